"""A JSON-schema validator finds our recipes right, and wrong ones wrong where limbeck does."""

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from limbeck import recipe, schema
from limbeck.core.refused import Refused

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.toml"))
RECIPE, BOARD = (Draft202012Validator(json.loads(of())) for of in (schema.of_recipe, schema.of_board))

GOOD = """
data = { name = "digits", valid = 0.1 }

[models]
teacher = { name = "cnn", widths = [8], depth = 2, weights = "x.safetensors" }
student = "cnn"
slow = { mean_of = "student" }
both = { ensemble = ["teacher", "slow"] }

[[stages]]
learner = "student"
epochs = 2
augment = ["crop", { name = "noise" }]
view = "flip"
scheme = { name = "offline" }
optim.student = { lr = 1 }
terms = [
  { method = "kd", temperature = 2, teacher = ["teacher", "both"], ramp = { epochs = 3 } },
  { method = "rkd", through = ["logit_standard"] },
]
"""


@pytest.mark.parametrize("validator", [RECIPE, BOARD], ids=["recipe", "board"])
def test_the_schema_is_a_schema(validator: Draft202012Validator) -> None:
    Draft202012Validator.check_schema(validator.schema)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_recipes_and_boards_are_valid(file: Path) -> None:
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    if set(content) == {"arms"}:  # arms alone, for boards to take
        content["recipe"] = "of-the-board.toml"
    (BOARD if "arms" in content else RECIPE).validate(content)


def changed(path: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(tomllib.loads(GOOD))
    place: Any = content
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in way:
        place = place[step]
    place[last] = value
    return content


def test_the_good_one_is_good() -> None:
    RECIPE.validate(tomllib.loads(GOOD))
    recipe.parse(tomllib.loads(GOOD))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dta", "digits"),
        ("data", "digit"),
        ("data/valid", 2),
        ("task", "classifi"),
        ("models/student", "cn"),
        ("models/teacher/width", [8]),
        ("models/slow/decay", 1.5),
        ("stages/0/epochs", 0),
        ("stages/0/epochs", "2"),
        ("stages/0/rows", "some"),
        ("stages/0/scheme", "ofline"),
        ("stages/0/scheme/temperature", 1),
        ("stages/0/augment", ["crops"]),
        ("stages/0/optim/student/name", "sdg"),
        ("stages/0/terms/0/temprature", 1),
        ("stages/0/terms/0/temperature", "hot"),
        ("stages/0/terms/0/method", "kdd"),
        ("stages/0/terms/0/ramp", {"epochs": 3, "shape": "square"}),
        ("stages/0/terms/1/through", ["logits"]),
    ],
)
def test_what_limbeck_refuses_the_schema_marks(path: str, value: Any) -> None:
    content = changed(path, value)
    with pytest.raises(Refused):
        recipe.parse(content)
    errors = list(RECIPE.iter_errors(content))
    where = [str(step) for step in errors[0].absolute_path]
    assert errors and where == path.split("/")[: len(where)]


@pytest.mark.parametrize("path", ["data", "models/student", "stages/0/scheme", "stages/0/view"])
def test_ones_own_is_let_through(path: str) -> None:
    RECIPE.validate(changed(path, "my.package:thing"))
    RECIPE.validate(changed(path, {"name": "my.package:thing", "knob": 3}))
    RECIPE.validate(changed("stages/0/terms/0", {"method": "my.package:Thing", "knob": [1], "weight": 2}))
