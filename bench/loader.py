"""The text loader: tokens a second and tokens lost, beside the reference's loader on the same text and tokenizer. Prints one table.

python bench/loader.py SHARD.parquet… [--reference FOLDER]     FOLDER: a checkout of karpathy/nanochat (MIT), run as it is
(pip install numba for the rows that use it)"""
import argparse, os, statistics, sys, tempfile, time
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pyarrow.parquet as pq, torch
from nanochat_nb import loader as L
from nanochat_nb.data import write_shards
from nanochat_nb.packing import Packer
from nanochat_nb import tokenizer as tokens_of
from nanochat_nb.tokenizer import train_tokenizer

class Adapter:
    "Our tokenizer behind the two methods that the reference's loader calls."
    def __init__(self, tok): self.tok = tok
    def get_bos_token_id(self): return self.tok.bos_id
    def encode(self, texts, prepend, num_threads): return [[prepend, *ids] for ids in self.tok.encode_batch(texts)]

def measure(make, tokens, batch, runs=3):
    "Million tokens a second, by wall and by processor time: medians; the first batch fills buffers and is not counted."
    walls, cpus = [], []
    for _ in range(runs):
        it = make()
        next(it)
        n = max(1, tokens // batch)
        w, c = time.perf_counter(), time.process_time()
        for _ in range(n): next(it)
        walls.append(n * batch / (time.perf_counter() - w) / 1e6); cpus.append(n * batch / (time.process_time() - c) / 1e6)
        if getattr(it, "pool", None): it.pool.close()
    return statistics.median(walls), statistics.median(cpus)

def ours_lost(lens, T, tokens, buffer=512):
    "Shares of tokens lost, of positions padded, of documents that fit and were left whole, over `tokens` tokens; lengths again and again."
    p, k, out, used, rows, fit, whole = Packer(T + 1), 0, 0, 0, 0, 0, 0
    while rows * T < tokens:
        while len(p) < buffer or p.tokens < 2 * (T + 1): p.add(k, None, lens[k % len(lens)]); k += 1
        rows += 1
        for d, _, first, n in p.row():
            out += n; used += n + 1
            if not first and lens[d % len(lens)] <= T: fit += 1; whole += n == lens[d % len(lens)]
    came = sum(lens) * (k // len(lens)) + sum(lens[:k % len(lens)])
    waiting = sum(left - 1 for _, left, *_ in p.queue if left)
    return 1 - (out + waiting) / came, 1 - used / (rows * (T + 1)), whole / fit

class Lengths:
    "Stands for a tokenizer: documents of given lengths, whose ids are never looked at."
    def __init__(self, lens): self.docs, self.k, self.came = [[1] * (n + 1) for n in lens], 0, 0
    def get_bos_token_id(self): return 1
    def encode(self, texts, prepend, num_threads):
        got = [self.docs[(self.k + i) % len(self.docs)] for i in range(len(texts))]
        self.k += len(texts); self.came += sum(map(len, got))
        return got

def reference_lost(R, lens, T, tokens):
    "Share of tokens that the reference throws away; what waits in its buffer is not lost."
    tok, n = Lengths(lens), 0
    it = R.tokenizing_distributed_data_loader_with_state_bos_bestfit(tok, 32, T, "train", device="cpu")
    while n < tokens: next(it); n += 32 * (T + 1)
    return 1 - (n + sum(map(len, it.gi_frame.f_locals["doc_buffer"]))) / tok.came

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("shards", nargs="+"); ap.add_argument("--reference", default="")
    ap.add_argument("--tokens", type=int, default=2_000_000); ap.add_argument("--simulate", type=int, default=400_000_000)
    a = ap.parse_args()
    torch.set_num_threads(1)
    texts = [t for p in a.shards for t in pq.read_table(p, columns=["text"]).column(0).to_pylist()]
    tok = train_tokenizer(texts[::10], 32768)
    lens = [len(ids) for ids in tok.encode_batch(texts)]
    T, B = 2048, 32
    with tempfile.TemporaryDirectory() as tmp:
        write_shards(({"text": t, "lang": "en"} for t in texts), tmp + "/data", source="bench", chars_per_shard=30_000_000, val_fraction=0.01)
        cache = L.prepare_cache(tmp + "/data", tok, tmp)
        rows = []
        def row(name, make, tokens): rows.append((name, *measure(make, tokens, B * T)))
        ours = lambda **kw: lambda: L.TextLoader(tmp + "/data", tok, seq_len=T, batch_rows=B, **kw)
        R = None
        if a.reference:
            sys.path.insert(0, a.reference)
            import nanochat.dataloader as R
            paths = sorted(str(p) for p in L.Path(tmp, "data").glob("*.parquet"))
            R.list_parquet_files = lambda **_: paths
            make = lambda t: lambda: R.tokenizing_distributed_data_loader_bos_bestfit(t, B, T, "train", device="cpu")
            large, tokens_of.BATCH = tokens_of.BATCH, 1 << 62
            row("reference, `tokenizers`", make(Adapter(tok)), a.tokens)
            tokens_of.BATCH = large
            row("reference, our compiled loops", make(Adapter(tok)), 2 * a.tokens)
            row("reference, tokens for nothing (packing alone)", make(Lengths(lens)), 4 * a.tokens)
        large, tokens_of.BATCH = tokens_of.BATCH, 1 << 62
        row("ours, `tokenizers`", ours(), a.tokens)
        tokens_of.BATCH = large
        if not tok._encoder: sys.exit("numba is not installed")
        row("ours, compiled loops", ours(), 10 * a.tokens)
        row("ours, compiled loops, 2 workers", ours(workers=2), 10 * a.tokens)
        row("ours, token cache", ours(cache=cache), 100 * a.tokens)
        print("| loader, T = 2048 | M tokens/s, wall | M tokens/s of processor time (main process) |\n|---|---|---|")
        for name, w, c in rows: print(f"| {name} | {w:.2f} | {c:.2f} |", flush=True)
        print("\n| lost tokens | T = 2048 | T = 512 |\n|---|---|---|")
        if R: print(f"| reference, {a.simulate // 10_000_000}M tokens |", " | ".join(f"{reference_lost(R, lens, t, a.simulate // 10):.1%}" for t in (2048, 512)), "|", flush=True)
        got = [ours_lost(lens, t, a.simulate) for t in (2048, 512)]
        for what, i in ((f"ours, {a.simulate // 1_000_000}M tokens: lost", 0), ("ours: padded", 1), ("ours: documents that fit, left whole", 2)):
            print(f"| {what} |", " | ".join(f"{g[i]:.2%}" for g in got), "|")

if __name__ == "__main__": main()
