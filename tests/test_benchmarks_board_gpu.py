"""The table for a GPU, in small on a CPU: it runs, goes on where it was, and says whose numbers are whose."""

import json
import math
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import board_gpu
from limbeck import registry
from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.engine import Engine

SMALL = f"resnet14 resnet8 70 60 61 {' '.join(['50'] * 9)}\nResNet50 resnet8 70 60 61 {' '.join(['50'] * 9)}"


DATA = """
import torch
from limbeck.data.loader import Data, Splits

def load() -> Splits:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (192, 3, 8, 8), dtype=torch.uint8, generator=draw)
    parts = [Data(some, torch.arange(64) % 4, ("a", "b", "c", "d"), 1 / 255) for some in x.split(64)]
    return Splits(parts[0], parts[1], parts[2])
"""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A small table, and the steps that were learned in it."""
    (tmp_path / "tiny_images.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    taken: list[int] = []
    learn = Engine._learn

    def counted(self: Engine, batch: Batch) -> None:
        taken.append(batch.rows)
        learn(self, batch)

    monkeypatch.setattr(board_gpu, "DATA", "tiny_images:load")
    monkeypatch.setattr(board_gpu, "PUBLISHED", SMALL)
    monkeypatch.setattr(board_gpu, "FIRST", ("resnet14", "resnet8"))
    monkeypatch.setattr(board_gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(Engine, "_learn", counted)
    return taken


def small(out: Path, *more: str) -> int:
    return board_gpu.main(["--device", "cpu", "--epochs", "2", "--out", str(out), *more])


def test_a_row_is_made_once_and_kept(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    ask = Frozen.__call__

    def counted(self: Frozen, batch: Batch) -> Seen:
        asked.append(batch.rows)
        return ask(self, batch)

    monkeypatch.setattr(Frozen, "__call__", counted)
    assert small(tmp_path / "out", "--keep", "here") == 0
    assert steps == [64] * 8  # two epochs of the teacher, the control, kd, and kd again
    assert asked.count(64) == 3, "two epochs, and the test split; the second time nobody is asked"
    kept = json.loads((tmp_path / "results" / "here.json").read_text())
    row = kept["rows"]["resnet14-resnet8"]
    assert row["teacher"]["theirs"] == 70 and 0 < row["teacher"]["minutes"] < 1
    arms = row["arms"]
    assert {name: arm["theirs"] for name, arm in arms.items()} == {
        "control": 60,
        "kd": 61,
        "kd, from the store": 61,
    }
    cells = tmp_path / "out" / "resnet14-resnet8" / "cells"
    heads = [
        load_file(cells / quote(arm, safe=" ") / "0" / "student.safetensors")["fc.weight"] for arm in arms
    ]
    assert torch.equal(heads[1], heads[2]) and not torch.equal(heads[0], heads[1])
    assert all(0 < minutes < 1 for arm in arms.values() for minutes in arm["minutes"])
    assert kept["setting"]["seeds"] == [0] and row["environment"]["device"] == "cpu"
    assert kept["left out"] == {"ResNet50-resnet8": "there is no model 'ResNet50' in limbeck/models"}
    assert "RepDistiller" in kept["theirs"]
    out = capsys.readouterr().out
    assert "theirs" in out and "ResNet50-resnet8: not here, there is no model" in out

    assert small(tmp_path / "out", "--keep", "again") == 0
    assert len(steps) == 8
    again = json.loads((tmp_path / "results" / "again.json").read_text())["rows"]["resnet14-resnet8"]
    for name, arm in again["arms"].items():
        assert arm["minutes"] == arms[name]["minutes"] and arm["scores"] == arms[name]["scores"]


def test_when_the_time_is_up_it_stops_and_can_go_on(
    tmp_path: Path, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert small(tmp_path, "--minutes", "0", "--keep", "none") == 0
    assert not steps and not (tmp_path / "results").exists()
    assert "resnet14-resnet8: not here, the time was up" in capsys.readouterr().out
    pair = ("resnet14", "resnet8")
    table = board_gpu.Table(tmp_path, 3, "cpu", ["kd"], [0], time.monotonic())  # up after a batch
    for taken in (1, 2):
        with pytest.raises(board_gpu.Stopped):
            table.row(pair)
        assert len(steps) == taken
    table.deadline = math.inf
    table.teacher("resnet14")
    table.deadline = 0
    with pytest.raises(board_gpu.Stopped):
        table.row(pair)
    assert len(steps) == 3 + 1
    table.deadline = math.inf
    assert table.row(pair)["arms"].keys() == {"control", "kd", "kd, from the store"}
    assert len(steps) == 3 + 3 * 3


def test_the_recipe_is_that_of_the_table() -> None:
    table = board_gpu.Table(Path(), 240, "cuda", [], [0], 0.0)
    stage = table.stage("student", "resnet8x4")
    assert (stage["precision"], stage["compile"], stage["epochs"]) == ("bfloat16", True, 240)
    assert stage["optim"]["student"]["lr"] == 0.05
    assert table.stage("student", "shufflenet_v1")["optim"]["student"]["lr"] == 0.01
    every = board_gpu.pairs()
    assert len(every) == 13 and every[0] == board_gpu.FIRST
    assert sum(not board_gpu.lacking(pair) for pair in every) >= 11
    theirs = board_gpu.published()[board_gpu.FIRST]
    assert (theirs["teacher"], theirs["control"], theirs["kd"], theirs["crd"]) == (79.42, 72.5, 73.33, 75.51)


@pytest.mark.parametrize("method", board_gpu.METHODS)
def test_only_small_answers_are_stored(method: str) -> None:
    """A map of every image and epoch would fill a disk."""
    looks = set(registry.find("method", method)().teacher_looks())
    (term,) = board_gpu._arm(method)["terms"]
    assert term.get("teacher", "teacher") == ("teacher" if looks <= {"pooled"} else "live")


def test_what_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match="There is no pair 'a-b' in the table"):
        board_gpu.pairs("a-b")
    assert board_gpu.main(["--device", "cpu", "--pairs", "a-b"]) == 2
    with pytest.raises(SystemExit):
        board_gpu.main(["--device", "cpu", "--methods", "magic"])
    assert "no published row of 'magic'" in capsys.readouterr().err
