"""What a vocabulary is worth: our tokenizer by Han run, digits, share of Chinese and size, beside published ones.

python bench/vocab.py CORPUS       a folder with clean.parquet, en/ and zh/ (columns text, and source in the first)
python bench/vocab.py table        bench/vocab.md again from bench/vocab.jsonl
Held out: every tenth statute book by name, every tenth passage of the novel, all of Jane Austen, every fortieth English
document, Python's standard library and sympy's docstrings; what shares 59 characters with them is dropped from training."""
import ast, json, os, random, re, resource, subprocess, sys, sysconfig, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pyarrow as pa, pyarrow.parquet as pq

HERE, SPAN, TOTAL = Path(__file__).resolve().parent, 30, 64_000_000    # bytes of training text
KINDS = ("statutes", "novel", "en", "austen", "code", "maths")
TIMES, POEMS = {"zh_law": 3, "zh_sanguo": 3}, 5_000_000                  # told so often; bytes of poems, which would drown the rest
tenth = lambda s, n=10: crc32(s.encode()) % n == 0

def python_text():
    "Code of the standard library, and docstrings of sympy, which are full of formulas."
    import sympy
    code = [f.read_text(encoding="utf-8") for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]]
    docs = []
    for f in sorted((Path(sympy.__file__).parent/"functions/special").glob("*.py")):
        tree = ast.walk(ast.parse(f.read_text(encoding="utf-8")))
        docs += [d for x in tree if isinstance(x, (ast.ClassDef, ast.FunctionDef)) and (d := ast.get_docstring(x)) and "math" in d]
    return code, docs

def split(corpus):
    "Held-out texts by kind, and training documents (text, kind) that share no span with them."
    held, pool = {k: [] for k in KINDS}, []
    held["code"], held["maths"] = python_text()
    for r in pq.read_table(corpus/"clean.parquet").to_pylist():
        text, source = r["text"], r["source"]
        out = {"zh_law": ("statutes", tenth(text.split()[0])), "zh_sanguo": ("novel", tenth(text)),
               "en_austen": ("austen", True)}.get(source, ("", False))
        if out[1]: held[out[0]].append(text)
        else: pool.append((text, source))
    for lang in ("zh", "en"):
        for f in sorted((corpus/lang).glob("*.parquet")):
            for t in pq.read_table(f)["text"].to_pylist():
                if lang == "en" and tenth(t, 40): held["en"].append(t)
                elif lang == "en" or t.count("平") + t.count("仄") < len(t) / 3: pool.append((t, "zh_poem" if lang == "zh" and is_poem(t) else lang))  # no tone patterns
    held = {k: cut(v, 1_000_000) for k, v in held.items()}
    seen = {t[i:i + SPAN] for v in held.values() for t in v for i in range(len(t) - SPAN + 1)
            if sum(c.isalpha() for c in t[i:i + SPAN:3]) > 5}             # rules and blanks are no text
    kept = [(t, k) for t, k in pool if not any(t[i:i + SPAN] in seen for i in range(0, len(t) - SPAN + 1, SPAN))]
    print(f"training documents dropped for a shared span: {len(pool) - len(kept):,} of {len(pool):,}", flush=True)
    random.Random(0).shuffle(kept)
    return held, kept

def is_poem(text):
    lines = [x for x in text.split("\n") if x.strip()]
    return sum(c.isascii() and c.isalpha() for c in text) < .02 * len(text) and sum(map(len, lines)) < 30 * len(lines)

def cut(texts, most):
    "Texts until so many bytes are reached."
    out = []
    for t in texts:
        if most <= 0: break
        out.append(t)
        most -= len(t.encode())
    return out

def one(folder, han, digits, share, vocab, without, pieces):
    "Train, measure, print a JSON object."
    from nanochat_nb import fastbpe, tokenizer as T
    count, n = fastbpe.count_pieces, []
    def noting(*a): n.append((c := count(*a)).n); return c
    fastbpe.count_pieces, split_pattern = noting, fastbpe.split_pattern
    held, pool = json.loads((folder/"held.json").read_text()), pq.read_table(folder/"train.parquet").to_pydict()
    skip, pool = without.split("+"), list(zip(pool["text"], pool["kind"]))
    poems = set(cut((t for t, k in pool if k == "zh_poem"), POEMS))
    zh = [t for t, k in pool if k.startswith("zh") and k not in skip and (k != "zh_poem" or t in poems) for _ in range(TIMES.get(k, 1))]
    random.Random(1).shuffle(zh)
    zh = cut(zh, share * TOTAL)
    train = zh + cut((t for t, k in pool if k.startswith("en")), (1 - share) * TOTAL)
    random.Random(0).shuffle(train)
    T.train_tokenizer(train[:2000], 400, split_pattern(han, digits))      # numba loads what it compiled
    before, w, c = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time(), time.process_time()
    tok = T.train_tokenizer(train, vocab, split_pattern(han, digits), max_pieces=pieces)
    row = dict(han=han, digits=digits, share=share, vocab=tok.vocab_size, without=without, max_pieces=pieces, seconds=round(time.time() - w, 1),
               cpu=round(time.process_time() - c, 1), mb_more=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
               zh_mb=round(sum(len(t.encode()) for t in zh) / 1e6, 1))
    row["pieces"] = n[-1]
    row |= measure(tok, held)
    print(json.dumps(row, ensure_ascii=False))

def measure(tok, held):
    "Bytes and characters a token by kind, megabytes encoded a second of processor time, vocabulary by script."
    from nanochat_nb.tokenizer import compression
    from nanochat_nb.vocab import scripts
    c, size = time.process_time(), sum(len(t.encode()) for v in held.values() for t in v)
    dense = {k: round(compression(tok, v), 3) for k, v in held.items()}
    speed = round(size / 1e6 / (time.process_time() - c), 1)
    chars = {k: round(dense[k] * sum(map(len, v)) / sum(len(t.encode()) for t in v), 3) for k, v in held.items()}
    return dict(dense=dense, chars=chars, speed=speed, scripts=scripts(tok))

CASES = ([dict(han=h) for h in (6, 4, 8, 1, 2, 5, 64)] + [dict(share=0.)] + [dict(han=h, without="zh_law+zh_sanguo") for h in (6, 4)]
         + [dict(han=h, pieces=500_000) for h in (6, 4)] + [dict(share=.5), dict(digits=3), dict(vocab=32_768), dict(vocab=131_072)]
         + [dict(share=.25), dict(vocab=65_536)])
MAIN = dict(han=6, digits=1, share=.4, vocab=80_000, without="", pieces=4_000_000)

def run_case(tmp, case):
    "One case in a process of its own."
    p = subprocess.run([sys.executable, __file__, "one", tmp, *map(str, (MAIN | case).values())], capture_output=True, text=True)
    if p.returncode: return print(case, p.stderr[-2000:])
    print(case, p.stdout.splitlines()[-1][:200], flush=True)
    return json.loads(p.stdout.splitlines()[-1])

def main(corpus, out=HERE/"vocab.jsonl"):
    "Rows that are there already are kept: run it again to go on."
    from nanochat_nb.vocab import load_references
    rows = [json.loads(x) for x in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    names = dict(pieces="max_pieces")
    todo = [c for c in CASES if not any("name" not in r and all(r[names.get(k, k)] == v for k, v in (MAIN | c).items()) for r in rows)]
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(2) as pool:
        held, kept = split(corpus)
        print({k: (len(v), sum(len(t.encode()) for t in v)) for k, v in held.items()}, "documents and bytes held out", flush=True)
        (Path(tmp)/"held.json").write_text(json.dumps(held))
        pq.write_table(pa.table({"text": [t for t, _ in kept], "kind": [k for _, k in kept]}), Path(tmp)/"train.parquet")
        del kept
        jobs = [pool.submit(run_case, tmp, case) for case in todo]
        refs = {n: r for n, r in load_references().items() if not isinstance(r, str)}
        rows = [dict(name=n, vocab=r.vocab_size) | measure(r, held) for n, r in refs.items()] + [r for r in rows if r.get("name") not in refs]
        for job in jobs:
            rows += [job.result()] if job.result() else []
            out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")

def table():
    "The rows of vocab.jsonl below the words of vocab.md."
    words = (HERE/"vocab.md").read_text(encoding="utf-8").split("| what")[0]
    head = ["what", "vocabulary", *(f"{k}" for k in KINDS), "train, CPU s", "MB more", "pieces", "encode MB/s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in map(json.loads, (HERE/"vocab.jsonl").read_text(encoding="utf-8").splitlines()):
        name = r.get("name") or ", ".join([f"Han 1–{r['han']}" if r["han"] < 64 else "Han, no limit", f"zh {r['share']:.0%}"]
            + [f"digits 1–{r['digits']}"] * (r["digits"] > 1) + [f"max_pieces {r.get('max_pieces', 0):,}"] * (r.get("max_pieces") != 4_000_000)
            + ["no statutes, no novel"] * bool(r.get("without")))
        cells = [name, f"{r['vocab']:,}", *(f"{r['dense'][k]:.2f}" for k in KINDS),
                 *(f"{r[k]:,}" if k in r else "" for k in ("cpu", "mb_more", "pieces")), f"{r['speed']}"]
        lines.append("| " + " | ".join(cells) + " |")
    (HERE/"vocab.md").write_text(words + "\n".join(lines) + "\n", encoding="utf-8")

if __name__ == "__main__":
    if sys.argv[1] == "one": one(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6]), sys.argv[7], int(sys.argv[8]))
    elif sys.argv[1] == "table": table()
    else: main(Path(sys.argv[1])); table()
