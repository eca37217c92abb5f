"Own dialogues end to end: a file of Belle's form, the command, a mixture by weight, a few steps of fine-tuning; bad files."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from nanochat_nb import pretrain, sft
from nanochat_nb.convert import ConvertSettings, convert, hold_out, make, mix_counts, parse_mix, to_conversation
from nanochat_nb.data import DataSettings, prepare, read_conversations
from nanochat_nb.settings import NanochatError
from nanochat_nb.tokenizer import TokenizerSettings, prepare_tokenizer

ROOT = Path(__file__).parents[1]
BELLE = [{"instruction": f"把数字{i}翻成英文", "input": "" if i % 2 else f"{i}", "output": f"number {i}"} for i in range(200)]

def lines(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), encoding="utf-8")
    return str(path)

def command(*flags):
    out = subprocess.run([sys.executable, "-m", "nanochat_nb.convert", *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True)
    return out.returncode, out.stdout, out.stderr


def test_from_belle_to_a_fine_tuned_model(tmp_path):
    torch.set_num_threads(1)
    base = str(tmp_path / "base")
    code, out, err = command("--source", lines(tmp_path / "belle.json", BELLE), "--base_dir", base)
    assert code == 0, err
    made = json.loads(out)
    assert made == {"folder": f"{base}/task_data/belle", "bad": 0, "train": 180, "val": 20}
    prepare(DataSettings(base_dir=base, n_people=10, n_chars=60_000))
    prepare_tokenizer(TokenizerSettings(base_dir=base, vocab_size=400))
    here = dict(depth=1, base_dir=base, device="cpu", dtype="float32", compile=False, eval_tokens=512)
    pretrain.train(pretrain.PretrainSettings(**here, seq_len=128, batch_tokens=512, num_iterations=3))
    mine = f"{made['folder']}/train.jsonl"
    cfg = sft.SFTSettings(**here, conversations=f"{mine}:0.7,world:0.3", n_conversations=120, num_iterations=8)
    got = sft.gather(cfg)
    own = {json.dumps(c, sort_keys=True) for c in read_conversations(mine)}
    n_own = sum(json.dumps(c, sort_keys=True) in own for c in got)
    assert (len(got), n_own) == (300, 210)                                  # 0.7 of 180 + 120; thirty of them twice
    held = {c["messages"][0]["content"] for c in read_conversations(f"{made['folder']}/val.jsonl")}
    assert len(held) == 20 and not held & {c["messages"][0]["content"] for c in got}
    end = sft.train(cfg)
    assert end["step"] == 7 and 0 < end["loss"] < 8 and end["n_dropped"] == 0

@pytest.mark.parametrize("conversations, n", [("{}", 180), ("{}:7", 7), ("{}:400", 400), ("{}:max7", 7), ("{}:max400", 180),
                                              ("{0}:0.5,{0}:0.5,{0}:3", 363), ("world:9,{}:max5", 14), ("{}:1.0", 180)])
def test_mixtures_as_fine_tuning_reads_them(tmp_path, conversations, n):
    make(ConvertSettings(source=lines(tmp_path / "b.jsonl", BELLE), base_dir=str(tmp_path)))
    got = sft.gather(sft.SFTSettings(base_dir=str(tmp_path), conversations=conversations.format(tmp_path / "task_data/b/train.jsonl")))
    assert len(got) == n

@pytest.mark.parametrize("text, says", [("a.jsonl:0.0", "expected more than 0"), ("a.jsonl:0", "expected more than 0"),
                                        ("a.jsonl:maxx", "is no file"), ("a.jsonl:-1", "expected more than 0"),
                                        ("a.jsonl:inf", "expected more than 0"), ("a.jsonl:nan", "expected more than 0"), ("a.jsonl:max0.5", "whole number")])
def test_mixtures_that_make_no_sense(text, says):
    with pytest.raises(NanochatError, match=says): sft.gather(sft.SFTSettings(conversations=text))

@pytest.mark.parametrize("seed", range(5))
def test_weights_are_kept_to_within_one_row(seed):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 500, (4,), generator=g).tolist()
    w = [round(x, 3) for x in (torch.rand(4, generator=g) + 0.01).tolist()]
    n = mix_counts(parse_mix(",".join(f"s{i}:{x:.3f}" for i, x in enumerate(w))), sizes)
    assert sum(n) == sum(sizes) and all(abs(k - sum(sizes) * x / sum(w)) < 1 for k, x in zip(n, w))


@pytest.mark.parametrize("row, says", [
    ('{"instruction": "半', "cannot be read"), ("[1]", "expected an object"), ("7", "expected an object"),
    ({"instruction": "a"}, "'output' is missing"), ({"instruction": "a", "output": ""}, "message 2: is empty"),
    ({"instruction": "", "output": "b"}, "message 1: is empty"), ({"instruction": "a", "output": 3}, "content must be"),
    ({"prompt": "a"}, "has prompt; expected messages"), ({}, "no field"), ({"conversations": [{"from": "human"}]}, "'value' is missing"),
    ({"conversations": [{"from": "tool", "value": "x"}, {"from": "gpt", "value": "y"}]}, "role is 'tool'"),
    ({"conversations": 3}, "cannot be read"), ({"messages": "hi"}, "expected a list"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "at least one user"),
    *(({"instruction": "a", "output": "b", "history": h}, r"history: expected [[question, answer], …]") for h in
      ([{"role": "user", "content": "hi"}], ["你好", "您好"], "你好", [["q"]], [["q", "a", "b"]])),
    ('{"instruction": "a", "output": "b\\ud800"}', "message 2: content must be a string (no half surrogate pair)"),
])
def test_every_bad_row_is_named_by_its_line(tmp_path, row, says):
    path = lines(tmp_path / "a.jsonl", [BELLE[0], row, BELLE[1], row])
    good, bad = convert(path)
    assert len(good) == 2 and len(bad) == 2 and "line 2" in bad[0] and "line 4" in bad[1] and says in bad[0]
    code, out, err = command("--source", path, "--out", str(tmp_path / "out")) if row == {} else (2, "", "line 2")
    assert code == 2 and "line 2" in err and not out and not (tmp_path / "out").exists()
    assert make(ConvertSettings(source=path, out=str(tmp_path / "out"), skip_bad=True))["bad"] == 2

def test_one_file_in_every_form_becomes_the_same(tmp_path):
    def forms(q, a): return [{"instruction": q, "output": a}, {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
                             {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}]
    same = [to_conversation(r, "") for r in forms("你好？", "好。")]
    assert same[0] == same[1] == same[2]
    (tmp_path / "list.json").write_text(json.dumps(forms("a", "b")), encoding="utf-8")
    assert convert(tmp_path / "list.json") == convert(lines(tmp_path / "l.jsonl", forms("a", "b")))


def test_a_file_of_the_same_name_from_elsewhere_replaces_nothing(tmp_path, monkeypatch):
    (tmp_path / "belle").mkdir(); (tmp_path / "alp").mkdir()
    base, one, two = str(tmp_path / "base"), *(lines(tmp_path / d / "train.jsonl", BELLE[:n]) for d, n in (("belle", 40), ("alp", 60)))
    kept = Path(make(ConvertSettings(source=one, base_dir=base))["folder"], "train.jsonl")
    code, out, err = command("--source", two, "--base_dir", base)
    assert code == 2 and not out and f"was made of {one}, not of {two}; give --out" in err and len(kept.read_text(encoding="utf-8").splitlines()) == 36
    monkeypatch.chdir(tmp_path / "belle")
    assert make(ConvertSettings(source="train.jsonl", base_dir=base, val_fraction=0.5))["train"] == 20 == len(kept.read_text(encoding="utf-8").splitlines())
    monkeypatch.chdir(tmp_path / "alp")
    with pytest.raises(NanochatError, match="belle/train.jsonl"): make(ConvertSettings(source="train.jsonl", base_dir=base))
    assert make(ConvertSettings(source=two, base_dir=base, out=str(tmp_path / "mine")))["train"] == 54
    assert make(ConvertSettings(source=two, base_dir=base, out=str(kept.parent)))["train"] == 54              # asked for by name
    assert make(ConvertSettings(source=two, base_dir=base))["train"] == 54
    (kept.parent / "source.json").unlink()
    with pytest.raises(NanochatError, match="made of an unknown file"): make(ConvertSettings(source=two, base_dir=base))

def test_the_seed_decides_what_is_held_out():
    rows = [to_conversation(r, "") for r in BELLE]
    asked = lambda seed: {r["messages"][0]["content"] for r in hold_out(rows, 0.1, seed)[1]}
    assert asked(1) == asked(1) != asked(2) and len(asked(1)) == len(asked(2)) == 20

def test_a_system_message_of_sharegpt_stays():
    turns = [("system", "Be brief."), ("gpt", "Welcome."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye")]
    got = to_conversation({"conversations": [{"from": k, "value": v} for k, v in turns]}, "")["messages"]
    assert [(m["role"], m["content"]) for m in got] == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
