"Whole runs in processes of their own: ranks, kills, Ctrl-C, resuming, bad input, papermill."
import ast, json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import asdict, fields
from pathlib import Path
import nbformat, pytest, torch
from nanochat_nb.checkpoint import damage, latest_step, load_checkpoint, pack_state, read_state
from nanochat_nb.data import DataSettings, prepare, shard_paths
from nanochat_nb.pretrain import PretrainSettings
from nanochat_nb.runtime import read_metrics
from nanochat_nb.settings import NanochatError, field_comments
from nanochat_nb.tokenizer import TokenizerSettings, prepare_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT/"nbs/03_pretrain.ipynb"
RUN = dict(depth=2, num_iterations=20, save_every=4, seq_len=64, batch_tokens=4096, eval_tokens=2048, device="cpu")

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A base folder with a small world and its tokenizer."
    base = tmp_path_factory.mktemp("prepared")
    prepare(DataSettings(base_dir=str(base), n_chars=400_000))
    prepare_tokenizer(TokenizerSettings(base_dir=str(base), vocab_size=512))
    return base

@pytest.fixture
def base(prepared, tmp_path):
    "A copy of it for one test."
    shutil.copytree(prepared, tmp_path/"base")
    return tmp_path/"base"

def environment(base):
    "Variables of a child: this code, that base folder, one thread."
    return os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

def command(**settings):
    flags = [f"--{k}={v}" for k, v in (RUN | settings).items()]
    return [sys.executable, "-m", "nanochat_nb.pretrain", *flags]

def run(base, *more, **settings):
    "Run the command to its end: status, standard output, standard error."
    p = subprocess.run([*command(**settings), *more], env=environment(base), capture_output=True, text=True, timeout=300)
    return p.returncode, p.stdout, p.stderr

def folder(base, tag="d2"): return base/"base_checkpoints"/tag
def losses(base, tag="d2"): return [r["loss"] for r in read_metrics(folder(base, tag)/"metrics.jsonl") if "loss" in r]

def wait_for(cond, seconds=120.):
    end = time.time() + seconds
    while not (x := cond()):
        assert time.time() < end, "waited too long"
        time.sleep(0.02)
    return x

def children(pid: int) -> list[int]:
    "Pids of all processes below one."
    table = [list(map(int, l.split())) for l in subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()]
    found = [pid]
    for p in found: found += [c for c, parent in table if parent == p]
    return found[1:]

def alive(pid: int) -> bool:
    out = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(out) and not out.startswith("Z")

@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    "Losses of the uninterrupted run of one rank, and its base folder."
    base = tmp_path_factory.mktemp("whole")/"base"
    shutil.copytree(prepared, base)
    status, out, err = run(base, "--dtype=float32", "--compile=false")
    assert status == 0, err
    last = json.loads(out.splitlines()[-1])
    assert last["step"] == 19 and Path(last["folder"]) == folder(base)
    return losses(base), base

def test_a_run_is_in_sight_says_what_an_interrupt_leaves_and_keeps_a_second_one_out(base):
    for more, told in ((dict(save_every=0), "no checkpoint was saved; save_every says"), (dict(save_every=2), "is saved: --resume goes on from there")):
        p = subprocess.Popen(command(num_iterations=4000, **more), env=environment(base), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: latest_step(folder(base)) if more["save_every"] else (folder(base)/"metrics.jsonl").exists() and len(losses(base)) > 2)
            status, out, err = run(base)
            assert status == 2 and not out and "another run trains in" in err and "another tag" in err and len(err.splitlines()) == 1
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=60)
        finally: p.kill()
        assert p.returncode == 130 and "{" not in out and "step 0/4000" in err and told in err, err
    step = latest_step(folder(base))
    assert 0 < int(err.split("stopped; step ")[1].split()[0]) <= step    # one under way may have been finished after that
    status, out, err = run(base, "--resume", num_iterations=step + 2)
    assert status == 0 and json.loads(out.splitlines()[-1])["step"] == step + 1 and "begins at step 0" not in out
    status, out, err = run(base, "--resume", num_iterations=1, tag="typo")
    assert status == 0 and "there is no checkpoint in" in out and "begins at step 0" in out

# ---- kill and resume

def test_sigkill_and_resume_gives_the_same_losses(base, whole):
    "Killed at a random step, resumed: every loss equals the uninterrupted run's, to the bit."
    at = random.randrange(5, 13)
    p = subprocess.Popen(command(dtype="float32", compile="false"), env=environment(base), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(losses(base)) >= at or p.poll() is not None)
    p.kill(); p.wait()
    assert latest_step(folder(base)) is not None and len(losses(base)) < 20
    status, _, err = run(base, "--dtype=float32", "--compile=false", "--resume")
    assert status == 0, err
    assert losses(base) == whole[0]
    for name in ("model.safetensors", "optimizer.safetensors"):         # the latter holds torch's random state too
        a, b = (read_state(folder(x)/"step_000020"/name) for x in (base, whole[1]))
        assert str(pack_state(a, one := {})) == str(pack_state(b, two := {})) and all(map(torch.equal, one.values(), two.values()))
    assert [r["step"] for r in read_metrics(folder(base)/"metrics.jsonl") if "bpb_zh" in r] == [0, 4, 8, 12, 16, 20]

def test_kill_before_the_first_checkpoint_of_a_second_run(base, whole):
    "An older run of the same tag is never resumed into by mistake."
    shutil.copytree(folder(whole[1]), folder(base))
    p = subprocess.Popen(command(seed=1, save_every=0), env=environment(base), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: 0 < len(losses(base)) < 15 or p.poll() is not None)
    p.kill(); p.wait()
    assert latest_step(folder(base)) is None and latest_step(folder(base)/"before") == 20
    status, _, err = run(base, "--resume", seed=1, save_every=0)
    assert status == 0, err
    assert len(losses(base)) == 20 and losses(base)[3] != whole[0][3]

def test_resumed_when_all_is_done_or_too_much(base, whole):
    "At the last step nothing is left but to measure again, and the summary is whole; asked for fewer steps than that, it refuses."
    shutil.copytree(folder(whole[1]), folder(base))
    rows = read_metrics(folder(base)/"metrics.jsonl")
    status, _, err = run(base, "--resume", num_iterations=12)
    assert status == 2 and "has 20 steps behind it, more than num_iterations=12" in err and "Traceback" not in err
    status, out, err = run(base, "--dtype=float32", "--compile=false", "--resume")
    assert status == 0, err
    assert read_metrics(folder(base)/"metrics.jsonl") == rows
    assert json.loads(out.splitlines()[-1])["loss"] == whole[0][-1]

def test_a_run_made_longer_at_other_rates(base, whole):
    "The rates are the new ones; what was measured at its old end is not lost."
    shutil.copytree(folder(whole[1]), folder(base))
    status, _, err = run(base, "--resume", num_iterations=30, muon_beta2=0.5, matrix_lr=0.01, lr_scale=1.0)
    assert status == 0, err
    assert [r["step"] for r in read_metrics(folder(base)/"metrics.jsonl") if "bpb_zh" in r] == [0, 4, 8, 12, 16, 20, 24, 30]
    muon = [g for g in load_checkpoint(folder(base), 30)[2]["param_groups"] if g["kind"] == "muon"]
    assert {(g["beta2"], g["initial_lr"]) for g in muon} == {(0.5, 0.01)}

def test_a_resumed_run_counts_all_its_seconds_and_takes_the_new_decay(base, whole):
    shutil.copytree(folder(whole[1]), folder(base))
    before = read_metrics(folder(base)/"metrics.jsonl")
    status, _, err = run(base, "--resume", num_iterations=22, weight_decay=0.3)
    assert status == 0, err
    seconds = [r["seconds"] for r in read_metrics(folder(base)/"metrics.jsonl") if "seconds" in r]
    assert len(seconds) == 22 and seconds == sorted(seconds) and seconds[19] == next(r["seconds"] for r in before if r["step"] == 19 and "loss" in r)
    muon = [g for g in load_checkpoint(folder(base), 22)[2]["param_groups"] if g["kind"] == "muon"]
    assert {g["initial_weight_decay"] for g in muon} == {0.3}

def test_what_belongs_to_an_earlier_run_goes_aside_with_it(base, whole):
    shutil.copytree(folder(whole[1]), folder(base))
    (folder(base)/"report.json").write_text("{}")
    status, _, err = run(base, num_iterations=2)
    assert status == 0, err
    for name in ("step_000020", "report.json"): assert (folder(base)/"before"/name).exists() and not (folder(base)/name).exists()

def test_two_ranks_and_resume_on_one(base, whole):
    "Two ranks have the losses of one; stopped and resumed on one rank they still have."
    status, out, err = run(base, "--compile=false", n_gpu=2)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["loss"] == losses(base)[-1]
    assert max(abs(a - b) for a, b in zip(losses(base), whole[0], strict=True)) < 1e-3
    shutil.rmtree(folder(base)/"step_000020")
    (folder(base)/"latest").write_text("step_000016\n")
    status, _, err = run(base, "--compile=false", "--resume")
    assert status == 0, err
    assert max(abs(a - b) for a, b in zip(losses(base), whole[0], strict=True)) < 1e-3
    for name in ("bpb_zh", "bpb_en"):
        one, two = ([r[name] for r in read_metrics(folder(b)/"metrics.jsonl") if name in r] for b in (whole[1], base))
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-3

def test_two_tags_side_by_side_have_times_and_costs(base):
    "Each run keeps its own record of ranks and time; without it, or with steps taken after it, the seconds are said to be of steps alone."
    from nanochat_nb.core import CompareSettings, compare
    for tag, n_gpu in (("two", 2), ("one", 1)):
        status, _, err = run(base, "--compile=false", tag=tag, n_gpu=n_gpu, num_iterations=3)
        assert status == 0, err
    cfg = CompareSettings(runs=f"{folder(base, 'two')},{folder(base, 'one')}", price=3600., out=str(base))
    def lines(): return {k.strip(): [c.strip() for c in cells] for _, k, *cells, _ in (l.split("|") for l in compare(cfg).splitlines() if l.startswith("| "))}
    records = [json.loads((folder(base, t)/"record.json").read_text()) for t in ("two", "one")]
    page = lines()
    assert [c.split(" × ")[0] for c in page["on"]] == ["2", "1"] and page["seconds"] == [f"{r['seconds']:,.0f}" for r in records]
    assert page["cost"] == [f"${r['seconds'] * r['ranks']:,.2f}" for r in records]
    (folder(base, "two")/"record.json").unlink()
    with open(folder(base, "one")/"metrics.jsonl", "a") as f: f.write(json.dumps(read_metrics(f.name)[-2] | dict(step=3, loss=9.)) + "\n")
    page = lines()
    assert page["on"] == page["cost"] == ["", ""] and all(c.endswith(" (steps alone)") for c in page["seconds"])

def test_ctrl_c_at_the_launcher(base):
    "The ranks die, the last checkpoint is whole, and the run goes on from it."
    long = dict(num_iterations=60, n_gpu=2, save_every=5, eval_every=30)
    p = subprocess.Popen(command(**long), env=environment(base), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: latest_step(folder(base)) is not None or p.poll() is not None)
    below = children(p.pid)
    assert len(below) >= 3                                     # torchrun and two ranks
    p.send_signal(signal.SIGINT)
    assert p.wait(40) == 130 and "Traceback" not in p.stderr.read()
    for pid in below: wait_for(lambda: not alive(pid), 20)
    step = latest_step(folder(base))
    before = losses(base)
    assert step < 60 and damage(folder(base)/f"step_{step:06d}") == ""
    status, _, err = run(base, "--resume", **long | dict(n_gpu=1))
    assert status == 0, err
    assert len(losses(base)) == 60 and max(abs(a - b) for a, b in zip(before, losses(base))) < 1e-3

# ---- bad input: one line that names the thing, status 2, nothing left behind

@pytest.mark.parametrize("more,said", [(["--depth=0"], "depth=0"), (["--dpeth=4"], "did you mean 'depth'"),
                                       (["--arch=clasic"], "arch"), (["--batch_tokens=32"], "batch_tokens=32"), (["--vocab_size=999"], "vocab_size=999")])
def test_bad_settings(base, more, said):
    before = sorted(base.rglob("*"))
    status, out, err = run(base, *more)
    assert status == 2 and said in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and sorted(base.rglob("*")) == before

def test_a_checkpoint_of_another_vocabulary(base, whole):
    shutil.copytree(folder(whole[1]), folder(base))
    prepare_tokenizer(TokenizerSettings(base_dir=str(base), vocab_size=600, retrain=True))
    status, _, err = run(base, "--resume")
    assert status == 2 and "belongs to tokenizer" in err and "Traceback" not in err
    assert latest_step(folder(base)) == 20 and losses(base) == whole[0]            # untouched

def test_a_shard_cut_in_half(base):
    shard = shard_paths(base/"base_data/world", "train")[0]
    os.truncate(shard, shard.stat().st_size // 2)
    status, _, err = run(base)
    assert status == 2 and shard.name in err and "Traceback" not in err

def test_a_damaged_checkpoint_names_a_whole_one(base, whole):
    shutil.copytree(folder(whole[1]), folder(base))
    file = folder(base)/"step_000020/model.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    status, _, err = run(base, "--resume")
    assert status == 2 and str(file) in err and "step 16" in err

def test_a_rank_that_fails_is_one_error_of_the_launcher(base):
    "What the rank said comes back through torchrun, in one line."
    shard = shard_paths(base/"base_data/world", "train")[0]
    os.truncate(shard, shard.stat().st_size // 2)
    status, _, err = run(base, n_gpu=2)
    assert status == 2 and shard.name in err and "Traceback" not in err

def test_data_and_tokenizer_are_made_if_absent(tmp_path):
    status, out, err = run(tmp_path, num_iterations=2)
    assert status == 0, err
    assert (tmp_path/"tokenizer/tokenizer.json").exists() and (tmp_path/"base_data/world/manifest.json").exists()
    assert json.loads((tmp_path/"report/pretrain.json").read_text())["settings"]["tag"] == "d2"

# ---- papermill

def papermill(base, *args, **kw):
    return subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOK), *args], env=environment(base), cwd=base,
                          capture_output=True, text=True, timeout=300, **kw)

def test_the_parameters_cell_is_the_dataclass():
    cell = next(c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", []))
    nodes = {n.target.id: n for n in ast.parse(cell.source).body}
    types = {f.name: f.type if isinstance(f.type, str) else f.type.__name__ for f in fields(PretrainSettings)}
    assert {k: ast.literal_eval(n.value) for k, n in nodes.items()} == asdict(PretrainSettings())
    assert {k: n.annotation.id for k, n in nodes.items()} == types
    comments = {l.split(":")[0]: l.split("#", 1)[1].strip() for l in cell.source.splitlines()}
    assert comments == field_comments(PretrainSettings)

def test_papermill_misspelt_name_fails_at_once(tmp_path):
    p = papermill(tmp_path, "out.ipynb", "-p", "dpeth", "4")
    assert p.returncode != 0 and "did you mean 'depth'" in p.stderr

def test_papermill_into_a_pipe(base):
    "Without an output path the notebook, and nothing else, goes to standard output; the run is real."
    parameters = [x for k, v in (RUN | dict(num_iterations=3, n_gpu=2)).items() for x in ("-p", k, str(v))]
    p = papermill(base, *parameters)
    assert p.returncode == 0, p.stderr[-3000:]
    nb = nbformat.reads(p.stdout, 4)
    nbformat.validate(nb)
    assert len(losses(base)) == 3 and latest_step(folder(base)) == 3
    shown = str(nb.cells)
    assert "bpb_zh" in shown and "image/png" in str([c.outputs for c in nb.cells if "launch_training(cfg)" in c.source])

# ---- what is compiled --------------------------------------------------------------------------------------------------

def test_what_is_compiled_is_little_and_agrees_with_eager(tmp_path, monkeypatch):
    "Nine blocks are two graphs, four of them used twice; measuring takes the model that is not compiled."
    from nanochat_nb.model import GPT, GPTConfig
    from nanochat_nb.pretrain import Trainer, fill
    from nanochat_nb.runtime import init_runtime
    rt = init_runtime("cpu", "float32", 0)
    model = GPT(GPTConfig(9, 2, 2, 32, 64, 32, chunk=16, value_embeds=True, residual_mix=True, attn_gain=1.44))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * .05)
    class Empty:
        def state_dict(self): return {}
    t = Trainer(fill(PretrainSettings(depth=9)), rt, None, model, Empty(), tmp_path, 300, 4, 128)
    monkeypatch.setattr("nanochat_nb.pretrain.can_compile", lambda kind: True)
    graphs, compile_ = [], torch.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=backend, **kw))
    torch.compiler.reset()
    fast, x = t.fast_model(), torch.randint(0, 64, (4, 32), generator=g)
    def grads(m):
        loss = m(x, x.roll(-1, 1), reduction="sum")
        return loss, *torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(grads(fast), grads(model), strict=True): assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7
    assert len(graphs) == 3                                                    # four blocks, the last, the loss
    with torch.no_grad(): model(x, x); model(x[:, :20])
    assert len(graphs) == 3

def test_the_share_of_the_peak_is_that_of_all_ranks(tmp_path):
    from nanochat_nb.model import GPT, config_from_depth, flops_per_token
    from nanochat_nb.pretrain import Trainer, fill
    from nanochat_nb.runtime import Runtime
    class Rows:
        def __next__(self): return torch.zeros(2, 2, 16, dtype=torch.long).unbind()
        def state_dict(self): return {}
    model = GPT(config_from_depth(1, 64, 16))
    for ranks in (1, 2):
        t = Trainer(fill(PretrainSettings(depth=1, base_dir=str(tmp_path))), Runtime(torch.device("cpu"), torch.float32, 0, ranks), None, model, Rows(), tmp_path, 9, 2, 32 * ranks)
        t.peak = 1e9                                               # of one rank
        row = t.train_step(model, 0)
        assert row["mfu"] * 1e9 * ranks == pytest.approx(row["tok_per_s"] * flops_per_token(model.cfg)) and row["tokens"] == 32 * ranks

@pytest.mark.parametrize("field", ["lr_scale", "workers", "ratio", "vocab_size", "keep", "save_every", "matrix_lr"])
def test_a_negative_setting_is_refused(field):
    from nanochat_nb.pretrain import fill
    with pytest.raises(NanochatError, match=f"{field}=-1: expected 0 or more"): fill(PretrainSettings(**{field: -1}))

@pytest.mark.parametrize("more", [dict(warmup=-.1), dict(warmup=2.), dict(warmdown=40.), dict(activation_budget=-1.), dict(muon_beta2=1.5)])
def test_a_share_is_between_nothing_and_all(more):
    from nanochat_nb.pretrain import fill
    with pytest.raises(NanochatError, match="expected a share, 0 to 1"): fill(PretrainSettings(**more))
