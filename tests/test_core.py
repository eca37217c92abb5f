"CORE: the bundle over a bad network, prompts by hand, ranks, resume, the command, bad input; agreement with lm-eval."
import hashlib, importlib.util, json, os, random, re, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
import nanochat_nb.core as C
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.core import CoreSettings, open_bundle, questions, read_tasks, read_run, run_core, score_batch, sit, texts, world_bundle, write_bundle
from nanochat_nb.engine import Engine
from nanochat_nb.export import export_hf
from nanochat_nb.fetch import fetch
from nanochat_nb.model import GPT, config_from_depth
from nanochat_nb.settings import NanochatError, from_flags, read_json
from nanochat_nb.tokenizer import train_tokenizer
from nanochat_nb.world import World, corpus
from test_fetch import start_hub

ROOT, WORLD = Path(__file__).resolve().parent.parent, World(n_people=8)

@pytest.fixture(scope="module")
def tok(): return train_tokenizer([d["text"] for d in corpus(WORLD, 60_000)], 512)

def random_model(tok, seed=0, seq_len=256):
    model, g = GPT(config_from_depth(2, tok.vocab_size, seq_len)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .1, generator=g)
    return model.eval()

@pytest.fixture
def base(tmp_path, tok):
    tok.save(tmp_path/"tokenizer")
    for i, tag in enumerate(("d2", "d3")):
        model = random_model(tok, i)
        save_checkpoint(tmp_path/"base_checkpoints"/tag, 5, model, meta=dict(config=vars(model.cfg), tokenizer_hash=tok.hash))
    world_bundle(tmp_path/"eval_bundle", WORLD, n=14)
    return tmp_path

def says(text, f, *args, **kw):
    with pytest.raises(NanochatError) as e: f(*args, **kw)
    assert text in str(e.value), str(e.value)


# ---- the bundle ----------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path, monkeypatch):
    "A server with a bundle of the real layout, zipped under its folder's name; pauses of milliseconds."
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(C, "fetch", lambda url, path: fetch(url, path, wait=.01, timeout=.5))
    s = start_hub()
    world_bundle(tmp_path/"made/eval_bundle", WORLD, n=14)
    s.files["eval_bundle.zip"] = Path(shutil.make_archive(tmp_path/"z", "zip", tmp_path/"made", "eval_bundle")).read_bytes()
    s.url = f"{s.address}/cdn/eval_bundle.zip"
    yield s
    s.shutdown(); s.server_close()

def test_a_bundle_comes_over_a_bad_network_once(server, tmp_path, capsys):
    base, body = tmp_path/"base", server.files["eval_bundle.zip"]
    server.faults = ["cut", "503", "reset"]
    folder = open_bundle(base, server.url, hashlib.sha256(body).hexdigest())
    assert sorted(os.listdir(base)) == ["eval_bundle"] and folder == base/"eval_bundle"
    assert [s for _, s, f in server.asked if f == ""] == [len(body) // 2]                 # went on where it was cut
    n = len(server.asked)
    server.files.clear()
    assert open_bundle(base, server.url) == open_bundle(base) == folder and len(server.asked) == n   # offline afterwards
    assert capsys.readouterr().out == f"{folder} is used, unpacked from {server.url}, not {C.BUNDLE}\n"             # of the unnamed one
    says("delete it to fetch", open_bundle, base, server.url + "x"); says("was unpacked from", open_bundle, base, server.url, "0" * 64)
    assert read_tasks(folder) == read_tasks(tmp_path/"made/eval_bundle")

def test_a_wrong_bundle_leaves_nothing(server, tmp_path):
    says("expected " + "0" * 64, open_bundle, tmp_path/"b", server.url, "0" * 64)
    server.files["eval_bundle.zip"] = b"<html>no zip</html>"
    says("is no zip file", open_bundle, tmp_path/"b", server.url)
    server.files["eval_bundle.zip"] = Path(shutil.make_archive(tmp_path/"y", "zip", tmp_path/"made/eval_bundle/eval_data")).read_bytes()
    says("holds no core.yaml", open_bundle, tmp_path/"b", server.url)
    says("HTTP 404", open_bundle, tmp_path/"b", f"{server.address}/cdn/other.zip")
    assert os.listdir(tmp_path/"b") == []

def test_the_published_layout_is_read(tmp_path):
    "Names, extra columns and the flat YAML as the published bundle has them; no delimiter means a space."
    (tmp_path/"eval_data/a").mkdir(parents=True)
    (tmp_path/"core.yaml").write_text("icl_tasks:\n-\n  label: copa\n  dataset_uri: a/copa.jsonl\n  num_fewshot: [0]\n"
                                      "  icl_task_type: multiple_choice\n  has_categories: false\n")
    (tmp_path/"eval_meta_data.csv").write_text('Eval Task,Task Category,Random baseline,Description\ncopa,x,50,"a, b"\n')
    (tmp_path/"eval_data/a/copa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 1, "more": 3}\n')
    task, = read_tasks(tmp_path)
    assert (task["delimiter"], task["chance"], task["shots"]) == (" ", .5, 0) and texts(task, 0) == ["q a", "q b"]

@pytest.mark.parametrize("file, old, new, said", [
    ("eval_data/zh_facts.jsonl", '"query"', '"question"', "zh_facts.jsonl, line 1: expected a JSON object with query"),
    ("eval_data/zh_facts.jsonl", "{", "", "zh_facts.jsonl, line 1"),
    ("core.yaml", "schema", "shema", "did you mean 'schema'"),
    ("core.yaml", "zh_facts.jsonl", "away.jsonl", "away.jsonl"),
    ("eval_meta_data.csv", "zh_facts,25", "others,25", "no line for zh_facts"), ("core.yaml", None, None, "has no core.yaml"),
    *[("eval_meta_data.csv", "zh_facts,25", f"zh_facts,{x}", "eval_meta_data.csv has no line for zh_facts with a Random baseline from 0")
      for x in ("", "100", "1e9", "-5", "nan", "half")],
    ("eval_meta_data.csv", "Random baseline", "Baseline", "no line for zh_facts with a Random baseline"),
    ("core.yaml", "icl_tasks", "tasks", "core.yaml, task 1: expected label"), ("core.yaml", "icl_task_type", "type", "core.yaml, task 1: expected label"),
    ("core.yaml", r'"num_fewshot": \[\s*2\s*\]', '"num_fewshot": 2', "core.yaml, task 1: expected label"),
    *[("eval_data/zh_whose.jsonl", '"gold": 0', f'"gold": {x}', "zh_whose.jsonl, line 1: expected a JSON object with context_options, continuation, gold (an option's")
      for x in ("9", "-1", '"0"', "null", "[0]", "0.5")],
    *[(f"eval_data/{file}.jsonl", rf'"{key}": ("([^"\\]|\\.)*"|\[[^]]*\])', f'"{key}": {x}', f"{file}.jsonl, line 1: expected a JSON object with")
      for file, key, x in (("zh_facts", "choices", "[1, 2, 3, 4]"), ("zh_facts", "choices", '"abcd"'), ("zh_facts", "choices", "7"), ("zh_facts", "query", "null"),
                           ("zh_whose", "context_options", '["a", null]'), ("zh_whose", "continuation", '["a"]'), ("en_spelling", "context", "7"))],
])
def test_bad_bundles_are_named(base, file, old, new, said):
    path = base/"eval_bundle"/file
    if not old: path.unlink()
    else:
        text = path.read_text(encoding="utf-8")
        changed = re.sub(old, new, text, count=1) if "\\" in old else text.replace(old, new, 1)
        assert changed != text
        path.write_text(changed, encoding="utf-8")
    says(said, read_tasks, base/"eval_bundle")

def test_a_byte_order_mark_is_no_text(base):
    before = read_tasks(base/"eval_bundle")
    for p in [p for p in (base/"eval_bundle").rglob("*.*") if p.is_file()]: p.write_text("\ufeff" + p.read_text(encoding="utf-8"), encoding="utf-8")
    assert read_tasks(base/"eval_bundle") == before
    says("max_per_task=-1", read_tasks, base/"eval_bundle", max_per_task=-1)

def test_only_a_newline_ends_a_line(tmp_path):
    items = [dict(context=f"a{c}b", continuation="c") for c in ("\u2028", "\x85", "\r", "")]
    got, = read_tasks(write_bundle(tmp_path, [("x", "language_modeling", 0, " ", 0., items)]))
    assert sorted(map(str, got["items"])) == sorted(map(str, items))


# ---- prompts and scores --------------------------------------------------------------------------------------------

def test_prompts_by_hand():
    mc = dict(form="multiple_choice", shots=1, delimiter="\nAnswer: ", items=[
        dict(query="1+1?", choices=["2", "3"], gold=0), dict(query="2+2?", choices=["5", "4"], gold=1)])
    assert texts(mc, 0) == [f"2+2?\nAnswer: 4\n\n1+1?\nAnswer: {c}" for c in "23"]
    schema = dict(form="schema", shots=1, delimiter=" ", items=[
        dict(context_options=["the cat", "the box"], continuation="sleeps", gold=0),
        dict(context_options=["a", "b"], continuation="c", gold=1)])
    assert texts(schema, 0) == ["b c\n\nthe cat sleeps", "b c\n\nthe box sleeps"]
    lm = dict(form="language_modeling", shots=1, delimiter=" ", items=[
        dict(context=" one ", continuation="two"), dict(context="three", continuation="four")])
    assert texts(lm, 1) == ["one two\n\nthree", "one two\n\nthree four"]

def test_examples_are_never_the_question_and_never_change(base):
    task = read_tasks(base/"eval_bundle", "en_facts")[0]
    for i in range(14):
        first = texts(task, i)[0]
        assert first == texts(task, i)[0] and first.count("\n\n") == 2
        assert task["items"][i]["query"] not in "\n\n".join(first.split("\n\n")[:-1])

@pytest.mark.parametrize("seq_len", [256, 24])                      # all fits; most is cut
def test_batched_is_one_at_a_time_is_plain(base, tok, seq_len):
    engine = Engine(random_model(tok, 3, seq_len), tok)
    for task in read_tasks(base/"eval_bundle"):
        qs = questions(tok, task, range(14), seq_len)
        together, apart = score_batch(engine, qs), [score_batch(engine, [q])[0] for q in qs]
        for q, a, b in zip(qs, together, apart):
            for row, start, (nll, hit), (nll1, hit1) in zip(q.rows, q.starts, a, b):
                logits = engine.model(torch.tensor([row[:-1]]))[0, start - 1:].detach()
                plain = torch.nn.functional.cross_entropy(logits, torch.tensor(row[start:])).item()
                assert nll == pytest.approx(plain, abs=1e-4) and nll1 == pytest.approx(plain, abs=1e-4)
                assert hit == hit1 == (logits.argmax(-1).tolist() == row[start:])
        assert any(q.cut for q in qs) == (seq_len == 24) or task["form"] == "schema"

def test_a_model_that_knows_nothing_earns_chance_for_ties(base, tok):
    engine = Engine(GPT(config_from_depth(1, tok.vocab_size, 256)), tok)                # its head is zero: all options tie
    for name in ("zh_whose", "en_whose"): assert sum(sit(engine, read_tasks(base/"eval_bundle", name)[0])[0]) == 7

def test_a_choice_that_is_the_beginning_of_another(tok):
    task = dict(form="multiple_choice", shots=0, delimiter=" ", items=[dict(query="a", choices=["duck", "duck house"], gold=0)])
    q, = questions(tok, task, [0], 64)
    assert all(0 < s < len(r) for s, r in zip(q.starts, q.rows))
    assert all(nll > 0 for nll, _ in score_batch(Engine(random_model(tok), tok), [q])[0])


def test_examples_are_drawn_anew_for_every_question():
    "As the field does: by 1234 and the question's number."
    task = dict(form="language_modeling", shots=3, delimiter=" ", items=[dict(context=f"<{i}>", continuation="x") for i in range(40)])
    for i in range(40):
        others = [j for j in range(40) if j != i]
        assert texts(task, i)[0].split(" x\n\n") == [f"<{j}>" for j in random.Random(1234 + i).sample(others, 3)] + [f"<{i}>"]

def test_other_questions_under_the_same_name_are_asked(base):
    run = lambda n: run_core(CoreSettings(base_dir=str(base), tag="d2", tasks="en_facts", max_per_task=n, device="cpu", dtype="float32"))
    assert [run(n)["runs"]["base d2@5"]["tasks"]["en_facts"]["n"] for n in (3, 9)] == [3, 9]

def test_only_results_of_the_same_exam_stand_in_one_row(base):
    "Fewer questions, fewer tasks or another bundle replace nothing and are set beside nothing else."
    ask = dict(base_dir=str(base), device="cpu", dtype="float32")
    kept = lambda: read_json(base/"report/core.json")["runs"]
    run_core(CoreSettings(tag="d2,d3", **ask))
    whole = kept()
    other = world_bundle(base/"other", World(seed=3, n_people=8), n=14)
    for more in (dict(max_per_task=5), dict(tasks="zh_facts,en_facts"), dict(bundle=str(other))): run_core(CoreSettings(tag="d3", **ask, **more))
    assert len(whole) == 2 and whole.items() < kept().items() and len(kept()) == 5
    for order in ("zh_facts,en_facts", "en_facts,zh_facts"): run_core(CoreSettings(tag="d3", **ask, tasks=order))
    run_core(CoreSettings(tag="d3", **ask, max_per_task=14))
    assert len(kept()) == 5                                         # the same exams, asked for in other words
    for tag in ("d2", "d3"): (base/"base_checkpoints"/tag/"metrics.jsonl").write_text('{"step": 0, "loss": 1, "tokens": 9, "seconds": 1, "tok_per_s": 9}\n')
    d2, d3 = (read_run(base/"base_checkpoints"/tag)["scores"] for tag in ("d2", "d3"))
    assert len(d2) == 1 and len(d3) == 4 and set(d2) < set(d3)
    d3.update({k: [1., 1., 1.] for k in d3})
    page = C.comparison([dict(read_run(base/"base_checkpoints"/tag), scores=s) for tag, s in (("d2", d2), ("d3", d3))])
    assert page.count("| CORE") == 4 and page.count("**1.000**") == 1

# ---- the command ---------------------------------------------------------------------------------------------------

def command(base, *args, ranks=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    cmd = [sys.executable, *torchrun, "-m", "nanochat_nb.core", "--base_dir", base, "--device", "cpu", "--dtype", "float32", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*map(str, cmd)], env=env, capture_output=True, text=True)

def scores(base): return {n.partition(",")[0]: {k: (t["acc"], t["n"]) for k, t in r["tasks"].items()} for n, r in read_json(base/"report/core.json")["runs"].items()}

def test_two_ranks_score_what_one_does(base):
    one = command(base, "--depth", 2, "--stage", "base")
    assert one.returncode == 0 and "base d2@5" in one.stdout and "**CORE**" in one.stdout, one.stderr
    alone = scores(base)
    shutil.rmtree(base/"report")
    two = command(base, "--depth", 2, ranks=2)
    assert two.returncode == 0, two.stderr
    assert scores(base) == alone and len((base/"report/core.jsonl").read_text().splitlines()) == 6
    assert two.stdout.count("**CORE**") == 1                        # one rank speaks

def test_a_killed_run_goes_on(base, tok, monkeypatch):
    cfg = CoreSettings(base_dir=str(base), tag="d2,d3@5", max_per_task=7, device="cpu", dtype="float32")
    run_core(cfg)
    whole = scores(base)
    assert set(whole) == {"base d2@5", "base d3@5"} and all(n == 7 for r in whole.values() for _, n in r.values())
    shutil.rmtree(base/"report")
    real, asked = C.sit, []
    def dies(engine, task, *rest):
        asked.append(task["label"])
        if len(asked) == 9: raise KeyboardInterrupt
        return real(engine, task, *rest)
    monkeypatch.setattr(C, "sit", dies)
    with pytest.raises(KeyboardInterrupt): run_core(cfg)
    assert not (base/"report/core.json").exists()
    run_core(cfg)
    assert len(asked) == 9 + 4 and scores(base) == whole            # eight of twelve were on record
    run_core(cfg)
    assert len(asked) == 13
    model = random_model(tok, 9)
    save_checkpoint(base/"base_checkpoints/d2", 5, model, meta=dict(config=vars(model.cfg), tokenizer_hash=tok.hash))
    run_core(cfg)
    assert len(asked) == 13 + 6                                     # other weights are another model

def test_compare_on_the_command_line(base, tmp_path):
    for tag, lr in (("d2", 1.0), ("d3", .5)):
        folder = base/"base_checkpoints"/tag
        rows = [dict(step=s, loss=3 - lr * s / 9, tokens=100 * (s + 1), seconds=float(s), tok_per_s=100.) for s in range(9)]
        (folder/"metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder/"settings.yaml").write_text(f"lr_scale: {lr}\nseed: 1\n")
    for tag in ("d2", "d3"): run_core(CoreSettings(base_dir=str(base), tag=tag, device="cpu", dtype="float32"))   # both stay on record
    (base/"report/pretrain.json").write_text(json.dumps(dict(settings=dict(tag="d3"), seconds=9., ranks=8, hardware="H100")))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    cmd = [sys.executable, "-m", "nanochat_nb.core", "compare", base/"base_checkpoints/d2", base/"base_checkpoints/d3", "--out", tmp_path/"o", "--price", "3600"]
    done = subprocess.run([*map(str, cmd)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| `lr_scale` | 1.0 | 0.5 |" in done.stdout and "seed" not in done.stdout and "| cost |  | $72.00 |" in done.stdout
    assert "| seconds | 8 (steps alone) | 9 |" in done.stdout
    assert "| on |  | 8 × H100 |" in done.stdout and "| tokens | 900 | 900 |" in done.stdout          # of d2 there is no record
    cores = [r["core"] for r in read_json(base/"report/core.json")["runs"].values()]
    assert all(f"{c:.3f}" in next(l for l in done.stdout.splitlines() if l.startswith("| CORE")) for c in cores)
    assert sorted(os.listdir(tmp_path/"o")) == ["compare.md", "compare.png"]
    assert (tmp_path/"o/compare.md").read_text(encoding="utf-8") in done.stdout
    runs = read_json(base/"report/core.json")["runs"]
    key = next(iter(runs))
    row = key.replace("base d2@5", "CORE")
    early = {key.replace("@5", "@1"): dict(runs[key], core=.9)}
    for both in (early | runs, runs | early):                          # whichever was examined last
        (base/"report/core.json").write_text(json.dumps(dict(runs=both)))
        assert read_run(base/"base_checkpoints/d2")["scores"][row][0] == runs[key]["core"]
    (base/"report/core.json").write_text(json.dumps(dict(runs=runs | {"base d2@5": dict(runs[key], core=.8)})))
    kept = read_run(base/"base_checkpoints/d2")["scores"]              # a file in which exams have no name is read still
    assert kept[row][0] == runs[key]["core"] and kept[row.rpartition(", exam")[0]][0] == .8
    big = dict(read_run(base/"base_checkpoints/d2"), tokens=1_310_720_000)
    assert "| tokens | 1,310,720,000 |" in C.comparison([big])
    for score, tag in ((.75, "d2"), (.5, "d3")):                       # each run keeps its own card; the last one's lies in report/ too
        card = dict(tag=tag, exams=dict(base=dict(zh=dict(mcq=dict(acc=score, ci95=[0, 1])), en={})), stages={})
        for p in (base/"base_checkpoints"/tag, base/"report"): (p/"report.json").write_text(json.dumps(card))
    assert [read_run(base/"base_checkpoints"/t)["scores"]["zh mcq"][0] for t in ("d2", "d3")] == [.75, .5]
    done = subprocess.run([*map(str, cmd[:4]), str(base/"none")], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "none is no folder" in done.stderr and done.stderr.count("\n") == 1

@pytest.mark.parametrize("args, said", [
    (["--depth", "7"], "there are base d2, base d3"), (["--stage", "bas"], "did you mean 'base'"), (["--tag", "d2@x"], "no step x; there are 5"),
    (["--tag", "d2@4"], "d2 has no step 4; there are 5"), (["--tasks", "zh_fact"], "did you mean 'zh_facts'"), (["--bundel", "x"], "did you mean 'bundle'"),
])
def test_bad_settings_are_one_line(base, args, said):
    try: cfg = from_flags(CoreSettings, ["--base_dir", str(base), "--device", "cpu", *args])
    except NanochatError as e: assert said in str(e); return
    says(said, run_core, cfg)


def test_a_bundle_that_nobody_named_is_told_once(base, capsys):
    (base/"eval_bundle/origin.json").write_text(json.dumps(dict(bundle="mine.zip", sha256="0")))
    ask = dict(base_dir=str(base), tag="d2", tasks="zh_facts", max_per_task=2, device="cpu", dtype="float32")
    run_core(CoreSettings(**ask))
    assert capsys.readouterr().out.count("unpacked from mine.zip") == 1
    run_core(CoreSettings(**ask, bundle="mine.zip"))
    assert "unpacked" not in capsys.readouterr().out
    says("was unpacked from mine.zip; delete it", run_core, CoreSettings(**ask, bundle="https://x.example/other.zip"))

# ---- the same questions by lm-eval ---------------------------------------------------------------------------------

def taught(tok, seq_len=96):
    "A model that has read a small world's entries for a hundred steps."
    from nanochat_nb.optim import make_optimizer, set_schedule
    text = [t for d in corpus(WORLD, 200_000) if d["kind"] == "entry" for t in [tok.bos_id] + tok.encode(d["text"])]
    rows = torch.tensor(text[:len(text) // (seq_len + 1) * (seq_len + 1)]).view(-1, seq_len + 1)
    model, g = GPT(config_from_depth(2, tok.vocab_size, seq_len)), torch.Generator().manual_seed(0)
    opt = make_optimizer(model)
    for step in range(100):
        set_schedule(opt, step, 100, warmdown=.5)
        batch = rows[torch.randint(len(rows), (10,), generator=g)]
        model(batch[:, :-1], batch[:, 1:]).backward(); opt.step(); opt.zero_grad()
    return model.eval()

TASK = """task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
num_fewshot: 0
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: "\\n"
metric_list: [{{metric: acc}}]
"""

@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))), reason="pip install lm-eval[hf]")
def test_lm_eval_makes_the_same_choices(tmp_path, tok, monkeypatch):
    for k in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"): monkeypatch.setenv(k, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path/"hf"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    folder = world_bundle(tmp_path/"bundle", WORLD, n=60)
    task = read_tasks(folder, "en_facts")[0] | dict(shots=0)
    model = taught(tok)
    path = tmp_path/"facts.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in task["items"]))
    (tmp_path/"yaml").mkdir()
    (tmp_path/"yaml/facts.yaml").write_text(TASK.format(path=path))
    lm = HFLM(pretrained=str(export_hf(model, tok, tmp_path/"hf_model", stage="base")), device="cpu", batch_size=16, add_bos_token=True, dtype="float32")
    out = simple_evaluate(lm, tasks=["facts"], task_manager=TaskManager(include_path=str(tmp_path/"yaml")), log_samples=True, bootstrap_iters=0)
    theirs = {s["doc"]["query"] + str(s["doc"]["choices"]): [float(r[0]) for r in s["filtered_resps"]] for s in out["samples"]["facts"]}
    qs = questions(tok, task, range(len(task["items"])), 96)
    right, same = 0, 0
    for x, q, options in zip(task["items"], qs, score_batch(Engine(model, tok), qs)):
        a = [-nll * (len(r) - s) for (nll, _), r, s in zip(options, q.rows, q.starts)]     # log-likelihood of what differs
        b = theirs[x["query"] + str(x["choices"])]
        assert [v - a[0] for v in a] == pytest.approx([v - b[0] for v in b], abs=2e-3)
        same += a.index(max(a)) == b.index(max(b)); right += a.index(max(a)) == x["gold"]
    ours, n = sum(sit(Engine(model, tok), task)[0]), len(qs)
    acc = out["results"]["facts"]["acc,none"]
    print(f"{n} questions: lm-eval acc {acc:.4f}, the same by sums {right / n:.4f} ({same} of {n} choices), by means a token {ours / n:.4f}")
    assert same == n and acc == pytest.approx(right / n) and acc > .3
    assert abs(ours / n - acc) < 2 * (.25 / n) ** .5                                       # means a token: within sampling error
