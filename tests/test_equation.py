"""`limbeck show RECIPE` tells what is minimised, on which rows, and how."""

import re
import tomllib
from typing import Any

import pytest

from limbeck import equation, recipe

MODELS = """
[models]
teacher = { name = "cnn", widths = [32, 64], depth = 2, taps = { deep = "stages.1" }, precision = "bfloat16" }
student = { name = "cnn", widths = [8], view = "rotations" }
peer = "resnet20"
slow = { mean_of = "student", decay = 0.99 }
both = { ensemble = ["teacher", "slow"], weights = [1, 2.5] }
"""


def told(stage: str, data: str = '"digits"') -> list[str]:
    """The lines of the first stage."""
    text = f"data = {data}\n{MODELS}\n[[stages]]\nepochs = 3\n{stage}"
    plan = recipe.parse(tomllib.loads(text))
    return equation.stage(plan, 0)


def first(stage: str) -> str:
    return told(stage)[0]


def test_a_stage_without_terms_lowers_its_task() -> None:
    assert first('learner = "teacher"') == "stage 0 (teacher): L = 1 · task(classify)"
    assert first('learner = "teacher"\ntask_weight = 0.5').endswith("L = 0.5 · task(classify)")


def test_terms_are_told_with_teacher_weight_and_every_knob() -> None:
    line = first(
        'learner = "student"\nterms = [{ method = "kd", temperature = 2 }, { method = "dkd", weight = 0.1 }]'
    )
    assert line == (
        "stage 0 (student): L = 1 · task(classify) + 1 · kd(teacher, temperature=2) "
        "+ 0.1 · dkd(teacher, alpha=1, beta=8, temperature=4)"
    )


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("ramp = { epochs = 5 }", "1 · ramp(linear, rising in 5 epochs) · kd(teacher, temperature=4)"),
        ('ramp = { epochs = 5, after = 2, shape = "cosine" }', "ramp(cosine, rising in 5 epochs after 2)"),
        ("ramp = { epochs = 5, falls = true }", "ramp(linear, falling in 5 epochs)"),
        ('through = ["logit_standard"]', "kd(teacher, temperature=4, through logit_standard)"),
        ('view = "rotations"', "kd(teacher, temperature=4, student shown rotations)"),
        ('teacher = ["teacher", "slow"]', "kd(mean over teacher and slow, temperature=4)"),
    ],
)
def test_how_a_term_is_used_is_told(use: str, words: str) -> None:
    line = first(f'learner = "student"\nterms = [{{ method = "kd", {use} }}]')
    assert words in line


def test_what_weighs_nothing_is_not_in_the_loss() -> None:
    stage = 'learner = "student"\ntask_weight = 0\nterms = [{ method = "kd", weight = 0 }, { method = "sp" }]'
    assert first(stage) == "stage 0 (student): L = 1 · sp(teacher, taps=[stage3])"


def test_peers_have_an_equation_each_and_nobody_teaches_himself() -> None:
    terms = 'terms = [{ method = "kd", teacher = ["student", "peer"] }]'
    lines = told(f'learner = ["student", "peer"]\nscheme = "online"\n{terms}')
    assert lines[0] == "stage 0 (student): L = 1 · task(classify) + 1 · kd(peer, temperature=4)"
    assert lines[1] == "stage 0 (peer): L = 1 · task(classify) + 1 · kd(student, temperature=4)"
    assert lines[2] == "  scheme online(in_turn=false) (limbeck show online)"


def test_a_scheme_with_losses_of_its_own_is_not_given_an_equation() -> None:
    stage = 'learner = "student"\nscheme = { name = "branches", branch_task = 0.5 }\n'
    lines = told(stage + 'terms = [{ method = "kd", teacher = "student" }]')
    assert (
        lines[0] == "stage 0 (student): branches is given 1 · task(classify) + 1 · kd(student, temperature=4)"
    )
    assert lines[1] == "  scheme branches(branch_task=0.5) (limbeck show branches)"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("", "  3 epochs of batches of 64, all rows, every label"),
        ("labels = 1000", "1,000 labels"),
        ("optim.student = { nesterov = false }", "momentum 0.9, weight decay"),
        ('rows = "labelled"', "labelled rows only"),
        ("batch = 8\nper_class = 2", "batches of 8, 2 rows a class"),
        (
            'augment = ["crop", "flip"]\nview = "rotations"',
            "augmented by crop(pad=4, purpose=crop) and flip, the learner is shown rotations",
        ),
        ("", "  sgd, learning rate 0.1, momentum 0.9 (Nesterov), weight decay 0.0005, cosine schedule"),
        (
            'optim.student = { name = "adam", lr = 0.001 }',
            "  adam, learning rate 0.001, weight decay 0.0005, cosine",
        ),
        ('optim.student = { schedule = "steps", milestones = [0.5] }', "times 0.1 at 0.5 of the stage"),
        (
            "optim = { student = {}, other = { lr = 1 } }",
            "learning rate 1, momentum 0.9 (Nesterov), weight decay 0.0005, cosine schedule for other",
        ),
        ("accumulate = 4\nclip = 2.0", "  each step in 4 micro-batches, gradient norm at most 2"),
        ('precision = "bfloat16"\ncompile = true', "  in bfloat16, compiled"),
        (
            'patience = 3\nkeep = "best"',
            "  stops after 3 epochs without a better validation score, the best epoch is kept",
        ),
        ('ships = "slow"', "  ships slow"),
    ],
)
def test_rows_and_steps_are_told(stage: str, words: str) -> None:
    assert any(words in line for line in told(f'learner = "student"\n{stage}')), told(
        f'learner = "student"\n{stage}'
    )


def test_a_learner_that_is_made_is_told() -> None:
    stage = 'learner = { name = "copy", from = "teacher" }\nterms = [{ method = "kd" }]'
    assert told(stage)[0].startswith("stage 0 (copy): L =") and "  copy is a copy of teacher" in told(stage)


def test_the_whole_recipe_names_data_models_and_every_stage() -> None:
    stages = '[[stages]]\nlearner = "teacher"\nepochs = 1\n[[stages]]\nlearner = "student"\nepochs = 2\n'
    text = f'data = {{ name = "digits", valid = 0.2, seen = 7 }}\nseed = 7\n{MODELS}{stages}'
    lines = equation.told(recipe.parse(tomllib.loads(text))).splitlines()
    assert lines[:6] == [
        "data digits, validation split 0.2 of every class, of which the first 7 classes are seen; "
        "task classify; seed 7",
        "teacher = cnn(widths=[32, 64], depth=2), answers in bfloat16, deep at stages.1",
        "student = cnn(widths=[8], depth=1), shown rotations",
        "peer = resnet20(depth=20, widths=[16, 16, 32, 64], shortcut=B)",
        "slow = running mean of student, decay 0.99",
        "both = mean probability of teacher and slow, weights [1, 2.5]",
    ]
    assert [line for line in lines if re.match(r"stage \d", line)] == [
        "stage 0 (teacher): L = 1 · task(classify)",
        "stage 1 (student): L = 1 · task(classify)",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(4.0, "4"), (0.1, "0.1"), (True, "true"), (None, "none"), ([1.5, "a"], "[1.5, a]"), (3, "3")],
)
def test_values_are_written_as_people_do(value: Any, shown: str) -> None:
    assert equation._value(value) == shown


# A key of a recipe, and a value that is not its default. A new key must be told, too.
STAGE: dict[str, Any] = {
    "learner": "teacher",
    "epochs": 4,
    "batch": 32,
    "labels": 10,
    "rows": "labelled",
    "per_class": 2,
    "terms": [{"method": "kd"}],
    "task_weight": 0.5,
    "task": "retrieve",
    "scheme": {"name": "branches"},
    "augment": "crop",
    "view": "flip",
    "ships": "slow",
    "accumulate": 2,
    "clip": 1.0,
    "precision": "float16",
    "compile": True,
    "patience": 2,
    "keep": "best",
    "optim": {"student": {"lr": 1.0}},
}
OPTIM: dict[str, Any] = {
    "name": "adam",
    "lr": 1.0,
    "momentum": 0.5,
    "nesterov": False,
    "betas": [0.9, 0.95],
    "weight_decay": 0.0,
    "decay_vectors": False,
    "layer_decay": 0.8,
    "schedule": "constant",
    "floor": 0.1,
    "milestones": [0.5],
    "gamma": 0.5,
    "warmup": 0.1,
}
USE: dict[str, Any] = {
    "method": "logits_mse",
    "teacher": "peer",
    "weight": 2.0,
    "ramp": {"epochs": 2},
    "pairs": {"stage1": "stage2"},
    "view": "flip",
    "through": ["logit_standard"],
}


def test_every_key_is_here() -> None:
    assert set(STAGE) == set(recipe.Stage.model_fields)
    assert set(OPTIM) == set(recipe.Optim.model_fields)
    assert set(USE) == {field.alias or name for name, field in recipe.Use.model_fields.items()}


@pytest.mark.parametrize(
    ("where", "key"),
    [*(("stage", key) for key in STAGE), *(("optim", key) for key in OPTIM), *(("use", key) for key in USE)],
)
def test_whatever_is_changed_shows(where: str, key: str) -> None:
    heard = {"betas": {"name": "adamw"}, "floor": {"schedule": "cosine"}}.get(key, {})

    def lines(changes: dict[str, dict[str, Any]]) -> list[str]:
        optim = {"schedule": "steps", **heard, **changes.get("optim", {})}
        use = {"method": "kd", **changes.get("use", {})}
        stage = {"learner": "student", "epochs": 3, "optim": {"student": optim}, "terms": [use]}
        if where == "stage":
            stage = {"learner": "student", "epochs": 3, **changes.get("stage", {})}
        models = tomllib.loads(MODELS)["models"]
        return equation.stage(recipe.parse({"data": "digits", "models": models, "stages": [stage]}), 0)

    value = {"stage": STAGE, "optim": OPTIM, "use": USE}[where][key]
    assert lines({where: {key: value}}) != lines({})
