"""What is exported is written down here; no file is called a drawer; names come without waiting for torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import limbeck

LIMBECK = Path(__file__).parents[2] / "limbeck"

PUBLIC = {
    *("Batch", "Lesson", "Seen"),
    *("Method", "Card", "Term", "Ramp"),
    *("Teacher", "Frozen", "MeanOf", "Ensemble"),
    *("Scheme", "Task", "Distiller", "Refused"),
}
DRAWERS = {"util", "utils", "common", "helper", "helpers", "misc", "base"}


def test_the_public_names_are_these() -> None:
    assert set(limbeck.__all__) == PUBLIC
    assert len(limbeck.__all__) == len(PUBLIC)
    assert set(dir(limbeck)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_the_object_of_that_name(name: str) -> None:
    assert getattr(limbeck, name).__name__ == name


def test_a_name_that_is_not_public_is_said_to_be_missing() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Temperature'"):
        limbeck.Temperature  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "import limbeck; dir(limbeck)",
        "import sys; sys.argv = ['limbeck', '--help']; from limbeck.cli import main; main()",
        "import sys; sys.argv = ['limbeck', 'run', '--help']; from limbeck.cli import main; main()",
        "from limbeck import registry; registry.names('method')",
    ],
)
def test_torch_is_not_waited_for(first: str) -> None:
    at_exit = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
    command = [sys.executable, "-c", at_exit + first]
    done = subprocess.run(command, cwd=LIMBECK.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "False"), done.stderr


def test_no_file_is_a_drawer() -> None:
    found = [str(path) for path in LIMBECK.rglob("*") if path.stem.lower().strip("_") in DRAWERS]
    assert not found
