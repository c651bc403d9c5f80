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
    """The keyword knobs of a method's class or a model's factory, by name."""
    return {
        n: p
        for n, p in inspect.signature(factory).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _outside_model(name: str) -> Any:
    from limbeck.models.outside import SOURCES, factory  # late: torch is not waited for

    source, _, rest = name.partition(":")
    return SOURCES[source](rest) if source in SOURCES and rest else factory(name, _outside("model", name))


def _outside(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise Refused(f"The {kind} '{path}' names nothing; expected 'package.module:name'.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise Refused(
            f"The {kind} '{path}' cannot be imported: {error}; expected 'package.module:name' of something "
            "on the Python path."
        ) from None
    except AttributeError:
        raise Refused(
            f"The {kind} '{path}' does not exist: module '{module}' has no '{attribute}'."
        ) from None


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
