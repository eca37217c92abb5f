"Reinforcement learning: kills, ranks, the parameters cell and bad input; what is learned from is tested in the chapter."
import ast, dataclasses, json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from nanochat_nb import rl, sft
from nanochat_nb.runtime import read_metrics
from nanochat_nb.rl import RLSettings
from nanochat_nb.settings import NanochatError, field_comments
from conftest import small_model

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
HERE = dict(depth=1, device="cpu", dtype="float32", compile=False, eval_every=1000, eval_tokens=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base folder with a model of one layer that answers 7 or 8 to whatever it is asked, and questions of either answer."
    d = small_model(tmp_path_factory.mktemp("rl"), **HERE, seq_len=32, batch_tokens=256, num_iterations=2)
    here = dict(HERE, base_dir=str(d))
    asked = [[{"role": "user", "content": f"{i} or so?"}] for i in range(20)]
    chats = [{"messages": m + [{"role": "assistant", "content": str(7 + i % 2)}]} for i, m in enumerate(asked)]
    (d / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (d / "questions.jsonl").write_text("".join(json.dumps(dict(messages=m, answer="7")) + "\n" for m in asked))
    sft.train(sft.SFTSettings(**here, conversations=str(d / "chats.jsonl"), text_share=0.0, num_iterations=40, lr_scale=0.5))
    return d

def settings(base, **kw):
    return RLSettings(**HERE | dict(base_dir=str(base), questions=str(base / "questions.jsonl"), num_iterations=6, per_step=4, group=4,
                                    max_tokens=4, n_held=2) | kw)

def flags(cfg): return [f"--{f.name}={v}" for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default]

def steps(base):
    rows = [r for r in read_metrics(base / "rl_checkpoints/d1/metrics.jsonl") if "reward" in r]
    assert [r["step"] for r in rows] == list(range(len(rows)))
    return [(r["loss"], r["reward"], r["alike"], r["tokens"]) for r in rows]


def test_killed_and_resumed_is_as_if_nothing_had_happened(base):
    cfg = settings(base, num_iterations=60, save_every=4)
    p = subprocess.Popen([sys.executable, "-m", "nanochat_nb.rl", *flags(cfg)], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
    path, end = base / "rl_checkpoints/d1/metrics.jsonl", time.time() + 90
    while len(read_metrics(path)) < 12: assert p.poll() is None and time.time() < end; time.sleep(0.01)
    p.send_signal(signal.SIGKILL); p.wait()
    done = len(steps(base))
    assert 8 < done < 60
    rl.train(replace(cfg, resume=True))
    resumed = steps(base)
    assert not (base / "rl_checkpoints/d1/before").exists()
    rl.train(cfg)
    assert resumed == steps(base) and len(resumed) == 60
    assert sum(r for _, r, *_ in resumed[-15:]) > sum(r for _, r, *_ in resumed[:15]) + 2     # and it learned

def test_two_ranks_learn_as_one_does(base):
    cfg = settings(base, per_step=5)                                             # not a multiple of the ranks
    out = subprocess.run([sys.executable, "-m", "nanochat_nb.rl", "--n_gpu=2", *flags(cfg)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert json.loads(out.stdout.splitlines()[-1])["step"] == 6
    two = steps(base)
    rl.train(cfg)
    one = steps(base)
    assert [x[1:] for x in two] == [pytest.approx(x[1:]) for x in one] and len(one) == 6 and 0 < one[0][1] < 1
    assert [x[0] for x in two] == pytest.approx([x[0] for x in one], abs=1e-4)

def test_every_run_keeps_its_record(base):
    shutil.copytree(base / "sft_checkpoints/d1", base / "sft_checkpoints/other")
    for tag in ("", "other"): rl.train(settings(base, init="sft", tag=tag, num_iterations=1))
    told = [json.loads((base / f"rl_checkpoints/{tag}/record.json").read_text()) for tag in ("d1", "other")]
    assert [x["settings"]["tag"] for x in told] == ["d1", "other"] and told[1] == json.loads((base / "report/rl.json").read_text())

def test_questions_of_another_run_are_not_gone_on_with():
    "With another number a step the places would shift: some questions asked twice, others never."
    ours = rl.Questions(10, 4, 42)
    next(ours)
    with pytest.raises(NanochatError, match="per_step=4, this loader has 5"): rl.Questions(10, 5, 42).load_state_dict(ours.state_dict())

def test_another_recipe_is_not_gone_on_with(base):
    run, other = dict(tag="same", num_iterations=1, save_every=1), base / "other.jsonl"
    other.write_text((base / "questions.jsonl").read_text().replace('"7"', '"8"'))
    shutil.copytree(base / "sft_checkpoints/d1", base / "sft_checkpoints/same")
    rl.train(settings(base, **run))
    for change in (dict(group=2), dict(temperature=.3), dict(max_tokens=3), dict(questions=str(other))):
        with pytest.raises(NanochatError, match="was made with"): rl.train(settings(base, **run | dict(num_iterations=2, resume=True) | change))
    rl.train(settings(base, **run | dict(num_iterations=2, resume=True)))

@pytest.mark.parametrize("kw, says", [
    (dict(depth=7), "no checkpoint of stage base with tag d7"), (dict(init="rl"), "starts from base, mid, sft"), (dict(group=1), "group=1"),
    (dict(temperature=0.0), "temperature=0.0"), (dict(questions="worlds"), "did you mean 'world'"), (dict(questions=","), "there are none"),
    (dict(questions="world:mcq"), "'mcq' is no kind"), (dict(questions="spelling:0"), "questions: 'spelling:0' asks"),
    (dict(lr_scale=-1.0), "lr_scale=-1.0: expected 0"), (dict(warmdown=3.0), "warmdown=3.0: expected a share"), (dict(keep=-2), "keep=-2"),
])
def test_a_bad_setting_is_named(base, kw, says):
    with pytest.raises(NanochatError) as e: rl.train(settings(base, **kw))
    assert says in str(e.value)

def test_questions_without_room_for_an_answer_are_left_out(base, tmp_path):
    long = [dict(messages=[{"role": "user", "content": f"{i} long" * 60}], answer="7") for i in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(x) + "\n" for x in long))
    with pytest.raises(NanochatError, match="no question leaves room"): rl.train(settings(base, questions=str(tmp_path / "q.jsonl")))

def test_nothing_held_out_is_taught_from_another_file(base, tmp_path):
    for name, ns in (("a", range(100)), ("b", range(50, 150))):
        rows = [dict(messages=[{"role": "user", "content": f"{i} and 1?"}], answer=str(i + 1)) for i in ns]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    some, held = rl.gather(settings(base, questions=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", n_held=1000))
    asked = lambda xs: [x["messages"][0]["content"] for x in xs]
    assert len(held) >= 10 and len(set(asked(held))) == len(held) and not set(asked(held)) & set(asked(some))
    assert len(set(asked(some))) + len(held) == 150
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(NanochatError, match="none.jsonl holds no question"): rl.gather(settings(base, questions=str(tmp_path / "none.jsonl")))

def test_parameters_cell_is_the_dataclass():
    cells = json.loads((ROOT / "nbs/07_rl.ipynb").read_text(encoding="utf-8"))["cells"]
    at, = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])]
    source = "".join(cells[at]["source"])
    got = {n.target.id: (n.annotation.id, ast.literal_eval(n.value)) for n in ast.parse(source).body}
    fields = dataclasses.fields(RLSettings)
    assert got == {f.name: (getattr(f.type, "__name__", f.type), f.default) for f in fields} and list(got) == [f.name for f in fields]
    assert [line.split("#")[1].strip() for line in source.splitlines()] == [field_comments(RLSettings)[f.name] for f in fields]
    assert "launch_training(cfg" in "".join(cells[-1]["source"]) and "#| eval: false" in "".join(cells[-1]["source"])
