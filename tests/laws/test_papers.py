"""One paper, one file: it cites, gives the equation, owns up to departures, and its functions tell shapes.

And what holds for classes and signatures everywhere: abstract or final, and no knobs passed through unseen.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from limbeck import registry
from limbeck.core.batch import Lesson
from limbeck.core.keyed import keyed

LIMBECK = Path(__file__).parents[2] / "limbeck"

METHODS = registry.names("method")
PAPERS = METHODS | registry.names("lens")
MATHEMATICS = [
    file
    for folder in ("knowledge", "pieces")
    for file in sorted((LIMBECK / folder).rglob("*.py"))
    if file.stem != "__init__"
]
ABSTRACT = {"Method", "Teacher", "Scheme", "Task"}
SHAPES = {"Float", "Int", "Bool", "Complex", "Num", "Real", "Inexact", "Shaped"}
PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|10\.\d{4,9}/[^\s;)]+")


def trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(root.rglob("*.py")):
        yield file.relative_to(root), ast.parse(file.read_text(encoding="utf-8"))


def shapeless(tree: ast.Module) -> list[str]:
    """Parameters and results of public functions that are of no said type, or tensors of no said shape."""
    found = []
    for function in public_functions(tree):
        parameters = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        for name, hint in [*((p.arg, p.annotation) for p in parameters), ("return", function.returns)]:
            if hint is None or _has_bare_tensor(hint):
                found.append(f"{function.name}({name})")
    return found


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _has_bare_tensor(hint: ast.expr) -> bool:
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) in SHAPES:
        return False
    return ast.unparse(hint) in ("Tensor", "torch.Tensor") or any(
        _has_bare_tensor(child) for child in ast.iter_child_nodes(hint) if isinstance(child, ast.expr)
    )


def passed_through(root: Path) -> set[str]:
    """Functions with `**kwargs` in their signature."""
    return {
        f"{file}:{getattr(node, 'name', 'lambda')}"
        for file, tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg
    }


def neither_abstract_nor_final(root: Path) -> list[str]:
    """Classes that extend a subclass of one of the four, or one of the four and another class of ours."""
    bases = {
        node.name: [ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases]
        for _, tree in trees(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    final = {name for name, parents in bases.items() if ABSTRACT & set(parents)}
    mixed = {name for name in final if set(bases[name]) & set(bases) - ABSTRACT}
    return sorted(mixed | {name for name, parents in bases.items() if final & set(parents)})


@pytest.mark.parametrize("name", PAPERS)
def test_a_file_cites_its_paper_and_gives_its_equation_and_departures(name: str) -> None:
    doc = importlib.import_module(PAPERS[name]).__doc__ or ""
    citation = doc.partition("\n\n")[0]
    assert PAPER.search(citation), "the first paragraph names no arXiv number or DOI"
    assert re.search(r"\b(19|20)\d\d\b", PAPER.sub("", citation)), "the citation has no year"
    assert re.search(r"\$\$.+?\$\$", doc, re.DOTALL), "no equation"
    assert re.search(r"\b[Dd]epart(ures?|s)\b", doc), "say what departs from the paper, or that nothing does"


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_card_names_the_paper_of_its_file(name: str) -> None:
    card = registry.find("method", name).card
    citation = (importlib.import_module(METHODS[name]).__doc__ or "").partition("\n\n")[0]
    assert PAPER.findall(citation) == [card.paper]
    assert str(card.year) in PAPER.sub("", citation)


@pytest.mark.parametrize("file", MATHEMATICS, ids=lambda file: file.stem)
def test_shapes_stand_in_the_functions(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert public_functions(tree), "the equation is a function"
    assert not shapeless(tree)


def test_a_shapeless_tensor_is_seen() -> None:
    good = 'def f(s: Float[Tensor, "b d"], k: int, *, w: Float[Tensor, "b"] | None) -> Float[Tensor, ""]: ...'
    assert not shapeless(ast.parse(good))
    bad = 'def f(s: Tensor, t: Float[Tensor, "b"] | Tensor, u: list[Tensor], v, *, w: torch.Tensor): ...'
    assert shapeless(ast.parse(bad)) == ["f(s)", "f(t)", "f(u)", "f(v)", "f(w)", "f(return)"]


def test_shapes_are_checked_at_every_call() -> None:
    """By tests/conftest.py, in every file that has shapes."""
    with pytest.raises(jaxtyping.TypeCheckError, match="Int"):
        keyed(Lesson(), torch.zeros(2, 2).long(), "two axes where one is expected")
    for name, module in PAPERS.items():
        assert type(importlib.import_module(module).__loader__).__module__.startswith("jaxtyping"), name


def test_no_signature_passes_anything_through() -> None:
    # A copy with some fields changed: the names are the dataclass' own, and it checks them.
    # A view made of another library's class has the knobs of that class.
    assert passed_through(LIMBECK) == {"core/batch.py:replace", "pieces/transform.py:view"}


def test_what_is_not_abstract_is_final() -> None:
    assert not neither_abstract_nor_final(LIMBECK)


@pytest.mark.parametrize(
    "line",
    ["class C(B): ...", "class C(a.B): ...", "class C(B[int]): ...", "class D: ...\nclass C(Method, D): ..."],
)
def test_a_class_extended_twice_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.py").write_text("class Method(nn.Module, ABC): pass\nclass B(Method): pass\n")
    assert not neither_abstract_nor_final(tmp_path)
    (tmp_path / "b.py").write_text(line)
    assert neither_abstract_nor_final(tmp_path) == ["C"]
