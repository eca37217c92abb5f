"dev/GUIDE.md: every row of the guide is there, and each heading, command, setting and test that it names exists."
import ast, dataclasses, importlib, re
from functools import cache
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/"dev/GUIDE.md").read_text(encoding="utf-8")
ROWS = [[c.strip() for c in line.strip("|").split(" | ")] for line in TEXT.splitlines() if re.match(r"\| \d\.\d \|", line)]
GUIDE = [f"{part}.{row}" for part, n in enumerate((4, 4, 3, 8, 8, 3), 1) for row in range(1, n + 1)]
MAIN = {"data": "DataFlags", "tokenizer": "TokenizerSettings", "clean": "CleanSettings", "pipeline": "PipelineSettings",
        "plan": "PlanSettings", "repackage": "RepackageSettings", "loader": "LoaderSettings", "convert": "ConvertSettings",
        "pretrain": "PretrainSettings", "core": "CoreSettings", "sft": "SFTSettings", "speedrun": "SpeedrunSettings"}

@cache
def headings(chapter):
    cells = nbformat.read(ROOT/"nbs"/f"{chapter}.ipynb", 4).cells
    return {h for c in cells if c.cell_type == "markdown" for h in re.findall(r"^##+ (.+)$", c.source, re.M)}

@cache
def parameters(chapter):
    cells = nbformat.read(ROOT/"nbs"/f"{chapter}.ipynb", 4).cells
    cell = next(c for c in cells if "parameters" in c.metadata.get("tags", []))
    return {n.target.id for n in ast.parse(cell.source).body if isinstance(n, ast.AnnAssign)}

@cache
def functions(path):
    return {n.name for n in ast.parse((ROOT/path).read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)}

def names(cell): return re.findall(r"`([^`]+)`", cell)


def test_every_row_once_and_in_order():
    assert [r[0] for r in ROWS] == GUIDE and {len(r) for r in ROWS} == {6}

@pytest.mark.parametrize("row", ROWS, ids=[r[0] for r in ROWS])
def test_what_a_row_names_is_there(row):
    _, asks, sections, commands, tests, state = row
    assert re.search("[\u4e00-\u9fff]", asks) and " · " in asks
    for section in sections.split("<br>"):
        name, link, heading = re.fullmatch(r"\[(\w+)\]\(\.\./(nbs/\w+\.ipynb)\): (.+)", section).groups()
        assert link == f"nbs/{name}.ipynb" and heading in headings(name), section
    assert names(commands) and names(tests)
    for command in names(commands): check_command(command)
    for test in names(tests):
        path, name = test.split("::")
        assert name in functions(path), test
    assert re.match(r"(works|partly|not yet): \S.{15,}", state), state

def check_command(command):
    if m := re.fullmatch(r"python -m nanochat_nb\.(\w+)(?: -f (\S+))?((?: --\w+(?: \S+)?)*)", command):
        module = importlib.import_module(f"nanochat_nb.{m[1]}")
        fields = {f.name for f in dataclasses.fields(getattr(module, MAIN[m[1]]))}
        assert hasattr(module, "main") and set(re.findall(r"--(\w+)", m[3])) <= fields and (ROOT/(m[2] or "")).exists(), command
    elif m := re.fullmatch(r"papermill nbs/(\w+)\.ipynb runs/\w+\.ipynb((?: -p \w+ \S+)+)", command):
        assert set(re.findall(r"-p (\w+)", m[2])) <= parameters(m[1]), command
    else: assert (ROOT/re.fullmatch(r"jupyter lab (nbs/\w+\.ipynb)", command)[1]).exists(), command

@pytest.mark.parametrize("command", ["python -m nanochat_nb.plan --dept 20", "papermill nbs/03_pretrain.ipynb runs/a.ipynb -p dept 20",
                                     "python -m nanochat_nb.nothing", "make everything"])
def test_a_command_that_does_not_exist_is_noticed(command):
    with pytest.raises((AssertionError, KeyError, TypeError, ModuleNotFoundError)): check_command(command)
