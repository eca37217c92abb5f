"The Chinese scenario end to end on real text: the files of configs/chinese_d20 with other sources and a tiny model."
import json, os, subprocess, sys
from pathlib import Path
import pyarrow.parquet as pq, pytest, yaml
from nanochat_nb.data import DataSettings
from nanochat_nb.fastbpe import split_pattern
from nanochat_nb.pretrain import PretrainSettings
from nanochat_nb.runtime import read_metrics
from nanochat_nb.settings import make_settings
from nanochat_nb.tokenizer import Tokenizer, TokenizerSettings

ROOT = Path(__file__).resolve().parent.parent
CONFIG, CORPUS = ROOT/"configs/chinese_d20", ROOT.parent/"shared/corpus"
STAGES = {"00_data": DataSettings, "01_tokenizer": TokenizerSettings, "03_pretrain": PretrainSettings}
real = pytest.mark.skipif(not CORPUS.exists(), reason="no ../shared/corpus")

def settings_of(step): return yaml.safe_load((CONFIG/f"{step}.yaml").read_text(encoding="utf-8"))

@pytest.mark.parametrize("step", STAGES)
def test_every_key_is_live(step):
    cfg = make_settings(STAGES[step], settings_of(step), step)
    for key, value in settings_of(step).items():
        assert getattr(cfg, key) == value
        assert value != getattr(STAGES[step](), key), f"{key} only repeats the default"

def test_the_stages_agree():
    assert len({settings_of(s)["source"] for s in STAGES}) == 1
    assert settings_of("01_tokenizer")["vocab_size"] == settings_of("03_pretrain")["vocab_size"] == 80000

def take(path, out, n):
    "The first n documents of a file, as a folder of their own."
    out.mkdir()
    pq.write_table(pq.read_table(path, columns=["text"]).slice(0, n), out/"text.parquet")
    return str(out)

def run(base, *command):
    p = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=400,
                       env=os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert p.returncode == 0, p.stderr[-3000:]
    return p.stdout

@real
def test_the_whole_way(tmp_path):
    base = tmp_path/"base"
    source = ",".join((take(CORPUS/"zh/shard_00000.parquet", tmp_path/"zh", 1000), take(CORPUS/"en/shard_00000.parquet", tmp_path/"en", 150)))
    run(base, "nanochat_nb.data", "-f", CONFIG/"00_data.yaml", "--source", source)
    out = run(base, "nanochat_nb.tokenizer", "-f", CONFIG/"01_tokenizer.yaml", "--source", source, "--vocab_size", 4096)
    dense = json.loads(out.splitlines()[-1])["bytes_per_token"]
    tok = Tokenizer.load(base/"tokenizer")
    assert tok.vocab_size == 4096 and tok.meta["pattern"] == split_pattern(han=6)
    assert dense["zh"] > 2.5 and dense["en"] > 2                # a byte-level alphabet alone would give 1
    small = dict(source=source, vocab_size=4096, depth=2, num_iterations=30, seq_len=128, batch_tokens=2048, device="cpu", eval_tokens=4096)
    flags = [x for k, v in small.items() for x in ("-p", k, v)]
    run(base, "papermill", "nbs/03_pretrain.ipynb", tmp_path/"out.ipynb", "-f", CONFIG/"03_pretrain.yaml", *flags, "--no-progress-bar")
    rows = read_metrics(base/"base_checkpoints/d2/metrics.jsonl")
    bpb = [{k: r[k] for k in ("bpb_zh", "bpb_en")} for r in rows if "bpb_zh" in r]
    print("bytes a token", dense, "bits a byte", bpb[0], "→", bpb[-1])
    assert all(bpb[-1][k] < bpb[0][k] for k in bpb[0])
    assert next(r["loss"] for r in rows if "loss" in r) == pytest.approx(8.3, abs=0.3)   # ln 4,096
