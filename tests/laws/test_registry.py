"""The folder is the registry: to add a method, add its file."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck import registry
from limbeck.core.method import Method

LIMBECK = Path(__file__).parents[2] / "limbeck"
KNOWLEDGE = LIMBECK / "knowledge"
FILES = {file.stem: file for file in KNOWLEDGE.rglob("*.py") if file.stem != "__init__"}
FOLDERS = {Path("response"), Path("feature"), Path("relation")}
KINDS = ("method", "lens")

NEW = """
from limbeck.core.method import Card, Method

class Mine(Method):
    card = Card("arXiv:2601.00001", 2026, ("feature",))

    def loss(self, s, t, batch):
        return s.out.sum()
"""


def defined(file: Path) -> tuple[list[str], set[str]]:
    """The names of the methods and of the public functions at the top of a file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    methods = [n.name for n in body if isinstance(n, ast.ClassDef) and "Method" in map(ast.unparse, n.bases)]
    return methods, {n.name for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}


def test_every_file_is_in_one_of_three_folders() -> None:
    assert {file.parent.relative_to(KNOWLEDGE) for file in FILES.values()} <= FOLDERS


def test_every_file_is_a_method_or_a_lens_and_none_is_both() -> None:
    methods, lenses = set(registry.names("method")), set(registry.names("lens"))
    assert methods | lenses == set(FILES)
    assert not methods & lenses


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_defines_one_thing(name: str) -> None:
    methods, functions = defined(FILES[name])
    assert len(methods) == 1 or (not methods and name in functions)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in registry.names(kind)])
def test_find_gives_what_the_file_of_that_name_defines(kind: str, name: str) -> None:
    found, folder = registry.find(kind, name), FILES[name].parent.name
    assert found.__module__ == f"limbeck.knowledge.{folder}.{name}"
    if kind == "method":
        assert issubclass(found, Method) and folder in found.card.knowledge


def ask(package: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=package, capture_output=True, text=True)


def test_a_new_file_is_found_and_a_second_of_its_name_is_not_hidden(tmp_path: Path) -> None:
    shutil.copytree(LIMBECK, tmp_path / "limbeck", ignore=shutil.ignore_patterns("__pycache__"))
    script = "from limbeck import registry; print(registry.find('method', 'mine').card.paper)"
    before = ask(tmp_path, script)
    assert before.returncode and "There is no method 'mine'" in before.stderr

    (tmp_path / "limbeck/knowledge/feature/mine.py").write_text(NEW)
    found = ask(tmp_path, script)
    assert (found.returncode, found.stdout) == (0, "arXiv:2601.00001\n"), found.stderr

    (tmp_path / "limbeck/knowledge/relation/mine.py").write_text(NEW)
    twice = ask(tmp_path, script)
    assert twice.returncode and "two files are called mine" in twice.stderr


def test_a_file_with_two_methods_is_refused(tmp_path: Path) -> None:
    shutil.copytree(LIMBECK, tmp_path / "limbeck", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "limbeck/knowledge/feature/mine.py").write_text(NEW + NEW.replace("Mine", "Yours"))
    found = ask(tmp_path, "from limbeck import registry; registry.find('method', 'mine')")
    assert found.returncode and "must define one Method, found 2" in found.stderr
