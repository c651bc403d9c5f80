"""A run writes alone, and what a full disk or a kill leaves is whole."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck import checkpoint, recipe
from limbeck import run as runs
from limbeck.core.refused import Refused
from limbeck.recipe import Recipe
from limbeck.run import Run, resume

ROOT = Path(__file__).parent.parent
STEPS = 6


def plan() -> Recipe:
    stage = {"learner": "student", "epochs": 3, "batch": 600}
    student = {"name": "cnn", "widths": [3, 4]}
    return recipe.parse({"data": "digits", "models": {"student": student}, "stages": [stage]})


def finish(run: Run) -> list[Any]:
    return list(run.moments())


def same(a: Path, b: Path) -> bool:
    mine, theirs = (load_file(folder / "student.safetensors") for folder in (a, b))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(Run(plan(), folder))
    return folder


# --- a full disk ---


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(
    k: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(plan(), tmp_path / "run", every=0)
    moments = run.moments()
    for _ in range(k + 1):  # the state after k batches is saved when the next is asked for
        next(moments)
    assert checkpoint.load(run.folder)["engine"]["step"] == k

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Refused, match=r"No space left on device.*free some space") as refusal:
            next(moments)
    assert "\n" not in str(refusal.value)
    assert checkpoint.load(run.folder)["engine"]["step"] == k
    assert not [path for path in run.folder.iterdir() if path.suffix in (".partial", ".lock")]
    assert len(finish(resume(run.folder))) == STEPS - k
    assert same(run.folder, whole)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    run = Run(plan(), tmp_path / "run", every=0)
    moments = run.moments()
    for _ in range(3):
        next(moments)
    run.lab.models["student"].head.bias.data[0] = float("nan")
    with pytest.raises(Refused, match="weights of player 'student' became nan"):
        next(moments)
    assert checkpoint.load(run.folder)["engine"]["step"] == 2


# --- one process at a time ---


def locks(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.lock")]


def test_a_run_says_that_it_is_writing_while_it_is(tmp_path: Path) -> None:
    run = Run(plan(), tmp_path / "run")
    assert not run.folder.exists()
    moments = run.moments()
    next(moments)
    (lock,) = locks(run.folder)
    assert lock.startswith(f"{os.getpid()}-")
    moments.close()
    assert not locks(run.folder)
    finish(run)
    assert not locks(run.folder)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """Another process, alive until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        yield process
        process.kill()


def test_a_folder_that_another_process_writes_is_refused(
    tmp_path: Path, other: "subprocess.Popen[str]", whole: Path
) -> None:
    name = runs._process(other.pid)
    (tmp_path / f"{name}.lock").touch()
    with pytest.raises(Refused, match=f"is being written by process {other.pid}; wait for it") as refusal:
        finish(Run(plan(), tmp_path))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.lock"]

    other.kill()  # and nobody asked how it ended: it is a zombie
    while runs._process(other.pid) is not None:
        pass
    finish(Run(plan(), tmp_path))
    assert same(tmp_path, whole) and not locks(tmp_path)


def test_what_another_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{os.getppid()}-7.lock").touch()  # alive, but it began at another time
    (tmp_path / f"{2**22 + 1}-7.lock").touch()  # beyond every number
    finish(Run(plan(), tmp_path))
    assert not locks(tmp_path)


def test_other_peoples_locks_stay(tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("mine")
    finish(Run(plan(), tmp_path))
    assert locks(tmp_path) == ["poetry.lock"]


AT_IT = """
import sys
from pathlib import Path
from limbeck.run import Run
from limbeck import recipe

moments = Run(recipe.parse(eval(sys.argv[2])), Path(sys.argv[1]), every=0).moments()
next(moments), next(moments)
print("at it", flush=True)
input()
"""


@pytest.mark.slow
def test_a_second_real_run_is_refused_until_the_first_is_killed(tmp_path: Path, whole: Path) -> None:
    content = repr(plan().model_dump(mode="json", by_alias=True))
    with subprocess.Popen(
        [sys.executable, "-c", AT_IT, str(tmp_path / "run"), content],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "at it\n"
        with pytest.raises(Refused, match=f"is being written by process {first.pid}"):
            finish(resume(tmp_path / "run"))
        first.kill()
        first.wait()
        assert len(locks(tmp_path / "run")) == 1
        assert len(finish(resume(tmp_path / "run"))) == STEPS - 1
    assert same(tmp_path / "run", whole) and not locks(tmp_path / "run")
