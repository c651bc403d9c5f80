"""Data that cannot be learned from, at the command line: one sentence, exit code 2, nothing written."""

import sys
from pathlib import Path

import pytest

from limbeck.cli import main

RECIPE = """
data = "digits"
models = { student = { name = "cnn", widths = [3] } }

[[stages]]
learner = "student"
epochs = 1
"""

THEIRS = '''
"""What a user brings, with something wrong."""

import torch
from torch.utils.data import DataLoader, TensorDataset


def grey(n=60):
    return TensorDataset(torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.arange(n) % 10)


def empty():
    return grey(0), grey()


def small():
    return grey(), grey(9), grey()


def colour():
    return grey(), TensorDataset(torch.zeros(60, 3, 8, 8, dtype=torch.uint8), torch.arange(60) % 10)


def shuffled():
    return DataLoader(grey(), shuffle=True), grey()


def nothing():
    return None
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "brought_bad.py").write_text(THEIRS)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "shelf" / "fashion-mnist").mkdir(parents=True, exist_ok=True)
        (tmp_path / "shelf" / "fashion-mnist" / f"{name}-ubyte").write_bytes(b"torn")
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(10):
            (tmp_path / "images" / name / f"{n}.png").write_bytes(b"torn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("brought_bad", None)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            'data="cifar10"',
            ["CIFAR-10 was not found", "looked in", "LIMBECK_OFFLINE is set", "put cifar-10-b"],
        ),
        ('data="fashion-mnist"', ["train-images-idx3-ubyte is not the published file", "4 bytes"]),
        ('data={name="image-folder",root="images"}', ["images/ant/", ".png cannot be read as an image"]),
        ('data={name="image-folder",root="nowhere"}', ["nowhere is not there, expected a folder"]),
        (
            'data={name="digits",valid=0.003}',
            ["validation split of 0.003 takes 0 of 1,437", "the 10 classes"],
        ),
        ('data="brought_bad:empty"', ["The training data is empty"]),
        ('data="brought_bad:small"', ["validation data has 9 samples, fewer than its 10 classes"]),
        ('data="brought_bad:colour"', ["the test data has shape (3, 8, 8), expected (1, 8, 8)"]),
        ('data="brought_bad:shuffled"', ["The training data shuffles"]),
        ('data="brought_bad:nothing"', ["There is no training data"]),
        ("models.student.channels=3", ["'student'", "channels = 3, and", "have channels = 1"]),
    ],
)
def test_it_is_refused_before_the_first_step(
    change: str,
    words: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "fashion" in change:
        monkeypatch.setenv("LIMBECK_DATA", str(place / "shelf"))
    before = sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts)
    monkeypatch.setattr(sys, "argv", ["limbeck", "run", "small.toml", "--set", change])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith("limbeck: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in path.parts) == before
