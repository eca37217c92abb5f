"Public sets: from a hub's address to training and to the report, with files in the real columns; programs that misbehave."
import csv, hashlib, io, json, multiprocessing, os, subprocess, time, zipfile
from dataclasses import replace
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq, pytest
from nanochat_nb import evals, fetch, rl, sft, tasks
from nanochat_nb.evals import is_right
from nanochat_nb.runtime import read_metrics
from nanochat_nb.speedrun import check_tasks
from conftest import small_model
from test_fetch import Hub, hurry, says, start_hub

def key(repo, path): return hashlib.sha256(f"{repo}/{path}".encode()).hexdigest()

class Repos(Hub):
    "The stand-in of test_fetch, keeping files apart by repository and path as a hub does."
    def answer(self, fault):
        if "/resolve/" in self.path:
            repo, rest = self.path.removeprefix("/datasets/").split("/resolve/")
            revision, path = rest.split("/", 1)
            self.server.revisions[repo] = revision
            self.path = "/datasets/" + key(repo, path)
        super().answer(fault)

def parquet(rows):
    out = io.BytesIO(); pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()

def archive(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, rows in members.items():
            f = io.StringIO(); w = csv.DictWriter(f, list(rows[0])); w.writeheader(); w.writerows(rows)
            z.writestr(name, f.getvalue())
    return out.getvalue()

def arc(i): return dict(id=f"q{i}", question=f"Question {i}: which of these four is a metal?", answerKey=str(2),
                        choices=dict(text=["wood", f"iron {i}", "water", "glass"], label=list("1234")))
def mmlu(i, subject): return dict(question=f"Item {i}: which is a metal?", subject=subject, choices=["wood", "iron", "water", "air"], answer=1)
def gsm(i): return dict(question=f"Shop {i} sold 48 clips in April and half as many in May. How many in May?",
                        answer=f"In May it sold 48/2 = <<48/2=24>>24.\n#### {i},024")
def gsm_zh(i): return dict(question=gsm(i)["question"], answer=gsm(i)["answer"], question_zh=f"第{i}家店四月卖出48个发夹，五月卖出一半，五月卖出多少个？",
                           answer_zh="五月卖出48/2=<<48/2=24>>24个。\n#### 24", answer_only="24", split="train" if i < 6 else "test")
def four(i): return dict(id=i, question=f"第{i}题：哪一项是金属？", A="木", B="铁", C="水", D="玻璃", answer="B")
def talk(text): return dict(messages=[dict(role="user", content=text), dict(role="assistant", content="It is so.")], source="x")
def talk_zh(i): return dict(id=str(i), conversations=[{"from": "user", "value": f"{i}？"}, {"from": "assistant", "value": "好。"}])
CODE = dict(task_id="HumanEval/0", prompt='def add(a, b):\n    "Sum."\n', canonical_solution="    return a + b\n",
            test="def check(f):\n    assert f(2, 3) == 5\n", entry_point="add")

@pytest.fixture
def hub(monkeypatch):
    hurry(monkeypatch); monkeypatch.delenv("HF_ENDPOINT", raising=False)
    s = start_hub()
    s.RequestHandlerClass, s.revisions = Repos, {}
    rows = {"arc-easy": arc, "arc-challenge": lambda i: arc(i + 50), "gsm8k": gsm, "mmlu": lambda i: mmlu(i, f"s{i % 2}"), "mmlu-aux": lambda i: mmlu(i + 2, ""),
            "humaneval": lambda i: CODE, "smoltalk": lambda i: talk(f"Say {i}." if i else "Help!\n" + gsm(7)["question"]), "smoltalk-chinese": talk_zh}
    for name, row in rows.items():
        t = tasks.TASKS[name]
        for ids, files in ((range(6), t.train), (range(5, 9), t.exam)):
            for path, _ in files: s.files[key(t.repo.split("@")[0], path)] = parquet([row(i) for i in ids])
    s.files[key("meta-math/GSM8K_zh", "GSM8K_zh.json")] = json.dumps([gsm_zh(i) for i in range(9)], ensure_ascii=False).encode()
    s.files[key("ceval/ceval-exam", "ceval-exam.zip")] = archive({"val/law_val.csv": [four(1), four(2)], "val/logic_val.csv": [four(3)], "test/law_test.csv": [four(4)]})
    cmmlu = [{k.title(): v for k, v in four(5).items()}]
    s.files[key("haonan-li/cmmlu", "cmmlu_v1_0_1.zip")] = archive({"test/agronomy.csv": cmmlu, "dev/agronomy.csv": cmmlu, "__MACOSX/test/x.csv": cmmlu})
    yield s
    s.shutdown(); s.server_close()


def test_every_set_comes_is_entered_and_is_not_asked_for_again(hub, tmp_path):
    hub.faults = ["cut", "503", "reset", "wrong"]
    for part in ("train", "exam"):
        for name, t in tasks.TASKS.items():
            if not getattr(t, part): continue
            rows = tasks.load(name, part, base_dir=str(tmp_path), endpoint=hub.address)
            assert rows and all("messages" in x for x in rows), name
            m = json.loads((tmp_path / "task_data" / name / "manifest.json").read_text())
            for path, info in m["files"].items():
                body = (tmp_path / "task_data" / name / path).read_bytes()
                assert (info["size"], info["sha256"], info["revision"]) == (len(body), hashlib.sha256(body).hexdigest(), "c0ffee")
            repo, _, pinned = t.repo.partition("@")
            assert m["repo"] == t.repo and m["licence"] == t.licence and hub.revisions[repo] == (pinned or "main")
    asked = len(hub.asked)
    hub.shutdown()
    assert len(tasks.load("ceval", "exam", base_dir=str(tmp_path))) == 3 and len(hub.asked) == asked      # offline from here
    assert [x["subject"] for x in tasks.load("cmmlu", "exam", base_dir=str(tmp_path))] == ["agronomy"]
    torn = tmp_path / "task_data/ceval/ceval-exam.zip"
    torn.write_bytes(torn.read_bytes()[:99])                                              # seen by its size, not read
    says("could not fetch", tasks.load, "ceval", "exam", base_dir=str(tmp_path), endpoint=hub.address)

def test_the_list_is_what_a_preflight_asks_for(hub):
    files = tasks.files_needed(tasks.sets_of(tasks.MIXTURES["mid"]) + tasks.sets_of("arc-easy,ceval,spelling", exam=True))
    found = fetch.preflight([f[:2] for f in files], hub.address)
    assert len(found) == len(files) and all(x["size"] for x in found)
    assert not any("test" in p and r.startswith("HuggingFaceTB") for r, p, _ in files)
    del hub.files[key("openai/gsm8k", "main/train-00000-of-00001.parquet")]
    says("gsm8k/resolve/main/main/train", fetch.preflight, [f[:2] for f in files], hub.address, tries=1)
    assert tasks.sets_of("world,own.jsonl:3,spelling") == []

def test_the_roll_call_asks_for_what_is_not_here(hub, tmp_path):
    params = {"sft": dict(conversations="world:fact+mcq:500,arc-easy:x2,gsm8k:460", endpoint=hub.address), "eval": dict(tasks="arc-easy,spelling")}
    tasks.bring("arc-easy", "train", str(tmp_path), hub.address)                          # its exam is not here yet
    assert check_tasks(params, tmp_path).startswith("7 public sets, 6 files to fetch")    # a train file; five exams of the language
    assert check_tasks(params, tmp_path, get=True).startswith("7 public sets, 0 files")
    hub.shutdown()
    assert check_tasks(params, tmp_path).startswith("7 public sets, 0 files")             # offline from here

def test_pins_are_for_the_hub_only(tmp_path):
    url = lambda e: fetch.artefact_url("ceval/ceval-exam@abc", "ceval-exam.zip", endpoint=e)
    assert url("https://hf-mirror.com") == "https://hf-mirror.com/datasets/ceval/ceval-exam/resolve/abc/ceval-exam.zip"
    assert url("modelscope") == "https://modelscope.cn/datasets/opencompass/ceval-exam/resolve/master/ceval-exam.zip"
    assert url(str(tmp_path)) == f"{tmp_path.as_uri()}/datasets/ceval/ceval-exam/ceval-exam.zip"

def _load(base, address, out): out.put(len(tasks.load("arc-easy", "train", base_dir=base, endpoint=address)))

def test_processes_at_once_fetch_once(hub, tmp_path):
    ctx = multiprocessing.get_context("fork")
    out = ctx.Queue()
    all_ = [ctx.Process(target=_load, args=(str(tmp_path), hub.address, out)) for _ in range(4)]
    for p in all_: p.start()
    assert [out.get(timeout=30) for _ in all_] == [6] * 4
    for p in all_: p.join()
    assert len(hub.asked) == 1

@pytest.mark.parametrize("name, part, broken, said", [
    ("gsm8k", "train", parquet([gsm(0), dict(question="?", answer="no number")]), "train-00000-of-00001.parquet row 2: ValueError answer has no '#### number'"),
    ("gsm8k", "train", parquet([dict(question="?", solution="x")]), "has no column answer (its columns: question, solution)"),
    ("arc-easy", "exam", parquet([arc(0) | dict(answerKey="7")]), "test-00000-of-00001.parquet row 1: ValueError"),
    ("arc-easy", "exam", parquet([arc(0), arc(1) | dict(question="")]), "row 2: question is missing or empty"),
    ("smoltalk", "train", parquet([talk("Hi"), dict(messages=[dict(role="user", content="?")], source="x")]), "row 2: expected at least one user"),
    ("gsm8k-zh", "train", json.dumps([gsm_zh(0), {"question_zh": "？", "split": "train"}]).encode(), "GSM8K_zh.json row 2: ValueError answer_zh is empty"),
    ("ceval", "exam", archive({"val/law_val.csv": [four(1), four(2) | dict(answer="")]}), "val/law_val.csv row 2: answer is missing or empty"),
    ("ceval", "exam", archive({"val/law_val.csv": [four(1) | dict(answer="BC")]}), "val/law_val.csv row 1: ValueError 'BC' is not in list"),
    ("mmlu", "exam", parquet([mmlu(0, "s"), mmlu(1, "s") | dict(answer=-1)]), "row 2: ValueError answer -1 is none of 4 choices"),
    ("mmlu", "exam", parquet([mmlu(0, "s") | dict(answer=4)]), "row 1: ValueError answer 4 is none of 4 choices"),
    ("mmlu", "exam", parquet([mmlu(0, "s"), mmlu(1, "s") | dict(choices=["a", None, "c", "d"])]), "row 2: ValueError None is no text"),
    ("gsm8k-zh", "exam", json.dumps({"data": [gsm_zh(7)]}).encode(), "GSM8K_zh.json row 1 is no JSON object"),
    ("gsm8k-zh", "train", json.dumps([gsm_zh(0), "text"]).encode(), "GSM8K_zh.json row 2 is no JSON object"),
    ("gsm8k-zh", "exam", b"7", "GSM8K_zh.json cannot be read"),
    ("ceval", "exam", archive({"dev/law_dev.csv": [four(1)]}), "holds no member like"),
    ("cmmlu", "exam", b"PK no zip", "cmmlu_v1_0_1.zip cannot be read"),
    ("mmlu", "exam", b"PAR1", "test-00000-of-00001.parquet cannot be read"),
])
def test_a_bad_row_or_column_is_named(hub, tmp_path, name, part, broken, said):
    for path, _ in getattr(tasks.TASKS[name], part): hub.files[key(tasks.TASKS[name].repo.split("@")[0], path)] = broken
    says(said, tasks.load, name, part, base_dir=str(tmp_path), endpoint=hub.address)

def test_no_fewer_than_no_rows(hub, tmp_path): says("n=-1 rows", tasks.load, "gsm8k", n=-1, base_dir=str(tmp_path), endpoint=hub.address)

@pytest.mark.parametrize("text, said", [
    ("zh: {name: , maker: 王老师, size: 五亿, skills: 聊天, languages: 中文}", "zh lacks name;"),
    ("en: {name: ' ', maker: W, size: 0.5 billion, skills: chat}", "en lacks name, languages;"),
    ("zh:\nen: {name: A, maker: W, size: 1, skills: chat, languages: English}", "zh lacks name, maker, size, skills, languages;"),
    ("zh: 阿书", "zh lacks name"), ("fr: {name: A}", "expected all in zh, en or both"), ("", "expected all in zh, en or both"),
])
def test_an_identity_with_gaps_is_refused(tmp_path, text, said):
    (tmp_path/"i.yaml").write_text(text, encoding="utf-8")
    says(said, tasks.identity, 1, str(tmp_path/"i.yaml"))

def test_an_identity_in_one_language(tmp_path):
    (tmp_path/"i.yaml").write_text("zh: {name: 阿书, maker: 王老师, size: 五亿, skills: 聊天, languages: 中文}", encoding="utf-8")
    talks = tasks.identity(200, str(tmp_path/"i.yaml"))
    assert len(talks) == 200 and all("。" in t["messages"][1]["content"] or "？" in t["messages"][1]["content"] for t in talks)

def test_a_rare_unusable_conversation_is_left_out(hub, tmp_path, capsys):
    rows = [talk(f"Say {i}.") for i in range(100)] + [dict(messages=[dict(role="user", content="?")], source="x")]
    for path, _ in tasks.TASKS["smoltalk"].train: hub.files[key("HuggingFaceTB/smol-smoltalk", path)] = parquet(rows)
    assert len(tasks.load("smoltalk", base_dir=str(tmp_path), endpoint=hub.address)) == 400
    assert "smoltalk: 4 rows left out, the first" in capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base folder with a tiny world, a tokenizer and a pretrained model of one layer."
    return small_model(tmp_path_factory.mktemp("tasks"), seq_len=512, batch_tokens=1024, num_iterations=2, eval_tokens=512)

def settings(base, hub, **kw):
    return sft.SFTSettings(**(dict(depth=1, base_dir=str(base), num_iterations=2, eval_every=100, device="cpu", dtype="float32",
                                   compile=False, endpoint=hub.address) | kw))

def test_sets_to_be_marked_on(base, hub):
    "Rows that the exams ask are left out, a tenth is held out, and an answer as fine-tuning teaches it is marked right."
    cfg = rl.RLSettings(depth=1, base_dir=str(base), endpoint=hub.address, questions="gsm8k,gsm8k-zh:3,spelling:20", n_questions=200)
    rows, held = rl.gather(cfg)
    asked = [x["messages"][0]["content"] for x in rows + held]
    assert len(rows) == 4 + 3 + 20 and len(held) > 20 and not {gsm(5)["question"], gsm(7)["question"]} & set(asked)
    assert all(is_right("".join(p["text"] for p in x["solution"]), x["answer"]) for x in rows)
    says("expected world, world:arithmetic, gsm8k", rl.gather, replace(cfg, questions="gsm8"))
    assert check_tasks({"rl": dict(questions="gsm8k:500,spelling", endpoint=hub.address)}, base).startswith("6 public sets, ")   # with the exams that guard it

def test_from_names_to_a_fine_tuned_model_and_its_report(base, hub, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(talk(q)) + "\n" for q in ("Hi", gsm(8)["question"])))
    cfg = settings(base, hub, conversations=f"world:5,arc-easy,gsm8k:x2,mmlu-aux:max6,smoltalk:7,gsm8k-zh:0.5,spelling:0.5,identity:4,{own}")
    rows = sft.gather(cfg)
    assert rows == sft.gather(cfg)
    said = [c["messages"][0]["content"] for c in rows]
    for i in range(5, 9):                                                       # what the exams ask is nowhere
        assert not [q for q in said if f"Question {i}:" in q or f"Item {i}:" in q or gsm(i)["question"] in q or gsm_zh(i)["question_zh"] in q and i > 5]
    assert sum("Shop" in q for q in said) == 10 and sum("Question" in q for q in said) == 5 and said[-1] == "Hi"
    assert len(rows) == 5 + 5 + 10 + 3 + 7 + (6 + 1000) + 4 + 1
    out = sft.train(cfg)
    assert out["n_dropped"] == 0 and len([r for r in read_metrics(base / "sft_checkpoints/d1/metrics.jsonl") if "loss" in r]) == 2
    says("'mmlu' is no set to train on", sft.gather, settings(base, hub, conversations="mmlu"))
    says("did you mean", sft.gather, settings(base, hub, conversations="smoltalks"))
    report = evals.evaluate(evals.EvalSettings(base_dir=str(base), n_questions=2, device="cpu", stages="sft", endpoint=hub.address, task_questions=3,
                                               tasks="arc-easy,arc-challenge,mmlu,gsm8k,humaneval,spelling,ceval,cmmlu"))
    sat = json.loads((base / "report/report.json").read_text())["tasks"]["sft"]
    assert {k: r["n"] for k, r in sat.items()} == dict.fromkeys(sat, 3) | {"cmmlu": 1} and len(sat) == 8
    assert sat["arc-easy"]["chance"] == .25 and len(sat["gsm8k"]["ci95"]) == 2 and "acc" in sat["mmlu"]["letter"]
    assert sat["ceval"]["subjects"] == 2 and 0 <= sat["ceval"]["subject_mean"] <= 1 and sat["humaneval"]["acc"] == 0
    core = [(sat[k]["letter"]["acc"] - .25) / .75 for k in ("arc-easy", "arc-challenge", "mmlu")] + [sat[k]["acc"] for k in ("gsm8k", "humaneval", "spelling")]
    assert report["chatcore"]["sft"] == pytest.approx(sum(core) / 6)
    page = (base / "report/report.md").read_text()
    assert "| ceval | letter |" in page and "ChatCORE: sft" in page and "mean of subjects, sft" in page
    with pytest.raises(tasks.NanochatError) as e: tasks.find_task("foo", "exam")
    assert str(e.value).count("ceval") == 1                           # what there is, said once
    says("'arc-esy' is no exam", evals.evaluate, evals.EvalSettings(base_dir=str(base), device="cpu", tasks="arc-esy"))


def test_own_files_are_compared_with_every_exam_that_is_here(hub, tmp_path, capsys, monkeypatch):
    asked = ["Hi", gsm(7)["question"], gsm_zh(8)["question_zh"]]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(talk(q)) + "\n" for q in asked))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(dict(messages=talk(q)["messages"][:1], answer="24")) + "\n" for q in asked))
    cfg = settings(tmp_path, hub, conversations=f"{tmp_path}/own.jsonl")
    learn = rl.RLSettings(base_dir=str(tmp_path), endpoint=hub.address, questions=f"{tmp_path}/asked.jsonl")
    taught = lambda: ({c["messages"][0]["content"] for c in sft.gather(cfg)}, {x["messages"][0]["content"] for xs in rl.gather(learn) for x in xs})
    assert taught() == ({*asked}, {*asked}) and not hub.asked
    assert capsys.readouterr().out.count("own files are compared with no exam; nanochat_nb.tasks.bring(") == 2       # once a run
    for name in ("gsm8k", "gsm8k-zh"): tasks.bring(name, "exam", str(tmp_path), hub.address)
    hub.shutdown()
    assert taught() == ({"Hi"}, {"Hi"})
    said = capsys.readouterr().out
    assert said.count("2 of 3 rows left out, an exam asks the same") == 2 and "no exam" not in said
    monkeypatch.setenv("RANK", "1")
    taught(); assert not tasks.exam_keys([str(tmp_path / "own.jsonl")], str(tmp_path / "empty")) and not capsys.readouterr().out

def test_an_exam_that_cannot_come_says_who_asked_for_it(hub, tmp_path):
    del hub.files[key("allenai/ai2_arc", tasks.TASKS["arc-challenge"].exam[0][0])]
    says("HTTP 404 Not Found; check the name, and the endpoint (exam arc-challenge, with which arc-easy, gsm8k is compared)", sft.gather,
         settings(tmp_path, hub, conversations="world:5,arc-easy,gsm8k-zh,gsm8k"))

def test_every_language_is_guarded_by_its_own_exams():
    zh, en = (tasks.guards([n]) for n in ("smoltalk-chinese", "smoltalk"))
    assert set(zh) == {"gsm8k-zh", "ceval", "cmmlu"} and set(en) == {"arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval"}
    assert tasks.guards(["gsm8k-zh"]) == zh and set(tasks.guards(["smoltalk", "gsm8k-zh"])) == {*zh, *en}

def test_another_seed_is_another_choice_of_questions(hub, tmp_path):
    got = [[x["answer"] + x["messages"][0]["content"] for x in tasks.load("gsm8k", "train", 4, seed, str(tmp_path), hub.address)] for seed in (1, 1, 2, 3)]
    assert got[0] == got[1] and len({*map(str, got)}) == 3

def test_a_program_that_forks_and_stays_is_ended(tmp_path):
    mark = tmp_path / "alive"
    code = f"import os, time\nif os.fork() == 0:\n    time.sleep(3); open({str(mark)!r}, 'w').close()\n"
    begun = time.time()
    tasks.run_program(code, seconds=2)                     # as root the fork works; the group is ended all the same
    assert time.time() - begun < 4
    time.sleep(3.5)
    assert not mark.exists()

def test_without_limits_no_program_runs(monkeypatch, base, hub):
    monkeypatch.setattr(tasks, "_JAIL", "import nothing_like_resource")
    assert "cannot limit" in tasks.no_limits() and not tasks.run_program("pass")

def test_numbers_of_every_form_are_marked():
    for said, answer, ok in (("It is 1,024.", "1024", True), ("so -3", "-3", True), ("3", "-3", False), ("0.50", "0.5", True), ("E", "E", True), ("Everything", "E", False)):
        assert evals.is_right(said, answer) is ok, said
