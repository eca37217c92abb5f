"Cleaning by several processes: the bytes of one process under every executor, kills, bad input, a stand-in for Slurm."
import json, os, shutil, subprocess, sys, time
from pathlib import Path
import pytest
from nanochat_nb import clean as C, data, world
from nanochat_nb.pipeline import PipelineSettings, clean_many, curriculum
from nanochat_nb.settings import NanochatError

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}

@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    "Five files of different kinds with copies across them, and what one process makes of them."
    d = tmp_path_factory.mktemp("pipeline")
    docs = [x["text"] for x in world.corpus(world.World(n_people=20), 120_000)]
    docs += docs[:40] + [t.replace("。", "！", 1) for t in docs[40:80]] + ["短"] * 5 + ["便宜手表天天都有\n" * 40] * 3
    (d / "in").mkdir()
    for i in range(4):
        (d / f"in/{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in docs[i::5]), encoding="utf-8")
    data.write_shards([{"text": t} for t in docs[4::5]], d / "in/shards", source="x")
    C.clean(str(d / "in"), C.CleanSettings(source=str(d / "in")), d / "one")
    return d

def command(crawl, out, *flags, env=ENV):
    done = subprocess.run([sys.executable, "-m", "nanochat_nb.pipeline", "--source", str(crawl / "in"), "--out", str(out), *flags],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr

def same(a, b):
    files = sorted(p.name for p in b.iterdir())
    assert sorted(p.name for p in a.iterdir()) == files and len(files) >= 4
    return all((a / f).read_bytes() == (b / f).read_bytes() for f in files)


@pytest.mark.parametrize("kw", [dict(workers=2), dict(workers=3, tasks=2), dict(workers=1)])
def test_processes_make_the_bytes_of_one(crawl, tmp_path, kw):
    report = clean_many(PipelineSettings(source=str(crawl / "in"), **kw), tmp_path / "out")
    assert same(tmp_path / "out", crawl / "one") and os.listdir(tmp_path) == ["out"]
    assert report["dropped"]["exact duplicate"] >= 40 and report["dropped"]["near duplicate"] > 0 and report["dropped"]["repeated"] > 0

@pytest.mark.parametrize("executor", ["local", "ray"])
def test_datatrove_with_two_workers_makes_the_same(crawl, tmp_path, executor):
    pytest.importorskip("datatrove")
    if executor == "ray": pytest.importorskip("ray")
    code, out, err = command(crawl, tmp_path / "out", "--executor", executor, "--workers", "2", "--tasks", "3")
    assert code == 0, err[-2000:]
    assert same(tmp_path / "out", crawl / "one") and json.loads(out.splitlines()[-1])["kept"] > 100

SBATCH = """#!{python}
import os, re, subprocess, sys                      # runs every task of the array at once, then says a job number
script = open(sys.argv[-1]).read()
last = re.search(r"#SBATCH --array=0-(\\d+)", script)
log = open({log!r}, "a")
for i in range(int(last[1]) + 1 if last else 1):
    env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), SLURM_NODEID="0", RUN_OFFSET="0", SLURM_NODELIST="here")
    done = subprocess.run(["bash", sys.argv[-1]], env=env, capture_output=True, text=True)
    log.write(f"{{done.returncode}} {{i}} {{sys.argv[1:-1]}}\\n" + done.stderr)
print("Submitted batch job 7")
"""

def test_the_script_for_slurm_runs_and_makes_the_same(crawl, tmp_path):
    "With an `sbatch` that runs the submitted script, an `srun` that runs its command, and an `scontrol` that knows one host."
    pytest.importorskip("datatrove")
    bin, log = tmp_path / "bin", tmp_path / "log"
    bin.mkdir(); log.touch()
    (bin / "sbatch").write_text(SBATCH.format(python=sys.executable, log=str(log)))
    (bin / "srun").write_text('#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n')
    (bin / "scontrol").write_text("#!/bin/bash\necho here\n")
    for f in bin.iterdir(): f.chmod(0o755)
    env = ENV | {"PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    code, out, err = command(crawl, tmp_path / "out", "--executor", "slurm", "--partition", "big", "--workers", "2", "--tasks", "2",
                             "--merge_gb", "32", env=env)
    assert code == 0 and json.loads(out.splitlines()[-1])["submitted"] == "slurm", err[-2000:]
    assert (tmp_path / "out").exists(), log.read_text()[-3000:]
    assert same(tmp_path / "out", crawl / "one")
    assert "--dependency=afterok:7" in log.read_text()                       # the merge waits for the tasks
    script = next(tmp_path.glob(".out.*/clean/launch_script.slurm")).read_text()
    assert "partition=big" in script and "array=0-1" in script
    merge = next(tmp_path.glob(".out.*/merge/launch_script.slurm")).read_text()
    assert "mem-per-cpu=4G" in script and "mem-per-cpu=32G" in merge         # the task that compares all documents has more

def test_a_killed_run_goes_on(crawl, tmp_path):
    p = subprocess.Popen([sys.executable, "-m", "nanochat_nb.pipeline", "--source", str(crawl / "in"), "--out", str(tmp_path / "out"), "--workers", "1"],
                         cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not (done := list(tmp_path.glob(".out.*/report.json_*"))): assert p.poll() is None and time.time() < end; time.sleep(0.002)
    p.kill(); p.wait()
    assert not (tmp_path / "out").exists()
    at = {f: f.stat().st_mtime_ns for f in done}
    work = done[0].parent
    clean_many(PipelineSettings(source=str(crawl / "in"), out=str(tmp_path / "out"), workers=1), tmp_path / "out")
    assert same(tmp_path / "out", crawl / "one") and not work.exists() and at

def test_a_task_that_is_done_is_not_done_again(crawl, tmp_path, monkeypatch):
    cfg, n, first = PipelineSettings(source=str(crawl / "in"), workers=1, tasks=5), [], C._first_pass
    from nanochat_nb import pipeline
    def third_fails(*a):
        n.append(a[0])
        if len(n) == 3: raise NanochatError("stop here")
        return first(*a)
    monkeypatch.setattr(pipeline, "_first_pass", third_fails)
    with pytest.raises(NanochatError, match="stop here"): clean_many(cfg, tmp_path / "out")
    clean_many(cfg, tmp_path / "out")
    assert len(n) == 6 and n[2] == n[3] and same(tmp_path / "out", crawl / "one")   # two done, one failed, three to go

@pytest.mark.parametrize("kw, says", [
    (dict(executor="slurmm"), "did you mean 'slurm'"), (dict(workers=0), "workers=0"), (dict(tasks=-1), "tasks=-1"),
    (dict(near=1.5), "near=1.5"), (dict(source="world"), "expected files"), (dict(source="nowhere.jsonl"), "nowhere.jsonl")])
def test_bad_settings_are_errors(crawl, tmp_path, kw, says):
    with pytest.raises(NanochatError, match=says): clean_many(PipelineSettings(**(dict(source=str(crawl / "in")) | kw)), tmp_path / "out")
    assert not os.listdir(tmp_path)

def test_a_bad_row_in_a_worker_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "好文章。" * 30 + '"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "' + "好文章，" * 30 + '"}\n{"text": 3}\n')
    code, _, err = command(tmp_path, tmp_path / "out", "--source", str(tmp_path), "--workers", "2")
    assert code == 2 and "b.jsonl line 2" in err and "Traceback" not in err and not (tmp_path / "out").exists()

def test_a_comma_in_a_name_and_an_empty_file_do_no_harm(crawl, tmp_path):
    shutil.copytree(crawl / "in", tmp_path / "in"); (tmp_path / "in/0.jsonl").rename(tmp_path / "in/0, 1.jsonl")
    (tmp_path / "in/a.jsonl").write_text("")
    assert clean_many(PipelineSettings(source=str(tmp_path / "in"), workers=1), tmp_path / "out") == json.loads((crawl / "one/clean.json").read_text())

@pytest.mark.parametrize("at", [2, 5, 8, 11, 14])
def test_a_run_killed_while_tidying_up_can_be_run_again(crawl, tmp_path, monkeypatch, at):
    cfg, real, n = PipelineSettings(source=str(crawl / "in"), workers=1), Path.unlink, []
    def once(path, *a, **kw):
        n.append(path.parent.name.startswith(".out."))
        if n.count(True) == at: raise KeyboardInterrupt
        real(path, *a, **kw)
    monkeypatch.setattr(Path, "unlink", once)
    with pytest.raises(KeyboardInterrupt): clean_many(cfg, tmp_path / "out")
    monkeypatch.undo()
    clean_many(cfg, tmp_path / "out")
    assert same(tmp_path / "out", crawl / "one") and os.listdir(tmp_path) == ["out"]

def test_without_datatrove_the_error_says_what_to_install(crawl, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(NanochatError, match=r"nanochat-nb\[clean\]"):
        clean_many(PipelineSettings(source=str(crawl / "in"), executor="local"), tmp_path / "out")

def test_a_curriculum_is_an_order(): assert sorted(curriculum(["a" * n for n in range(40)])) == list(range(40))
