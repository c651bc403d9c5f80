"""Imports point down and never sideways; names become objects in one place; nothing is unpickled.

Read from the source, so an import inside a function counts, and one for the type checker too.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

LIMBECK = Path(__file__).parents[2] / "limbeck"

LEAVES = {"knowledge", "schemes", "models", "views", "tasks", "data"}
LOOP = {"engine", "world", "checkpoint"}
NAMES = {"build", "recipe", "registry"}
DOORS = {"run", "board", "answers", "race", "doctor", "report", "export", "distiller"}
DOORS |= {"new", "schema", "equation", "distill", "hints", "pictures"}


# What each file or folder of limbeck/ may import besides its own files. Names know each other and so do doors
# (board uses run), but never in a circle. `import limbeck` opens everything, so it is for those on top.
INSIDE = {"core", "pieces"} | LEAVES | LOOP | NAMES
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "pieces": {"core"},
    **{folder: {"core", "pieces"} for folder in LEAVES},
    **{file: {"core"} for file in LOOP},
    **{file: INSIDE - {file} for file in NAMES},
    **{file: INSIDE | DOORS | {"limbeck"} for file in DOORS},
    "cli": INSIDE | DOORS | {"limbeck"},
    "templates": {"core"},  # what `limbeck new` copies
    "limbeck": {"core"},  # __init__.py: the public names are core's
}

PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLES = ("torch.load", "torch.save", "torch.serialization", "torch.hub", "torch.jit.load", "torch.package")


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(root.rglob("*.py")):
        yield file.relative_to(root), ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path, tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything a file imports, relative imports resolved. `from a import b` gives `a.b`."""
    package = ["limbeck", *file.parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, node.module or ""]).strip(".")
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ours(root: Path, file: Path, tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """What a file imports of limbeck, as paths of modules: ("core", "batch"); () is limbeck itself."""
    for name in imported(file, tree):
        first, *parts = name.split(".")
        if first != "limbeck":
            continue
        while parts and not any(root.joinpath("/".join(parts) + end).exists() for end in ("", ".py")):
            parts.pop()  # a name inside a module
        yield tuple(parts)


def sideways(root: Path) -> list[str]:
    """Every import that does not point down, as a sentence."""
    found = []
    for file, tree in sources(root):
        here = file.parts[0].removesuffix(".py").replace("__init__", "limbeck")
        if here not in MAY_IMPORT:
            found.append(f"{file} has no layer: give it a place in MAY_IMPORT")
            continue
        for parts in ours(root, file, tree):
            there = parts[0] if parts else "limbeck"
            if there != here and there not in MAY_IMPORT[here]:
                found.append(f"{file} imports {there}")
            if there == here == "knowledge" and len(parts) > 1:
                found.append(f"{file} imports another method, {'.'.join(parts)}")
    return found


def cycle(root: Path) -> list[str] | None:
    """Files that import each other, if any do."""
    graph = {
        ".".join(file.with_suffix("").parts).removesuffix("__init__").strip("."): {
            ".".join(parts) for parts in ours(root, file, tree)
        }
        for file, tree in sources(root)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def picklers(root: Path) -> list[str]:
    """Every way to a pickle: modules that read or write them, torch's and numpy's functions that do."""
    found = []
    for file, tree in sources(root):
        for name in imported(file, tree):
            if name.split(".")[0] in PICKLERS or name.startswith(PICKLES):
                found.append(f"{file} imports {name}")
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if text in PICKLES or text.endswith((".read_pickle", ".to_pickle")):
                found.append(f"{file}:{node.lineno} uses {text}")
            allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value)
            if allowed and allowed != "False":
                found.append(f"{file} allows a pickle: {allowed}")
    return found


def test_imports_point_down() -> None:
    assert not sideways(LIMBECK)


def test_no_two_files_import_each_other() -> None:
    assert cycle(LIMBECK) is None


def test_core_stands_on_torch() -> None:
    allowed = sys.stdlib_module_names | {"limbeck", "torch", "numpy", "jaxtyping"}
    trees = [(file, tree) for file, tree in sources(LIMBECK) if file.parts[0] == "core"]
    used = {name.split(".")[0] for file, tree in trees for name in imported(file, tree)}
    assert used <= allowed and "torch" in used


def test_names_become_objects_in_the_registry() -> None:
    """Nobody else imports by a name made at run time; that would be an import that these laws cannot see."""
    openers = {
        str(file)
        for file, tree in sources(LIMBECK)
        if any(name.split(".")[0] in ("importlib", "runpy", "pkgutil") for name in imported(file, tree))
        or any(isinstance(node, ast.Name) and node.id == "__import__" for node in ast.walk(tree))
    }
    assert openers == {"registry.py", "__init__.py"}


def test_nothing_is_unpickled() -> None:
    assert not picklers(LIMBECK)


# --- the laws are not blind ---


def write(root: Path, file: str, line: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(line + "\n")


HOUSE = (
    *("core/batch.py", "pieces/softening.py", "models/cnn.py", "knowledge/response/kd.py"),
    *("engine.py", "build.py", "run.py", "cli.py"),
)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/taps.py", "from limbeck import engine"),
        ("core/taps.py", "import limbeck"),
        ("core/taps.py", "from limbeck.pieces.softening import kl"),
        ("core/taps.py", "from .. import engine"),
        ("core/taps.py", "from ..build import lab"),
        ("pieces/bank.py", "def f():\n    from limbeck.models.cnn import CNN"),
        ("models/vit.py", "if TYPE_CHECKING:\n    from limbeck.knowledge.response.kd import KD"),
        ("knowledge/feature/at.py", "import limbeck.knowledge.response.kd"),
        ("knowledge/feature/at.py", "from ..response import kd"),
        ("knowledge/feature/at.py", "from limbeck.engine import Engine"),
        ("checkpoint.py", "from limbeck.engine import Engine"),
        ("engine.py", "from limbeck.models.cnn import CNN"),
        ("recipe.py", "from limbeck.run import Run"),
        ("run.py", "from limbeck.cli import app"),
        ("__init__.py", "from limbeck.run import Run"),
        ("drawer.py", "import torch"),
    ],
)
def test_an_import_that_does_not_point_down_is_seen(tmp_path: Path, file: str, line: str) -> None:
    for other in HOUSE:
        write(tmp_path, other, "")
    assert not sideways(tmp_path)
    write(tmp_path, file, line)
    assert len(sideways(tmp_path)) == 1


def test_a_cycle_is_seen(tmp_path: Path) -> None:
    write(tmp_path, "run.py", "from limbeck import board")
    write(tmp_path, "board.py", "")
    assert cycle(tmp_path) is None
    write(tmp_path, "board.py", "def f():\n    from limbeck.run import Run")
    assert set(cycle(tmp_path) or ()) == {"run", "board"}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "from torch import load",
        "def f(p):\n    return torch.load(p, weights_only=True)",
        "def f(p):\n    return np.load(p, allow_pickle=True)",
    ],
)
def test_a_pickle_is_seen(tmp_path: Path, line: str) -> None:
    write(tmp_path, "engine.py", "import torch\ndef f(p):\n    return np.load(p, allow_pickle=False)")
    assert not picklers(tmp_path)
    write(tmp_path, "engine.py", line)
    assert picklers(tmp_path)
