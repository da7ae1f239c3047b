"""The plan of the house: who imports whom, which room holds what, and how long a page may be."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

from conftest import MODULES, ROOT, SCRIPTS

GROUND = {"startup", "utils", "files", "training", "dataset", "plots", "transforms"}
CHAPTERS = {path.parent.name for path in ROOT.glob("p?_*/__init__.py")}
TRAIN = sorted(ROOT.glob("p?_*/train.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """The modules that a file imports, in the order of its lines, wherever they stand."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda node: node.lineno):
        assert not getattr(node, "level", 0), f"{path}:{node.lineno} imports relatively, which no script can"
        yield from [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def room(path):
    """The chapter or folder of a file, or its own name where it lies at the top."""
    return path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) != "report"], ids=name_of)  # that takes all
def test_who_imports_whom(path):
    top = {module.split(".")[0] for module in imports(path)}
    ours = top & {room(other) for other in MODULES}
    here, at_the_top = room(path), {other.stem for other in ROOT.glob("*.py")}
    if here in GROUND:
        allowed = GROUND
    elif here in CHAPTERS:
        more = {"p7_clevr": {"p1_ddpm"}, "tiny": {"p7_clevr"}}  # the mathematics of diffusion; scenes and their judge
        allowed = at_the_top | {here} | more.get(path.parent.name, set())
    else:  # graders, the course's network, what reads and builds the data
        allowed = at_the_top
    assert ours <= allowed, f"{name_of(path)} must not import {', '.join(sorted(ours - allowed))}"


@pytest.mark.parametrize("path", [ROOT / name for name in SCRIPTS], ids=name_of)
def test_every_script_begins_with_utils_and_ends_with_run(path):
    others = [module.split(".")[0] for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "utils"  # startup.py has to run before torch is there
    assert "sys.path.insert(0, str(ROOT))" in path.read_text()  # also under python -P
    assert path.read_text().endswith('\n\n\nif __name__ == "__main__":\n    run(main)\n')  # mistakes get one sentence


def test_no_file_hides_a_module_of_python():
    """A script's own folder comes first when Python looks for a module, also for those that numpy imports."""
    assert [name_of(path) for path in MODULES if path.stem in sys.stdlib_module_names] == []


@pytest.mark.parametrize("chapter", sorted(CHAPTERS | {"report"}))
def test_a_folder_of_modules_is_a_package_of_one_sentence(chapter):
    tree = ast.parse((ROOT / chapter / "__init__.py").read_text())
    assert ast.get_docstring(tree) and len(tree.body) == 1


def test_pages_are_short():
    limits = {"utils.py": 230, "README.md": 130, **{name_of(path): 130 for path in TRAIN}}
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in limits}
    assert {name: length for name, length in lengths.items() if length >= limits[name]} == {}


def runs_of_code(path, length=6):
    """Every `length` consecutive lines of code of a file, without imports and docstrings, as a set of tuples."""
    source = path.read_text()
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if text or isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1)
             if number not in skipped and line.strip() and not line.strip().startswith("#")]
    return {tuple(lines[i:i + length]) for i in range(len(lines) - length + 1)}


def test_no_six_lines_stand_in_two_train_scripts():
    runs = [runs_of_code(path) for path in TRAIN]
    assert len(runs) >= 3
    for i, first in enumerate(runs):
        for second in runs[i + 1:]:
            assert "\n".join(next(iter(first & second), ())) == ""


def test_no_remark_silences_the_linter_for_nothing():
    if not importlib.util.find_spec("ruff"):
        pytest.skip("ruff is not installed")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--extend-select", "RUF100",
                           "--output-format", "concise", ROOT], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert [line for line in done.stdout.splitlines() if "RUF100" in line] == []
    without_reason = [name_of(path) for path in MODULES if re.search("# noqa(?!: [A-Z0-9]+  )", path.read_text())]
    assert without_reason == []
