"""Bad input: one clear sentence on stderr, exit code 2, no traceback, and nothing written."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limbeck.cli import main

ROOT = Path(__file__).parent.parent

RECIPE = """
data = "digits"
models = { teacher = { name = "cnn", widths = [4] }, student = { name = "cnn", widths = [3] } }

[[stages]]
learner = "teacher"
epochs = 1
batch = 600

[[stages]]
learner = "student"
epochs = 1
batch = 600
terms = [{ method = "kd" }, { method = "fitnet", tap = "stage1" }]
"""

THEIRS = '''
"""What a user brings: data and networks, each with something wrong."""

from collections import OrderedDict

import torch
from torch import nn

from limbeck.core.method import Card, Method
from limbeck.data.loader import Data, Splits
from limbeck.tasks.classify import Classify

NAMES = tuple("abcdefghij")


def splits(x, y, names=NAMES):
    data = Data(x, y, names)
    return Splits(data, data, data)


def with_nan():
    x = torch.zeros(20, 1, 8, 8)
    x[7, 0, 3, 3] = float("nan")
    return splits(x, torch.arange(20) % 10)


def with_label_10():
    return splits(torch.zeros(20, 1, 8, 8), torch.arange(20) % 11)


def empty():
    return splits(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))


def flat():
    return splits(torch.zeros(20, 5), torch.arange(20) % 10)


def in_place(classes: int):
    conv, norm, act = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    layers = {"conv": conv, "norm": norm, "act": act, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    model = nn.Sequential(OrderedDict(layers, head=nn.Linear(4, classes)))
    model.TAPS = {"stage1": "norm"}
    return model


def shows_a_pair(classes: int):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Net(nn.Module):
        TAPS = {"stage1": "pair"}

        def __init__(self):
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(64, classes)

        def forward(self, x):
            return self.head(self.pair(x)[0].flatten(1))

    return Net()


def broken(classes: int):
    raise RuntimeError("no such file: backbone.pt")


def raises_a_key_error(classes: int = 10):
    raise KeyError("backbone")


NUMBER = 3
SPLITS = splits(torch.zeros(20, 1, 8, 8), torch.arange(20) % 10)


class Unfinished(Method):
    card = Card("arXiv:2601.00001", 2026, ("response",))


class Demanding(Classify):
    def __init__(self, margin):
        self.margin = margin


def no_batch():
    return None


def gives_none(batch):
    return None


def breaks(batch):
    raise KeyError("blur")


def of_nobody():
    return None
'''

Refuse = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("theirs", None)
    return tmp_path


def snapshot(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.fixture
def refuse(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """`limbeck …` in this process must refuse, in one sentence that holds all `words`. An exception that gets
    past the command line, which a user would see as a traceback, fails the test."""

    def check(arguments: str, *words: str) -> str:
        before = snapshot(place)
        monkeypatch.setattr(sys, "argv", ["limbeck", *arguments.split("|")])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert out == ""
        assert err.startswith("limbeck: ") and err.endswith("\n") and err.count("\n") == 1, err
        for word in words:
            assert word in err, err
        assert snapshot(place) == before
        return err

    return check


def given(place: Path, old: str, new: str) -> None:
    """The recipe with `old` replaced, which must be there once."""
    assert RECIPE.count(old) == 1
    (place / "small.toml").write_text(RECIPE.replace(old, new))


# --- the recipe ---


def test_an_unknown_key_comes_with_the_nearest(refuse: Refuse, place: Path) -> None:
    given(place, '{ method = "kd" }', '{ method = "kd", temprature = 4 }')
    refuse(
        "run|small.toml",
        "small.toml",
        "unknown key `temprature` at stages.1.terms.0",
        "did you mean `temperature`?",
    )


def test_a_wrong_type_comes_with_its_field_and_value(refuse: Refuse, place: Path) -> None:
    given(place, "widths = [3]", 'widths = "wide"')
    refuse("run|small.toml", "small.toml", "models.student.widths is 'wide'", "expected")


def test_a_wrong_change_comes_with_its_field_and_value(refuse: Refuse) -> None:
    refuse(
        "run|small.toml|--set|stages.0.epochs=many", "stages.0.epochs is 'many'", "expected a valid integer"
    )
    refuse("run|small.toml|--set|stages.7.epochs=1", "'stages.7.epochs=1' cannot be made")


def test_a_missing_file_is_named(refuse: Refuse) -> None:
    refuse("run|nowhere.toml", "no file nowhere.toml")
    refuse("board|nowhere.toml", "no file nowhere.toml")
    refuse("show|nowhere.toml", "no file nowhere.toml")


def test_what_is_not_toml_comes_with_its_line(refuse: Refuse, place: Path) -> None:
    (place / "small.toml").write_text('data = "digits"\nmodels = oops')
    refuse("run|small.toml", "small.toml is not TOML", "line 2")
    refuse("board|small.toml", "small.toml is not TOML", "line 2")


def test_a_folder_is_no_recipe(refuse: Refuse) -> None:
    refuse("run|.", ". is a folder; give the path of a recipe")


def test_a_runs_folder_says_how_to_go_on(refuse: Refuse, place: Path) -> None:
    run(place, "runs/small")
    refuse("run|runs/small", "is a folder", "limbeck resume runs/small")


def test_a_board_is_no_recipe_to_run(refuse: Refuse, place: Path) -> None:
    (place / "board.toml").write_text('recipe = "small.toml"\n[arms]\n')
    refuse("run|board.toml", "board.toml is a board", "limbeck board board.toml")


# --- models and taps ---


def test_a_tap_that_does_not_exist_comes_with_the_near_ones(refuse: Refuse, place: Path) -> None:
    given(place, 'tap = "stage1"', 'tap = "stagge1"')
    refuse("run|small.toml", "In stage 1: ", "'stagge1' does not exist in the student (CNN)", "stage1")


def test_an_in_place_tap_says_what_to_do(refuse: Refuse, place: Path) -> None:
    given(place, '{ name = "cnn", widths = [3] }', '"theirs:in_place"')
    refuse(
        "run|small.toml", "In stage 1: ", "'stage1' of the student is changed in place", "set inplace=False"
    )


def test_an_in_place_tap_of_the_teacher_says_whose_it_is(refuse: Refuse, place: Path) -> None:
    given(place, '{ name = "cnn", widths = [4] }', '"theirs:in_place"')
    refuse("run|small.toml", "In stage 1: ", "'stage1' of the teacher is changed in place")


def test_a_tap_that_shows_a_tuple_comes_with_an_example(refuse: Refuse, place: Path) -> None:
    given(place, '{ name = "cnn", widths = [3] }', '"theirs:shows_a_pair"')
    refuse("run|small.toml", "'stage1' shows a tuple of 2, expected one tensor", "'stage1[0]'")


def test_different_class_counts_say_which_methods_still_work(refuse: Refuse, place: Path) -> None:
    given(place, "widths = [4]", "widths = [4], classes = 12")
    said = refuse("run|small.toml", "In stage 1: ", "'kd'", "10 classes", "12", "`columns`")
    works = said.partition("still work: ")[2].partition(";")[0].split(", ")
    assert {"fitnet", "rkd"} <= set(works) and "kd" not in works


def test_a_model_that_cannot_be_made_says_why(refuse: Refuse, place: Path) -> None:
    given(place, '{ name = "cnn", widths = [3] }', '"theirs:broken"')
    refuse("run|small.toml", "Model 'student' (theirs:broken) cannot be made", "backbone.pt")


def test_a_model_that_cannot_take_the_data_is_named(refuse: Refuse, place: Path) -> None:
    given(place, "widths = [4]", "widths = [4], channels = 3")
    words = ["Model 'teacher' (cnn)", "channels = 3", "have channels = 1", "leave `channels` out"]
    refuse("run|small.toml", "In stage 0: ", *words)


def test_unknown_names_come_with_the_near_ones(refuse: Refuse) -> None:
    refuse("run|small.toml|--set|models.student.name=cmn", "no model 'cmn'", "'cnn'")
    refuse("run|small.toml|--set|stages.1.terms.0.method=kdd", "no method 'kdd'", "'kd'")
    refuse("run|small.toml|--set|stages.1.terms.0.teacher=teachr", "names 'teachr'", "'teacher'")
    refuse("run|small.toml|--set|data=theirs:nothing", "theirs:nothing", "has no 'nothing'")
    refuse("show|kdd", "no method 'kdd'", "'kd'")
    refuse("list|knobs", "no kind 'knobs'", "method")
    refuse("board|small.toml|--methods|kd,kdd", "arm 'kdd'", "no method 'kdd'")


def test_weights_that_are_a_pickle_are_never_opened(refuse: Refuse, place: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(place / "opened"),)

    (place / "w.safetensors").write_bytes(pickle.dumps(Bomb()))
    given(place, "widths = [3]", 'widths = [3], weights = "w.safetensors"')
    refuse("run|small.toml", "w.safetensors", "pickle", "safetensors")
    assert not (place / "opened").exists()
    torch.save({"head.bias": torch.zeros(10)}, place / "w.safetensors")
    refuse("run|small.toml", "w.safetensors", "pickle", "torch.save")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("./theirs.py:in_place", ["'./theirs.py:in_place' begins with no module's name", "'mine:in_place'"]),
        ("no_syntax:net", ["'no_syntax:net' cannot be imported: SyntaxError", "mend that module"]),
        ("stumbles:net", ["'stumbles:net' cannot be imported: KeyError: 'HOME_OF_DATA'"]),
        ("leaves:net", ["'leaves:net' cannot be imported: SystemExit"]),
        ("theirs:NUMBER", ["'theirs:NUMBER' is of type int"]),
    ],
)
@pytest.mark.parametrize("where", ["models.student", "stages.1.terms.0.method", "stages.0.view"])
def test_what_cannot_be_imported_or_used_is_one_sentence(
    path: str, words: list[str], where: str, refuse: Refuse, place: Path
) -> None:
    (place / "no_syntax.py").write_text("def net(:\n")
    (place / "stumbles.py").write_text("{}['HOME_OF_DATA']\n")
    (place / "leaves.py").write_text("raise SystemExit(0)\n")
    refuse(f"run|small.toml|--set|{where}='{path}'", "small.toml", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "data='theirs:raises_a_key_error'",
            ["The data 'theirs:raises_a_key_error'", "KeyError: 'backbone'"],
        ),
        ("data='theirs:NUMBER'", ["The training data is"]),
        ("models.student='theirs:raises_a_key_error'", ["Model 'student'", "KeyError: 'backbone'"]),
        ("models.student='theirs:of_nobody'", ["Model 'student' (theirs:of_nobody) is of type NoneType"]),
        ("stages.1.terms=['theirs:Data']", ["method 'theirs:Data' is a class without `card`", "subclass"]),
        ("stages.1.terms=['theirs:splits']", ["method 'theirs:splits' is of type function"]),
        ("stages.1.terms=['theirs:Unfinished']", ["Method 'theirs:Unfinished' cannot be made", "TypeError"]),
        ("stages.1.scheme='theirs:Data'", ["scheme 'theirs:Data' is a class without `staged`"]),
        ("task='theirs:Data'", ["task 'theirs:Data' is a class without `headline`"]),
        ("task='theirs:Demanding'", ["task lacks `margin`"]),
        ("stages.1.view='theirs:no_batch'", ["In stage 1: ", "view 'theirs:no_batch' cannot", "TypeError"]),
        ("stages.1.view='theirs:gives_none'", ["In stage 1: ", "view 'theirs:gives_none' gives a NoneType"]),
        ("models.teacher.view='theirs:breaks'", ["In stage 1: ", "'theirs:breaks' cannot", "KeyError"]),
        ("stages.1.terms.0.view='theirs:breaks'", ["In stage 1: ", "'theirs:breaks' cannot", "KeyError"]),
        ("stages.1.augment='theirs:gives_none'", ["In stage 1: ", "'theirs:gives_none' gives a NoneType"]),
        (
            "stages.1.learner={ name = 'made', from = 'student', change = 'theirs:no_batch' }",
            ["In stage 1: ", "change 'theirs:no_batch' cannot make 'made' of 'student': TypeError"],
        ),
        (
            "stages.1.learner={ name = 'made', from = 'student', change = 'theirs:gives_none' }",
            ["In stage 1: ", "change 'theirs:gives_none' gives a NoneType"],
        ),
        (
            "stages.1.learner={ name = 'made', from = 'student', change = 'theirs:missing' }",
            ["has no 'missing'"],
        ),
    ],
)
def test_what_is_brought_and_does_not_work_is_one_sentence(
    change: str, words: list[str], refuse: Refuse
) -> None:
    refuse(f"run|small.toml|--set|{change}", *words)


def test_data_may_be_a_data_set_itself(place: Path) -> None:
    from limbeck import build, recipe

    lab = build.lab(recipe.read(place / "small.toml", ["data='theirs:SPLITS'"]))
    assert len(lab.splits.train) == 20


# --- what does not fit the data or the stage ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.1.accumulate=700", ["In stage 1: ", "600 rows", "700 micro-batches", "`accumulate`"]),
        ("models.teacher.normalise=[[0, 0, 0], 1]", ["`normalise` of model 'teacher'", "has 1 channel;"]),
        ("models.student.taps={ stage9 = 'stages.9' }", ["'stage9' does not exist in the model 'student'"]),
        ("models.student.widths=[]", ["widths []", "at least one width"]),
        ("stages.0.view={ name = 'noise', sd = -1 }", ["In stage 0: ", "standard deviation -1", ">= 0"]),
        ("stages.0.augment='rotations'", ["In stage 0: ", "`augment` makes label 39 of 10 classes"]),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    change: str, words: list[str], refuse: Refuse
) -> None:
    refuse(f"run|small.toml|--set|{change}", *words)


def test_a_model_may_be_made_for_what_its_view_shows_it(place: Path) -> None:
    from limbeck import build, recipe

    (place / "theirs.py").write_text(
        THEIRS + "\n\ndef colour(batch):\n    return batch.replace(x=batch.x.expand(-1, 3, -1, -1))\n"
    )
    teacher = "models.teacher={ name = 'cnn', channels = 3, normalise = [[0, 0, 0], [1, 1, 1]], "
    plan = [f"{teacher} view = 'theirs:colour' }}", "stages.0.view='theirs:colour'"]
    build.rehearse(recipe.read(place / "small.toml", plan))


# --- data ---


def test_nan_in_the_data_comes_with_its_sample(refuse: Refuse, place: Path) -> None:
    given(place, '"digits"', '"theirs:with_nan"')
    refuse("run|small.toml", "NaN or infinite values in 1 of 20 samples, first in sample 7")


def test_a_label_outside_the_classes_comes_with_its_sample(refuse: Refuse, place: Path) -> None:
    given(place, '"digits"', '"theirs:with_label_10"')
    refuse("run|small.toml", "Label 10 of sample 10", "10 classes of the data (0 to 9)")


def test_a_label_outside_the_heads_range_says_how_many_it_needs(refuse: Refuse, place: Path) -> None:
    given(place, "widths = [4]", "widths = [4], classes = 7")
    refuse("run|small.toml", "In stage 0: ", "label 9", "7 outputs (0 to 6)", "classes = 10")


def test_data_without_a_sample_is_refused(refuse: Refuse, place: Path) -> None:
    given(place, '"digits"', '"theirs:empty"')
    refuse("run|small.toml", "0 inputs and 0 labels")


def test_data_of_another_shape_than_the_model_takes_is_refused(refuse: Refuse, place: Path) -> None:
    given(place, '"digits"', '"theirs:flat"')
    refuse("run|small.toml", "In stage 0: ", "teacher")


# --- folders and checkpoints ---


def run(place: Path, name: str, *changes: str) -> None:
    from limbeck import recipe
    from limbeck.run import Run

    for _ in Run(recipe.read(place / "small.toml", changes), place / name, every=0).moments():
        pass


def test_a_folder_of_another_recipe_comes_with_what_differs(refuse: Refuse, place: Path) -> None:
    run(place, "runs/small")
    words = ["another recipe", "stages.0.epochs is 1 there and 2 here", "choose another folder"]
    refuse("run|small.toml|--set|stages.0.epochs=2", *words)
    refuse("run|small.toml|--seed|3", "seed is 0 there and 3 here")


def test_a_checkpoint_of_another_recipe_is_refused(refuse: Refuse, place: Path) -> None:
    run(place, "one")
    run(place, "two", "seed=2")
    (place / "one" / "result.json").unlink()
    for path in (place / "two").glob("checkpoint*"):
        (place / "one" / path.name).write_bytes(path.read_bytes())
    refuse("resume|one", "checkpoint.json", "a checkpoint of recipe", "expected recipe")


def test_a_folder_without_a_run_cannot_be_resumed(refuse: Refuse, place: Path) -> None:
    refuse("resume|nowhere", "nowhere holds no run")
    refuse("resume|small.toml", "small.toml")


def test_a_file_is_no_folder_to_work_in(refuse: Refuse) -> None:
    refuse("run|small.toml|--out|theirs.py", "theirs.py")


def test_a_board_with_one_arm_that_does_not_fit_computes_none(refuse: Refuse, place: Path) -> None:
    arms = (
        'ok = { terms = [{ method = "rkd" }] }\nodd = { terms = [{ method = "fitnet", tap = "stage9" }] }\n'
    )
    (place / "b.toml").write_text(f'recipe = "small.toml"\n[arms]\n{arms}')
    refuse("board|b.toml", "Arm 'odd'", "In stage 1: ", "'stage9' does not exist")


# --- the machine ---


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "none"])
def test_a_device_that_is_not_there_is_named(device: str, refuse: Refuse) -> None:
    refuse(f"run|small.toml|--device|{device}", f"Device '{device}' cannot be used here", "expected cpu")
    refuse(f"board|small.toml|--device|{device}", f"Device '{device}' cannot be used here")


def test_several_processes_are_refused(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    refuse("run|small.toml", "4 processes", "without torchrun")


def test_the_real_command_says_it_too(place: Path) -> None:
    given(place, 'tap = "stage1"', 'tap = "stagge1"')
    command = [sys.executable, "-m", "limbeck.cli", "run", "small.toml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("limbeck: ") and done.stderr.count("\n") == 1 and "'stagge1'" in done.stderr
    assert not (place / "runs").exists()
