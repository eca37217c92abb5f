"""What a vocabulary is worth: our tokenizer by Han run, digits, share of Chinese and size, beside published ones.

python bench/vocab.py CORPUS       a folder with clean.parquet, en/ and zh/ (columns text, and source in the first)
python bench/vocab.py table        bench/vocab.md again from bench/vocab.jsonl
Held out: every tenth statute book by name, every tenth passage of the novel, all of Jane Austen, every fortieth English
document, Python's standard library and sympy's docstrings; what shares 59 characters with them is dropped from training."""
import ast, json, os, random, re, resource, subprocess, sys, sysconfig, tempfile, time
from pathlib import Path
from zlib import crc32
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pyarrow as pa, pyarrow.parquet as pq

HERE, SPAN, TOTAL = Path(__file__).resolve().parent, 30, 80_000_000    # bytes of training text
KINDS = ("statutes", "novel", "en", "austen", "code", "maths")
REFS = ("gpt2", "cl100k", "o200k", "qwen", "qwen3.6", "deepseek")
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
                elif lang == "en" or t.count("平") + t.count("仄") < len(t) / 3: pool.append((t, lang))   # no tone patterns
    held = {k: cut(v, 1_000_000) for k, v in held.items()}
    seen = {t[i:i + SPAN] for v in held.values() for t in v for i in range(len(t) - SPAN + 1)
            if sum(c.isalpha() for c in t[i:i + SPAN:3]) > 5}             # rules and blanks are no text
    kept = [(t, k) for t, k in pool if not any(t[i:i + SPAN] in seen for i in range(0, len(t) - SPAN + 1, SPAN))]
    print(f"training documents dropped for a shared span: {len(pool) - len(kept):,} of {len(pool):,}", flush=True)
    random.Random(0).shuffle(kept)
    return held, kept

def cut(texts, most):
    "Texts until so many bytes are reached."
    out = []
    for t in texts:
        if most <= 0: break
        out.append(t)
        most -= len(t.encode())
    return out

def one(folder, han, digits, share, vocab, without):
    "Train, measure, print a JSON object."
    from nanochat_nb import tokenizer as T
    from nanochat_nb.fastbpe import count_pieces, split_pattern
    held, pool = json.loads((folder/"held.json").read_text()), pq.read_table(folder/"train.parquet").to_pydict()
    skip, pool = without.split("+"), list(zip(pool["text"], pool["kind"]))
    zh = cut((t for t, k in pool if k.startswith("zh") and k not in skip), share * TOTAL)
    train = zh + cut((t for t, k in pool if k.startswith("en")), (1 - share) * TOTAL)
    random.Random(0).shuffle(train)
    T.train_tokenizer(train[:2000], 400, split_pattern(han, digits))      # numba loads what it compiled
    before, w, c = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time(), time.process_time()
    tok = T.train_tokenizer(train, vocab, split_pattern(han, digits))
    row = dict(han=han, digits=digits, share=share, vocab=tok.vocab_size, without=without, seconds=round(time.time() - w, 1),
               cpu=round(time.process_time() - c, 1), mb_more=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
               zh_mb=round(sum(len(t.encode()) for t in zh) / 1e6, 1))
    row["pieces"] = count_pieces(train, han, digits).n
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

CASES = ([dict(han=h) for h in (1, 2, 4, 5, 6, 8, 64)] + [dict(han=h, without="zh_law+zh_sanguo") for h in (4, 6)]
         + [dict(share=s) for s in (0, .25, .4, .6, .75)] + [dict(han=h, vocab=v) for v in (32_768, 65_536, 131_072) for h in (4, 6)]
         + [dict(digits=d) for d in (2, 3)])

def main(corpus):
    from nanochat_nb.vocab import load_reference
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        held, kept = split(corpus)
        (Path(tmp)/"held.json").write_text(json.dumps(held))
        pq.write_table(pa.table({"text": [t for t, _ in kept], "kind": [k for _, k in kept]}), Path(tmp)/"train.parquet")
        for name in REFS:
            try: ref = load_reference(name)
            except Exception as e: print(name, "not available:", e); continue
            rows.append(dict(name=name, vocab=ref.vocab_size) | measure(ref, held))
        for case in CASES:
            case = dict(han=6, digits=1, share=.5, vocab=80_000, without="") | case
            p = subprocess.run([sys.executable, __file__, "one", tmp, *map(str, case.values())], capture_output=True, text=True)
            if p.returncode: print(case, p.stderr[-2000:]); continue
            rows.append(json.loads(p.stdout.splitlines()[-1]))
            print(case, rows[-1]["seconds"], rows[-1]["dense"], flush=True)
            (HERE/"vocab.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    (HERE/"vocab.held.json").write_text(json.dumps({k: [len(v), sum(map(len, v)), sum(len(t.encode()) for t in v)] for k, v in held.items()}))

if __name__ == "__main__":
    if sys.argv[1] == "one": one(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
    else: main(Path(sys.argv[1]))
