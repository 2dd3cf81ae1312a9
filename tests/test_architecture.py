"""The rules of the house that a machine can check."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import qengine

ROOT = Path(qengine.__file__).resolve().parent
FLOORS = ("cli", "bench", "engine", "loaders", "kernels", "errors", "version")
ROOMS = FLOORS[:5]
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")) + sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400
MAX_FILE_BYTES = 16 << 20
UNPICKLERS = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"})
SKIPPED = frozenset({".git", "build", "__pycache__", ".venv", "venv"})


def name_of(path: Path) -> str:
    """Dotted module name of a source file, as seen from inside the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


INSIDE = [path for path in SOURCES if name_of(path)]
SILENT = [path for path in INSIDE if name_of(path).split(".")[0] != "cli"]
MODULES = {name_of(path): path for path in SOURCES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes below ``if TYPE_CHECKING``, which never run."""
    guarded = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    return {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: those outside functions and outside TYPE_CHECKING."""
    skipped = type_checking_only(tree)
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if node in skipped:
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def imports(path: Path, nodes: Iterator[ast.AST]) -> set[str]:
    """Modules of the package that these nodes import, as dotted names from the package's root ("" is the root)."""
    module = name_of(path)
    package = module.split(".") if path.name == "__init__.py" and module else module.split(".")[:-1]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "qengine"}
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            if base is not None:
                for alias in node.names:
                    inner = ".".join(part for part in (base, alias.name) if part)
                    found.add(inner if inner in MODULES else base)
    return found


def _base(node: ast.ImportFrom, package: list[str]) -> str | None:
    if node.level == 0:
        root, _, rest = (node.module or "").partition(".")
        return rest if root == "qengine" else None
    kept = package[: len(package) - (node.level - 1)]
    return ".".join([*kept, *(node.module or "").split(".")]).strip(".")


@pytest.mark.parametrize("path", INSIDE, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    module = name_of(path)
    here = FLOORS.index(module.split(".")[0])
    for target in imports(path, iter(ast.walk(tree_of(path)))):
        room = target.split(".")[0]
        assert room in FLOORS or not target, f"{module} imports {target}, which is no room"
        if target:
            assert FLOORS.index(room) >= here, f"{module} imports {target}, which is above it"
        else:
            assert module.split(".")[0] in ("cli", "bench"), f"{module} imports the front door of the package"


def test_the_import_rule_sees_what_it_must_see() -> None:
    path = ROOT / "loaders" / "source.py"
    for line, target in (
        ("from ..engine import session", "engine.session" if "engine.session" in MODULES else "engine"),
        ("from ..engine.session import Engine", "engine.session"),
        ("from qengine.cli import main", "cli"),
        ("import qengine.cli", "cli"),
        ("from .. import engine", "engine"),
    ):
        assert imports(path, iter(ast.walk(ast.parse(line)))) == {target}


def test_no_imports_go_round() -> None:
    graph = {name: imports(path, at_import_time(tree_of(path))) & set(MODULES) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"imports go round: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in sorted(graph[name] - {""}):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(set(graph) - {""}):
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_and_no_code_of_a_hub_is_run(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            assert not UNPICKLERS & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNPICKLERS
            assert not (node.module == "torch" and "load" in {alias.name for alias in node.names})
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.jit.load", "torch.hub.load")
            words = {keyword.arg for keyword in node.keywords if ast.unparse(keyword.value) != "False"}
            assert not words & {"trust_remote_code", "allow_pickle"}


@pytest.mark.parametrize("path", SILENT, ids=name_of)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert "print" not in {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_no_file_is_larger_than_16_mebibytes() -> None:
    files = (path for path in ROOT.rglob("*") if path.is_file() and not SKIPPED & set(path.relative_to(ROOT).parts))
    large = [str(path.relative_to(ROOT)) for path in files if path.stat().st_size > MAX_FILE_BYTES]
    assert not large


def test_the_version_stands_in_one_place() -> None:
    line = (ROOT / "version.py").read_text("utf-8")
    assert f'__version__ = "{qengine.__version__}"' in line
    assert f'version = "{qengine.__version__}"' not in (ROOT / "pyproject.toml").read_text("utf-8")


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = frozenset({"torch", "transformers", "diffusers", "triton", "numpy", "PIL", "huggingface_hub", "safetensors"})


@pytest.mark.parametrize("module", ["qengine", "qengine.kernels", "qengine.kernels.read", "qengine.loaders.source"])
def test_importing_the_package_loads_nothing_heavy(module: str) -> None:
    assert not imported_by(f"import {module}") & HEAVY


def test_importing_the_command_line_loads_no_torch() -> None:
    assert not imported_by("import qengine.cli") & HEAVY


def test_importing_the_engine_starts_no_cuda() -> None:
    statement = "import qengine, torch\nqengine.Engine\nassert not torch.cuda.is_initialized()"
    assert "torch" in imported_by(statement)
