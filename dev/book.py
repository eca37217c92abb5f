"""The book's own tools.

python dev/book.py execute [CHAPTER …]     run chapters in place, store their outputs, clean
python dev/book.py check [CHAPTER …]       form: two languages, short cells, outputs, parameters, no paths of a machine
python dev/book.py sync [--fix|--staged]   would export or clean change a file? --fix lets them, --staged looks at git's index
python dev/book.py copy --lang zh|en OUT   a copy of the book in one language
python dev/book.py test                    sync, check, every chapter's cells, tests/: what CI runs
"""
import argparse, ast, hashlib, os, re, shutil, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = ("00_data", "01_tokenizer", "03_pretrain", "04_sft", "06_eval", "07_rl")  # chapters that papermill runs with parameters
MAX_KB, MAX_LINES, MAX_COLUMNS, MAX_SENTENCES = 500, 25, 120, 3

HAN = re.compile(r"[\u4e00-\u9fff]")
LATIN = re.compile(r"[A-Za-z]{2,}")
MACHINE = re.compile(r"(?<![\w.~/:-])/(?:root|home|tmp|Users|usr|opt|mnt|private|var|work|content)/[\w.-]")
NO_EVAL = re.compile(r"^#\|\s*eval:\s*false", re.M)
EXPORT = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"


def chapters(names=()) -> list:
    "Paths of the chapters named (`02_model`, `nbs/02_model.ipynb`), or of all."
    if not names: return sorted((ROOT/"nbs").glob("*.ipynb"))
    paths = [ROOT/"nbs"/f"{Path(n).name.removesuffix('.ipynb')}.ipynb" for n in names]
    missing = [p.name for p in paths if not p.exists()]
    if missing: sys.exit(f"error: no such chapter: {', '.join(missing)}; there are {', '.join(p.stem for p in chapters())}")
    return paths


class Progress:
    "One live line on a terminal; on a pipe a line when the text changes, at most every `every` seconds."
    def __init__(self, every=20):
        self.tty, self.every, self.start, self.last, self.shown = sys.stderr.isatty(), every, time.time(), 0.0, ""
    def clock(self): return "%d:%02d" % divmod(int(time.time() - self.start), 60)
    def show(self, text):
        if self.tty: print(f"\r\033[K{self.clock()}  {text}"[:shutil.get_terminal_size().columns + 4], end="", file=sys.stderr, flush=True)
        elif time.time() - self.last >= self.every and text != self.shown: self.say(text)
    def say(self, text):
        print(f"{chr(13) + chr(27) + '[K' if self.tty else ''}{self.clock()}  {text}", file=sys.stderr, flush=True)
        self.last, self.shown = time.time(), text


# ---- execute -------------------------------------------------------------------------------------------------------

def execute(path, progress, timeout=900):
    "Run a chapter in its folder and store the outputs; cells marked `eval: false` keep what they show. Unchanged on error."
    from nbclient import NotebookClient
    from nbdev.clean import nbdev_clean
    nb = nbformat.read(path, 4)
    n = len(nb.cells)
    kept = {c.id: c.source for c in nb.cells if c.cell_type == "code" and NO_EVAL.search(c.source)}
    for c in nb.cells:
        if c.id in kept: c.source = ""                                            # nbclient skips an empty cell
    NotebookClient(nb, timeout=timeout, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}},
                   on_cell_start=lambda cell, cell_index: progress.show(f"{path.stem}: cell {cell_index + 1}/{n}")).execute()
    for c in nb.cells:
        if c.id in kept: c.source = kept[c.id]
    nb.metadata.pop("language_info", None)
    shown = any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", []))
    if not shown: nb.metadata.pop("widgets", None)                                # a state of widgets that no output shows
    tmp = path.with_suffix(".tmp")
    nbformat.write(nb, tmp)
    os.replace(tmp, path)
    nbdev_clean(fname=str(path))

def execute_all(names, timeout):
    "Run chapters one after another; the first failing cell ends it with its traceback."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    os.environ.setdefault("OMP_NUM_THREADS", "1")                                 # the same sums on every machine
    progress = Progress()
    for path in chapters(names):
        start = time.time()
        try: execute(path, progress, timeout)
        except (CellExecutionError, CellTimeoutError) as e: sys.exit(f"\n{path.name} failed; it was left as it was\n{str(e)[-3000:]}")
        progress.say(f"{path.stem}: ran in {time.time() - start:.0f} s, {path.stat().st_size // 1024} KB")


# ---- sync ----------------------------------------------------------------------------------------------------------

def _tree(root) -> dict:
    "Hash of every notebook and module below `root`."
    files = [p for d in ("nbs", "nanochat_nb") for p in sorted((root/d).rglob("*"))
             if p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

def _git(*args) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout

def _copy_tree(dest, staged):
    "The book's files, from the work tree or from git's index, in `dest`."
    if staged: return _git("checkout-index", "-a", f"--prefix={dest}/")
    for d in ("nbs", "nanochat_nb"):
        shutil.copytree(ROOT/d, dest/d, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.tmp"))
    for f in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT/f, dest/f)

def sync(fix=False, staged=False) -> list:
    "Problems: files that export and clean would change, add or leave behind. Works on a copy unless `fix`."
    with tempfile.TemporaryDirectory() as tmp:
        root = ROOT if fix else Path(tmp).resolve()
        if not fix: _copy_tree(root, staged)
        before = _tree(root)
        done = subprocess.run([sys.executable, "-c", EXPORT], cwd=root, capture_output=True, text=True)
        if done.returncode: return [f"export failed:\n{(done.stdout + done.stderr)[-2000:]}"]
        after = _tree(root)
        sources = {m for nb in (root/"nbs").glob("*.ipynb") for m in re.findall(r'"#\|\s*default_exp ([\w.]+)', nb.read_text(encoding="utf-8"))}
    said = "brought into line" if fix else "is not what its notebook exports, or not clean; edit notebooks alone, then make sync"
    out = [f"{f}: {said}" for f in after if before.get(f) != after[f]]
    out += [f"{f}: no notebook exports it" for f in after
            if f.startswith("nanochat_nb/") and Path(f).stem not in sources and not Path(f).stem.startswith("_")]
    if not staged and (ROOT/".git").exists():
        out += [f"{row[3:]}: not tracked; git add it" for row in _git("status", "--porcelain", "nbs", "nanochat_nb").splitlines() if row[:2] == "??"]
    return out


# ---- the two languages ---------------------------------------------------------------------------------------------

def blocks(source) -> list:
    "A markdown cell as (kind, text): heading, quote, prose, and `shared` for fences, formulas, tables, pictures, HTML."
    out, fence = [], None
    for line in source.splitlines():
        s = line.strip()
        if fence:                                                                 # inside a fence or a formula
            out[-1][1].append(line)
            if s.endswith(fence): fence = None
            continue
        opened = next((f for f in ("```", "$$") if s.startswith(f)), None)
        if opened: kind, fence = "shared", None if s.endswith(opened) and len(s) > len(opened) else opened
        elif re.match(r"#{1,6} ", s): kind = "heading"
        elif s.startswith(">"): kind = "quote"
        elif re.match(r"[|!<]|\[!", s): kind = "shared"
        else: kind = "prose" if s else ""
        if out and out[-1][0] == kind and kind not in ("heading", ""): out[-1][1].append(line)
        else: out.append((kind, [line]))
    return [(k, "\n".join(t)) for k, t in out if k]

def _words(text): return re.sub(r"(?s)`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|https?://\S+", " ", text)

def check_markdown(source, first=False) -> list:
    "What is wrong with the languages of one markdown cell; the first cell of a chapter may have an English subtitle only."
    out, parts = [], blocks(source)
    for kind, text in parts:
        if kind != "heading": continue
        zh, sep, en = text.lstrip("# ").partition(" · ")
        if not sep or not HAN.search(zh) or HAN.search(en) or not LATIN.search(en): out.append(f"heading {text!r} is not `中文 · English`")
    zh = " ".join(_words(t) for k, t in parts if k == "prose")
    en = " ".join(_words(t) for k, t in parts if k == "quote")
    kinds = [k for k, _ in parts if k in ("prose", "quote")]
    start = repr(source[:50])
    if zh.strip() and not HAN.search(zh): out.append(f"{start}: the body is not Chinese; English goes into a > quote")
    elif zh.strip() and not LATIN.search(en): out.append(f"{start}: no English > quote below the Chinese")
    elif en.strip() and not zh.strip() and not first: out.append(f"{start}: an English quote without Chinese")
    elif kinds and kinds[0] == "quote" and not first: out.append(f"{start}: the English stands before the Chinese")
    if len(HAN.findall(en)) > len(LATIN.findall(en)): out.append(f"{start}: the > quote is mostly Chinese")
    run = "\n".join(t for k, t in parts if k == "prose" and not re.match(r"\s*([-*+]|\d+\.) ", t))
    n = len(re.findall(r"[。！？]", _words(run)))
    if n > MAX_SENTENCES: out.append(f"{start}: {n} Chinese sentences in one cell, at most {MAX_SENTENCES}")
    return out

def one_language(source, lang) -> str:
    "A markdown cell with only its Chinese or its English; formulas, tables and pictures stay."
    out = []
    for kind, text in blocks(source):
        if kind == "heading":
            marks, title = re.match(r"(#+ )(.*)", text).groups()
            out.append(marks + title.split(" · ")[0 if lang == "zh" else -1])
        elif kind == "shared": out.append(text)
        elif kind == "prose" and (lang == "zh") == bool(HAN.search(text)): out.append(text)
        elif kind == "quote" and lang == "en": out.append(re.sub(r"(?m)^\s*>[ ]?", "", text))
    return "\n\n".join(out)

def copy(lang, out):
    "A copy of the chapters in one language below the folder `out`."
    out = Path(out)
    if out.resolve() == ROOT/"nbs" or ROOT/"nbs" in out.resolve().parents: sys.exit("error: OUT must lie outside nbs/, or export would read it")
    out.mkdir(parents=True, exist_ok=True)
    for path in chapters():
        nb = nbformat.read(path, 4)
        for c in nb.cells:
            if c.cell_type == "markdown": c.source = one_language(c.source, lang)
        nb.cells = [c for c in nb.cells if c.source.strip()]
        nbformat.write(nb, out/path.name)
    print(f"{len(chapters())} chapters in {out}")


# ---- check ---------------------------------------------------------------------------------------------------------

def _outputs(cell) -> list:
    "Texts of a code cell's outputs."
    out = []
    for o in cell.outputs:
        out += [o.text] if o.output_type == "stream" else [v for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return out

def check_code(cell) -> list:
    "What is wrong with the form of one code cell or with its stored output."
    out, lines, start = [], cell.source.splitlines(), repr(cell.source[:50])
    if len(lines) > MAX_LINES and "parameters" not in cell.metadata.get("tags", []): out.append(f"{start}: {len(lines)} lines, at most {MAX_LINES}")
    out += [f"{start}: line {i} has {len(x)} columns, at most {MAX_COLUMNS}" for i, x in enumerate(lines, 1) if len(x) > MAX_COLUMNS]
    if HAN.search("".join(re.findall(r"(?m)#.*$", cell.source))) and not re.search(r"['\"]", cell.source): out.append(f"{start}: a Chinese comment; comments are English")
    if any(o.output_type == "error" for o in cell.outputs): out.append(f"{start}: a stored error")
    for text in _outputs(cell):
        if found := MACHINE.search(text): out.append(f"{start}: the output names a path of a machine: …{text[found.start():][:40]!r}")
        if "\r" in text: out.append(f"{start}: the output holds the debris of a progress bar")
        if "Traceback (most recent call last)" in text: out.append(f"{start}: the output holds a traceback")
    return out

def check_parameters(path, nb) -> list:
    "What papermill cannot see of a chapter's parameters: the tag, a type, a comment."
    from papermill import inspect_notebook
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1: return [f"{len(tagged)} cells are tagged `parameters`, not one; papermill would run with the defaults and say nothing"]
    nodes = ast.parse(tagged[0].source).body
    names = [n.target.id if isinstance(n, ast.AnnAssign) else n.targets[0].id for n in nodes if isinstance(n, (ast.Assign, ast.AnnAssign))]
    seen = inspect_notebook(str(path))
    out = [f"papermill does not see parameter {n}; write `{n}: type = value  # comment` with a one-word type" for n in names if n not in seen]
    out += [f"parameter {n} has no type" for n, p in seen.items() if p["inferred_type_name"] in ("", "None")]
    return out + [f"parameter {n} has no comment" for n, p in seen.items() if not p["help"].strip()]

def check_chapter(path) -> list:
    "All that is wrong with the form of a chapter."
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    out = []
    if not re.fullmatch(r"# .+ · .+\n\n?> .+\n?", nb.cells[0].source): out.append("the first cell is not `# 中文 · English` and a one-line > subtitle")
    if not any(re.search(r"^#\| *default_exp \w", c.source, re.M) for c in code): out.append("no `#| default_exp`")
    if nb.metadata.get("kernelspec", {}).get("name") != "python3": out.append("no kernelspec python3; papermill would not know what to start")
    if not any(c.outputs for c in code): out.append("no outputs; run: python dev/book.py execute " + path.stem)
    if path.stat().st_size > MAX_KB * 1000: out.append(f"{path.stat().st_size // 1000} KB, at most {MAX_KB}")
    if path.stem in PARAMETERS: out += check_parameters(path, nb)
    for i, c in enumerate(nb.cells):
        if c.cell_type == "markdown":
            out += check_markdown(c.source, first=i == 0)
            if re.search(r"^#\|", c.source, re.M): out.append(f"cell {i}: a markdown cell with a #| directive")
            if re.search(r"(?m)^#{1,6} ", c.source) and i and len(blocks(c.source)) > 1: out.append(f"{c.source[:40]!r}: a heading shares its cell")
        elif c.cell_type == "code": out += check_code(c)
    return [f"{path.name}: {problem}" for problem in out]

def check(names=()) -> list:
    "Problems of form in the chapters."
    found = [p for path in chapters(names) for p in check_chapter(path)]
    missing = [] if names else [f"nbs/{n}.ipynb does not exist" for n in PARAMETERS if not (ROOT/"nbs"/f"{n}.ipynb").exists()]
    return found + missing


# ---- test ----------------------------------------------------------------------------------------------------------

def test_chapters(progress) -> list:
    "Run the cells of every chapter, two at a time, as `nbdev_test` does; names and logs of those that fail."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    where = ["--path"] if version("nbdev").startswith("2") else []                # nbdev 3 takes the path as it is
    todo, running, failed, lock = chapters(), {}, [], threading.Lock()
    done = 0
    def one(path):
        nonlocal done
        with lock: running[path.stem] = time.time()
        p = subprocess.run([Path(sys.executable).with_name("nbdev_test"), *where, path], cwd=ROOT, env=env,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with lock:
            took, done = time.time() - running.pop(path.stem), done + 1
            progress.say(f"[{done}/{len(todo)}] {path.stem}: {'ok' if p.returncode == 0 else 'FAILED'}, {took:.0f} s")
            if p.returncode: failed.append(f"{path.name}\n{p.stdout[-4000:]}")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(one, path) for path in todo]
        while not all(j.done() for j in jobs):
            with lock: now = ", ".join(f"{k} {time.time() - t:.0f} s" for k, t in sorted(running.items()))
            progress.show(f"chapters {done}/{len(todo)}; running {now}")
            time.sleep(0.5)
    for j in jobs: j.result()
    return failed

def report(title, problems, progress) -> bool:
    "Print a step's verdict; true if there were problems."
    progress.say(f"{title}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
    for p in problems: print(f"  {p}", file=sys.stderr)
    return bool(problems)

def test_all():
    "Everything CI holds the book to; exit status 1 if anything is wrong."
    progress = Progress()
    bad = report("sync", sync(), progress)
    bad |= report("check", check(), progress)
    bad |= report("chapters", test_chapters(progress), progress)
    progress.say("tests/")
    how = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]                   # two files at a time
    bad |= bool(subprocess.run([sys.executable, "-m", "pytest", "tests", *how], cwd=ROOT, stdin=subprocess.DEVNULL).returncode)
    progress.say("FAILED" if bad else "all is well")
    sys.exit(bad)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="command", required=True)
    p = sub.add_parser("execute"); p.add_argument("chapters", nargs="*"); p.add_argument("--timeout", type=int, default=900, help="seconds a cell")
    p = sub.add_parser("check"); p.add_argument("chapters", nargs="*")
    p = sub.add_parser("sync"); p.add_argument("--fix", action="store_true"); p.add_argument("--staged", action="store_true")
    p = sub.add_parser("copy"); p.add_argument("--lang", choices=["zh", "en"], required=True); p.add_argument("out")
    sub.add_parser("test")
    a = ap.parse_args()
    if a.command == "execute": execute_all(a.chapters, a.timeout)
    elif a.command == "copy": copy(a.lang, a.out)
    elif a.command == "test": test_all()
    else:
        problems = check(a.chapters) if a.command == "check" else sync(a.fix, a.staged)
        for p in problems: print(p)
        fixed = getattr(a, "fix", False)
        print(f"{len(problems)} {'line(s) to read' if fixed else 'problem(s)'}" if problems else "ok")
        sys.exit(bool(problems) and (not fixed or problems[0].startswith("export failed")))

if __name__ == "__main__": main()
