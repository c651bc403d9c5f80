"""`limbeck new` writes a method and a test that pass everything at once, and never over what is there."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck import new
from limbeck.core.refused import Refused

ROOT = Path(__file__).parent.parent
LONG = "a" * new.LONGEST


def run(folder: Path, *command: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def pytest_in(folder: Path, *arguments: str) -> int:
    """How many tests passed; that all did is certain."""
    told = run(folder, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    return int(re.search(r"(\d+) passed", told)[1])  # type: ignore[index]


def checkout(folder: Path) -> Path:
    """What a checkout has as far as `new` cares."""
    for part in ("limbeck/knowledge/feature", "tests/knowledge/feature"):
        (folder / part).mkdir(parents=True)
    return folder


def written(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_in_a_checkout_the_pair_goes_where_the_house_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout(tmp_path))
    told = new.method("cosine_gap", "feature")
    pair = {"limbeck/knowledge/feature/cosine_gap.py", "tests/knowledge/feature/test_cosine_gap.py"}
    assert written(tmp_path) == pair
    assert all(f"Written: {file}" in told for file in pair)
    text = "".join((tmp_path / file).read_text() for file in pair)
    assert "class CosineGap(Method)" in text and "def cosine_gap(" in text
    assert "from limbeck.knowledge.feature.cosine_gap import CosineGap, cosine_gap" in text
    assert "name_here" not in text.lower() and "namehere" not in text.lower() and "templates" not in text


@pytest.mark.parametrize("kind", new.KINDS)
def test_elsewhere_the_pair_lies_side_by_side_and_its_tests_pass(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = new.method(f"my_{kind}", kind, outside=tmp_path / "made")
    assert written(tmp_path) == {f"made/my_{kind}.py", f"made/test_my_{kind}.py"}
    path = f"my_{kind}:My{kind.capitalize()}"
    assert f'{{ method = "{path}" }}' in told[-1] and str(tmp_path / "made") in told[-1]
    for file in written(tmp_path):
        block = re.findall(r"^from .*", (tmp_path / file).read_text().partition(f"\nfrom my_{kind}")[0], re.M)
        assert block == sorted(block), "limbeck is a package among others here"
    monkeypatch.syspath_prepend(tmp_path / "made")
    tests = vars(importlib.import_module(f"test_my_{kind}"))
    of_the_pair = [test for name, test in tests.items() if name.startswith("test_")]
    assert len(of_the_pair) >= 4
    for test in of_the_pair:
        test()


@pytest.mark.slow
def test_elsewhere_pytest_finds_the_pair(tmp_path: Path) -> None:
    new.method("mine", "feature", outside=tmp_path / "made")
    assert pytest_in(tmp_path, "made/test_mine.py") >= 4


def test_a_recipe_takes_the_pair_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck import recipe, registry

    package = tmp_path / "my_methods"
    (package / "deep").mkdir(parents=True)
    for folder in (package, package / "deep"):
        (folder / "__init__.py").touch()
    told = new.method("mine", "response", outside=package / "deep")
    path = re.search(r'"(\S+:Mine)"', told[-1])[1]  # type: ignore[index]
    assert path == "my_methods.deep.mine:Mine" and f"with {tmp_path} on" in told[-1]
    monkeypatch.syspath_prepend(tmp_path)
    stage = {"learner": "a", "epochs": 1, "terms": [{"method": path, "teacher": "b"}]}
    recipe.parse({"data": "digits", "models": {"a": "cnn", "b": "cnn"}, "stages": [stage]})
    assert registry.find("method", path).card.knowledge == ("response",)


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_mine.py").write_text("precious")
    with pytest.raises(Refused, match=r"test_mine\.py is there already.*another name"):
        new.method("mine", "feature")
    assert written(tmp_path) == {"test_mine.py"} and (tmp_path / "test_mine.py").read_text() == "precious"
    (tmp_path / "test_mine.py").unlink()
    new.method("mine", "feature")
    before = {file: (tmp_path / file).read_text() for file in written(tmp_path)}
    with pytest.raises(Refused, match=r"mine\.py is there already"):
        new.method("mine", "relation")
    assert {file: (tmp_path / file).read_text() for file in written(tmp_path)} == before


@pytest.mark.parametrize(
    "name", ["", "Mine", "my-method", "my method", "2nd", "_a", "a__b", "a.b", "../a", "ä"]
)
def test_what_is_no_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=f"'{re.escape(name)}' cannot be a method's name; expected small letters"
    ):
        new.method(name, "feature", outside=tmp_path)
    assert not written(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("class", "match", "float", "sum", "json"),  # Python's
        *("batch", "seen", "card", "method", "torch", "across", "slow", "x"),  # the written files' own
        *("task", "loss", "logits"),  # names of losses that are taken
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"means something else already; choose another name"):
        new.method(name, "relation", outside=tmp_path)
    assert not written(tmp_path)


def test_a_name_that_is_taken_too_long_or_of_no_kind_is_refused(tmp_path: Path) -> None:
    for name, what in (
        ("kd", "a method 'kd' already"),
        ("logit_standard", "a lens 'logit_standard' already"),
    ):
        with pytest.raises(Refused, match=what):
            new.method(name, "response", outside=tmp_path)
    with pytest.raises(Refused, match=f"at most {new.LONGEST}"):
        new.method(LONG + "a", "response", outside=tmp_path)
    with pytest.raises(
        Refused, match="no kind 'logits' of method; the kinds are response, feature, relation"
    ):
        new.method("mine", "logits", outside=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"file.* cannot be written"):
        new.method("mine", "response", outside=tmp_path / "file")
    assert written(tmp_path) == {"file"}


@pytest.mark.parametrize("kind", new.KINDS)
def test_no_line_is_too_long_whatever_the_name(kind: str, tmp_path: Path) -> None:
    new.method(LONG, kind, outside=tmp_path)
    for file in written(tmp_path):
        assert max(map(len, (tmp_path / file).read_text().splitlines())) <= 110


@pytest.mark.slow
@pytest.mark.parametrize("kind", new.KINDS)
def test_in_the_house_the_pair_passes_the_contract_the_laws_and_its_test(kind: str, tmp_path: Path) -> None:
    for part in ("limbeck", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write = f"from limbeck import new; new.method('brand_new', '{kind}')"
    run(tmp_path, sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {write}")
    folders = ["tests/contract", "tests/knowledge", "tests/laws"]
    assert pytest_in(tmp_path, "-k", "brand_new", *folders) > 20
