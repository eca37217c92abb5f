"One command: misspelt keys, the roll call, a killed run that goes on, a changed step, failures and what they leave behind."
import fcntl, os, re, signal, subprocess, sys, time, types
from pathlib import Path
import pyarrow.parquet as pq, pytest, yaml
from nanochat_nb import speedrun
from nanochat_nb.engine import Engine
from nanochat_nb.model import GPT, GPTConfig, config_from_depth
from nanochat_nb.plan import disk_plan, micro_batch
from nanochat_nb.pretrain import PretrainSettings
from nanochat_nb.runtime import read_metrics
from nanochat_nb.settings import NanochatError, read_json
from nanochat_nb.speedrun import STEPS, fingerprints, parameters, read_recipe, roll_call
from nanochat_nb.tokenizer import train_tokenizer
from nanochat_nb.world import World

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, CORPUS = sorted((ROOT/"configs").glob("*.yaml")), ROOT.parent/"shared/corpus"
SMALL = """source: world
depth: 1
vocab_size: 512
data: {n_people: 20, n_chars: 200000}
tokenizer:
pretrain: {num_iterations: 200, compile: false, seq_len: 128, batch_tokens: 1024, eval_tokens: 1024, eval_every: 1000, save_every: 10, device: cpu}
"""

def start(out, *flags, recipe=None, notebooks="no", **kw):
    file = out.parent/"recipe.yaml"
    if recipe or not file.exists(): file.write_text(recipe or SMALL, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "NANOCHAT_BASE_DIR"} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "nanochat_nb.speedrun", "-f", str(file), "--out", str(out), "--notebooks", notebooks, *map(str, flags)],
                            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def run(*a, **kw):
    p = start(*a, **kw)
    stdout, stderr = p.communicate(timeout=240)
    return p.returncode, stdout, stderr

def children(folder):
    "Processes whose command line names a folder."
    out = []
    for p in Path("/proc").glob("[0-9]*/cmdline"):
        try: out += [p.parent.name] * (str(folder) in p.read_bytes().decode(errors="replace"))
        except OSError: pass
    return out

# ---- the recipes

@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_run_that_was_moved_is_the_same_run(path, tmp_path):
    here, there = (fingerprints(parameters(path, {}, base), base) for base in (tmp_path/"one/base", tmp_path/"两/base"))
    assert here == there

@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_key_of_a_recipe_reaches_a_step(path, tmp_path):
    common, steps = read_recipe(path)
    params = parameters(path, {}, tmp_path)
    assert all(any(k in p for p in params.values()) for k in common)
    assert list(params) == [s for s in STEPS if s in steps]
    sizes = {params[s]["vocab_size"] for s in ("tokenizer", "pretrain")}
    assert [params[s]["stage"] for s in ("mid", "sft") if s in steps] == [s for s in ("mid", "sft") if s in steps]
    assert len(sizes) == 1 and len({p["depth"] for p in params.values() if "depth" in p}) == 1

@pytest.mark.parametrize("text, said", [
    ("source: world\npretrain:\n  num_iteration: 9\n", ["line 3", "'num_iteration'", "did you mean 'num_iterations'"]),
    ("depht: 4\npretrain:\n", ["line 1", "did you mean 'depth'"]), ("pretrian:\n  depth: 4\ntokenizer:\n", ["line 1", "did you mean 'pretrain'"]),
    ("n_gpu: 8\ntokenizer:\n", ["line 1", "'n_gpu'"]), ("source: world\n", ["no section"]), ("pretrain: 4\n", ["pretrain"]),
    ("pretrain: {depth: four}\n", ["section pretrain", "'four'"]),
    ("data:\npretrain: 4\n", ["line 2", "pretrain is 4"]),
    ("source: world\npretrain:\n  token_cache: false\nsft:\n  token_cache: false\n", ["line 5: unknown key 'token_cache' in section sft"]),
    ("5: 3\ndata:\n", ["line 1: unknown key 5"]), ("data: {5: 3}\n", ["line 1: unknown key 5 in section data"]),
    ("pretrain: {depth: 2}\ndata:\npretrain: {depth: 3}\n", ["line 3: pretrain stands in", "line 1 too"]),
    ("data:\n  seed: 1\n  seed: 2\n", ["line 3: data.seed stands in", "line 2 too"]), ("", ["no section"]),
    ("data:\nseed: [1, 2]\n", ["seed=[1, 2]", "section data, or the common keys"]),
    ("base_dir: x\ndata:\n", ["line 1: unknown key 'base_dir'", "the run sets it, by --out or NANOCHAT_BASE_DIR"]),
    ("pretrain: {resume: true}\n", ["line 1", "section pretrain", "by --resume"]), ("sft: {stage: mid}\n", ["by a section's name"]),
    ("out: x\nclean:\n", ["line 1", "by --out"]), ("data: {out: x}\n", ["by --out"])])
def test_a_misspelt_key_is_named_with_its_line(text, said, tmp_path):
    (tmp_path/"a.yaml").write_text(text)
    with pytest.raises(NanochatError) as e: parameters(tmp_path/"a.yaml", {}, tmp_path)
    assert "a.yaml" in str(e.value) and all(s in str(e.value) for s in said), e.value

def test_overrides(tmp_path):
    over = speedrun.read_flags(["-f", str(ROOT/"configs/speedrun.yaml"), "--depth", "2", "--mid.epochs=2", "--device_batch", "4", "--n_shards", "-1"])[2]
    p = parameters(ROOT/"configs/speedrun.yaml", over, tmp_path)
    assert p["pretrain"]["depth"] == p["sft"]["depth"] == 2 and p["data"]["n_shards"] == -1
    assert p["mid"]["epochs"] == 2 and "epochs" not in p["sft"] and p["pretrain"]["device_batch"] == 4
    with pytest.raises(NanochatError, match="no section 'midd'; did you mean 'mid'"): read_recipe(ROOT/"configs/speedrun.yaml", {"midd.epochs": "1"})
    with pytest.raises(NanochatError, match="command line: unknown key 'depht'"): read_recipe(ROOT/"configs/tiny.yaml", {"depht": "1"})
    with pytest.raises(NanochatError, match="command line: unknown key 'base_dir'; the run sets it"): read_recipe(ROOT/"configs/tiny.yaml", {"base_dir": "x"})
    with pytest.raises(NanochatError, match="say --pretrain.KEY VALUE"): read_recipe(ROOT/"configs/tiny.yaml", {"pretrain": "5"})
    with pytest.raises(NanochatError) as e: read_recipe(ROOT/"configs/tiny.yaml", {"zzz": "1"})
    assert not {"base_dir", "resume", "stage", "out"} & {*re.findall(r"\w+", str(e.value).split("valid names")[1])}
    assert parameters(ROOT/"configs/chinese_d20.yaml", {"clean.out": "mine"}, tmp_path)["clean"]["out"] == str(tmp_path/"base_data/mine")

# ---- the roll call

def test_preflight_refuses_a_missing_file_before_anything_runs(tmp_path):
    code, stdout, stderr = run(tmp_path/"out", "--source", "no_such_folder")
    assert code == 2 and "nothing was started: see text" in stderr and "no_such_folder" in stdout and "Traceback" not in stderr
    assert not (tmp_path/"out/state.json").exists() and not list((tmp_path/"out").glob("*.log"))

def test_preflight_alone_stops_after_the_table(tmp_path):
    code, stdout, _ = run(tmp_path/"out", "--preflight")
    assert code == 0 and [l.split()[1] for l in stdout.splitlines()] == ["ok"] * 8 and not (tmp_path/"out/state.json").exists()

def stops(params, base, what):
    return [said for w, ok, said in roll_call(params, base) if not ok and w == what]

def test_what_the_roll_call_sees(tmp_path, monkeypatch):
    p = {"tokenizer": dict(source="world", vocab_size=512), "pretrain": dict(source="world", depth=1, vocab_size=512)}
    assert not [x for x in roll_call(p, tmp_path) if not x[1]]
    assert "differs" in stops(p | {"tokenizer": dict(vocab_size=600)}, tmp_path, "vocabulary")[0]
    assert "mine.jsonl" in stops(p | {"sft": dict(conversations="world,mine.jsonl:500")}, tmp_path, "tasks")[0]
    for key, mix, said in (("conversations", "world:mcq+turms:9", "did you mean 'turns'"), ("conversations", "smoltlk:x2", "did you mean 'smoltalk'"),
                           ("conversations", "me.yaml:300", "me.yaml does not exist"), ("questions", "world:arithmetc", "did you mean 'arithmetic'"),
                           ("questions", "gsm8k", "files cannot be reached: "), ("questions", "mmlu", "mmlu does not exist"), ("tasks", "arc-easy,arc-esy", "'arc-esy' is no exam"), ("tasks", "arc-easy:100", "'arc-easy:100' is no exam"),
                           ("tasks", str(Path(__file__)), "is no exam"), ("tasks", "identity", "'identity' is no exam")):
        assert said in stops(p | {"sft": {key: mix}}, tmp_path, "tasks")[0]
    assert not stops(p | {"sft": dict(conversations="world:fact+mcq:500,identity:500,spelling:x2")}, tmp_path, "tasks")
    (tmp_path/"hub").mkdir()
    far = {"data": dict(source="fineweb-edu", n_shards=2, endpoint=str(tmp_path/"hub"))} | p
    assert "3 of 3 files cannot be reached" in stops(far, tmp_path, "text")[0]
    monkeypatch.setattr(speedrun.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    assert "free some" in stops(p, tmp_path, "disk")[0]
    monkeypatch.setattr(speedrun.torch.cuda, "device_count", lambda: 2)
    assert "say --n_gpu 2" in stops(p | {"pretrain": dict(depth=1, n_gpu=8, device="cuda")}, tmp_path, "gpu")[0]

def test_an_exam_is_no_file_and_the_tasks_of_cleaning_are_no_exams(tmp_path):
    (tmp_path/"my.jsonl").write_text("{}\n")
    assert "is no exam" in stops({"eval": dict(tasks=str(tmp_path/"my.jsonl"))}, tmp_path, "tasks")[0]
    assert not stops({"clean": dict(source="world", out="x", tasks=4)}, tmp_path, "tasks")

def test_stages_that_do_not_meet_are_seen_before_the_run(tmp_path):
    base, said = tmp_path/"base", lambda p: (stops(p, tmp_path/"base", "stages") or [""])[0]
    base.mkdir()
    for p in ({"pretrain": dict(depth=1), "sft": {}}, {"pretrain": dict(depth=1), "eval": dict(tag="d4")},
              {"pretrain": dict(tag="a"), "mid": dict(tag="b")}): assert "tags differ" in said(p), p
    for p in ({"sft": {}}, {"mid": dict(init="base"), "eval": {}}, {"eval": dict(tag="d4")}, {"pretrain": {}, "sft": {}, "rl": dict(init="mid")}):
        assert "no checkpoint of stage" in said(p), p
    assert "unknown stage 'bsae'" in said({"pretrain": {}, "sft": dict(init="bsae")})
    for p in ({"data": {}}, {"pretrain": dict(depth=1), "sft": dict(depth=1, init="base"), "eval": {}}): assert not said(p), p
    (base/"base_checkpoints/d4").mkdir(parents=True); (base/"base_checkpoints/d4/latest").touch()
    for p in ({"sft": {}}, {"mid": dict(init="base"), "rl": dict(init="mid"), "eval": dict(tag="d4")}): assert not said(p), p
    assert "there are base d4" in said({"sft": dict(depth=1)})

def test_what_a_step_of_the_recipe_makes_is_not_asked_for(tmp_path):
    (tmp_path/"a.txt").write_text("text")
    recipe, at = tmp_path/"a.yaml", tmp_path/"far/cleaned"
    recipe.write_text(f"source: {tmp_path/'a.txt'}\nclean: {{out: {at}}}\ntokenizer:\n")
    p = parameters(recipe, {}, tmp_path/"base")
    (tmp_path/"base").mkdir()
    assert p["tokenizer"]["source"] == str(at) and not stops(p, tmp_path/"base", "text")
    before = fingerprints(p, tmp_path/"base")
    at.mkdir(parents=True); (at/"shard.txt").write_text("made by the run")
    assert fingerprints(p, tmp_path/"base") == before
    assert stops({"tokenizer": dict(source=str(tmp_path/"base/base_data/gone"))}, tmp_path/"base", "text")

def test_disk_and_cards_are_those_of_the_form_that_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**13))
    monkeypatch.setattr(speedrun.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(speedrun.torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=40 * 2**30))
    for arch in ("classic", "modern"):
        p = {"pretrain": dict(depth=20, arch=arch, n_gpu=8, vocab_size=65536, device="cuda", device_batch=32)}
        model = config_from_depth(20, 65536, 2048, arch)
        want = sum(v for k, v in disk_plan(model, 0).items() if k in ("base_checkpoints", "tokenizer"))
        assert speedrun.check_disk(p, tmp_path, 0).startswith(f"{want / 1e9:.1f} GB wanted")
        assert f"; {micro_batch(model, 40, n_gpu=8)} rows fit by plan" in speedrun.check_gpu(p)

@pytest.mark.parametrize("seq_len", [32, 96])   # too short for some questions; too short for four turns
def test_the_chat_at_the_end_fits_any_context(seq_len, monkeypatch, capsys):
    tok = train_tokenizer(["你是谁？ Who are you?"], 300)
    engine = Engine(GPT(GPTConfig(1, 2, 2, 32, tok.vocab_size, seq_len)), tok)
    monkeypatch.setattr(speedrun, "load_engine", lambda base: engine)
    monkeypatch.setattr(speedrun, "world_of", lambda base: World(0, 12))
    speedrun.talk(Path("base"))
    assert capsys.readouterr().out.count("] > ") == 8

# ---- runs

def test_a_step_by_papermill(tmp_path):
    out = tmp_path/"out"
    code, stdout, stderr = run(out, recipe="source: world\ndata: {n_people: 20, n_chars: 200000}\n", notebooks="yes")
    assert code == 0 and "done: " in stderr, stderr
    cells = read_json(out/"data.ipynb")["cells"]
    assert all(c["metadata"]["papermill"]["status"] == "completed" for c in cells)
    assert any("n_people = 20" in "".join(c["source"]) for c in cells)
    assert read_json(out/"base/base_data/world/manifest.json")["recipe"]["n_people"] == 20

def test_killed_in_the_middle_and_resumed_and_changed(tmp_path):
    out = tmp_path/"out"
    p = start(out)
    metrics, end = out/"base/base_checkpoints/d1/metrics.jsonl", time.time() + 120
    while time.time() < end and p.poll() is None and not (out/"base/base_checkpoints/d1/latest").exists(): time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    _, stderr = p.communicate(timeout=40)
    assert p.returncode == 130 and "--resume" in stderr.split("go on with: ")[1] and "Traceback" not in stderr
    assert not children(out), "a child outlived the run"
    state = read_json(out/"state.json")
    assert [(s, x["done"]) for s, x in state.items()] == [("data", True), ("tokenizer", True), ("pretrain", False)]
    code, _, stderr = run(out)
    assert code == 2 and "holds a run" in stderr
    code, _, stderr = run(out, "--resume")
    assert code == 0, stderr
    assert "data: done before" in stderr and "tokenizer: done before" in stderr and "pretrain: was interrupted, resumes" in stderr
    steps = [r["step"] for r in read_metrics(metrics) if "loss" in r]
    assert steps == list(range(200)) and (told := yaml.safe_load((out/"pretrain.yaml").read_text()))["resume"] is True
    assert told["base_dir"] == str(out/"base")                       # complete: python -m nanochat_nb.pretrain -f …/pretrain.yaml goes on there

@pytest.mark.parametrize("change", [{"rl.group": "0"}, {"sft.epochs": "-1"}, {"mid.lr_scale": "-1"}, {"pretrain.dtype": "foo"}, {"eval.device": "foo"},
                                    {"sft.init": "rl"}, {"rl.temperature": "0"}, {"pretrain.warmup": "2"}], ids=str)
def test_the_roll_call_refuses_what_a_step_would_refuse(tmp_path, change):
    rows = {what: (ok, said) for what, ok, said in roll_call(parameters(ROOT/"configs/tiny.yaml", change, tmp_path), tmp_path)}
    assert rows["values"][0] is False and [*change][0].split(".")[1] in rows["values"][1], rows

def test_a_changed_parameter_runs_again_from_that_step_on(tmp_path):
    a = parameters(ROOT/"configs/speedrun.yaml", {}, tmp_path)
    prints = fingerprints(a, tmp_path)
    for change, again in (({"sft.epochs": "2"}, 2), ({"pretrain.ratio": "10"}, 4), ({"data.n_shards": "8"}, 6), ({}, 0)):
        b = fingerprints(parameters(ROOT/"configs/speedrun.yaml", change, tmp_path), tmp_path)
        assert [prints[s] == b[s] for s in prints] == [True] * (6 - again) + [False] * again
    text = tmp_path/"text.txt"
    text.write_text("one")
    mine = {"data": dict(source=str(text)), "tokenizer": {}}
    before = fingerprints(mine, tmp_path/"base")
    text.write_text("another")
    assert all(before[s] != x for s, x in fingerprints(mine, tmp_path/"base").items())
    for name in ("my:own.jsonl", "plain.jsonl", "base/task_data/mine/train.jsonl"):
        file = tmp_path/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("one")
        for more in ("", ":500"):
            mine = {"sft": dict(conversations=f"world,{file}{more}")}
            before = fingerprints(mine, tmp_path/"base")
            file.write_text(file.read_text() + ", another")
            assert before != fingerprints(mine, tmp_path/"base"), name + more

def test_a_changed_and_a_failing_step(tmp_path):
    out, quick = tmp_path/"out", SMALL.replace("num_iterations: 200", "num_iterations: 2")
    assert run(out, recipe=quick)[0] == 0
    code, _, stderr = run(out, "--resume", "--pretrain.num_iterations", 3)
    assert code == 0 and "tokenizer: done before" in stderr and "pretrain: parameters or inputs changed, runs again" in stderr
    assert read_metrics(out/"base/base_checkpoints/d1/metrics.jsonl")[-1]["n_steps"] == 3
    code, _, stderr = run(out, "--resume", "--tokenizer.pattern", "(")
    assert code == 2 and "step tokenizer ended" in stderr and "go on with: " in stderr and not read_json(out/"state.json")["tokenizer"]["done"]

@pytest.fixture
def steps(tmp_path, monkeypatch):
    "A run whose steps are pretended: `go(*flags)` → the steps that ran, with what they were told."
    ran, recipe = [], tmp_path/"recipe.yaml"
    recipe.write_text("source: world\ndepth: 1\nvocab_size: 512\ndata: {n_people: 20}\ntokenizer:\npretrain: {device: cpu}\nsft:\neval: {n_questions: 4}\n")
    def step(s, p, out, base, *_):
        ran.append((s, p.get("resume", False)))
        if stage := speedrun.TRAIN.get(s):
            (base/f"{stage}_checkpoints/d1").mkdir(parents=True, exist_ok=True); (base/f"{stage}_checkpoints/d1/latest").touch()
        if s == "eval": (base/"report").mkdir(exist_ok=True); (base/"report/report.md").write_text("THE CARD\n")
        return 1.0
    monkeypatch.setattr(speedrun, "run_step", step)
    monkeypatch.setattr(speedrun, "talk", lambda base: print("THE TALK"))
    def go(*flags, at="", out="out"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(at))
        ran.clear()
        speedrun.main(["-f", str(recipe), "--out", str(tmp_path/out), "--notebooks", "no", *flags])
        return dict(ran)
    return go

def test_one_step_alone_ends_well_and_shows_no_old_card(steps, capsys):
    said = lambda: [x for x in capsys.readouterr().out.splitlines() if x.startswith("THE")]
    assert steps("--only", "data") == {"data": False} and said() == []
    assert [*steps("--resume")] == ["tokenizer", "pretrain", "sft", "eval"] and said() == ["THE CARD", "THE TALK"]
    assert [*steps("--only", "sft")] == ["sft"] and said() == []
    assert [*steps("--only", "eval")] == ["eval"] and said() == ["THE CARD"]
    assert [*steps("--resume")] == [] and said() == ["THE CARD", "THE TALK"]

def test_a_changed_step_that_was_killed_early_does_not_take_the_old_checkpoint(steps, tmp_path, monkeypatch):
    steps()
    os.utime(tmp_path/"out/base/sft_checkpoints/d1/latest", (1e9, 1e9))          # long ago
    step = speedrun.run_step
    def killed(s, *a): raise KeyboardInterrupt
    monkeypatch.setattr(speedrun, "run_step", killed)
    with pytest.raises(KeyboardInterrupt): steps("--resume", "--sft.epochs", "2")
    monkeypatch.setattr(speedrun, "run_step", step)
    assert steps("--resume", "--sft.epochs", "2") == {"sft": False, "eval": False}

def test_a_run_knows_its_base_folder_and_its_checkpoints(steps, tmp_path, capsys):
    steps()
    with pytest.raises(NanochatError, match=f"base folder in {tmp_path}/out/base; set NANOCHAT_BASE_DIR"): steps("--resume", at=tmp_path/"other")
    assert steps("--resume", at=tmp_path/"out/base") == {}
    (tmp_path/"out").rename(tmp_path/"moved")
    assert steps("--resume", out="moved") == {}
    (tmp_path/"moved/base/base_checkpoints/d1/latest").unlink()
    assert steps("--resume", out="moved") == {"pretrain": False}
    assert "pretrain: there is no checkpoint (save_every), begins again" in capsys.readouterr().err

def test_the_hint_names_the_base_folder_and_a_killed_step_without_checkpoint_begins_again(steps, tmp_path, monkeypatch, capsys):
    pretend, lost = speedrun.run_step, NanochatError("killed")
    def dies(s, *a):
        if s == "sft": raise lost
        return pretend(s, *a)
    monkeypatch.setattr(speedrun, "run_step", dies)
    with pytest.raises(NanochatError, match=f"go on with: env NANOCHAT_BASE_DIR={tmp_path}/far python -m .* --resume"): steps(at=tmp_path/"far")
    with pytest.raises(NanochatError, match="go on with: python -m"): steps(out="near")
    monkeypatch.setattr(speedrun, "run_step", pretend)
    assert steps("--resume", at=tmp_path/"far") == {"sft": False, "eval": False}
    assert "sft: there is no checkpoint (save_every), begins again" in capsys.readouterr().err
    (tmp_path/"near/base/sft_checkpoints/d1").mkdir(parents=True); (tmp_path/"near/base/sft_checkpoints/d1/latest").touch()
    assert steps("--resume", out="near") == {"sft": True, "eval": False}
    assert "sft: was interrupted, resumes from its last checkpoint" in capsys.readouterr().err

def test_one_run_at_a_time_and_folders_that_cannot_be(steps, tmp_path):
    steps("--only", "data")
    with open(tmp_path/"out/.lock") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(NanochatError, match=f"another speedrun works in {tmp_path}/out"): steps("--resume")
    assert [*steps("--resume")][0] == "tokenizer"
    for out in ("recipe.yaml", "/proc/xx"):
        with pytest.raises(NanochatError, match="take another folder for --out"): steps(out=out)

@pytest.mark.skipif(not CORPUS.exists(), reason="no ../shared/corpus")
def test_the_chinese_recipe_end_to_end_on_real_text(tmp_path):
    for lang, n in (("zh", 300), ("en", 60)):
        (tmp_path/lang).mkdir()
        pq.write_table(pq.read_table(CORPUS/lang/"shard_00000.parquet", columns=["text"]).slice(0, n), tmp_path/lang/"text.parquet")
    out, recipe = tmp_path/"out", (ROOT/"configs/chinese_d20.yaml").read_text(encoding="utf-8")
    small = dict(source=f"{tmp_path/'zh'}:0.8,{tmp_path/'en'}:0.2", depth=2, vocab_size=1024, num_iterations=20, n_gpu=1, workers=1, seq_len=128,
                 batch_tokens=1024, eval_tokens=2048, n_questions=4, n_conversations=200, device="cpu",
                 task_questions=4, compile="false") | {"sft.conversations": "world", "eval.tasks": "spelling"}
    code, stdout, stderr = run(out, *[x for k, v in small.items() for x in (f"--{k}", v)], recipe=recipe)
    assert code == 0, stderr
    rows = [r for r in read_metrics(out/"base/base_checkpoints/d2/metrics.jsonl") if "bpb_zh" in r]
    print("bits a byte", rows[0]["bpb_zh"], rows[0]["bpb_en"], "→", rows[-1]["bpb_zh"], rows[-1]["bpb_en"])
    assert all(rows[-1][k] < rows[0][k] for k in ("bpb_zh", "bpb_en"))
    report = read_json(out/"report.json")
    assert {*report["stages"]["pretrain"]["bpb"]} == {*report["stages"]["sft"]["bpb"]} == {"zh", "en"} and "bits a byte" in stdout
    assert {*report["tasks"]} == {"base", "sft"} and report["tasks"]["sft"]["spelling"]["n"] == 4
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (out/"report.md").read_text(encoding="utf-8"))
    assert pictures and all((out/p).exists() for p in pictures)
    cleaned = read_json(out/"base/base_data/clean/clean.json")
    assert 0 < cleaned["kept"] < cleaned["documents"]
    assert read_json(out/"base/tokenizer/meta.json")["bytes_per_token"]["zh"] > 2
