"""A recipe is data: what it says is checked word by word, and what it leaves out is written out."""

import copy
import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.core.refused import Refused
from limbeck.recipe import Growth, Made, Mean, Net, Optim, Recipe, Stage, Use, apply, parse, read

ROOT = Path(__file__).parent.parent
TOML = """
data = "digits"
seed = 3

[models]
teacher = { name = "cnn", widths = [8, 16], depth = 2, normalise = [0.5, [1, 2.5]], taps = { out = "[0]" } }
student = "cnn"
slow = { mean_of = "student", decay = 0.99 }
crowd = { ensemble = ["teacher", "slow"], weights = [1, 2] }

[[stages]]
learner = "teacher"
epochs = 2
optim.student = { lr = 0.05, schedule = "steps", milestones = [0.5] }

[[stages]]
learner = { name = "small", from = "student" }
epochs = 4
labels = 100
terms = [
  { method = "kd", temperature = 2, weight = 0.5, ramp = { epochs = 2, after = 1, shape = "cosine" } },
  { method = "fitnet", teacher = ["teacher", "slow"], tap = "stage1" },
]
"""


def content() -> dict[str, Any]:
    return tomllib.loads(TOML)


@pytest.fixture(scope="module")
def whole() -> Recipe:
    return parse(content())


# --- TOML and Python ---


def test_toml_and_python_say_the_same(whole: Recipe) -> None:
    in_python = Recipe(
        data="digits",
        seed=3,
        models={
            "teacher": Net(
                name="cnn", widths=[8, 16], depth=2, normalise=[0.5, [1, 2.5]], taps={"out": "[0]"}
            ),
            "student": Net(name="cnn"),
            "slow": Mean(mean_of="student", decay=0.99),
            "crowd": {"ensemble": ["teacher", "slow"], "weights": [1, 2]},
        },
        stages=[
            Stage(
                learner="teacher",
                epochs=2,
                optim={"student": Optim(lr=0.05, schedule="steps", milestones=[0.5])},
            ),
            Stage(
                learner=Made(name="small", **{"from": "student"}),
                epochs=4,
                labels=100,
                terms=[
                    Use(
                        method="kd", temperature=2, weight=0.5, ramp=Growth(epochs=2, after=1, shape="cosine")
                    ),
                    Use(method="fitnet", teachers=["teacher", "slow"], tap="stage1"),
                ],
            ),
        ],
    )
    assert in_python == whole
    assert in_python.fingerprint == whole.fingerprint


def test_a_recipe_written_out_reads_back_as_itself(whole: Recipe) -> None:
    written = json.loads(json.dumps(whole.model_dump(mode="json", by_alias=True)))
    assert parse(written) == whole
    assert parse(written).fingerprint == whole.fingerprint


def test_a_file_is_read_with_its_changes(tmp_path: Path, whole: Recipe) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TOML)
    assert read(path) == whole
    changed = read(path, ["stages.1.epochs=7", "seed = 4"])
    assert (changed.stages[1].epochs, changed.seed, changed.data.name) == (7, 4, "digits")


def test_the_recipes_we_ship_fit() -> None:
    for path in (ROOT / "recipes").glob("*.toml"):
        if "arms" not in tomllib.loads(path.read_text()):
            assert read(path).stages


def test_names_and_defaults_are_filled_in(whole: Recipe) -> None:
    assert whole.models["student"] == Net(name="cnn")
    assert whole.task.name == "classify" and whole.task_in(whole.stages[0]) == whole.task
    first, second = whole.stages
    assert (first.learns, second.learns) == ("teacher", "small")
    assert (first.batch, first.labels, first.rows, first.scheme.name, first.accumulate) == (
        64,
        None,
        "all",
        "offline",
        1,
    )
    assert second.terms[0].teachers == ["teacher"] and second.terms[1].weight == 1.0
    assert second.terms[0].knobs == {"temperature": 2}
    assert whole.models["teacher"].knobs == {"widths": [8, 16], "depth": 2}


def test_a_recipe_cannot_be_changed_under_ones_feet(whole: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        whole.seed = 4  # type: ignore[misc]


# --- fingerprints ---


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        random.Random(0).shuffle(keys)
        return {key: shuffled(value[key]) for key in keys[::-1]}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


def test_the_order_of_keys_is_no_content(whole: Recipe) -> None:
    other = shuffled(content())
    assert list(other) != list(content())
    assert parse(other).fingerprint == whole.fingerprint


def test_a_default_written_out_is_no_content(whole: Recipe) -> None:
    changes = ["task=classify", "stages.0.batch=64", "stages.1.task_weight=1", "models.student.name=cnn"]
    spelled = content() | {"models": content()["models"] | {"student": {}}}
    assert parse(apply(spelled, changes)).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        "seed=4",
        "stages.0.epochs=3",
        "stages.1.terms.0.temperature=4",
        "stages.1.terms.1.teacher=['slow', 'teacher']",
        "models.slow.decay=0.9",
        "models.teacher.widths=[16, 8]",
    ],
)
def test_any_content_changes_the_fingerprint(whole: Recipe, change: str) -> None:
    assert parse(apply(content(), [change])).fingerprint != whole.fingerprint


def test_the_order_of_stages_is_content(whole: Recipe) -> None:
    turned = content()
    turned["stages"].reverse()
    assert parse(turned).fingerprint != whole.fingerprint


# --- changes from the command line ---


@pytest.mark.parametrize(
    ("change", "place", "value"),
    [
        ("seed=4", ("seed",), 4),
        ("stages.1.epochs=7", ("stages", 1, "epochs"), 7),
        ("stages.0.optim.student.lr=0.2", ("stages", 0, "optim", "student", "lr"), 0.2),
        ("stages.0.optim.critic.lr=0.2", ("stages", 0, "optim", "critic"), {"lr": 0.2}),
        ("data=fashion", ("data",), "fashion"),
        ('data="fashion"', ("data",), "fashion"),
        ("models.student={ name = 'cnn', depth = 2 }", ("models", "student"), {"name": "cnn", "depth": 2}),
        ("models.teacher.widths=[1, 2]", ("models", "teacher", "widths"), [1, 2]),
        ("data=a=b", ("data",), "a=b"),
    ],
)
def test_a_change_is_made_in_its_place(change: str, place: tuple[Any, ...], value: Any) -> None:
    changed = apply(content(), [change])
    found: Any = changed
    for step in place:
        found = found[step]
    assert found == value
    whole = content()
    assert changed != whole
    target: Any = whole
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    assert changed == whole  # and nowhere else


def test_changes_are_made_in_order_and_leave_their_source_alone() -> None:
    before = content()
    source = copy.deepcopy(before)
    assert apply(source, ["seed=1", "seed=2"])["seed"] == 2
    assert source == before


@pytest.mark.parametrize(
    "change",
    [
        "stages.1.epochs",
        "stages.9.epochs=1",
        "stages.first.epochs=1",
        "data.x=1",
        "stages.0.learner.name=x",
        "seed",
    ],
)
def test_a_change_that_cannot_be_made_is_refused(change: str) -> None:
    with pytest.raises(Refused, match=r"cannot be made; expected KEY=VALUE.*stages.1.epochs=2") as refusal:
        apply(content(), [change])
    assert f"'{change}'" in str(refusal.value)


# --- what is refused ---


def refuse(change: str | Callable[[dict[str, Any]], Any], *words: str) -> None:
    bad = content()
    if isinstance(change, str):
        bad = apply(bad, [change])
    else:
        change(bad)
    with pytest.raises(Refused) as refusal:
        parse(bad, "r.toml")
    sentence = str(refusal.value)
    assert sentence.startswith("In r.toml: ") and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sed=3", ["unknown key `sed`", "did you mean `seed`?"]),
        ("stages.0.epoch=3", ["unknown key `epoch` at stages.0", "`epochs`?"]),
        ("stages.1.terms.0.temprature=3", ["unknown key `temprature` at stages.1.terms.0", "`temperature`?"]),
        (
            "stages.1.terms.0.wieght=3",
            ["unknown key `wieght` at stages.1.terms.0", "`weight`?", "temperature"],
        ),
        ("stages.1.terms.0.ramp.epoch=3", ["unknown key `epoch` at stages.1.terms.0.ramp", "`epochs`?"]),
        ("stages.0.optim.student.learning_rate=1", ["unknown key `learning_rate` at stages.0.optim.student"]),
        ("models.teacher.width=[3]", ["unknown key `width` at models.teacher", "`widths`?"]),
        ("models.slow.dekay=0.5", ["unknown key `dekay` at models.slow", "`decay`?"]),
        ("stages.1.learner.form='student'", ["unknown key `form` at stages.1.learner", "`from`?"]),
        ("stages.0.augment=[{ name='flip', batch=3 }]", ["unknown key `batch`", "it has no knobs."]),
        ("stages.0.scheme={ name='online', cast=3 }", ["unknown key `cast`", "its knobs are in_turn."]),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest(change: str, words: list[str]) -> None:
    refuse(change, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed='three'", ["seed is 'three'", "expected a valid integer"]),
        ("stages.0.epochs=0", ["stages.0.epochs is 0", "expected greater than or equal to 1"]),
        ("stages.0.epochs=2.5", ["stages.0.epochs is 2.5", "expected a valid integer"]),
        ("stages.0.epochs=true", ["stages.0.epochs is True", "expected a valid integer"]),
        ("stages.0.labels=-1", ["stages.0.labels is -1", "expected greater than or equal to 0"]),
        (
            "stages.1.terms.0.weight=-1",
            ["stages.1.terms.0.weight is -1", "expected greater than or equal to 0"],
        ),
        ("stages.1.terms.0.weight=nan", ["stages.1.terms.0.weight is nan", "expected"]),
        ("stages.1.terms.0.weight=inf", ["stages.1.terms.0.weight is inf", "finite"]),
        (
            "stages.1.terms.0.temperature='hot'",
            ["stages.1.terms.0.temperature is 'hot'", "expected a valid number"],
        ),
        ("stages.1.terms.1.tap=3", ["stages.1.terms.1.tap is 3", "expected a valid string"]),
        (
            "stages.1.terms.0.ramp.shape='stairs'",
            ["ramp.shape is 'stairs'", "'linear', 'cosine' or 'sigmoid'"],
        ),
        ("stages.0.optim.student.name='lion'", ["optim.student.name is 'lion'", "'sgd', 'adam' or 'adamw'"]),
        ("stages.0.optim.student.lr=0", ["optim.student.lr is 0", "expected greater than 0"]),
        ("models.teacher.depth='deep'", ["models.teacher.depth is 'deep'", "expected a valid integer"]),
        ("models.slow.decay=1", ["models.slow.decay is 1", "expected less than 1"]),
        (
            "models.teacher.precision='int8'",
            ["models.teacher.precision is 'int8'", "'bfloat16' or 'float16'"],
        ),
        ("stages=[]", ["stages is []: expected at least 1 entry."]),
        ("stages.1.terms=[3]", ["stages.1.terms.0 is 3: expected a name or a table."]),
        ("stages.0.optim=3", ["stages.0.optim is 3: expected a table."]),
        ("models.teacher.widths=3", ["models.teacher.widths is 3: expected a list."]),
        ("models.teacher.normalise=[1]", ["normalise is [1]: expected at least 2 entries."]),
        ("models.teacher.weights=''", ["models.teacher.weights is '': expected some text."]),
        (
            "stages.0.optim.student.milestones=[150, 180]",
            ["milestones is [150, 180]: expected shares of the stage", "not epochs"],
        ),
        ("stages.0.optim.student.milestones=[1]", ["milestones is [1]: expected shares of the stage"]),
        ("seed=1979-05-27", ["seed is datetime.date(1979, 5, 27)", "expected a valid integer"]),
        (
            "stages.1.terms.0.temperature=1979-05-27",
            ["temperature is datetime.date(1979, 5, 27)", "expected"],
        ),
    ],
)
def test_a_wrong_type_or_value_is_refused_with_its_field_and_what_was_found(
    change: str, words: list[str]
) -> None:
    refuse(change, *words)


@pytest.mark.parametrize(("change", "word"), [("seeds=[1]", "seed"), ("stages.0.learnr='a'", "learner")])
def test_the_word_meant_is_one_of_the_place(change: str, word: str) -> None:
    refuse(change, f"(did you mean `{word}`?)")


def test_the_word_meant_is_never_the_word_found(tmp_path: Path) -> None:
    """A word of another place, where it would be right, is no advice here."""
    from limbeck import board

    (tmp_path / "b.toml").write_text('recipe = "r.toml"\nseed = [1]\narms = {}')
    with pytest.raises(Refused, match=r"unknown key `seed` \(did you mean `seeds`\?\)"):
        board.read(tmp_path / "b.toml", (), (), None)
    refuse("stages.0.seed=1", "unknown key `seed` at stages.0 (did you mean `scheme`?)")


def test_a_method_may_be_its_name_alone(whole: Recipe) -> None:
    spelled, short = ["stages.1.terms=[{ method = 'kd' }]"], ["stages.1.terms=['kd']"]
    assert parse(apply(content(), short)) == parse(apply(content(), spelled)) != whole


def test_a_recipe_without_models_says_so() -> None:
    refuse(lambda c: c.update(models={}), "'teacher', which is no model of this recipe; it has none.")


@pytest.mark.parametrize("key", ["data", "models", "stages"])
def test_what_is_missing_is_named(key: str) -> None:
    refuse(lambda c: c.pop(key), f"`{key}` is missing")


def test_what_is_missing_further_down_is_named() -> None:
    refuse(lambda c: c["stages"][0].pop("learner"), "`stages.0.learner` is missing")
    refuse(lambda c: c["stages"][1]["terms"][0].pop("method"), "`stages.1.terms.0.method` is missing")
    refuse(lambda c: c["stages"][1]["learner"].pop("from"), "`stages.1.learner.from` is missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("models.student=cmn", ["no model 'cmn'", "did you mean 'cnn'?", "package.module:name"]),
        ("stages.1.terms.0.method=kdd", ["no method 'kdd'", "'kd'"]),
        ("task=clasify", ["no task 'clasify'", "'classify'"]),
        ("data=digit", ["no data 'digit'", "'digits'"]),
        ("stages.0.scheme=ofline", ["no scheme 'ofline'", "'offline'"]),
        ("stages.0.view=blur", ["no view 'blur'"]),
        ("stages.1.terms.0.through=['glasses']", ["no lens 'glasses'"]),
        (
            "stages.1.terms.0.teacher=techer",
            ["stages.1.terms.0.teacher names 'techer'", "did you mean 'teacher'?"],
        ),
        ("stages.0.learner=techer", ["stages.0.learner names 'techer'", "did you mean 'teacher'?"]),
        ("stages.1.learner.from=studnt", ["stages.1.learner.from names 'studnt'", "did you mean 'student'?"]),
        ("models.slow.mean_of=studnt", ["models.slow names 'studnt'", "did you mean 'student'?"]),
        ("models.crowd.ensemble=['techer']", ["models.crowd names 'techer'", "did you mean 'teacher'?"]),
        (
            "models.student=no.such.package:net",
            ["model 'no.such.package:net' cannot be imported", "package.module:name"],
        ),
        ("models.student=math:net", ["model 'math:net' does not exist", "module 'math' has no 'net'"]),
        ("models.student=:net", ["model ':net'", "package.module:name"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(change: str, words: list[str]) -> None:
    refuse(change, *words)


def test_a_made_model_is_known_only_from_its_stage_on() -> None:
    def before(c: dict[str, Any]) -> None:
        c["stages"][0]["learner"] = "small"

    def after(c: dict[str, Any]) -> dict[str, Any]:
        c["stages"].append(
            {"learner": "student", "epochs": 1, "terms": [{"method": "kd", "teacher": "small"}]}
        )
        return c

    refuse(before, "stages.0.learner names 'small'", "its models are teacher, student, slow, crowd")
    assert parse(after(content())).stages[2].terms[0].teachers == ["small"]


def test_an_ensemble_of_itself_is_refused() -> None:
    refuse("models.crowd.ensemble=['teacher', 'crowd']", "models.crowd", "itself")


def test_a_learner_that_would_teach_itself_is_refused() -> None:
    """As its own teacher it would be put into eval at every batch; a mean or a made copy is right."""
    refuse("stages.0.terms=[{ method = 'kd' }]", "stages.0", "'teacher'", "itself")


def test_a_knob_that_has_no_default_must_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_length.py").write_text("def net(classes: int, length: int) -> None: ...")
    monkeypatch.syspath_prepend(tmp_path)
    refuse("models.student='needs_length:net'", "models.student lacks `length`, which net needs")
    assert (
        parse(apply(content(), ["models.student={ name = 'needs_length:net', length = 3 }"]))
        .models["student"]
        .knobs
    )


def test_a_file_that_is_not_there_or_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"There is no file .*nowhere.toml"):
        read(tmp_path / "nowhere.toml")
    with pytest.raises(Refused, match="is a folder; give the path of a recipe"):
        read(tmp_path)
    for name, text in {"a.toml": b"data = digits", "b.toml": b"{}"}.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(Refused, match=f"{name} is not TOML.*line 1"):
            read(tmp_path / name)
    (tmp_path / "date.toml").write_text(TOML.replace("seed = 3", "seed = 1979-05-27"))
    with pytest.raises(Refused, match=r"seed is datetime.date"):
        read(tmp_path / "date.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match=r"c.toml cannot be read"):
        read(tmp_path / "c.toml")
