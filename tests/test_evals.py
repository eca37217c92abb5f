"Evaluation: ranks, random models, the whole line of stages, the command, bad input."
import dataclasses, json, os, random, re, shutil, subprocess, sys, textwrap, warnings
from pathlib import Path
import pytest, torch
from nanochat_nb import evals, pretrain, sft
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.data import DataSettings, prepare
from nanochat_nb.engine import Engine
from nanochat_nb.evals import (MAX_TOKENS, EvalSettings, bits_per_byte, build_report, chance, checkpoints, evaluate, exam_rows, exam_table,
                               find_checkpoint, is_right, load_engine, mark_answers, mark_choices, plot_exam, plot_stages, report_markdown, sit_tasks, wilson)
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.runtime import init_runtime
from nanochat_nb.settings import NanochatError, read_json, write_json
from nanochat_nb.tokenizer import TokenizerSettings, prepare_tokenizer, train_tokenizer
from nanochat_nb.world import EXAMS, World, conversations, corpus, exam

ROOT = Path(__file__).resolve().parent.parent
WORLD = World(n_people=8)

@pytest.fixture(scope="module")
def tok(): return train_tokenizer([d["text"] for d in corpus(WORLD, 60_000)], 512)

@pytest.fixture(scope="module")
def rt(): return init_runtime("cpu", "float32")

def random_model(vocab_size, seq_len=128, seed=0):
    model = GPT(GPTConfig(2, 2, 2, 64, vocab_size, seq_len))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3, generator=g)
    return model.eval()


# ---- bits per byte -------------------------------------------------------------------------------------------------

TWO_RANKS = textwrap.dedent("""
    import json, sys, torch
    from nanochat_nb.evals import bits_per_byte
    from nanochat_nb.model import GPT, GPTConfig
    from nanochat_nb.runtime import close_runtime, init_runtime, print0
    rt = init_runtime("cpu", "float32")
    g = torch.Generator().manual_seed(3)
    model = GPT(GPTConfig(1, 1, 1, 32, 50, 16))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3, generator=g)
    batches = [tuple(torch.randint(low, 50, (4, 16), generator=g) for low in (0, -1)) for _ in range(5)]   # 5 over 2 ranks
    print0(json.dumps(bits_per_byte(model, batches, list(range(50)), rt)))
    close_runtime()
""")

def test_two_ranks_measure_what_one_does(tmp_path):
    script = tmp_path/"two.py"
    script.write_text(TWO_RANKS)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = lambda *cmd: json.loads(subprocess.run([sys.executable, *cmd], env=env, capture_output=True, text=True, check=True).stdout)
    one = run(script)
    two = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script)
    assert one == pytest.approx(two, rel=1e-9) and one > 0

def test_bits_per_byte_of_a_coin():
    "A model that finds all tokens alike spends log2(V) bits a token."
    model = GPT(GPTConfig(1, 1, 1, 32, 64, 8))                     # its head is zero
    x = y = torch.randint(0, 63, (3, 8))
    rt = init_runtime("cpu", "float32")
    assert bits_per_byte(model, [(x, y)], [2] * 63 + [0], rt) == pytest.approx(6 / 2, rel=1e-6)
    assert bits_per_byte(model, [(x, torch.full_like(x, 63))], [2] * 63 + [0], rt) is None


# ---- marking -------------------------------------------------------------------------------------------------------

def test_marking_numbers():
    rng = random.Random(0)
    for _ in range(500):
        n, other = rng.randrange(10**rng.randint(1, 7)), rng.randrange(1000)
        for form in ("{n}", "{n:,}", "{n}.0", "一共{n}元。", "It is {n:,} yuan.", "{o}*2={n}", "{o}，{n}", "没有{o}，是{n:,}。", "{o}-{n}"):
            assert is_right(form.format(n=n, o=other), str(n)), form
        wide = str(n).translate(str.maketrans("0123456789", "０１２３４５６７８９"))
        assert is_right(f"有{wide}个", str(n))
        for form in ("{n}1", "1{n}", "{n}.5", "-{n}", "是−{n}", "{n}, then 9999999999", "{n:,},999"):
            if n or form[0] not in "-是": assert not is_right(form.format(n=n), str(n)), (form, n)

@pytest.mark.parametrize("said", ["", "\n", "�", "none", "十二", "1 2", "1e2", "12/5"])
def test_marking_odd_answers_never_raises(said):
    for answer in ("12", "A", "陈安去了青河。", "c-a-t"): assert not is_right(said, answer)

def test_marking_what_normalising_would_flatten():
    for said in ("12²", "1²2", "½", "12½", "12₂", "12e3", "12^2", "12^{3}", "m^12", "x12", "x1.12", "v0,12", "–12", "‑12", "1e12", "1e-12", "1e999999999999999999999"):
        assert not is_right(said, "12") and not is_right(said, "122"), said
    for said in ("12 m²", "12㎡", "12 cm³.", "12km", "12 m^2", "共12m²", "CO₂: 12", "CO2 12", "H2 is 12.", "10–12", "x=12", "(5²) 12", "½+11½=12"):
        assert is_right(said, "12"), said

def test_a_letter_beside_another_is_no_answer():
    for said in ("A B", "A, B", "A/B/C/D", "A和B", "A、B", "A或者D", "(A) or (E)", "Ａ与Ｂ", "A. B is it"): assert not is_right(said, "A"), said
    for said in ("A", "A.", "(A)", "A. 北京", "A. Beijing", "A. Answer A", "A，选A", "A. DNA", "A 5 kg"): assert is_right(said, "A"), said

@pytest.mark.parametrize("lang", ["zh", "en"])
def test_the_shuffled_answers_are_wrong(lang):
    "Each question's answer is right for itself and wrong for a question with another answer."
    for kind in EXAMS:
        items = exam(World(), lang, kind, 100)
        for x, y in zip(items, items[1:]): assert is_right(y["answer"], x["answer"]) == (x["answer"] == y["answer"])

def test_batched_marks_are_those_of_one_by_one(tok, rt):
    engine = Engine(random_model(tok.vocab_size), tok, rt)
    items = [x for l in ("zh", "en") for k in EXAMS for x in exam(WORLD, l, k, 6)]
    right, said = mark_answers(engine, items, 20)
    alone = [mark_answers(engine, [x], 20) for x in items]
    assert said == [s for _, (s,) in alone] and right == [r for (r,), _ in alone]
    assert len(set(said)) > len(items) / 2                         # the random model says many different things
    mcq = [x for l in ("zh", "en") for x in exam(WORLD, l, "mcq", 20)]
    assert mark_choices(engine, mcq) == [mark_choices(engine, [x])[0] for x in mcq]

def test_likelihood_ignores_the_place_of_the_right_answer(tok, rt):
    engine = Engine(random_model(tok.vocab_size, seed=1), tok, rt)
    for x in exam(WORLD, "en", "mcq", 10):
        turned = x | dict(choices=x["choices"][1:] + x["choices"][:1], label=(x["label"] - 1) % 4)
        assert mark_choices(engine, [x]) == mark_choices(engine, [turned])

@pytest.mark.parametrize("vocab_size", [512, 2048])
def test_no_taught_answer_is_cut_off(vocab_size):
    world = World()
    tok = train_tokenizer([d["text"] for d in corpus(world, 200_000)], vocab_size)
    for c in conversations(world, 1500, seed=9):
        if c["kind"] not in MAX_TOKENS: continue
        ids, mask = tok.render({"messages": c["messages"][:2]})
        assert len(ids) - mask.index(1) <= MAX_TOKENS[c["kind"]], c


@pytest.mark.parametrize("room, n", [(3, 0), (4, 1)])
def test_a_question_needs_room_for_its_answer(tok, rt, room, n):
    items = exam(WORLD, "en", "mcq", 1)
    engine = Engine(random_model(tok.vocab_size, len(tok.render_prompt(items[0]["messages"])) + room), tok, rt)
    assert [r["n"] for r in sit_tasks(engine, dict(one=items)).values()] == [1] * n


# ---- intervals and chance ------------------------------------------------------------------------------------------

def test_wilson_holds_the_rate_and_narrows():
    for n in (1, 7, 60, 200):
        ends = [wilson(k, n) for k in range(n + 1)]
        for k, (low, high) in enumerate(ends):
            assert 0 <= low <= k / n <= high <= 1 and low < high
            assert ends[n - k] == pytest.approx([1 - high, 1 - low])
        assert ends == sorted(ends)
    widths = [wilson(n // 2, n)[1] - wilson(n // 2, n)[0] for n in (10, 40, 160, 640)]
    assert widths == sorted(widths, reverse=True) and widths[2] / widths[3] == pytest.approx(2, abs=.05)

def test_every_subject_counts_alike():
    "Three right of four in a large subject and none of one in a small one: 3/8, not 3/5."
    row = evals._row([True, True, True, False, False], [dict(answer="A", choices="ABCD", subject=s) for s in "aaaab"])
    assert (row["acc"], row["subjects"], row["subject_mean"]) == (.6, 2, .375)

def test_chance():
    assert chance([]) == 0 and chance([{"answer": a} for a in "1121"]) == .75
    assert chance(exam(WORLD, "zh", "mcq", 20)) == .25

@pytest.mark.parametrize("seq_len, whole", [(8, 0), (48, None), (160, 6)])
def test_what_does_not_fit_the_context_is_left_out_and_counted(tok, rt, capsys, seq_len, whole):
    engine = Engine(random_model(tok.vocab_size, seq_len), tok, rt)
    table = exam_table(engine, WORLD, 6)
    said = capsys.readouterr().out
    for lang in table:
        for kind in EXAMS:
            row = table[lang].get(kind)
            assert (f"{lang} {kind}: none of 6 questions fits a context of {seq_len} tokens" in said) == (not row)
            if row: assert row["n"] + row["too_long"] == 6
            assert whole is None or (row["n"] if row else 0) == whole
    if whole is None: assert any(table.values()) and said


# ---- the whole line ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A base folder with data, tokenizer and two trained stages of a few steps."
    base = tmp_path_factory.mktemp("base")
    at = dict(base_dir=str(base), device="cpu", dtype="float32")
    prepare(DataSettings(base_dir=str(base), n_people=10, n_chars=200_000, world_seed=5))
    prepare_tokenizer(TokenizerSettings(base_dir=str(base), vocab_size=512))
    more = dict(depth=1, num_iterations=3, compile=False, eval_tokens=2048)
    pretrain.train(pretrain.PretrainSettings(**at, **more, batch_tokens=1024))
    sft.train(sft.SFTSettings(**at, **more, n_conversations=60))
    return base

@pytest.fixture(scope="module")
def report(run): return evaluate(EvalSettings(base_dir=str(run), n_questions=6, device="cpu", dtype="float32"))

def test_report_has_the_promised_keys(run, report):
    assert read_json(run/"report/report.json") == report
    for lang in ("zh", "en"):
        for kind in ("mcq", "arithmetic", "spelling", "translation"):
            row = report["exam"][lang][kind]
            assert row["n"] == 6 and row["ci95"][0] <= row["acc"] <= row["ci95"][1] and 0 < row["chance"] < 1
        assert {"acc", "n", "ci95", "chance"} <= set(report["exam"][lang]["mcq"]["letter"])
        assert 0 < report["bpb"][lang] < 10
    assert report["tokens_per_s"] > 0 and list(report["exams"]) == ["base", "sft"] and report["exam_of_stage"] == "sft"
    assert list(report["seconds"]) == ["data", "tokenizer", "pretrain", "sft", "eval"] and min(report["seconds"].values()) > 0

def test_report_has_the_settings_of_the_run(report):
    settings = {k: s.get("settings", s.get("recipe")) for k, s in report["stages"].items()}
    assert settings["data"]["n_people"] == 10 and settings["tokenizer"]["vocab_size"] == 512
    assert settings["pretrain"]["num_iterations"] == settings["sft"]["num_iterations"] == 3
    assert settings["eval"]["n_questions"] == 6
    assert report["model"]["n_layer"] == 1 and report["world"] == "World(10 people, 20 towns, 120 facts)"
    assert report["stages"]["pretrain"]["tokens"] == 3 * 1024

def test_report_page_and_picture(run, report):
    page = (run/"report/report.md").read_text(encoding="utf-8")
    shown = ["exams.png", "stages.png", "base_curves.png", "sft_curves.png"]
    assert page == report_markdown(report, shown)
    assert all((run/"report"/p).read_bytes().startswith(b"\x89PNG") and f"]({p})" in page for p in shown)
    assert " × " in page and "The base model, continuing:" in page and "$" not in page
    assert f"${report['seconds']['pretrain']:,.2f}" in report_markdown(report | dict(price=3600))     # a dollar a second
    for word in ("zh mcq, letter", "en translation", "pretrain", "tokenizer", "base (95 %)"): assert word in page
    axes = plot_exam(report).axes
    assert [a.get_title() for a in axes] == ["zh", "en"]
    heights = [b.get_height() for b in axes[1].patches]
    assert heights == [r["acc"] for e in report["exams"].values() for r in exam_rows(e["en"]).values()]

def test_times_belong_to_the_run_in_question(run, report):
    "The wall time of another tag is not this tag's; a resumed run counts all its steps."
    wall = read_json(run/"report/pretrain.json")
    try:
        write_json(run/"report/pretrain.json", wall | dict(seconds=1e6))
        again = lambda: build_report(run, "d1", report["exams"], dict(seconds=1.0))["seconds"]["pretrain"]
        assert again() == 1e6
        write_json(run/"report/pretrain.json", wall | dict(seconds=1e6, settings=wall["settings"] | dict(tag="d9")))
        assert again() < 1e5
        write_json(run/"report/pretrain.json", wall | dict(seconds=0.0))
        assert again() > 0
    finally: write_json(run/"report/pretrain.json", wall)

def test_a_later_run_takes_no_record_from_an_earlier_one(run, report):
    "Ranks and hardware of d1 are known from its own card after d9 was trained; of other training than that they are not."
    last, own, record = run/"report/pretrain.json", run/"base_checkpoints/d1/report.json", run/"base_checkpoints/d1/record.json"
    wall, card = read_json(last), read_json(own)
    assert read_json(record) == wall
    again = lambda: build_report(run, "d1", report["exams"], dict(seconds=1.0))
    assert card == report
    try:
        own.unlink(); write_json(last, wall | dict(settings=wall["settings"] | dict(tag="d9")))
        r = again()                                                # d1 was never examined: its record is in its folder
        assert r["stages"]["pretrain"]["ranks"] == 1 and r["seconds"]["pretrain"] == round(wall["seconds"], 2)
        assert "steps alone" not in report_markdown(r)
        write_json(own, card); record.unlink()
        write_json(last, wall | dict(ranks=8, seconds=1e6, hardware="H100", settings=wall["settings"] | dict(tag="d9")))
        r = again()
        assert (r["stages"]["pretrain"]["ranks"], r["seconds"]["pretrain"]) == (1, report["seconds"]["pretrain"])
        card["stages"]["pretrain"]["loss"] += 1                    # the card is of an earlier run of this tag
        write_json(own, card)
        r = again()
        assert "ranks" not in r["stages"]["pretrain"]
        line = next(l for l in report_markdown(r | dict(price=3600)).splitlines() if l.startswith("| pretrain"))
        assert "$" not in line and "H100" not in line and " (steps alone) |" in line
        write_json(record, wall | dict(loss=wall["loss"] + 1)); write_json(last, wall | dict(loss=wall["loss"] + 1))
        assert "ranks" not in again()["stages"]["pretrain"]        # of the tag, but of other steps than those on record
    finally: write_json(last, wall); write_json(record, wall); write_json(own, report)

def test_a_card_of_public_exams_alone(run, report, tmp_path):
    "Nothing of the mini world on it, no heads without rows, no picture without bars; and what was said to the public exams."
    base = shutil.copytree(run, tmp_path/"base")
    r = evaluate(EvalSettings(base_dir=str(base), n_questions=0, tasks="spelling", task_questions=4, device="cpu", dtype="float32"))
    page = (base/"report/report.md").read_text(encoding="utf-8")
    assert "exams.png" not in page and not (base/"report/exams.png").exists() and "stages.png" in page and "World(" not in page
    tables = [re.findall(r"^\|.*\n", t, re.M) for t in re.findall(r"(?:^\|.*\n)+", page, re.M)]
    assert [t[0].split("|")[1].strip() for t in tables] == ["task", "stage", "exam"] and all(len(t) > 2 for t in tables)
    assert tables[2][2].startswith("| spelling | ") and r["tasks"]["sft"]["spelling"]["samples"][0]["question"][:9] in tables[2][2]
    row = dict(r["tasks"]["sft"]["spelling"])
    choice = dict(row, letter=dict(row))
    del choice["samples"]
    both = report_markdown(report | dict(tasks=dict(base={"ceval": choice}, sft={"ceval": choice}), chatcore={}))
    assert both.count("\n| ceval, letter | ") == 1 and "World(10 people" in both and "| en translation | " in both
    assert "| exam |" not in report_markdown(r | dict(tasks={}))   # none at all

def test_a_picture_of_one_stage_is_whole():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (1, 2, 7): assert plot_stages(dict(seconds={str(i): 1.0 for i in range(n)})).axes[0].get_position().height > .2

def test_the_same_again(run, report):
    again = evaluate(EvalSettings(base_dir=str(run), n_questions=6, device="cpu", dtype="float32"))
    assert again["exams"] == report["exams"]

def test_a_failed_evaluation_leaves_the_old_report(run, report, monkeypatch):
    before = (run/"report/report.json").read_bytes()
    monkeypatch.setattr("nanochat_nb.evals.report_markdown", lambda *a: 1 / 0)
    monkeypatch.setattr("nanochat_nb.evals.exam_table", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): evaluate(EvalSettings(base_dir=str(run), n_questions=6, device="cpu"))
    assert (run/"report/report.json").read_bytes() == before
    assert not list((run/"report").glob(".*"))


# ---- which checkpoint ----------------------------------------------------------------------------------------------

def test_the_checkpoint_written_last(tmp_path, tok):
    model = random_model(tok.vocab_size)
    meta = dict(config=dataclasses.asdict(model.cfg), tokenizer_hash=tok.hash)
    def save(stage, tag, when):
        folder = tmp_path/f"{stage}_checkpoints"/tag
        save_checkpoint(folder, 1, model, meta=meta)
        os.utime(folder/"latest", (when, when))
        return folder
    old, new = save("base", "d4", 100), save("base", "d2", 200)
    assert find_checkpoint(tmp_path) == new and find_checkpoint(tmp_path, "base", "d4") == old
    for tag in ("../base_checkpoints/d4", "d*", "d[4]", "."): assert checkpoints(tmp_path, "base", tag) == []   # a tag is a name, no path or pattern
    assert checkpoints(tmp_path, "base") == [old, new]
    tuned = save("sft", "d4", 150)
    assert find_checkpoint(tmp_path) == tuned and find_checkpoint(tmp_path, "base") == new
    (tmp_path/"base_checkpoints/d3").mkdir()                       # training began, nothing saved yet
    assert find_checkpoint(tmp_path, "base") == new

def command(*args):
    return subprocess.run([sys.executable, "-m", "nanochat_nb.evals", *args], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})

def test_command(run):
    done = command("--base_dir", str(run), "--n_questions", "3", "--stages", "base", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "# Report card · d1" in done.stdout and "sft (95 %)" not in done.stdout

@pytest.mark.parametrize("args, said", [
    ((), "there are base d1, sft d1"), (("--tag", "d7"), "no checkpoint of stage base with tag d7"),
    (("--stages", "base,stf"), "did you mean 'sft'"), (("--stages", ""), "names none of base, mid, sft, rl"),
    (("--n_questions", "0"), "n_questions=0"), (("--task_questions", "-1"), "task_questions=-1: expected 0 or more"),
    (("--price", "-1"), "price=-1.0: expected 0 or more"), (("--n_questions", "-1", "--tasks", "spelling"), "n_questions=-1"), (("--n_question", "3"), "did you mean 'n_questions'"), (("--device", "gpu"), "unknown device"),
])
def test_bad_input(run, args, said):
    from nanochat_nb.settings import from_flags
    if not args: args = ("--stages", "mid")
    with pytest.raises(NanochatError, match=said.replace("(", r"\(")): evaluate(from_flags(EvalSettings, ["--base_dir", str(run), *args]))

def test_no_checkpoint_at_all_is_one_line(tmp_path):
    done = command("--base_dir", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: no checkpoint of stage base") and done.stderr.count("\n") == 1
    assert not (tmp_path/"report").exists()

def test_another_tokenizer_is_an_error(tmp_path, tok, rt):
    model = random_model(tok.vocab_size)
    save_checkpoint(tmp_path/"base_checkpoints/d2", 1, model, meta=dict(config=dataclasses.asdict(model.cfg), tokenizer_hash=tok.hash))
    with pytest.raises(NanochatError, match="tokenizer"): load_engine(tmp_path, runtime=rt)      # none at all
    tok.save(tmp_path/"tokenizer")
    assert load_engine(tmp_path, runtime=rt).tok.hash == tok.hash
    train_tokenizer(["same size, other merges " + "xyz" * i for i in range(300)] + [d["text"] for d in corpus(WORLD, 30_000)], 512).save(tmp_path/"tokenizer")
    with pytest.raises(NanochatError, match="belongs to tokenizer"): load_engine(tmp_path, runtime=rt)
