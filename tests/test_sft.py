"Midtraining and fine-tuning: what is learned after packing, kills, ranks, the parameters cell and bad input."
import ast, dataclasses, json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch
from nanochat_nb import pretrain, rl, sft
from nanochat_nb.checkpoint import latest_step
from nanochat_nb.loader import ChatLoader
from nanochat_nb.runtime import Runtime, read_metrics
from nanochat_nb.settings import NanochatError, field_comments
from nanochat_nb.sft import SFTSettings
from nanochat_nb.tokenizer import Tokenizer, train_tokenizer
from conftest import small_model

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}

DIALOGUES = [
    {"messages": [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": "你好，<|assistant_start|>？"},
                  {"role": "assistant", "content": "你好！🦊"}, {"role": "user", "content": "王峰住在哪里？"},
                  {"role": "assistant", "content": "王峰住在东湖。"}]},
    {"messages": [{"role": "user", "content": "What is 3 * 9?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "3*9"},
                                                    {"type": "python_output", "text": "27"}, {"type": "text", "text": "It is 27."}]}]},
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model.  Two spaces."}]},
]
LEARNED = ["你好！🦊<|assistant_end|>王峰住在东湖。<|assistant_end|>",
           "Let me see: <|python_start|>3*9<|python_end|>It is 27.<|assistant_end|>",
           "A small model.  Two spaces.<|assistant_end|>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base folder with a tiny world, a tokenizer and a pretrained model of one layer."
    return small_model(tmp_path_factory.mktemp("sft"), seq_len=64, batch_tokens=512, num_iterations=3, eval_tokens=512)

def settings(base, **kw):
    return SFTSettings(**(dict(depth=1, base_dir=str(base), n_conversations=60, num_iterations=8, eval_every=100, device="cpu",
                               dtype="float32", compile=False) | kw))

def losses(base, stage):
    rows = [r for r in read_metrics(base / f"{stage}_checkpoints/d1/metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == list(range(len(rows)))
    return [r["loss"] for r in rows]


@pytest.mark.parametrize("repeat, seq_len, batch_rows", [(1, 512, 1), (1, 160, 3), (5, 300, 2)])
def test_what_is_learned_after_packing_is_what_the_assistant_says(base, repeat, seq_len, batch_rows):
    tok = Tokenizer.load(base / "tokenizer")
    chats = DIALOGUES * repeat
    loader, said = ChatLoader(chats, tok, seq_len=seq_len, batch_rows=batch_rows), []
    while sum(map(len, said)) < sum(map(len, LEARNED)) * repeat and loader.epoch == 0:
        x, y = next(loader)
        assert (y[:, :-1][y[:, :-1] >= 0] == x[:, 1:][y[:, :-1] >= 0]).all()     # a target is the next input
        for row_x, row_y in zip(x.tolist(), y.tolist()):
            for i in [i for i, t in enumerate(row_x) if t == tok.bos_id] or [0]:  # conversation by conversation
                end = next((j for j in range(i + 1, len(row_x)) if row_x[j] == tok.bos_id), len(row_x))
                ids = [t for t in row_y[i:end] if t >= 0]
                if ids: said.append(tok.decode(ids))
    assert sorted(set(said)) == sorted(LEARNED) and loader.n_cut == loader.n_dropped == 0
    for text in LEARNED: assert said.count(text) >= repeat

def test_masked_gradients_do_not_depend_on_the_micro_batch(base):
    model, _ = sft.load_model(sft.start_from(settings(base)))
    tok = Tokenizer.load(base / "tokenizer")
    loader = ChatLoader(DIALOGUES, tok, seq_len=64, batch_rows=4)
    x, y = next(loader)
    y[0, 30:] = -1; y[3] = -1
    whole = torch.autograd.grad(model(x, y), list(model.parameters()))           # torch's own mean over the targets
    for micro in (4, 2, 1):
        t = sft.Trainer(settings(base, lr_scale=1.0), Runtime(torch.device("cpu"), torch.float32, 0, 1, 0), tok, model, loader,
                        base / "unused", 1, micro, 256)
        model.zero_grad(set_to_none=True)
        t.gradients(model, x, y)
        for p, g in zip(model.parameters(), whole): torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)

def test_a_run_without_any_target_in_some_rows_is_finite(base, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "never seen"}]}, DIALOGUES[2]] * 8
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = sft.train(settings(base, stage="mid", tag="", conversations=str(tmp_path / "c.jsonl"), text_share=0.0, num_iterations=3))
    assert out["n_dropped"] == 8 and out["n_cut"] == 0
    assert all(0 < l < 20 for l in losses(base, "mid"))
    assert json.loads((base / "report/mid.json").read_text())["n_dropped"] == 8

def test_what_is_counted_does_not_depend_on_batches_made_ahead(base, tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "never seen"}]}, DIALOGUES[2]] * 400
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    def dropped(depth):
        with monkeypatch.context() as m:
            m.setattr(pretrain, "Prefetch", partial(pretrain.Prefetch, depth=depth))
            out = sft.train(settings(base, stage="mid", conversations=str(tmp_path / "c.jsonl"), text_share=0.0, num_iterations=3))
        return out["n_dropped"]
    assert dropped(0) == dropped(20) > 0

def test_killed_and_resumed_is_as_if_nothing_had_happened(base):
    cfg = settings(base, init="base", num_iterations=60, save_every=4, keep=2)
    flags = [f"--{f.name}={v}" for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default]
    p = subprocess.Popen([sys.executable, "-m", "nanochat_nb.sft", *flags], cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
    path, end = base / "sft_checkpoints/d1/metrics.jsonl", time.time() + 60
    while len(read_metrics(path)) < 12: assert p.poll() is None and time.time() < end; time.sleep(0.01)
    p.send_signal(signal.SIGKILL); p.wait()
    done = len(losses(base, "sft"))
    assert 8 < done < 60
    sft.train(replace(cfg, resume=True))
    resumed = losses(base, "sft")
    assert not (base / "sft_checkpoints/d1/before").exists()
    sft.train(cfg)
    assert resumed == losses(base, "sft") and len(resumed) == 60

def test_two_ranks_train_as_one_does(base):
    cfg = settings(base, init="base", num_iterations=6)
    out = subprocess.run([sys.executable, "-m", "nanochat_nb.sft", "--n_gpu=2", *(f"--{f.name}={v}" for f in dataclasses.fields(cfg)
                          if (v := getattr(cfg, f.name)) != f.default)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert json.loads(out.stdout.splitlines()[-1])["step"] == 6
    two = losses(base, "sft")
    sft.train(cfg)
    assert two == pytest.approx(losses(base, "sft"), abs=1e-3) and len(two) == 6
    assert json.loads((base / "report/sft.json").read_text())["ranks"] == 1

def test_mid_is_where_sft_starts(base):
    sft.train(settings(base, stage="mid", num_iterations=2))
    assert sft.start_from(settings(base)).parent.name == "mid_checkpoints"
    assert sft.start_from(settings(base, init="base")).parent.name == "base_checkpoints"
    rate = lambda folder: sft.load_model(base / folder / "d1")[1]["settings"]["lr_scale"]
    sft.train(settings(base, num_iterations=2))
    assert rate("sft_checkpoints") == rate("mid_checkpoints") == rate("base_checkpoints") / 2

def test_documents_are_those_of_pretraining(base, tmp_path, monkeypatch):
    at, texts = dict(base_dir=str(tmp_path / "b")), tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"Number {i} is followed by number {i + 1}, as ever. " * 9}) + "\n" for i in range(200)))
    pretrain.train(pretrain.PretrainSettings(depth=1, source=str(texts), vocab_size=300, seq_len=64, batch_tokens=512, num_iterations=2, eval_tokens=512,
                                             device="cpu", dtype="float32", compile=False, **at))
    (tmp_path / "c.jsonl").write_text((HELLO + "\n") * 30)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(dict(messages=[{"role": "user", "content": f"{i}?"}], answer="7")) + "\n" for i in range(20)))
    data, = (p.parent for p in (tmp_path / "b/base_data").glob("*/manifest.json"))
    made, cfg = (data / "manifest.json").stat().st_mtime_ns, settings(tmp_path / "b", conversations=str(tmp_path / "c.jsonl"), num_iterations=2)
    (texts / "a.jsonl").rename(tmp_path / "a.jsonl"); texts.rmdir()              # gone, but prepared
    read, loader = [], sft.TextLoader
    monkeypatch.setattr(sft, "TextLoader", lambda data, *a, **k: read.append(data) or loader(data, *a, **k))
    sft.train(replace(cfg, stage="mid"))
    out = subprocess.run([sys.executable, "-m", "nanochat_nb.sft", "--n_gpu=2", *(f"--{f.name}={v}" for f in dataclasses.fields(cfg)
                          if (v := getattr(cfg, f.name)) != f.default)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    rl.train(rl.RLSettings(depth=1, questions=str(tmp_path / "q.jsonl"), num_iterations=1, per_step=2, group=2, max_tokens=2, device="cpu", dtype="float32", **at))
    told = [json.loads((tmp_path / f"b/report/{s}.json").read_text())["settings"]["source"] for s in ("mid", "sft", "rl")]
    assert read == [data] and told == [str(texts)] * 3
    assert not (tmp_path / "b/base_data/world").exists() and not (tmp_path / "b/report/data.json").read_text().count('"world"') and (data / "manifest.json").stat().st_mtime_ns == made
    sft.train(replace(cfg, source=str(tmp_path / "a.jsonl")))                   # an explicit one wins
    assert len(read) == 2 and json.loads((read[1] / "manifest.json").read_text())["source"] == str(tmp_path / "a.jsonl")
    (data / "manifest.json").unlink()
    for main in (sft.train, sft.main):
        with pytest.raises(NanochatError, match=f"source is empty, so as in .*/mid_checkpoints/d1: source '{texts}' is no known source"): main(replace(cfg, init="mid"))
    meta = tmp_path / "b/mid_checkpoints/d1/step_000002/meta.json"                # an imported model has no such entry
    kept = json.loads(meta.read_text()); del kept["settings"]["source"]; meta.write_text(json.dumps(kept))
    assert sft.with_source(cfg, meta.parents[1]).source == "world"

def test_every_run_keeps_its_record(base):
    shutil.copytree(base / "base_checkpoints/d1", base / "base_checkpoints/other")
    for tag in ("", "other"): sft.train(settings(base, init="base", tag=tag, num_iterations=1))
    told = [json.loads((base / f"sft_checkpoints/{tag}/record.json").read_text()) for tag in ("d1", "other")]
    assert [x["settings"]["tag"] for x in told] == ["d1", "other"] and told[1] == json.loads((base / "report/sft.json").read_text())


HELLO = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})

def test_an_epoch_is_one_pass_whatever_the_order(base):
    "Short and long in turn, as in files where two languages alternate; and lengths that leave room at the end of rows."
    say = lambda n: {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab" * n}]}
    tok = Tokenizer.load(base / "tokenizer")
    for n, talks in ((4000, [say(1 + 40 * (i % 2)) for i in range(4000)]), (800, [say(14)] * 800)):
        chat = ChatLoader(talks, tok, seq_len=128, batch_rows=4)
        steps = sft.steps_of(sft.SFTSettings(), chat)
        for _ in range(steps): next(chat)
        assert 0.93 < (chat.place - len(chat.packer)) / n < 1.07, steps

def test_a_start_that_fails_leaves_the_earlier_run_in_place(base, tmp_path):
    bad, _ = tmp_path/"long.jsonl", shutil.copytree(base/"base_checkpoints/d1", base/"base_checkpoints/kept")
    bad.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 9000}, {"role": "assistant", "content": "y"}]}) + "\n")
    sft.train(settings(base, tag="kept", stage="sft", init="base", num_iterations=1))
    with pytest.raises(NanochatError, match="none of 1 conversations"): sft.train(settings(base, tag="kept", stage="sft", init="base", conversations=str(bad), num_iterations=1))
    assert latest_step(base/"sft_checkpoints/kept") == 1

def test_a_resumed_run_keeps_to_what_it_started_from(base):
    shutil.copytree(base/"base_checkpoints/d1", base/"base_checkpoints/late")
    sft.train(settings(base, tag="late", num_iterations=1))
    sft.train(settings(base, tag="late", stage="mid", num_iterations=1))
    sft.train(settings(base, tag="late", num_iterations=2, resume=True))
    assert json.loads((base/"sft_checkpoints/late/record.json").read_text())["start"].endswith("base_checkpoints/late")
    sft.train(settings(base, tag="late", num_iterations=1))                    # a new one begins with mid
    assert json.loads((base/"sft_checkpoints/late/record.json").read_text())["start"].endswith("mid_checkpoints/late")

@pytest.mark.parametrize("line, says", [
    (HELLO[:30], "line 2: not valid JSON"),
    ("[1]", "line 2: expected an object"),
    (HELLO.replace("messages", "turns"), "line 2: expected a list 'messages'"),
    (HELLO.replace('"user"', '"assistant"'), "line 2, message 1: role is 'assistant', expected 'user'"),
    (HELLO.replace('"assistant"', '"asistant"'), "line 2, message 2: role is 'asistant'"),
    (HELLO.replace('"Hello"', "null"), "line 2, message 2: content must be"),
    (HELLO.replace('"Hello"', '" "'), "line 2, message 2: is empty"),
    ('{"messages": ' + "[" * 99_999, "line 2: not valid JSON"),
])
def test_a_bad_line_is_named(base, tmp_path, line, says):
    (tmp_path / "c.jsonl").write_text(HELLO + "\n" + line + "\n")
    with pytest.raises(NanochatError) as e: sft.train(settings(base, conversations=str(tmp_path / "c.jsonl")))
    assert says in str(e.value) and "c.jsonl" in str(e.value)

@pytest.mark.parametrize("kw, says", [
    (dict(epochs=float("inf"), num_iterations=0), "epochs=inf"), (dict(tag="../out"), "no path"), (dict(tag=" .."), "no path"), (dict(depth=7), "no checkpoint of stage base with tag d7"), (dict(tag="mine"), "with tag mine"), (dict(init="sft"), "starts from base or mid"),
    (dict(stage="base"), "expected mid or sft"), (dict(text_share=1.0), "text_share=1.0"), (dict(text_share=-0.1), "text_share=-0.1"),
    (dict(conversations="worlds"), "did you mean 'world'"), (dict(conversations="no.jsonl"), "'no.jsonl' is no file"),
    (dict(conversations=","), "there are no conversations"), (dict(n_conversations=0), "there are no conversations"),
    (dict(num_iterations=-3), "num_iterations=-3"), (dict(num_iterations=0, epochs=0.0), "epochs=0.0"), (dict(depth=0), "depth=0"),
    (dict(lr_scale=-1.0), "lr_scale=-1.0: expected 0"), (dict(warmdown=5.0), "warmdown=5.0: expected a share"), (dict(device_batch=-1), "device_batch=-1: expected 0"),
    (dict(n_gpu=0), "n_gpu=0: expected 1"), (dict(matrix_lr=float("nan")), "matrix_lr=nan: expected 0"),
])
def test_a_bad_setting_is_named(base, kw, says):
    with pytest.raises(NanochatError) as e: sft.train(settings(base, **kw))
    assert says in str(e.value)

def test_a_command_ends_with_one_line(tmp_path):
    for flags, says in ((["--base_dir", str(tmp_path)], "no checkpoint of stage base"), (["--stge", "mid"], "did you mean 'stage'")):
        r = subprocess.run([sys.executable, "-m", "nanochat_nb.sft", *flags], cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert r.returncode == 2 and says in r.stderr and "Traceback" not in r.stderr
    assert not list(tmp_path.iterdir())                                          # nothing was made on the way

def test_a_checkpoint_of_another_tokenizer_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "b")
    text = (base / "tokenizer/tokenizer.json").read_text(encoding="utf-8")
    other = train_tokenizer(["another text altogether, 别的文字。" * 40, text[:20_000]], 400)
    assert other.hash != Tokenizer.load(base / "tokenizer").hash
    other.save(tmp_path / "b/tokenizer")
    with pytest.raises(NanochatError, match="tokenizer"): sft.train(settings(tmp_path / "b", init="base"))

def test_parameters_cell_is_the_dataclass():
    cells = json.loads((ROOT / "nbs/04_sft.ipynb").read_text(encoding="utf-8"))["cells"]
    at = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])]
    assert len(at) == 1
    source = "".join(cells[at[0]]["source"])
    got = {n.target.id: (n.annotation.id, ast.literal_eval(n.value)) for n in ast.parse(source).body}
    fields = dataclasses.fields(SFTSettings)
    assert got == {f.name: (getattr(f.type, "__name__", f.type), f.default) for f in fields} and list(got) == [f.name for f in fields]
    assert [line.split("#")[1].strip() for line in source.splitlines()] == [field_comments(SFTSettings)[f.name] for f in fields]
    assert "".join(cells[at[0] + 1]["source"]).strip() == "cfg = from_notebook(SFTSettings, globals())"
    assert "launch_training(cfg" in "".join(cells[-1]["source"]) and "#| eval: false" in "".join(cells[-1]["source"])
