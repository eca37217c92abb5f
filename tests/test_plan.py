"The planner where it does not read well as a cell: the command, bad input, a real source, the picture of every card."
import json, os, subprocess, sys
import pytest
from nanochat_nb.data import DataSettings, prepare, read_manifest
from nanochat_nb.model import config_from_depth, count_params, memory_bytes
from nanochat_nb.plan import *
from nanochat_nb.plan import GPUS, HEADROOM
from nanochat_nb.pretrain import PretrainSettings
from nanochat_nb.settings import from_flags
from nanochat_nb.tokenizer import TokenizerSettings, prepare_tokenizer

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

def test_the_command_it_proposes_can_be_typed():
    cfg = PlanSettings(vocab_size=65536, chars_per_token=4.8, ratio=10)
    line = next(x for x in sheet(cfg, make_plan(cfg)).splitlines() if x.startswith("run "))
    made = from_flags(PretrainSettings, line.split("nanochat_nb.pretrain ")[1].split())
    assert (made.depth, made.n_gpu, made.device_batch, made.ratio) == (20, 8, 32, 10)

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
