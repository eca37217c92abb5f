"Killed at every point of a save, a full disk: the checkpoints stay whole."
import os, resource, signal
from pathlib import Path
import torch
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
    "Between moving the old folder away and the new one in, the pointer names nothing: the step before is found."
    for s in (1, 2): save_checkpoint(tmp_path, s, {"w": torch.full((200,), float(s))})
    (tmp_path / "step_000002").rename(tmp_path / ".step_000002.old")
    assert value_at(tmp_path) == 1

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
