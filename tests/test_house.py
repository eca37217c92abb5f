"The house around the chapters: two configurations of one package, the checks of the book, the READMEs."
import ast, configparser, os, re, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest, yaml
import nanochat_nb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"dev"))
import book

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib
PROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
PYTHON = Path(sys.executable)
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))


# ---- the two configurations ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ini():
    c = configparser.ConfigParser(interpolation=None)
    c.read(ROOT/"settings.ini", encoding="utf-8")
    return c["DEFAULT"]

def test_settings_ini_is_the_same_package(ini):
    p, n = PROJECT["project"], PROJECT["tool"]["nbdev"]
    assert ini["lib_name"] == ini["repo"] == p["name"]
    assert ini["version"] == nanochat_nb.__version__ and "version" in p["dynamic"]
    assert ini["description"] == p["description"]
    assert p["requires-python"] == f">={ini['min_python']}"
    assert (ini["license"], p["license"]) == ("apache2", "Apache-2.0")
    assert ini["keywords"].split() == p["keywords"]
    assert ini["author"] == p["authors"][0]["name"]
    for key in ("lib_path", "nbs_path", "tst_flags"): assert ini[key] == n[key], key
    for key in ("allowed_cell_metadata_keys", "allowed_metadata_keys"): assert ini[key].split() == n[key], key
    for key in ("jupyter_hooks", "clean_ids"): assert ini[key] == str(n[key]), key

def test_settings_ini_has_the_same_dependencies(ini):
    p = PROJECT["project"]
    assert ini["requirements"].split() == p["dependencies"]
    assert ini["dev_requirements"].split() == p["optional-dependencies"]["dev"]
    assert dict(x.split("=", 1) for x in ini["console_scripts"].split()) == p["scripts"]

def test_what_keeps_the_modules_of_both_majors_identical(ini):
    assert "urls" not in PROJECT["project"]                       # a Documentation URL would be written into the modules
    assert ini["update_pyproject"] == "False"
    assert (ini["doc_host"], ini["doc_baseurl"], ini["git_url"], ini["branch"]) == ("", "/", "", "main")

def test_the_parameters_tag_survives_cleaning():
    assert PROJECT["tool"]["nbdev"]["allowed_cell_metadata_keys"] == ["tags"]

def test_the_tested_versions_lie_in_the_admitted_ranges():
    from packaging.requirements import Requirement
    project = PROJECT["project"]
    ranges = {r.name: r for r in map(Requirement, project["dependencies"] + sum(project["optional-dependencies"].values(), []))}
    pins = [Requirement(x) for x in (ROOT/"dev/constraints.txt").read_text().splitlines() if x and x[0] != "#"]
    for pin in pins:
        version = str(pin.specifier).removeprefix("==")
        if pin.name in ranges: assert ranges[pin.name].specifier.contains(version), pin.name
    assert "torch" in [p.name for p in pins]

@pytest.mark.parametrize("command", ["nbdev_test", "nbdev-test"])
def test_both_spellings_of_the_test_command(command, tmp_path):
    command = PYTHON.with_name(command)
    if not command.exists() and command.name == "nbdev-test": pytest.skip("nbdev 2 has the other name only")
    (tmp_path/"nbs").mkdir()
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT/name, tmp_path/name)
    for source, ends_well in (("assert 1 + 1 == 2", True), ("assert 1 + 1 == 3", False)):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("#| default_exp toy"), nbformat.v4.new_code_cell(source)])
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        nbformat.write(nb, tmp_path/"nbs/toy.ipynb")
        assert (subprocess.run([command], cwd=tmp_path, capture_output=True).returncode == 0) == ends_well


# ---- sync: what CI says to a tree that is not in step ---------------------------------------------------------------

@pytest.fixture
def tree(tmp_path):
    "A copy of the book that may be spoilt."
    for name in ("dev", "nbs", "nanochat_nb"):
        shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT/name, tmp_path/name)
    return tmp_path

def run_book(tree, *args):
    done = subprocess.run([PYTHON, "dev/book.py", *args], cwd=tree, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

def test_sync_accepts_a_tree_in_step_and_touches_nothing(tree):
    assert run_book(tree, "sync", "--fix")[0] == 0
    before = book._tree(tree)
    assert run_book(tree, "sync") == (0, "ok\n")
    assert book._tree(tree) == before

def test_sync_sees_a_module_edited_by_hand(tree):
    run_book(tree, "sync", "--fix")
    module = tree/"nanochat_nb/settings.py"
    module.write_text(module.read_text(encoding="utf-8").replace("cutoff=0.5", "cutoff=0.4"), encoding="utf-8")
    code, said = run_book(tree, "sync")
    assert code == 1 and "nanochat_nb/settings.py" in said
    assert "cutoff=0.4" in module.read_text(encoding="utf-8")     # seen, not silently undone

def test_sync_sees_a_missing_module_and_one_without_notebook(tree):
    run_book(tree, "sync", "--fix")
    (tree/"nanochat_nb/settings.py").unlink()
    (tree/"nanochat_nb/stray.py").write_text("x = 1\n")
    code, said = run_book(tree, "sync")
    assert code == 1 and "nanochat_nb/settings.py" in said and "nanochat_nb/stray.py: no notebook exports it" in said

def test_sync_sees_a_notebook_that_is_not_clean(tree):
    run_book(tree, "sync", "--fix")
    path = tree/"nbs/000_settings.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells[2].metadata["collapsed"] = True
    nbformat.write(nb, path)
    code, said = run_book(tree, "sync")
    assert code == 1 and "nbs/000_settings.ipynb" in said

def test_the_hook_looks_at_what_is_staged(tree):
    def git(*args): return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tree, capture_output=True)
    run_book(tree, "sync", "--fix")
    git("init"); git("add", "-A")
    assert run_book(tree, "sync", "--staged")[0] == 0
    module = tree/"nanochat_nb/settings.py"
    whole = module.read_text(encoding="utf-8")
    module.write_text(whole + "x = 1\n", encoding="utf-8"); git("add", "-A")
    module.write_text(whole, encoding="utf-8")                    # mended in the work tree, not in the index
    assert run_book(tree, "sync")[0] == 0 and run_book(tree, "sync", "--staged")[0] == 1


# ---- check: the form of a chapter -----------------------------------------------------------------------------------

GOOD = "把文档首尾相接，不留空白。\n\n> Documents are joined end to end."

@pytest.mark.parametrize("source", [
    GOOD, "## 打包 · Packing", "$$x = 1$$", "| a | b |\n|---|---|\n| 1 | 2 |", "![plan](plan.png)", "```python\nx = 1\n```",
    "有公式：\n\n> A formula:\n\n$$\nx\n$$", "调用 `train(cfg)`。\n\n> Call `train(cfg)`, e.g. on “你好”.", "- 一\n- 二\n\n> One, two.",
])
def test_markdown_in_two_languages_passes(source): assert book.check_markdown(source) == []

@pytest.mark.parametrize("source, said", [
    ("把文档首尾相接，不留空白。", "no English"),
    ("Documents are joined end to end.", "not Chinese"),
    ("> Documents are joined end to end.", "without Chinese"),
    ("> Joined end to end.\n\n首尾相接，不留空白。", "before the Chinese"),
    ("把文档首尾相接。\n\n> 把文档首尾相接，不留空白。", "no English"),
    ("## Packing", "heading"), ("## 打包 Packing", "heading"), ("## Packing · 打包", "heading"), ("## 打包 · 装箱", "heading"),
    ("一。二。三。四。\n\n> One, two, three, four.", "4 Chinese sentences"),
])
def test_markdown_in_one_language_is_refused(source, said): assert any(said in p for p in book.check_markdown(source))

def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("stream", name="stdout", text=t) for t in outputs])

@pytest.mark.parametrize("source, output, said", [
    ("x = 1\n" * 26, "", "26 lines"), ("x = " + "1" * 120, "", "124 columns"), ("f()", "saved to /home/me/a.txt", "path of a machine"),
    ("f()", "  5%|#\r 10%|##", "progress bar"), ("f()", "Traceback (most recent call last):\n", "traceback"),
])
def test_code_cells_that_are_refused(source, output, said): assert any(said in p for p in book.check_code(code(source, output)))

def test_code_cells_that_pass():
    assert book.check_code(code("x = 1\n" * 25, "~/.cache/nanochat", "a/tmp/b", "https://host/usr/x")) == []
    failed = code("f()")
    failed.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[]))
    assert any("stored error" in p for p in book.check_code(failed))

def parameters_problems(tmp_path, source, tag="parameters"):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, tmp_path/"a.ipynb")
    return book.check_parameters(tmp_path/"a.ipynb", nb)

def test_parameters_that_papermill_can_list(tmp_path):
    assert parameters_problems(tmp_path, "depth: int = 4  # the one dial\nsource: str = 'world'  # where from") == []
    for source, said in [("depth = 4  # the one dial", "no type"), ("depth: int = 4", "no comment"),
                         ("lr: float | None = None  # rate", "does not see")]:
        assert any(said in p for p in parameters_problems(tmp_path, source)), source
    assert any("would run with the defaults" in p for p in parameters_problems(tmp_path, "depth: int = 4  # x", tag="other"))

@pytest.mark.parametrize("name", [n for n in book.PARAMETERS if (ROOT/"nbs"/f"{n}.ipynb").exists()])
def test_papermill_lists_the_parameters(name):
    done = subprocess.run([PYTHON, "-m", "papermill", "--help-notebook", ROOT/"nbs"/f"{name}.ipynb"], capture_output=True, text=True)
    assert done.returncode == 0 and "Parameters inferred" in done.stdout and "Unknown type" not in done.stdout

def test_check_names_a_chapter_without_outputs_or_tag(tree):
    path = tree/"nbs/03_pretrain.ipynb"
    nb = nbformat.read(ROOT/"nbs/000_settings.ipynb", 4)
    for c in nb.cells: c.pop("outputs", None) if c.cell_type == "markdown" else c.update(outputs=[])
    nbformat.write(nb, path)
    code, said = run_book(tree, "check", "03_pretrain")
    assert code == 1 and "no outputs" in said and "tagged `parameters`" in said

def test_execute_leaves_a_failing_chapter_as_it_was(tree):
    path = tree/"nbs/000_settings.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells[:3]] + [nbformat.v4.new_code_cell("1/0")]
    nbformat.write(nb, path)
    before = path.read_bytes()
    code, said = run_book(tree, "execute", "000_settings")
    assert code == 1 and "ZeroDivisionError" in said and path.read_bytes() == before

def test_execute_keeps_the_output_of_cells_that_are_not_run(tree):
    path = tree/"nbs/000_settings.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells = nb.cells[:2] + [code("#| eval: false\ntrain()", "loss 2.5"), nbformat.v4.new_code_cell("6 * 7")]
    nbformat.write(nb, path)
    status, said = run_book(tree, "execute", "000_settings")
    assert status == 0, said
    kept, ran = nbformat.read(path, 4).cells[-2:]
    assert kept.source.endswith("train()") and kept.outputs[0].text == "loss 2.5" and ran.outputs[0].data["text/plain"] == "42"


# ---- one language ---------------------------------------------------------------------------------------------------

def test_one_language_of_a_cell():
    cell = "## 打包 · Packing\n\n把文档首尾相接：\n\n> Documents are joined:\n\n$$\nx > y\n$$\n\n| 项 · item | 值 |\n|---|---|\n| a | 1 |"
    shared = "$$\nx > y\n$$\n\n| 项 · item | 值 |\n|---|---|\n| a | 1 |"
    assert book.one_language(cell, "zh") == "## 打包\n\n把文档首尾相接：\n\n" + shared
    assert book.one_language(cell, "en") == "## Packing\n\nDocuments are joined:\n\n" + shared
    assert book.one_language("正文\n> Body\n> goes on", "en") == "Body\ngoes on"
    assert book.one_language("```\n> not a quote\n# not a heading\n```", "zh") == "```\n> not a quote\n# not a heading\n```"

@pytest.mark.parametrize("lang", ["zh", "en"])
def test_copy_of_the_book(lang, tmp_path):
    subprocess.run([PYTHON, ROOT/"dev/book.py", "copy", "--lang", lang, tmp_path/"out"], check=True, capture_output=True)
    for path in NOTEBOOKS:
        ours, theirs = nbformat.read(path, 4), nbformat.read(tmp_path/"out"/path.name, 4)
        assert [c.source for c in theirs.cells if c.cell_type == "code"] == [c.source for c in ours.cells if c.cell_type == "code" and c.source.strip()]
        prose = [t for c in theirs.cells if c.cell_type == "markdown" for k, t in book.blocks(c.source) if k in ("heading", "prose")]
        if lang == "zh": assert all(book.HAN.search(t) for t in prose)
        else: assert sum(len(book.HAN.findall(t)) for t in prose) < 0.1 * sum(map(len, prose))
    assert subprocess.run([PYTHON, ROOT/"dev/book.py", "copy", "--lang", lang, ROOT/"nbs"/"zh"], capture_output=True).returncode == 1


# ---- modules, configs, documents ------------------------------------------------------------------------------------

def module_order():
    return re.findall(r"^\| `nbs/\w+\.ipynb` \| `(\w+)` \|", (ROOT/"dev/DESIGN.md").read_text(encoding="utf-8"), re.M)

def test_imports_only_run_down_the_table():
    order = module_order()
    assert order[0] == "settings"
    for path in (ROOT/"nanochat_nb").glob("[a-z]*.py"):
        assert path.stem in order, f"{path.stem} is missing from the table in dev/DESIGN.md"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {n.module.split(".")[-1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
                and (n.level or n.module.startswith("nanochat_nb."))}
        assert all(order.index(u) < order.index(path.stem) for u in used if u in order), f"{path.stem} imports {used}"

@pytest.mark.parametrize("path", sorted(p for d in ("nanochat_nb", "tests", "dev") for p in (ROOT/d).glob("*.py")), ids=lambda p: p.name)
def test_syntax_of_the_oldest_python(path):
    "`x[a, *b]` and `except*` came with Python 3.11; later grammar fails to parse on the versions CI runs."
    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))):
        assert type(n).__name__ != "TryStar", f"line {n.lineno}"
        if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Tuple):
            assert not any(isinstance(e, ast.Starred) for e in n.slice.elts), f"line {n.lineno}"

def test_the_library_stays_small():
    code = [x for p in (ROOT/"nanochat_nb").glob("[a-z]*.py") for x in p.read_text(encoding="utf-8").splitlines() if x.strip() and x.strip()[0] != "#"]
    assert len(code) <= 9550   # a ceiling, not the aim: 4,000 was meant for the chapters up to 06, and is exceeded

READMES = [(ROOT/n).read_text(encoding="utf-8") for n in ("README.md", "README.zh-CN.md")]

def test_the_readmes_have_the_same_sections_and_commands():
    shapes = [[len(m) for m in re.findall(r"^(#+) ", re.sub(r"(?s)```.*?```", "", t), re.M)] for t in READMES]
    assert shapes[0] == shapes[1]
    blocks = [[re.sub(r"[ ]*#.*", "", b) for b in re.findall(r"(?s)```sh\n(.*?)```", t)] for t in READMES]
    assert blocks[0] == blocks[1]

@pytest.mark.parametrize("text", READMES, ids=["en", "zh"])
def test_the_readmes_point_at_what_is_there(text):
    for link in re.findall(r"\]\(([^)#:]+)\)", text): assert (ROOT/link).exists(), link
    for path in NOTEBOOKS: assert path.stem in text, f"{path.stem} is missing"
    for name in re.findall(r"nanochat_nb\.(\w+)", text): assert name in module_order(), name
    makefile = (ROOT/"Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", text): assert re.search(rf"^{target}:", makefile, re.M), target

def test_the_glossary_has_one_word_for_a_concept():
    rows = [r.split("|")[1].strip() for r in (ROOT/"TERMS.md").read_text(encoding="utf-8").splitlines() if re.match(r"\| [^-E]", r)]
    assert len(rows) > 60 and len(rows) == len(set(rows))

def test_ci_runs_what_the_readme_says():
    assert "make test" in (ROOT/".ci/run").read_text() and "bash .ci/run" in (ROOT/".github/workflows/ci.yml").read_text()
    for script in (".ci/run", "dev/hooks/pre-commit"): assert os.access(ROOT/script, os.X_OK), script

def test_licence(): assert "Apache License" in (ROOT/"LICENSE").read_text()
