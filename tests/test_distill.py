"""No recipe at all: what is chosen, what is said before the first step, and what is handed back."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from limbeck import board, checkpoint, cli, distill, doctor, recipe, run
from limbeck.core.refused import Refused
from limbeck.models.cnn import CNN


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """The weights of a run, with their JSON."""
    plan = recipe.parse(
        {
            "data": "digits",
            "models": {"teacher": {"name": "cnn", "widths": [8, 16], "depth": 2}},
            "stages": [{"learner": "teacher", "epochs": 1, "batch": 256}],
        }
    )
    for _ in run.Run(plan, tmp_path / "taught").moments():
        pass
    return tmp_path / "taught" / "teacher.safetensors"


def folder_of_images(root: Path, mode: str) -> Path:
    for number, name in enumerate(("night", "day")):
        (root / name).mkdir(parents=True)
        for n in range(20):
            level = np.full((16, 16, 3), 200 * number + n, dtype=np.uint8)
            Image.fromarray(level).convert(mode).save(root / name / f"{n}.png")
    return root


def test_a_named_teacher_learns_first(tmp_path: Path) -> None:
    plan = distill.plan("vgg8", "cnn", "digits", epochs=7, labels=100)
    first, last = plan.stages
    assert (first.learns, first.labels, first.epochs, first.terms) == ("teacher", None, 7, [])
    assert (last.learns, last.labels, last.epochs) == ("student", 100, 7)
    assert [(use.method, use.knobs) for use in last.terms] == [("kd", {"temperature": 4.0})]


def test_trained_weights_say_whose_they_are(teacher: Path) -> None:
    plan = distill.plan(str(teacher), "cnn", "digits")
    (only,) = plan.stages
    net = plan.models["teacher"]
    assert only.learns == "student" and isinstance(net, recipe.Net)
    assert net.weights == str(teacher) and net.knobs == {"widths": [8, 16], "depth": 2}


def test_weights_without_a_word_about_them(teacher: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute.safetensors"
    mute.write_bytes(teacher.read_bytes())
    with pytest.raises(Refused, match=r"does not say which network .* NAME="):
        distill.plan(str(mute), "cnn", "digits")
    safetensors.torch.save_file(CNN(classes=10).state_dict(), mute)
    net = distill.plan(f"cnn={mute}", "cnn", "digits").models["teacher"]
    assert isinstance(net, recipe.Net) and (net.name, net.weights) == ("cnn", str(mute))


def test_networks_without_batchnorm_learn_by_adamw() -> None:
    first, last = distill.plan("vit_tiny", "cnn", "digits").stages
    assert first.optim["student"].name == "adamw" and last.optim["student"].name == "sgd"


def test_only_colour_images_are_cropped_and_mirrored(tmp_path: Path) -> None:
    colour = folder_of_images(tmp_path / "colour", "RGB")
    assert [v.name for v in distill.plan("vgg8", "cnn", str(colour)).stages[1].augment] == ["crop", "flip"]
    assert distill.plan("vgg8", "cnn", "digits").stages[1].augment == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("vgg8", "cnn", "nowhere/at/all"), "neither a folder nor a data set"),
        (("vgg9", "cnn", "digits"), "There is no model 'vgg9'"),
        (("vgg8", "cmn", "digits"), r"did you mean 'cnn'"),
    ],
)
def test_what_is_not_there(names: tuple[str, str, str], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        distill.plan(*names)


def test_what_ships_did_best_on_the_validation_split(teacher: Path, tmp_path: Path) -> None:
    plan = distill.plan(str(teacher), "cnn", "digits", epochs=1, batch=256, labels=50)
    wild = {"terms": [{**distill.KD, "weight": 1e30}], "optim": {"student": {"lr": 1e9}}}
    arms = {"kd": {"terms": [distill.KD]}, "idle": {"terms": [], "labels": 10}, "wild": wild}
    whole = board.Board(plan, arms, [0, 1], tmp_path / "board")
    for _ in whole.moments():
        pass
    valid = {
        (arm, seed): json.loads((whole.cell_folder(arm, seed) / "result.json").read_text())["scores"][
            "valid.accuracy"
        ]
        for arm in ("control", "kd", "idle")
        for seed in (0, 1)
    }
    arm, seed, file = distill.ship(whole)
    assert "wild" not in whole.ended  # it diverged, and has no score to ship by
    sums = {name: valid[name, 0] + valid[name, 1] for name in ("control", "kd", "idle")}
    assert sums[arm] == max(sums.values()) and valid[arm, seed] == max(valid[arm, 0], valid[arm, 1])
    there = checkpoint.load_weights(whole.cell_folder(arm, seed) / "student.safetensors")
    back = checkpoint.load_weights(file)
    assert back.keys() == there.keys() and all(torch.equal(back[name], there[name]) for name in there)


def test_the_door(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cost is said before the first cell; the plan it wrote is a board that is the same board."""
    out = tmp_path / "out"
    line = ["limbeck", "distill", "--teacher", str(teacher), "--student", "cnn", "--data", "digits"]
    monkeypatch.setattr("sys.argv", [*line, "--epochs", "1", "--seeds", "1", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.index("It will take about") < said.index("[1/2] control, seed 0") < said.index("Shipped:")
    assert (out / "student.safetensors").exists() and (out / "report.html").exists()
    whole, arms, seeds, _ = board.read(out / "board.toml")
    assert whole == distill.plan(str(teacher), "cnn", "digits", epochs=1)
    assert (list(arms), seeds) == (["kd"], [0])
    again = next(line for line in said.splitlines() if line.startswith("The plan")).split("limbeck ")[1]
    assert again.rstrip(")").endswith(f"--out {out}")
    told = lines(again.rstrip(")").split(), monkeypatch, capsys)
    assert "[2/2] kd, seed 0" in told and said.split("[1/2]")[1].startswith(told.split("[1/2]")[1][:40])


def lines(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int = 0
) -> str:
    """What `limbeck WORDS` says; on stderr when it refuses."""
    monkeypatch.setattr("sys.argv", ["limbeck", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code or 0) == code, said.err
    return said.err if code else said.out


def test_a_teacher_of_a_finished_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's lines: a recipe's run leaves its teacher's weights, and they are distilled into another
    student. Each distillation has a folder of its own, and one that does not fit a folder leaves it alone."""
    monkeypatch.chdir(tmp_path)
    plan = distill.plan("cnn", "cnn", "digits", epochs=1, batch=400)
    for _ in run.Run(plan, Path("runs/digits")).moments():
        pass
    line = ["distill", "--student", "cnn", "--data", "digits", "--labels", "100", "--seeds", "1"]
    line += ["--epochs", "1", "--teacher"]
    lines([*line, "runs/digits/teacher.safetensors"], monkeypatch, capsys)
    written = Path("runs/distill/cnn-teacher-digits/board.toml")
    before = written.read_bytes()
    lines([*line, "cnn"], monkeypatch, capsys)
    assert (Path("runs/distill/cnn-cnn-digits") / "student.safetensors").exists()
    line[line.index("100")] = "50"
    said = lines([*line, "runs/digits/teacher.safetensors"], monkeypatch, capsys, code=2)
    assert "labels is 100 there and 50 here; choose another folder" in said
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    ("teacher", "data", "name"),
    [
        ("vgg8", "digits", "cnn-vgg8-digits"),
        ("vgg8=a/big.npz", "digits", "cnn-big-digits"),
        ("mine.nets:big", "photos/", "cnn-mine.nets%3Abig-photos"),
    ],
)
def test_the_folder_tells_what_is_distilled(
    teacher: str, data: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    assert distill.folder(teacher, "cnn", data) == Path("runs/distill") / name


# --- what it will take ---


def test_cost_counts_every_stage_once_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When everything that is timed takes one second."""
    plan = distill.plan("cnn", "cnn", "digits", epochs=2, batch=128)
    monkeypatch.setattr(doctor, "_timed", _one_second)
    one = doctor.of_board(plan, [plan], 1)
    two = doctor.of_board(plan, [plan, plan], 3)
    steps = 2 * (1257 // 128)
    scores = (2 * 180 + 180 + 360) / 180
    assert one.seconds == pytest.approx(2 * (steps + scores))
    assert two.seconds == pytest.approx(3 * 3 * (steps + scores))
    assert one.memory > 10**7


def test_disk_is_what_the_folder_comes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its largest: checkpoints are replaced, so for a moment there are two."""
    content = distill.plan("cnn", "cnn", "digits", epochs=2, batch=400).model_dump(mode="json", by_alias=True)
    for name in ("teacher", "student"):
        content["models"][name]["widths"] = [32, 64, 96]
    plan = recipe.parse(content)
    table = board.Board(plan, {}, [0], tmp_path / "board")
    cost = doctor.of_board(plan, [table.plans["control"]], 1)
    sizes, commit = [], checkpoint._commit

    def weighed(path: Path) -> None:
        sizes.append(sum(file.stat().st_size for file in table.folder.rglob("*") if file.is_file()))
        commit(path)

    monkeypatch.setattr(checkpoint, "_commit", weighed)
    monkeypatch.setattr(board, "Run", partial(run.Run, every=0.0))  # as if every step took a minute
    for _ in table.moments():
        pass
    assert cost.disk == pytest.approx(max(sizes), rel=0.05)
    kept = doctor.of_board(plan, [table.plans["control"]], 2).disk - cost.disk  # one seed's, nobody at work
    assert kept == pytest.approx(sizes[-1], rel=0.08)


def _one_second(what: object, device: torch.device) -> float:
    assert callable(what)
    what()
    return 1.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (99, "99 s"), (150, "2 min"), (5999, "100 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert doctor.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(12, "12 bytes"), (4_200, "4.2 kB"), (151_000_000, "151 MB"), (2 * 10**9, "2 GB")]
)
def test_sizes(count: int, words: str) -> None:
    assert doctor.size(count) == words
