"Runs that go on: a rank killed under torchrun, and another number of ranks, tokenising processes or a cache on resume."
import json, os, shutil, signal, subprocess
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from nanochat_nb.checkpoint import latest_step, save_checkpoint
from nanochat_nb.pretrain import Trainer
from nanochat_nb.settings import NanochatError
import test_pretrain
from test_pretrain import children, command, environment, prepared, run, wait_for   # `prepared` is a fixture

TWO = dict(depth=1, n_gpu=2, num_iterations=24, save_every=4, eval_every=24, eval_tokens=512, dtype="float32", compile="false")

def folder(base): return test_pretrain.folder(base, "d1")
def losses(base): return test_pretrain.losses(base, "d1")

@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    "The undisturbed run of two ranks: its base folder, all checkpoints kept, and its losses."
    base = tmp_path_factory.mktemp("whole")/"base"
    shutil.copytree(prepared, base)
    status, _, err = run(base, keep=0, **TWO)
    assert status == 0, err
    assert len(losses(base)) == 24
    return base, losses(base)

def rank_of(pid: int) -> str:
    "RANK of a process that torchrun started, else empty."
    env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((e[5:].decode() for e in env if e.startswith(b"RANK=")), "")

def test_a_killed_rank_does_not_end_the_run(prepared, whole, tmp_path):
    "SIGKILL to one of two ranks: torchrun starts both again, they go on from the last checkpoint, the losses are the same."
    base = tmp_path/"base"
    shutil.copytree(prepared, base)
    p = subprocess.Popen(command(max_restarts=2, **TWO), env=environment(base), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(losses(base)) >= 10 and latest_step(folder(base)) or p.poll() is not None)
    os.kill(next(c for c in children(p.pid) if rank_of(c) == "1"), signal.SIGKILL)
    out, err = p.communicate(timeout=200)
    assert p.returncode == 0, err
    assert losses(base) == whole[1] and json.loads(out.splitlines()[-1])["loss"] == whole[1][-1]
    log = (folder(base)/"launch.log").read_text(encoding="utf-8", errors="replace")
    assert "-9" in log                                       # the rank did die
    assert not (folder(base)/"before").exists()              # and nothing was set aside

def cut_back(base, step):
    "As if the run had ended after this step."
    for p in folder(base).glob("step_*"):
        if int(p.name[5:]) > step: shutil.rmtree(p)
    (folder(base)/"latest").write_text(f"step_{step:06d}\n")

def test_two_ranks_then_one_then_four(whole):
    "Resumed on one rank with a tokenising process, then on four with a token cache: the losses stay those of two ranks."
    base, want = whole
    for step, settings in ((8, dict(n_gpu=1, workers=1)), (16, dict(n_gpu=4, token_cache="true"))):
        cut_back(base, step)
        status, _, err = run(base, "--resume", keep=0, **TWO | settings)
        assert status == 0, err
        assert losses(base)[:8] == want[:8]                   # written by the two ranks
        assert losses(base) == pytest.approx(want, rel=1e-5)      # float32, summed in another order
    assert (base/"tokenized_data/train/manifest.json").exists()

def test_only_a_restart_of_the_same_launch_goes_on(tmp_path, monkeypatch):
    "An older run of the same tag is not taken for this one, also when ranks are started again."
    trainer = SimpleNamespace(folder=tmp_path, rt=SimpleNamespace(is_main=True), cfg=SimpleNamespace(resume=False))
    def begin(run, count, agent=1):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run); monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        monkeypatch.setattr(os, "getppid", lambda: agent)
        again = Trainer.goes_on(trainer)
        if not again: Trainer.set_aside(trainer)
        return again
    assert [begin("a", 0), begin("a", 1), begin("a", 2)] == [False, True, True]
    assert [begin("b", 1), begin("b", 2), begin("b", 0)] == [False, True, False]    # b's first start died early
    assert [begin("b", 1, agent=2), begin("b", 2, agent=2)] == [False, True]        # several machines: the same id for every launch
    monkeypatch.delenv("TORCHELASTIC_RUN_ID"); monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert not Trainer.goes_on(trainer)

@pytest.mark.parametrize("resume", [False, True])
def test_a_move_cut_short_is_finished(tmp_path, monkeypatch, resume):
    "Killed while the earlier run is moved away and started again: nothing of it is lost, and nothing of it is resumed."
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a"); monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    rename, count, done, k = Path.rename, [0], False, 0
    def dies(self, to):
        count[0] += 1
        if count[0] == k: raise KeyboardInterrupt
        return rename(self, to)
    monkeypatch.setattr(Path, "rename", dies)
    while not done:
        f, k, count[0] = tmp_path/str(k), k + 1, -1000
        for s in (4, 8): save_checkpoint(f, s, {"w": torch.zeros(1)})
        (f/"metrics.jsonl").write_text("{}\n"); (f/"before").mkdir()
        trainer = SimpleNamespace(folder=f, rt=SimpleNamespace(is_main=True), cfg=SimpleNamespace(resume=False))
        count[0] = 0
        try: Trainer.set_aside(trainer); done = True
        except KeyboardInterrupt: pass
        trainer.cfg.resume = resume and (f/".before").exists() and any((f/".before").iterdir())
        if not done:
            assert not Trainer.goes_on(trainer)
            Trainer.set_aside(trainer)
        assert latest_step(f) is None and sorted(p.name for p in f.iterdir()) == ["before", "run.json"]
        assert sorted(p.name for p in (f/"before").iterdir()) == ["latest", "metrics.jsonl", "step_000004", "step_000008"]
    assert k > 4

def test_a_checkpoint_that_only_one_machine_has(tmp_path, monkeypatch):
    "Another machine would begin with new weights, and nobody would notice."
    monkeypatch.setattr("nanochat_nb.pretrain.broadcast_object", lambda _: 8)      # what the main rank found
    with pytest.raises(NanochatError, match="step None, but step 8 where the main rank runs; put base_dir on a disk"):
        Trainer.restore(SimpleNamespace(folder=tmp_path))

def test_parameters_split_on_the_way(whole):
    "Resumed on four ranks that split the parameters, then on one that has them all: the losses stay those of two ranks."
    base, want = whole
    for step, settings in ((8, dict(n_gpu=4, shard="true")), (16, dict(n_gpu=1))):
        cut_back(base, step)
        status, out, err = run(base, "--resume", keep=0, **TWO | settings)
        assert status == 0, err
        assert losses(base) == pytest.approx(want, rel=1e-5)
