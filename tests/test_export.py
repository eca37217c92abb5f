"Export: the command, what transformers makes of it, and what cannot be read back."
import json, os, shutil, subprocess, sys
from dataclasses import asdict
import pytest, torch
from safetensors.torch import load_file, save_file
from nanochat_nb.checkpoint import save_checkpoint
from nanochat_nb.engine import Engine
from nanochat_nb.evals import load_model
from nanochat_nb.export import ExportSettings, export_hf, load_hf, run_export, run_import
from nanochat_nb.model import GPT, GPTConfig
from nanochat_nb.pretrain import PretrainSettings, fill
from nanochat_nb.settings import NanochatError
from nanochat_nb.sft import SFTSettings, fill_from
from nanochat_nb.tokenizer import train_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
TEXTS = [f"{i}+{j} 等于几？你好世界 hello, how much is it?" for i in range(10) for j in range(10)]

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tok = train_tokenizer(TEXTS, 300)
    tok.save(folder/"tokenizer")
    model = GPT(GPTConfig(2, 2, 2, 64, tok.vocab_size, 96))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3, generator=g)
    save_checkpoint(folder/"sft_checkpoints"/"d4", 7, model, meta=dict(config=asdict(model.cfg), tokenizer_hash=tok.hash, settings={"source": "world"}))
    return folder, model, tok

def command(*args): return subprocess.run([sys.executable, "-m", "nanochat_nb.export", *map(str, args)], capture_output=True, text=True)

def test_command_there_and_back(base, tmp_path):
    folder, model, tok = base
    done = command("--to", "hf", "--tag", "d4", "--stage", "sft", "--base_dir", folder, tmp_path/"out")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert "world" in (tmp_path/"out"/"README.md").read_text(encoding="utf-8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/"out")
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path/"out")
    ids = their_tok.apply_chat_template([{"role": "user", "content": "你好 hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad(): assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)
    out = theirs.generate(ids, max_new_tokens=30)[0, ids.size(1):].tolist()   # greedy, by generation_config.json
    end = tok.special("assistant_end")
    assert [t for t in out if t != end] == Engine(model, tok).generate(ids.tolist(), 30, temperature=0, tools=False, stop={end})[0]
    done = command("--source", tmp_path/"out", "--tag", "again", "--base_dir", tmp_path/"base")
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"base"/"sft_checkpoints"/"again"/"latest").exists()
    like = fill(PretrainSettings(depth=2))
    for stage in ("base", "mid"):                                               # and can be trained further
        assert command("--source", tmp_path/"out", "--tag", "on", "--stage", stage, "--base_dir", tmp_path/"base").returncode == 0
        settings = load_model(tmp_path/"base"/f"{stage}_checkpoints"/"on")[1]["settings"]
        assert fill_from(SFTSettings(depth=2), settings).lr_scale == like.lr_scale / 2
    again = command("--source", tmp_path/"out", "--tag", "again", "--base_dir", tmp_path/"base")
    assert again.returncode == 2 and "choose another --tag" in again.stderr

def test_command_says_what_is_wrong(base, tmp_path):
    folder, _, _ = base
    for args, said in (((), "name the folder"), (("--to", "gguf", tmp_path/"x"), "GGUF knows no architecture"), ((folder,), "not empty"),
                       (("--tag", "d5", tmp_path/"x"), "no checkpoint"), (("--dtype", "int3", tmp_path/"x"), "unknown dtype"),
                       (("--source", tmp_path/"none"), "none"), (("--source", tmp_path, "--stage", "stf"), "unknown stage 'stf'; did you mean 'sft'?"),
                       (("--source", tmp_path, tmp_path/"x"), "an import writes a checkpoint into --base_dir"),
                       ((folder/"tokenizer"/"meta.json"/"x"/"y",), "cannot write"), (("/proc/xx/y",), "cannot write"),
                       (("--source", folder/"tokenizer"/"meta.json"), "cannot be read")):
        done = command("--base_dir", folder, *args)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)
    assert list(tmp_path.iterdir()) == []                        # and nothing half written

def test_the_folder_one_stands_in(base, tmp_path, monkeypatch):
    (tmp_path/"here").mkdir(); monkeypatch.chdir(tmp_path/"here")
    with pytest.raises(NanochatError, match="where you stand"): export_hf(*base[1:], ".")
    assert export_hf(*base[1:], "out").samefile(tmp_path/"here/out") and os.listdir(tmp_path) == ["here"]

def test_half_precision_is_close(base, tmp_path):
    _, model, tok = base
    back, _ = load_hf(export_hf(model, tok, tmp_path/"half", dtype="bfloat16"))
    for a, b in zip(model.parameters(), back.parameters()): assert torch.equal(a.bfloat16().float(), b)

def test_damaged_folders(base, tmp_path):
    _, model, tok = base
    for name in ("weights", "missing", "shape", "tokenizer"): export_hf(model, tok, tmp_path/name)
    (tmp_path/"weights"/"model.safetensors").write_bytes(b"x" * 100)
    (tmp_path/"missing"/"model.safetensors").unlink()
    config = json.loads((tmp_path/"shape"/"config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path/"shape"/"config.json").write_text(json.dumps(config))
    (tmp_path/"tokenizer"/"tokenizer.json").unlink()
    for name, said in (("weights", "model.safetensors"), ("missing", "model.safetensors"), ("shape", "disagree"), ("tokenizer", "tokenizer.json")):
        with pytest.raises(NanochatError, match=said): load_hf(tmp_path/name)

def test_damage_inside_the_files(base, tmp_path):
    "Each is one error that names the folder, and none of them loads."
    _, model, tok = base
    modern = GPT(GPTConfig(2, 2, 2, 64, tok.vocab_size, 96, "modern", chunk=8))
    plain, own = export_hf(model, tok, tmp_path/"plain"), export_hf(modern, tok, tmp_path/"own")
    n = 0
    def copy(source):
        nonlocal n; n += 1
        return shutil.copytree(source, tmp_path/str(n))
    def refused(folder, said):
        with pytest.raises(NanochatError, match=said): load_hf(folder)
    def config(source, said, **new):
        folder, old = copy(source), json.loads((source/"config.json").read_text())
        (folder/"config.json").write_text(json.dumps({k: v for k, v in (old | new).items() if v is not None}))
        refused(folder, said)
    def weights(said, change):
        folder = copy(plain)
        state = load_file(folder/"model.safetensors")
        save_file(state | {(k := "lm_head.weight"): change(state[k])}, folder/"model.safetensors")
        refused(folder, said)
    for source in (plain, own): config(source, "damaged", num_attention_heads=None, num_key_value_heads=None)
    config(plain, "damaged", num_attention_heads="two"); config(own, "n_head='two' in config.json is not int", num_attention_heads="two")
    config(own, "chunk='x' in config.json is not int", chunk="x")
    weights("lm_head.weight is not all finite", lambda w: w * torch.nan); weights("lm_head.weight is not all finite", lambda w: w.to(torch.int8))
    for name, text, said in (("config.json", "[]", "damaged"), ("model.safetensors.index.json", "{}", "weight_map"), ("tokenizer.json", "{}", "tokenizer.json cannot be used")):
        folder = copy(plain); (folder/name).write_text(text); refused(folder, said)

def test_model_and_tokenizer_of_two_sizes(base, tmp_path):
    _, model, tok = base
    other = train_tokenizer(TEXTS, 280)
    with pytest.raises(NanochatError, match="the tokenizer 280"): export_hf(model, other, tmp_path/"out")
    out = export_hf(model, tok, tmp_path/"out")
    (out/"tokenizer.json").write_text(other.spec, encoding="utf-8")
    with pytest.raises(NanochatError, match="tokenizer.json cannot be used: .*the tokenizer 280"):
        run_import(ExportSettings(source=str(out), base_dir=str(tmp_path/"base")))
    assert not (tmp_path/"base"/"tokenizer").exists()

def test_the_step_asked_for_is_exported_and_only_with_its_tokenizer(base, tmp_path):
    folder, model, tok = base
    at = tmp_path/"base"
    tok.save(at/"tokenizer")
    meta = dict(config=asdict(model.cfg), tokenizer_hash=tok.hash, settings={})
    for step in (1, 2):
        save_checkpoint(at/"sft_checkpoints"/"d2", step, {k: v + step for k, v in model.state_dict().items()}, meta=meta)
    for step, want in ((1, 1), (-1, 2)):
        out = run_export(ExportSettings(out=str(tmp_path/f"out{step}"), base_dir=str(at), step=step))
        assert torch.equal(load_file(out/"model.safetensors")["lm_head.weight"], model.head.weight + want)
    train_tokenizer([t[::-1] for t in TEXTS] + ["another text " * 9], 300).save(at/"tokenizer")
    with pytest.raises(NanochatError, match="belongs to tokenizer"): run_export(ExportSettings(out=str(tmp_path/"no"), base_dir=str(at)))

def test_nothing_else_is_deleted(base, tmp_path, monkeypatch):
    (tmp_path/".mine.tmp").mkdir(); (tmp_path/".mine.tmp"/"precious").touch(); (tmp_path/"link").symlink_to(tmp_path/"nowhere")
    export_hf(*base[1:], tmp_path/"mine")
    with pytest.raises(NanochatError, match="cannot write"): export_hf(*base[1:], tmp_path/"link")
    def full(self, *a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_text", full)                     # met at the first JSON file
    with pytest.raises(NanochatError, match="No space left"): export_hf(*base[1:], tmp_path/"full")
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "link", "mine"] and (tmp_path/".mine.tmp"/"precious").exists()

def test_the_card_claims_no_stage_that_is_not_known(base, tmp_path):
    card = lambda name, **kw: (export_hf(*base[1:], tmp_path/name, **kw)/"README.md").read_text(encoding="utf-8")
    assert "| sft |" in card("said", stage="sft") and "阶段" not in card("unsaid")

def test_an_unwritable_place_is_said(base, tmp_path, monkeypatch):
    _, model, tok = base
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr("nanochat_nb.export.save_file", full)
    with pytest.raises(NanochatError, match="No space left"): export_hf(model, tok, tmp_path/"out")
    assert list(tmp_path.iterdir()) == []

def test_the_modern_form_in_a_fresh_process(base, tmp_path):
    "What a stranger does: no nanochat_nb there, a batch of two lengths padded on the left, answers as the engine gives them."
    folder, _, tok = base
    model = GPT(GPTConfig(4, 2, 1, 64, tok.vocab_size, 96, "modern", chunk=8, value_embeds=True, residual_mix=True, attn_gain=1.44)).eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3, generator=g)
    meta = dict(config=asdict(model.cfg), tokenizer_hash=tok.hash, settings={"source": "world"})
    save_checkpoint(folder/"sft_checkpoints"/"fast", 7, model, meta=meta)
    done = command("--tag", "fast", "--stage", "sft", "--base_dir", folder, tmp_path/"out")
    assert done.returncode == 0, done.stderr
    card = (tmp_path/"out"/"README.md").read_text(encoding="utf-8")
    assert card.count('from_pretrained(".", trust_remote_code=True)') == 2      # the tokenizer too, or it stops and asks
    script = """import json, sys, torch
sys.modules["nanochat_nb"] = None
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
a, b = json.loads(sys.argv[2])
ids = torch.tensor([a, [0] * (len(a) - len(b)) + b])
real = torch.tensor([[1] * len(a), [0] * (len(a) - len(b)) + [1] * len(b)])
assert m.generate(ids[:1], max_length=len(a) + 2, do_sample=False).size(1) <= len(a) + 2       # the caller's limit
assert m(ids).past_key_values is not None and m.train()(ids).past_key_values is None
m.eval()
try: m.generate(ids, cache_implementation="static", max_new_tokens=3)
except ValueError as e: assert "cache_implementation" in str(e), e
else: raise AssertionError("a static cache would need another mask")
print(json.dumps(m.generate(ids, attention_mask=real, max_new_tokens=30, do_sample=False)[:, len(a):].tolist()))"""
    a, b = tok.render_prompt([{"role": "user", "content": "你好 hello 12+3"}]), [tok.bos_id, 5]
    env = os.environ | {"HF_HOME": str(tmp_path/"cache"), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path/"out"), json.dumps([a, b])], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    end = tok.special("assistant_end")
    got = [[t for t in row if t != end] for row in json.loads(done.stdout.splitlines()[-1])]
    assert got == Engine(model, tok).generate([a, b], 30, temperature=0, tools=False, stop={end})
    done = command("--source", tmp_path/"out", "--tag", "../out", "--base_dir", tmp_path/"base")
    assert done.returncode == 2 and "no path" in done.stderr and not (tmp_path/"base/tokenizer").exists()
    done = command("--source", tmp_path/"out", "--tag", "back", "--base_dir", tmp_path/"base")
    assert done.returncode == 0, done.stderr
