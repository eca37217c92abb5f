"""Training and encoding beside other tools, each in a process of its own. Prints one table.

python bench/tokenizer.py EN_FOLDER ZH_FOLDER      (pip install rustbpe gigabpe fastokens tiktoken for the comparison)
python bench/tokenizer.py encode EN_FOLDER ZH_FOLDER               only the rows of encoding
python bench/tokenizer.py one TOOL FOLDER CHARACTERS VOCABULARY      one case; prints a JSON object"""
import functools, json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pyarrow.parquet as pq

def texts(folder, n):
    "Documents of at most 10,000 characters from the shards of a folder, round and round, n characters in all."
    while True:
        for path in sorted(Path(folder).glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(1024, columns=["text"]):
                for t in batch["text"].to_pylist():
                    t = t[:min(10_000, n)]
                    n -= len(t)
                    yield t
                    if n <= 0: return

def train(tool, folder, n, vocab):
    from nanochat_nb import tokenizer as T
    if tool == "this book": return T.train_tokenizer(texts(folder, n), vocab)
    if tool == "tokenizers":
        T.LARGE = 1 << 62
        return T.train_tokenizer(texts(folder, n), vocab)
    if tool == "rustbpe":
        import rustbpe
        rustbpe.Tokenizer().train_from_iterator(texts(folder, n), vocab - 9, pattern=r"\p{Han}{1,4}| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    if tool == "gigabpe":                                  # reads files only, by a pattern of its own
        import gigabpe
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as f:
            for t in texts(folder, n): f.write(t + "\n")
            f.flush()
            gigabpe.train_bpe([f.name], vocab - 9, pretokenizer="bytelevel", threads=2)

def encode(tool, folder, n, vocab):
    "Seconds to make an encoder; MB/s of processor time, cold (on text it was not trained on, no piece seen before) and warm (once more)."
    from nanochat_nb import tokenizer as T
    tok, some = T.train_tokenizer(texts(folder, n), vocab), list(texts(folder, 2 * n))
    while sum(map(len, some)) > n: some.pop(0)               # the second half
    some, size = [some[i:i + 64] for i in range(0, len(some), 64)], sum(len(t.encode()) for t in some)
    T._compiled(tok.spec)([" a b"])                           # numba loads what it compiled
    begin, call = time.process_time(), tok.encode_flat
    if tool == "encode, this book": tok._encoder = T._compiled(tok.spec)
    if tool == "encode, tokenizers": T.BATCH = 1 << 62
    if tool == "encode, fastokens":                           # for comparison only; the package does not use it
        import fastokens
        fast = fastokens.Tokenizer.from_json_str(tok.spec)
        call = lambda ts: fast.encode_batch_flat(ts, False, True)
    if tool == "encode, tiktoken":
        import tiktoken
        ranks = {b: i for i, b in enumerate(tok._bytes) if i not in tok.special_ids}
        call = tiktoken.Encoding("bench", pat_str=T.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary_batch
        call = functools.partial(call, num_threads=1)
    made = time.process_time() - begin
    def rate():
        c = time.process_time()
        for ts in some: call(ts)
        return size / 1e6 / (time.process_time() - c)
    return made, rate(), rate()

def one(tool, folder, n, vocab):
    if tool == "this book": train(tool, folder, 2_100_000, 400)          # numba loads what it compiled
    made, cold, warm, w, c = 0.0, 0.0, 0.0, time.time(), time.process_time()
    if tool.startswith("encode"): made, cold, warm = encode(tool, folder, n, vocab)
    else: train(tool, folder, n, vocab)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(wall=time.time() - w, cpu=time.process_time() - c, peak=peak, made=made, cold=cold, warm=warm)))

def case(tool, folder, n, vocab, k=3):
    "Medians of k processes."
    rows = []
    for _ in range(k):
        p = subprocess.run([sys.executable, __file__, "one", tool, folder, str(n), str(vocab)], capture_output=True, text=True)
        if p.returncode: return {"failed": p.stderr.strip().splitlines()[-1][:60]}
        rows.append(json.loads(p.stdout.splitlines()[-1]))
    return {key: statistics.median(r[key] for r in rows) for key in rows[0]}

def main(en, zh):
    print(f"{'text':4} {'M chars':>7} {'what':20} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}")
    for lang, folder, n in (("en", en, 20_000_000), ("zh", zh, 5_000_000)):
        for tool in ("this book", "gigabpe", "rustbpe", "tokenizers"):
            r = case(tool, folder, n, 32_768, 1 if tool in ("tokenizers", "rustbpe") else 3)
            if "failed" in r: print(f"{lang:4} {'':7} {tool:20} {r['failed']}", flush=True); continue
            print(f"{lang:4} {n / 1e6:7.1f} {tool:20} {r['wall']:7.1f} {r['cpu']:7.1f} {r['peak']:8.0f}", flush=True)
    for lang, folder in (("en", en), ("zh", zh)):
        for n in (100_000_000, 400_000_000):
            r = case("this book", folder, n, 32_768 if n < 4e8 else 65_536, 1)
            print(f"{lang:4} {n / 1e6:7.0f} {'this book':20} {r['wall']:7.1f} {r['cpu']:7.1f} {r['peak']:8.0f}", flush=True)
    encoders(en, zh)

def encoders(en, zh):
    print(f"{'text':4} {'M chars':>7} {'what':20} {'made s':>7} {'cold MB/s':>9} {'warm MB/s':>9}")
    for lang, folder, n in (("en", en, 20_000_000), ("zh", zh, 8_000_000)):
        for tool in ("this book", "fastokens", "tiktoken", "tokenizers"):
            k = n // 10 if tool == "tokenizers" else n
            r = case("encode, " + tool, folder, k, 32_768)
            if "failed" in r: print(f"{lang:4} {'':7} {tool:20} {r['failed']}", flush=True); continue
            print(f"{lang:4} {k / 1e6:7.1f} {tool:20} {r['made']:7.2f} {r['cold']:9.1f} {r['warm']:9.1f}", flush=True)
    print("load", os.getloadavg()[0])

if __name__ == "__main__":
    if sys.argv[1] == "encode": encoders(*sys.argv[2:4])
    elif sys.argv[1] == "one": one(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else: main(*sys.argv[1:3])
