"Processes and signals: what does not read well as a notebook cell."
import os, resource, shutil, signal, subprocess, sys, time, types
from pathlib import Path
import pytest, torch
from nanochat_nb import runtime
from nanochat_nb.checkpoint import load_checkpoint
from nanochat_nb.runtime import *
from nanochat_nb.settings import NanochatError

TOY = '''
import os, time, torch
from dataclasses import dataclass
from pathlib import Path
from nanochat_nb.settings import NanochatError, run_main
from nanochat_nb.runtime import *
from nanochat_nb.checkpoint import load_checkpoint, save_checkpoint

@dataclass
class Toy:
    folder: str = ""     # where everything goes
    steps: int = 4
    fail: str = ""       # what goes wrong at step 2
    stubborn: bool = False

def main(cfg):
    rt = init_runtime("cpu", "float32")
    folder = Path(cfg.folder)
    (folder / f"pid{rt.rank}").write_text(str(os.getpid()))
    if cfg.stubborn:
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
    m = Metrics(folder / "metrics.jsonl", keep_below=0)
    for step in range(1, cfg.steps + 1):
        a, b = torch.full((3, 2), float(rt.rank + step)), torch.full((5,), 10. * rt.rank)
        c = torch.full((2,), rt.rank, dtype=torch.bfloat16)
        all_reduce_mean([a, b, c], )
        if step == 2 and rt.rank == rt.world_size - 1:
            if cfg.fail == "crash": raise ValueError("boom in the last rank")
            if cfg.fail == "user": raise NanochatError("depth=0 must be at least 1")
            if cfg.fail == "kill": os.kill(os.getpid(), 9)
        if step == 2 and cfg.fail == "disk": save_checkpoint(folder / "pid0", 2, {"w": a})   # a file, not a folder
        m.log(step=step, loss=a.mean(), b=b[0], c=c[0], said=broadcast_object(f"rank {rt.rank}"))
        if cfg.steps > 100: time.sleep(0.05)
    save_checkpoint(folder / "ckpt", step, {"w": a})
    assert load_checkpoint(folder / "ckpt")[0] == step    # every rank sees it at once
    close_runtime()

if __name__ == "__main__": run_main(main, Toy)
'''

PARENT = '''
import sys
from nanochat_nb.runtime import launch
folder, n, stubborn = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
try: launch("toy_ranks", dict(folder=folder, steps=100_000, stubborn=stubborn), n_gpu=n, metrics=folder + "/metrics.jsonl")
except KeyboardInterrupt: sys.exit(130)
'''

@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A folder with the toy module in it, on the path of child processes."
    (tmp_path / "toy_ranks.py").write_text(TOY)
    (tmp_path / "parent.py").write_text(PARENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(runtime.__file__).parents[1])]))
    return tmp_path

def alive(pid: int) -> bool:
    "Whether a process runs (a zombie does not)."
    out = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(out) and not out.startswith("Z")

def wait_for(cond, seconds=60.):
    end = time.time() + seconds
    while not (x := cond()):
        assert time.time() < end, "waited too long"
        time.sleep(0.05)
    return x

def test_two_ranks_average(toy):
    rows = []
    launch("toy_ranks", dict(folder=str(toy)), n_gpu=2, metrics=toy / "metrics.jsonl", on_metrics=rows.append)
    assert rows == [dict(step=s, loss=s + 0.5, b=5.0, c=0.5, said="rank 0") for s in (1, 2, 3, 4)]
    assert rows == read_metrics(toy / "metrics.jsonl")
    assert torch.equal(load_checkpoint(toy / "ckpt")[1]["w"], torch.full((3, 2), 4.5))

def test_two_nodes_meet(toy):
    "Two launchers of one rank each, as on two machines, meet at one endpoint."
    import socket, threading
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    errors = []
    def node(k):
        try: launch("toy_ranks", dict(folder=str(toy)), nnodes=2, node_rank=k, rdzv_endpoint=f"127.0.0.1:{port}", metrics=toy / "metrics.jsonl")
        except NanochatError as e: errors.append(str(e))
    ts = [threading.Thread(target=node, args=(k,)) for k in (0, 1)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not errors
    assert [r["loss"] for r in read_metrics(toy / "metrics.jsonl")] == [1.5, 2.5, 3.5, 4.5]

@pytest.mark.parametrize("fail,said", [("crash", "ValueError: boom in the last rank"), ("user", "depth=0 must be at least 1"),
                                       ("kill", "rank 1 of toy_ranks ended with status -9"), ("disk", "cannot save step 2")])
def test_a_rank_that_dies(toy, fail, said):
    with pytest.raises(NanochatError) as e: launch("toy_ranks", dict(folder=str(toy), fail=fail), n_gpu=2, metrics=toy / "metrics.jsonl")
    assert said in str(e.value)
    if fail == "user": assert "Traceback" not in str(e.value)
    for r in (0, 1): wait_for(lambda: not alive(int((toy / f"pid{r}").read_text())), 10)

def test_a_misspelt_setting(toy):
    with pytest.raises(NanochatError, match="unknown parameter 'stpes'.*did you mean 'steps'"): launch("toy_ranks", dict(stpes=3), metrics=toy / "metrics.jsonl")

def running(toy, stubborn=False):
    "Start a launcher of two ranks; returns it and the ranks' pids once both train."
    p = subprocess.Popen([sys.executable, str(toy / "parent.py"), str(toy), "2", str(int(stubborn))], start_new_session=True)
    wait_for(lambda: len(read_metrics(toy / "metrics.jsonl")) > 3)
    return p, [int((toy / f"pid{r}").read_text()) for r in (0, 1)]

@pytest.mark.parametrize("sig,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_orphans(toy, sig, status):
    "However the launcher ends, its ranks end."
    if sig == signal.SIGKILL and sys.platform != "linux": pytest.skip("only Linux tells a child that its parent was killed")
    p, ranks = running(toy)
    p.send_signal(sig)
    assert p.wait(30) == status
    for pid in ranks: wait_for(lambda: not alive(pid), 40)
    rows = read_metrics(toy / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))

@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_ranks_do_not_outlive_torchrun(toy):
    "When torchrun itself is killed, its ranks end and the launcher raises."
    p, ranks = running(toy)
    agent = int(subprocess.run(["ps", "-o", "ppid=", "-p", str(ranks[0])], capture_output=True, text=True).stdout)
    os.kill(agent, signal.SIGKILL)
    assert p.wait(10) == 1
    for pid in ranks: wait_for(lambda: not alive(pid), 5)

@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_stubborn_ranks_end_too(toy):
    "Ranks that ignore SIGINT and SIGTERM are gone within twenty seconds of Ctrl-C."
    p, ranks = running(toy, stubborn=True)
    p.send_signal(signal.SIGINT)
    assert p.wait(25) == 130
    for pid in ranks: wait_for(lambda: not alive(pid), 5)

def in_child(f) -> int:
    "Run `f` in a forked child; its wait status."
    pid = os.fork()
    if pid == 0:
        try: f()
        except BaseException as e: print(repr(e)); os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def test_full_disk_under_the_metrics(tmp_path):
    "The row that does not fit is one clear error, and what was written can be read."
    def f():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        m = Metrics(tmp_path / "m.jsonl")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            for s in range(1000): m.log(step=s, loss=1 / 3)
        except NanochatError as e:
            assert "m.jsonl" in str(e) and "free disk space" in str(e)
            return
        raise AssertionError("no error")
    assert in_child(f) == 0
    steps = [r["step"] for r in read_metrics(tmp_path / "m.jsonl")]
    assert len(steps) > 10 and steps == list(range(len(steps)))

def test_the_seed_is_that_of_both_generators():
    import random
    def drawn(seed): init_runtime("cpu", "float32", seed); return torch.rand(3).tolist(), random.random()
    a, b = drawn(1), drawn(2)
    assert drawn(1) == a and a[0] != b[0] and a[1] != b[1]

def test_metrics_after_a_crash(tmp_path):
    "A half-written line is dropped and the next row starts on a line of its own."
    p = tmp_path / "metrics.jsonl"
    m = Metrics(p)
    for s in range(5): m.log(step=s, loss=float("nan") if s == 3 else s / 3)
    m.close()
    with open(p, "a") as f: f.write('{"step": 5, "lo')
    assert [r["step"] for r in read_metrics(p)] == [0, 1, 2, 3, 4]
    Metrics(p, keep_below=4).log(step=4, loss=1.0)
    assert [r["loss"] for r in read_metrics(p)] == [0.0, 1 / 3, 2 / 3, None, 1.0]
    p.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(NanochatError, match="line 2"): read_metrics(p)

def test_interrupted_kernel(toy):
    "Interrupting the kernel ends the ranks; the cell fails, the kernel lives, the chart has every row it was given."
    manager = pytest.importorskip("jupyter_client.manager")
    km, kc = manager.start_new_kernel(kernel_name="python3", env=dict(os.environ))
    code = f"""from nanochat_nb.runtime import launch
rows = []
launch("toy_ranks", dict(folder={str(toy)!r}, steps=100_000), n_gpu=2, metrics={str(toy / "metrics.jsonl")!r}, on_metrics=rows.append)"""
    try:
        asked = kc.execute(code)
        wait_for(lambda: len(read_metrics(toy / "metrics.jsonl")) > 3)
        time.sleep(0.5)
        km.interrupt_kernel()
        reply = kc.get_shell_msg(timeout=30)
        assert reply["parent_header"]["msg_id"] == asked and reply["content"]["ename"] == "KeyboardInterrupt"
        for r in (0, 1): wait_for(lambda: not alive(int((toy / f"pid{r}").read_text())), 10)
        said = kc.execute_interactive("assert len(rows) > 3 and [r['step'] for r in rows] == list(range(1, len(rows) + 1))", timeout=30)
        assert said["content"]["status"] == "ok"
    finally: kc.stop_channels(); km.shutdown_kernel(now=True)

def test_the_last_rows_arrive(toy):
    "Rows written just before the end, also by a run that fails, and none of an earlier run."
    (toy / "metrics.jsonl").write_text('{"step": 77}\n')
    rows = []
    with pytest.raises(NanochatError, match="boom"):
        launch("toy_ranks", dict(folder=str(toy), fail="crash"), n_gpu=2, metrics=toy / "metrics.jsonl", on_metrics=rows.append)
    assert rows == read_metrics(toy / "metrics.jsonl") and [r["step"] for r in rows][:1] == [1]

@pytest.mark.parametrize("compiler", ["nothing", ""])
def test_no_compiler(tmp_path, compiler):
    "Without a C++ compiler the probe says so instead of failing later; with one it says nothing."
    if not compiler and not (shutil.which("g++") or shutil.which("clang++")): pytest.skip("no C++ compiler")
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | ({"CXX": str(tmp_path/compiler)} if compiler else {})
    done = subprocess.run([sys.executable, "-c", "from nanochat_nb.runtime import can_compile; print(can_compile())"], env=env, capture_output=True, text=True)
    said, _, answer = done.stdout.strip().rpartition("\n")
    assert answer == str(not compiler) and (compiler in said if compiler else not said), done


# ---- trackers ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_rows_also_go_to_a_service(tmp_path, monkeypatch, name):
    "A stub with the calls that all three have."
    said, stub = [], types.ModuleType(name)
    stub.init = lambda project, name: said.append(("init", project, name))
    stub.log = lambda row, step: said.append((step, row))
    stub.finish = lambda: said.append("finish")
    monkeypatch.setitem(sys.modules, name, stub)
    m = Metrics(tmp_path/"base_checkpoints/d4/metrics.jsonl", tracker=name)
    m.log(step=3, loss=torch.tensor(2.5), bad=float("nan"), samples={"zh": "你好"}, done=True)
    m.close()
    assert said == [("init", "nanochat", "base_checkpoints-d4"), (3, {"loss": 2.5}), "finish"]
    assert read_metrics(tmp_path/"base_checkpoints/d4/metrics.jsonl") == [dict(step=3, loss=2.5, bad=None, samples={"zh": "你好"}, done=True)]

def test_tensorboard_has_the_rows(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    m = Metrics(tmp_path/"metrics.jsonl", tracker="tensorboard")
    for step in range(3): m.log(step=step, loss=3. - step)
    m.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(0, 3), (1, 2), (2, 1)]

def test_a_tracker_that_cannot_be_had_leaves_the_metrics_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Metrics(tmp_path/"metrics.jsonl").log(step=1)
    for name, said in (("wandb", "pip install wandb"), ("wandbb", "did you mean 'wandb'")):
        with pytest.raises(NanochatError, match=said): Metrics(tmp_path/"metrics.jsonl", keep_below=0, tracker=name)
    assert read_metrics(tmp_path/"metrics.jsonl") == [{"step": 1}]
