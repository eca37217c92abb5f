"Killed at every point of a save, a full disk: the checkpoints stay whole."
import os, resource, signal
from pathlib import Path
import pytest, torch
from nanochat_nb import checkpoint
from nanochat_nb.checkpoint import *
from nanochat_nb.settings import NanochatError

def in_child(f) -> int:
    "Run `f` in a forked child; its wait status."
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)      # a forked child has lost the pool of threads and would wait for it
        try: f()
        except BaseException as e: print(repr(e)); os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def value_at(folder):
    step, state, opt, meta = load_checkpoint(folder)
    assert meta["step"] == step and torch.equal(state["w"], torch.full((200,), float(step)))
    return step

def test_killed_at_every_point_of_a_save(tmp_path, monkeypatch):
    "SIGKILL before each operation on the disk, in turn: what can be loaded is step 1 or step 2, always whole."
    save = lambda s: save_checkpoint(tmp_path / f"run{k}", s, {"w": torch.full((200,), float(s))}, keep=1)
    def die_at(k):
        count = [0]
        def deadly(f):
            def g(*a, **kw):
                count[0] += 1
                if count[0] == k: os.kill(os.getpid(), signal.SIGKILL)
                return f(*a, **kw)
            return g
        for mod, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (Path, "rename"), (Path, "mkdir"), (checkpoint, "save_file"),
                          (checkpoint.shutil, "rmtree"), (os, "unlink"), (os, "open")): setattr(mod, name, deadly(getattr(mod, name)))
    seen, k = [], 0
    while True:
        k += 1; save(1)
        status = in_child(lambda: (die_at(k), save(2)))
        if status == 0: break
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen.append(value_at(tmp_path / f"run{k}"))
        save(3); assert value_at(tmp_path / f"run{k}") == 3              # a later save works and leaves no litter
        assert sorted(p.name for p in (tmp_path / f"run{k}").iterdir() if not p.name.startswith(".latest")) == ["latest", "step_000003"]
    assert len(seen) > 10 and set(seen) == {1, 2}

def test_saving_the_same_step_again_survives_a_kill(tmp_path, monkeypatch):
    "Between moving the old folder away and the new one in: what was being replaced is found, also where it is the only one."
    for s in (1, 2): save_checkpoint(tmp_path / f"{s}", s, {"w": torch.full((200,), float(s))}, keep=1)
    save_checkpoint(tmp_path / "2", 1, {"w": torch.ones(200)}, keep=0)
    for s in ("1", "2"): (tmp_path / s / f"step_00000{s}").rename(tmp_path / s / f".step_00000{s}.old")
    assert value_at(tmp_path / "1") == 1
    assert latest_step(tmp_path / "2") == 1 and steps_in(tmp_path / "2") == [1, 2]        # `latest` named 1
    save_checkpoint(tmp_path / "1", 1, {"w": torch.full((200,), 1.)})
    save_checkpoint(tmp_path / "1", 3, {"w": torch.full((200,), 3.)})
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["latest", "step_000001", "step_000003"]
    big, before = {"w": torch.zeros(100)}, value_at(tmp_path / "1")
    def full(*a, **kw): raise OSError(28, "No space left on device")
    real, n = Path.rename, []                                         # the second rename fails: the first is taken back
    def sometimes(self, to): n.append(1); return full() if len(n) == 2 else real(self, to)
    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(NanochatError, match="step 3 is still whole"): save_checkpoint(tmp_path / "1", 3, big)
    monkeypatch.undo()
    assert value_at(tmp_path / "1") == before

@pytest.mark.parametrize("keep", range(1, 7))
def test_as_many_are_kept_as_was_said(tmp_path, keep):
    for s in range(12): save_checkpoint(tmp_path, s, {"w": torch.zeros(1)}, keep=keep)
    assert steps_in(tmp_path) == list(range(12 - keep, 12))
    save_checkpoint(tmp_path, 5, {"w": torch.zeros(1)}, keep=2)                # gone back: the later ones were given up
    assert steps_in(tmp_path) == [5, 11] and latest_step(tmp_path) == 5

def test_two_runs_do_not_save_into_each_other(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)})
    real, said = checkpoint.write_state, []
    def other(*a):
        monkeypatch.setattr(checkpoint, "write_state", real)
        with pytest.raises(NanochatError, match="another run saves in"): save_checkpoint(tmp_path, 2, {"w": torch.zeros(1)})
        said.append(1); real(*a)
    monkeypatch.setattr(checkpoint, "write_state", other)
    save_checkpoint(tmp_path, 2, {"w": torch.full((1,), 2.)})
    assert said and load_checkpoint(tmp_path)[1]["w"].item() == 2

def test_a_changed_page_and_a_lost_pointer_are_told(tmp_path, capsys):
    for s in (1, 2): save_checkpoint(tmp_path, s, {"w": torch.ones(1)}, meta={"row": 9600})
    page = tmp_path / "step_000002/meta.json"
    for old, new in (("9600", "1600"), ('"files"', '"fils"')):
        text = page.read_text(); page.write_text(text.replace(old, new))
        with pytest.raises(NanochatError, match="damaged checkpoint: .*meta.json.*step 1"): load_checkpoint(tmp_path)
        page.write_text(text)
    (tmp_path / "latest").write_text("step_000009\n")
    assert load_checkpoint(tmp_path)[0] == 2 and "names 'step_000009', which is not there; going on from step 2" in capsys.readouterr().out

@pytest.mark.parametrize("state, says", [({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, "two tensors are called 'optimizer.a.b'"),
                                         ({0: torch.ones(1), "0": torch.zeros(1)}, "two tensors"), ({"x": torch.Size([1])}, "is a Size"), ({(1, 2): 3}, "such keys")])
def test_a_state_that_would_not_come_back_is_refused(tmp_path, state, says):
    with pytest.raises(NanochatError, match=says): save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, state)

@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs the names of open files")
def test_the_disk_holds_all_before_the_name_and_the_pointer_change(tmp_path, monkeypatch):
    "A power cut may lose what was not synced: both files and their folder come first, then the rename, its folder, then `latest`."
    said, real, moved = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: said.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or real(fd))
    monkeypatch.setattr(Path, "rename", lambda self, to: said.append(f"to {Path(to).name}") or moved(self, to))
    save_checkpoint(tmp_path, 1, {"w": torch.ones(3)})
    name = lambda x: x if not x.startswith(".") or x.endswith("000001.tmp") else x.split(".")[1]
    assert [*map(name, said)] == ["model.safetensors", "optimizer.safetensors", "meta", ".step_000001.tmp", "to step_000001", tmp_path.name, "latest"]

def test_full_disk(tmp_path):
    "A file cannot grow beyond the limit: one clear error, nothing left behind, the last checkpoint whole."
    big = {"w": torch.zeros(100_000)}
    save_checkpoint(tmp_path, 1, {"w": torch.full((200,), 1.)})
    before = sorted(p.name for p in tmp_path.iterdir())
    def f():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try: save_checkpoint(tmp_path, 2, big)
        except NanochatError as e:
            assert "cannot save step 2" in str(e) and "step 1 is still whole" in str(e), e
            return
        raise AssertionError("no error")
    assert in_child(f) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before and value_at(tmp_path) == 1

def test_killed_while_the_thread_writes(tmp_path):
    "SIGKILL at any moment of a run that saves in the background: what can be loaded is whole, and never older than announced."
    import random, time
    def train(said):
        saver, w, step = Saver(), torch.zeros(200_000), 0
        while True:
            step += 1
            w += 1
            saver.save(tmp_path, step, {"w": w}, {"m": w * 2}, keep=2)
            if step > 1: os.write(said, b"%d\n" % (step - 1))     # the save before is on disk
    for k in range(6):
        r, said = os.pipe()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)                              # a forked child has lost the pool of threads
            try: train(said)
            finally: os._exit(1)
        os.close(said)
        os.read(r, 1)                                             # the first one is there
        time.sleep(random.random() * 0.15)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        with os.fdopen(r, "rb") as f: announced = max([1, *(int(l) for l in f.read().split(b"\n")[1:-1] if l)])
        step, state, opt, _ = load_checkpoint(tmp_path)
        assert step >= announced and torch.equal(state["w"], torch.full((200_000,), float(step)))
        assert torch.equal(opt["m"], 2 * state["w"])
        for p in [*tmp_path.iterdir()]: checkpoint.shutil.rmtree(p) if p.is_dir() else p.unlink()

def test_a_failed_background_save_is_raised_at_the_next_one(tmp_path):
    (tmp_path / "file").write_text("")
    saver = Saver()
    saver.save(tmp_path / "file", 1, {"w": torch.zeros(3)})
    try: saver.save(tmp_path / "good", 2, {"w": torch.zeros(3)})
    except NanochatError as e: assert "cannot save step 1" in str(e)
    else: raise AssertionError("no error")
    saver.save(tmp_path / "good", 2, {"w": torch.zeros(3)}); saver.wait(); saver.wait()
    assert latest_step(tmp_path / "good") == 2

def test_the_last_save_is_finished_at_exit(tmp_path):
    import subprocess, sys
    code = f"import torch\nfrom nanochat_nb.checkpoint import *\nSaver().save({str(tmp_path)!r}, 7, {{'w': torch.zeros(3_000_000)}})\nraise ValueError"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 1
    assert load_checkpoint(tmp_path)[0] == 7
