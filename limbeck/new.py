"""`limbeck new`: a method's file and its test, which work at once and are then made one's own."""

import ast
import builtins
import keyword
import re
import sys
from datetime import date
from pathlib import Path

from limbeck import registry
from limbeck.core.refused import Refused

KINDS = ("response", "feature", "relation")
LONGEST = 20
"""Characters of a name; with more of them lines of the written files would be too long."""

_TEMPLATES = Path(__file__).parent / "templates"


def method(name: str, kind: str, outside: Path | None = None) -> list[str]:
    """Write a method and its test, and say what was written and how to go on, a line each.

    In a checkout of limbeck, and without `outside`, they go where the house keeps them. Elsewhere they are a
    pair beside each other in the folder `outside` (default: the current one), which may be a package. Nothing
    is overwritten. Raises `Refused` for a name or a kind that cannot be.
    """
    if kind not in KINDS:
        raise Refused(f"There is no kind '{kind}' of method; the kinds are {', '.join(KINDS)}.")
    texts = [(_TEMPLATES / file).read_text(encoding="utf-8") for file in (f"{kind}.py", f"{kind}_test.py")]
    _check_name(name, kind, texts)
    if outside is None and _is_checkout(Path()):
        files = [
            Path("limbeck/knowledge", kind, f"{name}.py"),
            Path("tests/knowledge", kind, f"test_{name}.py"),
        ]
        module = f"limbeck.knowledge.{kind}.{name}"
        further = [
            "Put your paper where TODO stands. Every check of the house runs it as it is:",
            f'  make test ARGS="-k {name}"',
        ]
    else:
        folder = Path() if outside is None else outside
        files = [folder / f"{name}.py", folder / f"test_{name}.py"]
        root, module = _import_path(folder, name)
        further = [
            f"Put your paper where TODO stands, and test it: pytest {files[1]}",
            f'In a recipe, with {root} on PYTHONPATH: {{ method = "{module}:{_class(name)}" }}',
        ]
        texts = [_sorted_elsewhere(text) for text in texts]
    there = [file for file in files if file.exists()]
    if there:
        raise Refused(f"{there[0]} is there already, and nothing is overwritten; choose another name.")
    try:
        for file, text in zip(files, texts, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_renamed(text, name, kind, module), encoding="utf-8")
    except OSError as error:
        raise Refused(f"{error.filename} cannot be written: {error.strerror}.") from None
    return [*(f"Written: {file}" for file in files), *further]


def _check_name(name: str, kind: str, texts: list[str]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise Refused(
            f"'{name}' cannot be a method's name; expected small letters, digits and single underscores, a "
            f"letter first, at most {LONGEST} in all, for example 'cosine_gap'."
        )
    for what in ("method", "lens"):
        if name in registry.names(what):
            raise Refused(f"There is a {what} '{name}' already; choose another name.")
    ours = {"loss", "logits", "task"}.union(*map(_words, texts))
    pythons = {*dir(builtins), *keyword.kwlist, *keyword.softkwlist, *sys.stdlib_module_names}
    for word in (name, _class(name)):
        if word in ours | pythons:
            raise Refused(
                f"'{word}' means something else already; choose another name, such as '{name}_{kind}'."
            )


def _words(text: str) -> set[str]:
    """The names that a template uses for itself, so that a method cannot take them away."""
    tree = ast.parse(text)
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    variables = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return imported | functions | variables | parameters


def _is_checkout(folder: Path) -> bool:
    return (folder / "limbeck/knowledge").is_dir() and (folder / "tests/knowledge").is_dir()


def _import_path(folder: Path, name: str) -> tuple[Path, str]:
    """What must be on the Python path, and the module's name from there: packages around the folder count."""
    parts, place = [name], folder.resolve()
    while (place / "__init__.py").exists():
        parts, place = [place.name, *parts], place.parent
    return place, ".".join(parts)


def _sorted_elsewhere(text: str) -> str:
    """The imports as ruff sorts them where limbeck is somebody else's package and the method one's own."""
    found = re.search(r"((?:from .+\n)+)\n((?:from limbeck.+\n)+)", text)
    assert found is not None
    lines = sorted(found[1].splitlines() + found[2].splitlines())
    own = [line for line in lines if line.startswith("from limbeck.templates")]
    theirs = [line for line in lines if line not in own]
    return text.replace(found[0], "\n".join([*theirs, *([""] if own else []), *own, ""]))


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _renamed(text: str, name: str, kind: str, module: str) -> str:
    text = text.replace(f"limbeck.templates.{kind}", module).replace("2026", str(date.today().year))
    return text.replace("NameHere", _class(name)).replace("name_here", name)
