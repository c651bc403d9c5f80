"""The folder is the registry: to add a method, add its file. Nothing registers itself."""

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from limbeck.core.refused import Refused

_HERE = Path(__file__).parent

# kind → (folder, the class a file's one subclass extends; None: the file's function of this name, "" meaning
# the file's own name)
KINDS: dict[str, tuple[str, str | None, str]] = {
    "method": ("knowledge", "Method", ""),
    "lens": ("knowledge", None, ""),
    "scheme": ("schemes", "Scheme", ""),
    "task": ("tasks", "Task", ""),
    "view": ("views", None, ""),
    "data": ("data", None, "load"),
    "model": ("models", None, "MODELS"),
}

# What a class from outside must have. The other kinds are functions, and data may be a data set itself.
_HAS = {"method": ("card", "loss"), "scheme": ("staged",), "task": ("headline", "loss", "score")}


def find(kind: str, name: str) -> Any:
    """The class or function called `name`, or the object at `package.module:name`. Raises `Refused` with the
    near names.

    A model may also be `timm:NAME`, `hf:NAME` or an `nn.Module`; what is found is always a factory.
    """
    if ":" in name:
        return _outside(kind, name) if kind != "model" else _outside_model(name)
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise Refused(
            f"There is no {kind} "
            f"'{name}'{' (did you mean ' + ' or '.join(repr(n) for n in near) + '?)' if near else ''}; "
            f"known: {', '.join(known) or 'none'}; or give the path of your own, 'package.module:name'."
        )
    module = importlib.import_module(known[name])
    _, parent, function = KINDS[kind]
    if kind == "model":
        return module.MODELS[name]
    return getattr(module, function or name) if parent is None else _only_subclass(module, parent)


@cache
def names(kind: str) -> dict[str, str]:
    """name → module, sorted. Files are read, not imported, except models' (one file has several names)."""
    folder, parent, function = KINDS[kind]
    found = {}
    for path in sorted((_HERE / folder).rglob("*.py")):
        if not _defines(path, parent, function or path.stem):
            continue
        module = ".".join(["limbeck", *path.relative_to(_HERE).with_suffix("").parts])
        # A recipe says "fashion-mnist"; Python's file must be called fashion_mnist.
        stem = path.stem.replace("_", "-") if kind == "data" else path.stem
        for name in importlib.import_module(module).MODELS if kind == "model" else [stem]:
            assert name not in found, f"two files are called {name}"
            found[name] = module
    return dict(sorted(found.items()))


def knobs(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword knobs of a method's class or a model's factory, by name; none where it does not tell."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _outside_model(name: str) -> Any:
    from limbeck.models.outside import SOURCES, factory  # late: torch is not waited for

    source, _, rest = name.partition(":")
    return SOURCES[source](rest) if source in SOURCES and rest else factory(name, _imported("model", name))


def _outside(kind: str, path: str) -> Any:
    found = _imported(kind, path)
    if kind == "data":
        return found if callable(found) else lambda: found
    if kind == "view" and inspect.isclass(found):
        from limbeck.pieces.transform import as_view  # late: torch is not waited for

        return as_view(found, path)
    lacks = [name for name in _HAS.get(kind, ()) if not hasattr(found, name)]
    if kind not in _HAS and not callable(found):
        raise Refused(f"The {kind} '{path}' is of type {type(found).__name__}, expected a function.")
    if kind in _HAS and not (inspect.isclass(found) and not lacks):
        what = "a class" if inspect.isclass(found) else f"of type {type(found).__name__}"
        raise Refused(
            f"The {kind} '{path}' is {what}{f' without `{lacks[0]}`' if lacks else ''}, expected a subclass "
            f"of limbeck.core.{kind}.{kind.title()} with {' and '.join(f'`{name}`' for name in _HAS[kind])}."
        )
    return found


def _imported(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise Refused(f"The {kind} '{path}' names nothing; expected 'package.module:name'.")
    if not all(part.isidentifier() for part in module.split(".")):
        raise Refused(
            f"The {kind} '{path}' begins with no module's name; expected 'package.module:name', for "
            f"./mine.py 'mine:{attribute}' (modules are looked for where you are, and on the Python path)."
        )
    try:
        whole = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Refused(
            f"The {kind} '{path}' cannot be imported: {error}; expected 'package.module:name' of something "
            "on the Python path."
        ) from None
    except (Exception, SystemExit) as error:  # theirs
        why = in_a_line(error)
        raise Refused(f"The {kind} '{path}' cannot be imported: {why}; mend that module.") from error
    if not hasattr(whole, attribute):
        raise Refused(f"The {kind} '{path}' does not exist: module '{module}' has no '{attribute}'.")
    return getattr(whole, attribute)


def in_a_line(error: BaseException) -> str:
    """Somebody else's error in a line: its type, and its own first words."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _defines(path: Path, parent: str | None, name: str) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    extended = {
        b.id for node in body if isinstance(node, ast.ClassDef) for b in node.bases if isinstance(b, ast.Name)
    }
    if parent is not None:
        return parent in extended
    if name == "MODELS":
        return any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODELS" for node in body)
    # A method's function may be called as its file is, as a lens' function is; the class tells them apart.
    return "Method" not in extended and any(
        isinstance(node, ast.FunctionDef) and node.name == name for node in body
    )


def _only_subclass(module: Any, parent: str) -> Any:
    mine = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and c.__module__ == module.__name__
        and any(b.__name__ == parent for b in c.__bases__)
    ]
    assert len(mine) == 1, f"{module.__name__} must define one {parent}, found {len(mine)}"
    return mine[0]
