"""Seconds of training to equal bits per byte, this project and the reference on the same rows of tokens, one GPU.

python bench/time_to_bpb.py prepare FOLDER SHARD.parquet …       tokenizer of 32,768, rows of 2,048 tokens; the last 512 are held out
python bench/time_to_bpb.py FOLDER --reference PATH [--runs NAME …] [--tokens N] [--out FILE.jsonl]

PATH is a checkout of karpathy/nanochat, whose own training script runs with its own rules for rates and batch; only its data,
its tokenizer and its checkpoints are replaced. Every run is a process of its own that reads the same rows in the same order and
is measured on the same held-out rows by the same formula. Seconds are those of the steps: neither compiling (the first step is
counted as an ordinary one) nor measuring.
"""
import argparse, contextlib, io, json, os, re, runpy, statistics, subprocess, sys, types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
T, VOCAB, HELD_OUT = 2048, 32768, 512
OURS = dict(who="ours", arch="modern", fp8=True, batch=65536, points=3, share=0.8,
            settings=dict(muon_beta2=0.9, lr_scale=1.0, matrix_lr=0.025, embedding_lr=0.3, unembedding_lr=0.008, warmdown=0.6))
TUNED = ["--warmup-steps", 5, "--matrix-lr", 0.04, "--embedding-lr", 0.6, "--unembedding-lr", 0.016, "--weight-decay", 0.1]
RUNS = {  # name: who, depth, rows of a micro-batch, tokens a step (0: the reference's own rule), and what else differs
    "ref-d12": dict(who="reference", depth=12, rows=32, batch=0),
    "ref-tuned-d12": dict(who="reference", depth=12, rows=32, batch=131072, args=TUNED),
    "modern-d12": dict(OURS, depth=12, rows=32),
    "classic-d12": dict(OURS, depth=12, rows=32, arch="classic"),
    "ref-d16": dict(who="reference", depth=16, rows=16, batch=0),
    "ref-tuned-d16": dict(who="reference", depth=16, rows=16, batch=131072, args=TUNED),
    "modern-d16": dict(OURS, depth=16, rows=16),
    "classic-d16": dict(OURS, depth=16, rows=16, arch="classic"),
}

def prepare(folder: Path, shards):
    "Tokenizer, rows and bytes of each token, as files in `folder`."
    import numpy as np, pyarrow.parquet as pq
    from nanochat_nb.tokenizer import Tokenizer, train_tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    texts = [t for s in shards for t in pq.read_table(s, columns=["text"])["text"].to_pylist()]
    if not (folder / "tokenizer.json").exists(): train_tokenizer(iter(texts[::3]), VOCAB).save(folder)
    tok = Tokenizer.load(folder)
    ids = [np.asarray([tok.bos_id, *x], np.uint16) for i in range(0, len(texts), 4096) for x in tok.encode_batch(texts[i:i + 4096])]
    flat = np.concatenate(ids)
    n = (len(flat) - 1) // T
    np.save(folder / "rows.npy", np.lib.stride_tricks.as_strided(flat, (n, T + 1), (2 * T, 2)))
    np.save(folder / "nbytes.npy", np.asarray(tok.token_bytes()))
    print(f"{len(texts):,} documents, {n:,} rows of {T}")

class Rows:
    "The rows of training again and again, `rows` at a time: (x, y)."
    def __init__(self, folder, rows): 
        import numpy as np
        self.all, self.rows, self.at = np.load(Path(folder) / "rows.npy", mmap_mode="r")[:-HELD_OUT], rows, 0
    def __iter__(self): return self
    def __next__(self):
        import numpy as np, torch
        at = np.arange(self.at, self.at + self.rows) % len(self.all)
        self.at += self.rows
        r = torch.from_numpy(self.all[at].astype("int64"))
        return r[:, :-1].contiguous(), r[:, 1:].contiguous()
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

def held_out(folder, rows):
    import numpy as np, torch
    r = torch.from_numpy(np.load(Path(folder) / "rows.npy", mmap_mode="r")[-HELD_OUT:].astype("int64"))
    return [(b[:, :-1].contiguous(), b[:, 1:].contiguous()) for b in r.split(rows)]

def ours(run):
    "[(step, bits per byte)], seconds of every step."
    import numpy as np, torch
    from nanochat_nb.evals import bits_per_byte
    from nanochat_nb.model import GPT, config_from_depth
    from nanochat_nb.pretrain import PretrainSettings, Trainer, fill
    from nanochat_nb.runtime import init_runtime, peak_flops
    rt, batch = init_runtime(run.get("device", "cuda"), "bfloat16", 0), run["batch"]
    steps, more = run["tokens"] // batch, run.get("settings", {})
    cfg = fill(PretrainSettings(depth=run["depth"], fp8=run.get("fp8", False), batch_tokens=batch, num_iterations=steps, **more))
    model = GPT(config_from_depth(run["depth"], VOCAB, T, run["arch"])).to(rt.device)
    trainer = Trainer(cfg, rt, None, model, Rows(run["folder"], batch // T), Path("."), steps, min(run["rows"], batch // T), batch)
    trainer.peak, fast = peak_flops(rt), trainer.fast_model()
    val, nbytes = held_out(run["folder"], 16), torch.from_numpy(np.load(Path(run["folder"]) / "nbytes.npy"))
    bpb, seconds = [], []
    for step in range(steps + 1):
        if step % max(1, steps // run["points"]) == 0 or step == steps:
            bpb.append((step, bits_per_byte(model, val, nbytes, rt)))
            print(*bpb[-1], sum(seconds), batch / statistics.median(seconds or [1]), file=sys.stderr, flush=True)
        if step < steps: seconds.append(trainer.train_step(fast, step)["step_ms"] / 1000)
    return bpb, seconds, batch, torch.cuda.max_memory_allocated() / 1e9

def reference(run):
    "The same of the reference's own script."
    import numpy as np, torch
    sys.path.insert(0, run["path"])
    device, val, train = "cuda", held_out(run["folder"], run["rows"]), Rows(run["folder"], run["rows"])
    nbytes = torch.from_numpy(np.load(Path(run["folder"]) / "nbytes.npy"))
    def module(name, **names): sys.modules[name] = types.ModuleType(name); vars(sys.modules[name]).update(names)
    def training(*a, **k):
        for x, y in train: yield x.cuda(), y.cuda(), dict(epoch=0, pq_idx=0, rg_idx=0)
    tok = types.SimpleNamespace(get_vocab_size=lambda: VOCAB)
    module("wandb"); module("scripts.base_eval", evaluate_core=None)
    module("nanochat.tokenizer", get_tokenizer=lambda: tok, get_token_bytes=lambda device: nbytes.to(device))
    module("nanochat.engine", Engine=None)
    module("nanochat.checkpoint_manager", save_checkpoint=lambda *a, **k: None, load_checkpoint=None)
    module("nanochat.dataloader", tokenizing_distributed_data_loader_with_state_bos_bestfit=training,
           tokenizing_distributed_data_loader_bos_bestfit=lambda *a, **k: ((x.cuda(), y.cuda()) for x, y in val))
    import nanochat.loss_eval as le
    measure = le.evaluate_bpb
    le.evaluate_bpb = lambda model, *a: measure(model._orig_mod, *a)          # uncompiled, as ours is
    from nanochat.gpt import GPT, GPTConfig
    d = run["depth"]
    args = ["--depth", d, "--window-pattern", "L", "--device-batch-size", run["rows"], "--eval-tokens", HELD_OUT * T,
            "--core-metric-every", -1, "--sample-every", -1, *run.get("args", [])]
    batch = run["batch"]
    if not batch:                                                              # its rule, for a run of this many tokens
        with torch.device("meta"): sizes = [GPT(GPTConfig(T, VOCAB, k, k // 2, k // 2, k * 64, "L")).num_scaling_params() for k in (d, 12)]
        ratio = run["tokens"] / (sizes[0]["transformer_matrices"] + sizes[0]["lm_head"])
        few = [s["transformer_matrices"] + s["lm_head"] for s in sizes]
        batch = 2 ** round(np.log2(2**19 * (few[0] / few[1]) ** 0.383))
        args += ["--target-param-data-ratio", ratio]
    else: args += ["--num-iterations", run["tokens"] // batch, "--total-batch-size", batch]
    args += ["--eval-every", max(1, run["tokens"] // batch // run["points"])]
    sys.argv, said = ["base_train", *map(str, args)], io.StringIO()
    class Both:
        def write(self, s): said.write(s); sys.stderr.write(s)
        def flush(self): pass
    with contextlib.redirect_stdout(Both()): runpy.run_module("scripts.base_train", run_name="__main__")
    lines = said.getvalue()
    bpb = [(int(a), float(b)) for a, b in re.findall(r"Step (\d+) \| Validation bpb: ([\d.]+)", lines)]
    total = int(re.search(r"Total batch size ([\d,]+)", lines)[1].replace(",", ""))
    return bpb, [float(x) / 1000 for x in re.findall(r"dt: ([\d.]+)ms", lines)], total, torch.cuda.max_memory_allocated() / 1e9

def one(run):
    bpb, seconds, batch, mem = (ours if run["who"] == "ours" else reference)(run)
    usual = statistics.median(seconds)
    at = [sum(min(s, 2 * usual) for s in seconds[:step]) for step, _ in bpb]      # compiling is no step
    run = {k: v for k, v in run.items() if k not in ("path", "folder")}
    print(json.dumps(dict(run, batch=batch, tok_per_s=round(batch / usual), memory_gb=round(mem, 1), first_step_s=round(seconds[0], 1),
                          curve=[dict(step=s, tokens=s * batch, seconds=round(t, 2), bpb=round(b, 5)) for (s, b), t in zip(bpb, at)])))

def reached(curve, bpb):
    "Seconds and tokens at which a curve reaches `bpb`, between its points by a straight line; None if it never does."
    for a, b in zip(curve, curve[1:]):
        if b["bpb"] <= bpb <= a["bpb"]:
            part = (a["bpb"] - bpb) / max(1e-9, a["bpb"] - b["bpb"])
            return [a[k] + part * (b[k] - a[k]) for k in ("seconds", "tokens")]

def table(rows):
    print("| run | tokens a step | tokens/s | memory GB | first step s | tokens | seconds | bits a byte | seconds to the first row's end | share of its time |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    firsts = {}
    for r in rows:
        end, first = r["curve"][-1], firsts.setdefault(r["depth"], r["curve"][-1])
        there = reached(r["curve"], first["bpb"])
        said = f"{there[0]:.0f} | {there[0] / first['seconds']:.2f}" if there else "not reached | "
        print(f"| {r['name']} | {r['batch']:,} | {r['tok_per_s']:,} | {r['memory_gb']} | {r['first_step_s']} | {end['tokens'] / 1e6:.1f}M | {end['seconds']:.0f} | {end['bpb']:.4f} | {said} |")

def main():
    if sys.argv[1:2] == ["prepare"]: return prepare(Path(sys.argv[2]), sys.argv[3:])
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", nargs="?", default=""); ap.add_argument("--reference", default=""); ap.add_argument("--runs", nargs="*", default=list(RUNS))
    ap.add_argument("--tokens", type=int, default=62_914_560); ap.add_argument("--points", type=int, default=8)
    ap.add_argument("--out", default=""); ap.add_argument("--one")
    a = ap.parse_args()
    if a.one: return one(json.loads(a.one))
    rows = []
    for name in a.runs:
        run = dict(tokens=a.tokens, points=a.points) | RUNS[name] | dict(name=name, folder=a.folder, path=a.reference)
        run["tokens"] = int(run["tokens"] * run.pop("share", 1))
        done = subprocess.run([sys.executable, __file__, "--one", json.dumps(run)], stdout=subprocess.PIPE, text=True)
        print(f"--- {name} {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode: continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if a.out: Path(a.out).open("a").write(json.dumps(rows[-1]) + "\n")
    table(rows)

if __name__ == "__main__": main()
