"The planner where it does not read well as a cell: the command, bad input, a real source, the picture of every card."
import json, os, shlex, subprocess, sys
import pytest
from nanochat_nb.data import DataSettings, prepare, read_manifest
from nanochat_nb.model import config_from_depth, count_params, memory_bytes, scaling_params
from nanochat_nb.plan import *
from nanochat_nb.optim import plan as sizes_of
from nanochat_nb.plan import GPUS, HEADROOM
from nanochat_nb.pretrain import PretrainSettings, fill
from nanochat_nb.settings import NanochatError, from_flags
from nanochat_nb.tokenizer import Tokenizer, TokenizerSettings, prepare_tokenizer

def command(base, *flags):
    out = subprocess.run([sys.executable, "-m", "nanochat_nb.plan", *flags], env=os.environ | {"NANOCHAT_BASE_DIR": str(base)},
                         capture_output=True, text=True)
    return out.returncode, out.stdout, out.stderr

@pytest.fixture(autouse=True)
def nothing_in_place(tmp_path, monkeypatch): monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    d = tmp_path_factory.mktemp("plan")
    prepare(DataSettings(base_dir=str(d), n_people=10, n_chars=100_000))
    prepare_tokenizer(TokenizerSettings(base_dir=str(d), vocab_size=600))
    return str(d)

def test_the_command_of_the_guide(tmp_path):
    code, out, _ = command(tmp_path, "--depth", "20", "--gpu", "h100", "--n_gpu", "8", "--arch", "classic")
    p = json.loads(out.splitlines()[-1])
    assert code == 0 and p["params"] == 560_988_160 and p["tables"] == 0 and p["shards"] == 216 and p["tokens"] == 21_400 * 524_288
    assert (p["hours"], round(p["dollars"]), round(p["yuan"])) == (3.35, 67, 476)
    assert (p["micro_batch"], p["accumulation"]) == (32, 1)
    assert 30 < p["disk_gb"] < 40 and "assumed" in out and "MFU 0.41: an assumption" in out and "¥476" in out

def test_the_default_form_reads_as_much_and_its_tables_are_counted_apart(tmp_path):
    code, out, _ = command(tmp_path, "--depth", "20", "--gpu", "h100", "--n_gpu", "8")
    p = json.loads(out.splitlines()[-1])
    assert code == 0 and p["tokens"] == 21_400 * 524_288 and p["tables"] == 10 * 65536 * 1280
    assert p["params"] + p["tables"] == count_params(config_from_depth(20, arch="modern"))["total"]
    assert p["memory_gb"] <= 80 and p["hours"] < 3.35 and f"{p['tables']:,} in tables of values" in out

@pytest.mark.parametrize("flags, says", [
    (["--gpu", "h10"], "did you mean 'h100'"), (["--dept", "20"], "did you mean 'depth'"), (["--depth", "0"], "depth=0"),
    (["--mfu", "0"], "mfu=0"), (["--source", "nowhere"], "nowhere"), (["--n_gpu", "-1"], "n_gpu=-1")])
def test_what_cannot_be_planned_is_one_line(tmp_path, flags, says):
    code, out, err = command(tmp_path, *flags)
    assert code == 2 and says in err and len(err.splitlines()) == 1 and not out

def test_what_is_in_place_is_measured(base):
    p = make_plan(PlanSettings(base_dir=base, depth=4, n_gpu=1, seq_len=256, batch_tokens=2048, ratio=1.0, source="world"))
    assert p["vocab_size"] == 600 and 1 < p["measured"]["zh"] < p["measured"]["en"] < 4
    assert p["measured"]["zh"] < p["chars_per_token"] == p["measured"]["all"] < p["measured"]["en"]
    train = [s for s in read_manifest(f"{base}/base_data/world")["shards"] if s["split"] == "train"]
    assert p["there"] == sum(s["characters"] for s in train) and p["shards"] == len(train) == 1
    assert p["disk"]["base_data"] == pytest.approx(sum(s["bytes"] for s in train), rel=1e-6)
    assert p["epochs"] == pytest.approx(p["tokens"] * p["chars_per_token"] / p["there"]) and "times" in p["advice"][-1]
    q = make_plan(PlanSettings(base_dir=base, depth=4, n_gpu=1, seq_len=256, batch_tokens=2048, ratio=1.0))   # text as the tokenizer's
    size = sum(s["bytes"] for s in train) / sum(s["characters"] for s in train)
    assert q["there"] == 0 and q["disk"]["base_data"] == pytest.approx(q["chars"] * size, rel=1e-6)

def test_a_token_holds_what_the_mix_of_languages_says(base, tmp_path):
    "Ten Chinese characters to one English: not half and half, though as many documents of each are held out."
    zh, en = ("一二三四五六七八九十" * 4, "the cat sat on the mat and looked at the moon ")
    docs = [{"text": f"{i}{t}", "lang": k} for k, t, n in (("zh", zh, 3000), ("en", en, 300)) for i in range(n)]
    (tmp_path/"mix.jsonl").write_text("\n".join(map(json.dumps, docs)))
    mix = str(tmp_path/"mix.jsonl")
    prepare(DataSettings(base_dir=base, source=mix, val_fraction=.5))
    got, tok = measured_chars(base, mix), Tokenizer.load(f"{base}/tokenizer")
    true = sum(len(d["text"]) for d in docs) / sum(map(len, tok.encode_batch([d["text"] for d in docs])))
    assert got["all"] == pytest.approx(true, rel=.05) and got["zh"] < got["all"] < (got["zh"] + got["en"]) / 2

def test_the_command_it_proposes_can_be_typed():
    cfg = PlanSettings(vocab_size=65536, chars_per_token=4.8, ratio=10)
    line = next(x for x in sheet(cfg, make_plan(cfg)).splitlines() if x.startswith("run "))
    made = from_flags(PretrainSettings, line.split("nanochat_nb.pretrain ")[1].split())
    assert (made.depth, made.n_gpu, made.device_batch, made.ratio) == (20, 8, 32, 10)

def test_the_command_keeps_spaces_and_the_cache():
    p = dict(depth=4, n_gpu=1, vocab_size=4096, batch_tokens=2048, micro_batch=8)
    made = from_flags(PretrainSettings, shlex.split(run_line(PlanSettings(base_dir="/a b", cache=True), p))[3:])
    assert (made.base_dir, made.token_cache, made.depth) == ("/a b", True, 4)

def test_a_chinese_tokenizer_needs_less_text():
    zh, en = (make_plan(PlanSettings(base_dir="", vocab_size=65536, chars_per_token=c)) for c in (1.5, 4.8))
    assert zh["params"] == en["params"] and zh["shards"] == 68 and zh["hours"] == en["hours"]

@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("depth", [4, 12, 20, 32])
def test_every_micro_batch_fits_and_twice_as_many_would_not(gpu, depth):
    gb, model = GPUS[gpu][0], config_from_depth(depth)
    n = micro_batch(model, gb)
    need = lambda rows: HEADROOM * memory_bytes(model, rows)["total"] / 2**30
    if n: assert need(n) <= gb
    if n < 64: assert need(max(1, 2 * n)) > gb
    if not n: assert "not even one row" in make_plan(PlanSettings(depth=depth, gpu=gpu, vocab_size=65536))["advice"][0]

def test_half_the_ratio_halves_everything():
    a, b = (make_plan(PlanSettings(vocab_size=65536, chars_per_token=4.8, ratio=r)) for r in (20, 10))
    for k in ("tokens", "hours", "dollars", "shards"): assert a[k] == pytest.approx(2 * b[k], rel=0.01), k
    assert a["disk"]["base_checkpoints"] == b["disk"]["base_checkpoints"]

def test_hours_times_speed_are_the_tokens_of_the_measured_run():
    "At the MFU that the table assumes, d12 makes the tokens a second that the log measured."
    p = make_plan(PlanSettings(depth=12, arch="classic", n_gpu=1, vocab_size=65536))
    assert p["tokens"] / (p["hours"] * 3600) == pytest.approx(389_073, rel=0.01)

def test_four_epochs_are_nearly_as_good_as_new_text_and_forty_are_not():
    assert worth(4, 1) > 0.9 * 4 and worth(40, 1) < 0.5 * 40 and worth(0.5, 1) == 0.5
    assert worth(100, 50) == pytest.approx(50 * worth(2, 1))
    n = count_params(config_from_depth(20))["total"]
    assert expected_loss(n, 10 * n) > expected_loss(n, 20 * n) > expected_loss(2 * n, 20 * n)

@pytest.mark.parametrize("kw", [dict(depth=4, gpu="4060", n_gpu=1), dict(depth=12, seq_len=512, gpu="4080", n_gpu=1, ratio=5.), dict()])
def test_the_command_it_prints_trains_what_it_planned(kw):
    cfg = PlanSettings(**kw); p = make_plan(cfg)
    line, = [l for l in sheet(cfg, p).splitlines() if l.startswith("run")]
    run = fill(from_flags(PretrainSettings, line.split("nanochat_nb.pretrain ")[1].split()))
    model = config_from_depth(run.depth, run.vocab_size, run.seq_len, run.arch)
    tokens = round(run.ratio * scaling_params(model))
    assert scaling_params(model) == p["params"] and run.batch_tokens == p["batch_tokens"] and run.n_gpu == p["n_gpu"]
    assert abs(tokens // run.batch_tokens - p["steps"]) <= 1 and micro_batch(model, cfg.memory_gb or GPUS[cfg.gpu][0], n_gpu=run.n_gpu) >= run.device_batch

@pytest.mark.parametrize("kw", [dict(tflops=-5.), dict(price=-1.), dict(memory_gb=-1.), dict(n_chars=-10), dict(chars_per_token=-1.), dict(mfu=41.),
                                dict(ratio=float("inf")), dict(mfu=float("nan"))])
def test_numbers_that_cannot_be_are_named(kw):
    with pytest.raises(NanochatError, match=f"{list(kw)[0]}="): make_plan(PlanSettings(**kw))

def test_advice_on_text_that_is_short_and_on_what_was_rounded():
    short, long = (" ".join(make_plan(PlanSettings(n_chars=n, batch_tokens=100000))["advice"]) for n in (10**9, 10**12))
    assert "halves tokens, hours" in short and "halves tokens, shards, hours" in long and "batch_tokens 100,000 →" in short

def test_what_does_not_fit_a_card_is_split_over_several_before_a_larger_one_is_bought():
    cfg = dict(depth=26, gpu="4090", vocab_size=65536)                     # modern, 8 cards of 24 GB
    whole, split = make_plan(PlanSettings(**cfg)), make_plan(PlanSettings(**cfg, shard=True))
    assert whole["micro_batch"] == 0 and "take --shard True or --depth" in whole["advice"][0]
    assert split["micro_batch"] > 0 and split["memory_gb"] <= 24 and not any("not even" in x for x in split["advice"])
    line = run_line(PlanSettings(**cfg, shard=True), split)
    assert from_flags(PretrainSettings, line.split("nanochat_nb.pretrain ")[1].split()).shard
    alone = make_plan(PlanSettings(**cfg | dict(n_gpu=1)))                 # nobody to share with
    assert "--shard" not in alone["advice"][0] and peak_gb(config_from_depth(4), 1) == peak_gb(config_from_depth(4), 1, 1, True)

def test_a_shorter_row_is_advised_where_it_fits():
    cfg = dict(depth=4, arch="classic", n_gpu=1, seq_len=65536, vocab_size=1024)
    need = [peak_gb(config_from_depth(4, 1024, t, "classic"), 1) for t in (32768, 65536)]
    said = make_plan(PlanSettings(**cfg, memory_gb=sum(need) / 2))["advice"]
    assert any("take --seq_len 32768 or" in x for x in said), said

@pytest.mark.parametrize("kw", [dict(depth=4, n_gpu=1), dict(batch_tokens=100_000, ratio=7.123456789), dict(depth=26, gpu="4090", shard=True)])
def test_the_printed_command_has_the_planned_steps_exactly(kw, base):
    cfg = PlanSettings(**kw, base_dir=base, source="world", vocab_size=65536); p = make_plan(cfg)
    run = fill(from_flags(PretrainSettings, run_line(cfg, p).split("nanochat_nb.pretrain ")[1].split()))
    made = sizes_of(run.depth, run.vocab_size, run.seq_len, arch=run.arch, ratio=run.ratio, batch_tokens=run.batch_tokens,
                    n_gpu=run.n_gpu, device_batch=run.device_batch)
    for k in ("params", "tokens", "steps", "batch_tokens", "accumulation"): assert getattr(made, k) == p[k], k
    assert (made.device_batch, run.base_dir, run.source) == (p["micro_batch"], base, "world")

def test_the_loss_of_half_the_ratio_counts_repeated_text_at_its_worth():
    p = make_plan(PlanSettings(vocab_size=65536, chars_per_token=4.8, n_chars=10**9))
    once = p["tokens"] / p["epochs"]
    lost = expected_loss(p["params"], worth(p["tokens"] / 2, once)) - expected_loss(p["params"], worth(p["tokens"], once))
    assert p["epochs"] > 40 and any(f"loss about {lost:+.2f} nats" in x for x in p["advice"])
    assert lost < 0.5 * (expected_loss(p["params"], p["tokens"] / 2) - expected_loss(p["params"], p["tokens"]))    # all new
