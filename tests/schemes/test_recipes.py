"""The recipes of the schemes run, cut to an epoch a stage, and end with the plain student and no more."""

import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck import board, recipe
from limbeck.data.digits import load
from limbeck.models.cnn import CNN
from limbeck.run import Run

FOLDER = Path(__file__).parents[2] / "recipes"
LOSSES = {
    "online": {"student.task", "student.kd", "peer.task", "peer.kd"},
    "branches": {"task", *(f"stage{n}.{loss}" for n in (1, 2) for loss in ("task", "kd", "fitnet"))},
    "assistants": {"task", "kd"},
    "mean_teacher": {"task", "mean_teacher"},
    "data_free": {"one_hot", "balance", "alive", "kd"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_runs_and_ships_the_plain_student(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.toml"
    stages = len(tomllib.loads(path.read_text())["stages"])
    changes = [f"stages.{n}.{key}" for n in range(stages) for key in ("epochs=1", "batch=200")]
    plan = recipe.read(path, changes)
    run = Run(plan, tmp_path / "run")
    records = [moment.record for moment in run.moments() if moment.record is not None]
    assert records[-1].losses.keys() == LOSSES[name]
    student = CNN(10, **plan.models["student"].knobs)  # type: ignore[union-attr]
    student.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"))
    test = load().test
    x, y = test.rows(torch.arange(len(test)))
    with torch.no_grad():
        right = 100 * int((student.eval()(x).argmax(1) == y).sum()) / len(y)
    assert run.result is not None and run.result["scores"]["test.accuracy"] == right
    assert len(run.result["stages"]) == stages


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("data_free", 70.0), ("online", 80.0), ("branches", 80.0)])
def test_it_learns(name: str, least: float, tmp_path: Path) -> None:
    run = Run(recipe.read(FOLDER / f"{name}.toml"), tmp_path / "run")
    for _ in run.moments():
        pass
    assert run.result is not None and run.result["scores"]["test.accuracy"] > least


def test_the_assistants_board_has_an_arm_for_each_teacher() -> None:
    _, arms, _, _ = board.read(FOLDER / "assistants_digits.toml")
    teachers = {name: arm["terms"][0]["teacher"] for name, arm in arms.items()}
    assert teachers == {
        "the teacher": "teacher",
        "the assistant": "assistant",
        "both": ["teacher", "assistant"],
    }
