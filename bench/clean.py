"""Cleaning on one thread: rules, and near-duplicates beside datasketch on the same shingles. Prints one table.

python bench/clean.py FOLDER_OR_FILE…    (pip install datasketch for the comparison)"""
import os, random, statistics, sys, time
from collections import Counter
from itertools import islice
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np, pyarrow as pa
from nanochat_nb import clean as C, data

def read(source, n): return [t for t, _ in islice(C._read(source), n)]

def seconds(f, k=3):
    "Median of k: processor time of this process, which other processes disturb least."
    out = []
    for _ in range(k):
        s = time.process_time(); f(); out.append(time.process_time() - s)
    return statistics.median(out)

def rules(texts, near=0.0):
    cfg = C.CleanSettings(near=near)
    for b, _ in C._batches((t, None) for t in texts):
        new, f = C.rewrite(b, cfg, Counter())
        C.judge(f, cfg); C.exact_duplicates(C._hash64(new))

def plant(texts, rng):
    "An edited copy of every other text, at a similarity that varies."
    out = []
    for i, t in enumerate(texts):
        out.append((i, t))
        if i % 2: continue
        s = list(t)
        for _ in range(max(1, int(len(s) * rng.choice((.002, .005, .01, .02, .03))))): s[rng.randrange(len(s))] = rng.choice("xyzq甲乙丙")
        out.append((i, "".join(s)))
    rng.shuffle(out)
    return [k for k, _ in out], [t for _, t in out]

def shingles(t): return set(np.unique(C._shingles(*C._codes([t]))).tolist()) - {int(C._NONE)}

def ours(texts): return C.near_duplicates(C.measure(texts, 120)["sig"], 0.7)

def datasketch(texts, words=False):
    "Its fastest ordinary use: 120 permutations, the same bands; pieces of 8 characters, or 5 words."
    from datasketch import MinHash, MinHashLSH
    lsh, label = MinHashLSH(num_perm=120, params=(20, 6)), list(range(len(texts)))
    for i, t in enumerate(texts):
        m = MinHash(num_perm=120, seed=1)
        if words: w = t.split(); pieces = {" ".join(w[j:j + 5]).encode() for j in range(len(w) - 4)}
        else: pieces = {t[j:j + 8].encode() for j in range(len(t) - 7)}
        m.update_batch(list(pieces) or [t.encode()])
        near = [j for j in lsh.query(m) if m.jaccard(kept[j]) >= 0.7] if i else []
        if not i: kept = {}
        kept[i] = m; lsh.insert(i, m)
        if near: label[i] = min(label[j] for j in near)
    return np.array(label)

def quality(label, key, texts):
    "Recall over planted pairs of Jaccard 0.75 and more; precision: joined pairs whose Jaccard is 0.6 and more."
    first, hit, n, good, joined = {}, 0, 0, 0, 0
    for i, k in enumerate(key):
        if k not in first: first[k] = i; continue
        a, b = shingles(texts[i]), shingles(texts[first[k]])
        if len(a & b) >= 0.75 * len(a | b): n += 1; hit += label[i] == label[first[k]]
    for i in range(len(texts)):
        j = label[i]
        if j == i: continue
        a, b = shingles(texts[i]), shingles(texts[j]); joined += 1; good += len(a & b) >= 0.6 * len(a | b)
    return f"{hit}/{n}", f"{good}/{joined}"

def main(sources):
    pa.set_cpu_count(1); C._tables()
    rows = []
    for s in sources:
        texts = read(s, 6000); name, size = "/".join(s.rstrip("/").split("/")[-2:]), sum(map(len, texts)) / len(texts)
        for what, near in (("rules + exact", 0.0), ("the same + signatures", 0.7)):
            d = seconds(lambda: rules(texts, near))
            rows.append((name, f"{size:.0f}", what, f"{len(texts) / d:,.0f}", f"{size * len(texts) / d / 1e6:.0f}", "", ""))
        key, some = plant(texts[:600], random.Random(0))
        arms = [("near-duplicates, this book", ours, 3)]
        try: import datasketch as _; arms += [("datasketch, 8 characters", datasketch, 1), ("datasketch, 5 words", lambda x: datasketch(x, True), 1)]
        except ImportError: print("datasketch is not installed: no comparison")
        for what, f, k in arms:
            d = seconds(lambda: f(some), k); r, p = quality(f(some), key, some)
            rows.append((name, f"{np.mean([len(t) for t in some]):.0f}", what, f"{len(some) / d:,.0f}", f"{sum(map(len, some)) / d / 1e6:.1f}", r, p))
    heads = ("source", "chars/doc", "what", "docs/s", "Mchars/s", "recall J≥.75", "precision")
    wide = [max(len(str(r[i])) for r in [heads, *rows]) for i in range(len(heads))]
    for r in [heads, *rows]: print("  ".join(str(x).ljust(w) for x, w in zip(r, wide)).rstrip())
    print("load", os.getloadavg()[0])

if __name__ == "__main__": main(sys.argv[1:] or sys.exit(__doc__))
