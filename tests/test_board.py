"""A fair board: arms differ in nothing but what is said, the control is honest, and no work is done twice."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from limbeck import answers, recipe, report
from limbeck import run as runs
from limbeck.board import Board, Cell, holm, paired, read, verdict
from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.recipe import Recipe
from limbeck.run import Moment, Run, Stopped

KD = {"terms": [{"method": "kd", "temperature": 2}]}
HINT = {"terms": [{"method": "fitnet", "tap": "stage1"}]}


def whole(**changes: Any) -> Recipe:
    """One step an epoch, so that an epoch's mean loss is that of its first batch, before anybody learned."""
    return recipe.parse(
        {
            "data": "digits",
            "models": {"teacher": {"name": "cnn", "widths": [6]}, "student": {"name": "cnn", "widths": [3]}},
            "stages": [
                {"learner": "teacher", "epochs": 2, "batch": 640},
                {"learner": "student", "epochs": 1, "batch": 1000, "labels": 100},
            ],
            **changes,
        }
    )


def compute(board: Board) -> list[tuple[Cell, Moment | None]]:
    return list(board.moments())


def cell(board: Board, arm: str, seed: int) -> Path:
    return board.folder / "cells" / arm / str(seed)


def weights(board: Board, arm: str, seed: int) -> bytes:
    return (cell(board, arm, seed) / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """kd and a hint against the control, and the control again under two other names; finished."""
    arms = {
        "kd": KD,
        "hint": HINT,
        "nothing": {"terms": []},
        "kd of weight 0": {"terms": [{"method": "kd", "weight": 0}]},
    }
    board = Board(whole(), arms, [0, 4], tmp_path_factory.mktemp("boards") / "tiny")
    compute(board)
    return board


@pytest.fixture(scope="module")
def result(board: Board) -> dict[str, Any]:
    return board.result()


# --- fair ---


@pytest.mark.parametrize("name", ["online", "branches", "mean_teacher", "data_free", "assistants"])
def test_the_control_is_plain_training_of_the_first_learner(name: str, tmp_path: Path) -> None:
    """Whatever the scheme: no terms, no peers, no branches, no generator, no running mean."""
    plan, arms, _, _ = read(Path(__file__).parents[1] / "recipes" / f"{name}.toml")
    control = Board(plan, arms, [0], tmp_path).plans["control"].stages[-1]
    taught = plan.stages[-1]
    assert (control.terms, control.scheme.name, control.learners, control.ships) == (
        [],
        "offline",
        (taught.learns,),
        None,
    )
    same = ("epochs", "batch", "labels", "rows", "augment", "view")
    assert [getattr(control, key) for key in same] == [getattr(taught, key) for key in same]
    assert control.optim == {name: one for name, one in taught.optim.items() if name == "student"}


@pytest.mark.parametrize("weight", [0.1, 0])
def test_the_control_learns_the_task_in_full(weight: float, tmp_path: Path) -> None:
    """However little the task counts beside what is taught."""
    stages = whole().model_dump(mode="json", by_alias=True)["stages"]
    stages[-1] |= {"task_weight": weight, **KD}
    board = Board(whole(stages=stages), {"as written": {}}, [0], tmp_path)
    assert board.plans["control"].stages[-1].task_weight == 1
    assert board.plans["as written"].stages[-1].task_weight == weight
    assert board.plans["control"] == Board(whole(), {}, [0], tmp_path).plans["control"]


def test_an_arm_that_changes_nothing_is_the_control_bit_for_bit(board: Board) -> None:
    for seed in board.seeds:
        for same in ("nothing", "kd of weight 0"):
            assert weights(board, same, seed) == weights(board, "control", seed)
        for other in ("kd", "hint"):
            assert weights(board, other, seed) != weights(board, "control", seed)


def test_arms_begin_with_the_same_weights_and_the_same_batch(board: Board, result: dict[str, Any]) -> None:
    first = [[curve[0]["losses"]["task"] for curve in arm["curves"]] for arm in result["arms"]]
    assert all(losses == first[0] for losses in first)
    assert first[0][0] != first[0][1]  # and seeds with others


def test_the_teacher_learns_once_a_seed_and_all_arms_learn_from_it(tmp_path: Path) -> None:
    board = Board(whole(), {"kd": KD}, [0, 4], tmp_path / "b")
    moments = [(c.arm, c.seed, m.stage) for c, m in compute(board) if m is not None]
    assert Counter(moments) == {
        **{(None, seed, 0): 2 * 1 for seed in (0, 4)},
        **{(arm, seed, 1): 1 for arm in ("control", "kd") for seed in (0, 4)},
    }


def test_the_shared_teacher_is_the_one_the_whole_recipe_would_train(board: Board, tmp_path: Path) -> None:
    plan = whole(stages=[whole().stages[0].model_dump(), whole().stages[1].model_dump() | KD])
    run = Run(plan, tmp_path / "run", seed=4)
    for _ in run.moments():
        pass
    assert (run.folder / "student.safetensors").read_bytes() == weights(board, "kd", 4)
    teacher = load_file(board.folder / "shared" / "4" / "teacher.safetensors")
    assert all(torch.equal(teacher[name], w) for name, w in run.lab.models["teacher"].state_dict().items())


def test_cells_go_seed_by_seed_with_the_shared_stages_and_the_control_first(board: Board) -> None:
    cells = board.cells()
    assert [c.arm for c in cells[:3]] == [None, "control", "kd"]
    assert [c.seed for c in cells] == [0] * 6 + [4] * 6
    assert [(c.number, c.cells) for c in cells] == [(n, 12) for n in range(12)]


def test_a_recipe_of_one_stage_has_nothing_to_share(tmp_path: Path) -> None:
    alone = whole(stages=[{"learner": "student", "epochs": 1, "batch": 1000}])
    board = Board(alone, {"slow": {"optim": {"student": {"lr": 0.001}}}}, [0], tmp_path / "b")
    assert [c.arm for c in board.cells()] == ["control", "slow"]
    assert [m.stage for _, m in compute(board) if m] == [0, 0]
    assert board.result()["teachers"] == []


# --- what it says ---


def test_its_result_holds_every_score_and_what_they_come_to(board: Board, result: dict[str, Any]) -> None:
    assert [arm["name"] for arm in result["arms"]] == ["control", "kd", "hint", "nothing", "kd of weight 0"]
    assert (result["metric"], result["seeds"], result["control"]) == ("test.accuracy", [0, 4], "control")
    for arm in result["arms"]:
        told = [json.loads((cell(board, arm["name"], seed) / "result.json").read_text()) for seed in (0, 4)]
        assert arm["scores"] == [r["scores"]["test.accuracy"] for r in told]
        assert arm["mean"] == pytest.approx(sum(arm["scores"]) / 2)
        assert arm["sd"] == pytest.approx(abs(arm["scores"][0] - arm["scores"][1]) / math.sqrt(2))
        assert arm["seconds"] == pytest.approx(sum(r["seconds"] for r in told) / 2)
        assert arm["parameters"] == sum(
            w.numel() for n, w in shipped(board).items() if "running" not in n and "num_" not in n
        )
        assert [[r["stage"] for r in curve] for curve in arm["curves"]] == [[1], [1]]
    control, kd = result["arms"][:2]
    assert control["difference"] is None
    assert kd["difference"] == paired(kd["scores"], control["scores"])
    assert kd["changes"] == {"terms": [{"method": "kd", "temperature": 2}]}
    (teacher,) = result["teachers"]
    assert teacher["name"] == "teacher" and len(teacher["scores"]) == 2


def shipped(board: Board) -> dict[str, torch.Tensor]:
    return load_file(cell(board, "control", 0) / "student.safetensors")


def test_its_result_is_also_a_file(board: Board, result: dict[str, Any]) -> None:
    assert json.loads((board.folder / "board.json").read_text()) == result
    assert recipe.parse(result["recipe"]) == whole()


def test_it_says_what_it_ran_on_and_what_that_took(board: Board, result: dict[str, Any]) -> None:
    about = json.loads((cell(board, "kd", 4) / "run.json").read_text())
    assert result["environment"] == about["environment"]
    assert {"python", "torch", "machine", "device", "threads", "cores"} <= result["environment"].keys()
    seconds = sum(sum(r["seconds"] for r in curve) for arm in result["arms"] for curve in arm["curves"])
    assert result["cost"]["wall"] > seconds and result["cost"]["cpu"] > 0


def test_cells_that_ran_on_other_machines_are_not_passed_off_as_alike(tmp_path: Path) -> None:
    board = Board(whole(), {"kd": KD}, [0], tmp_path / "b")
    compute(board)
    file = cell(board, "kd", 0) / "run.json"
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    assert board.result()["environment"]["torch"] == f"{torch.__version__}, 1.0"


def test_the_cost_adds_up_over_sittings(tmp_path: Path) -> None:
    compute(Board(whole(), {"kd": KD}, [0], tmp_path / "b"))
    first = json.loads((tmp_path / "b" / "cost.json").read_text())
    compute(Board(whole(), {"kd": KD}, [0, 1], tmp_path / "b"))
    second = json.loads((tmp_path / "b" / "cost.json").read_text())
    assert 0 < first["wall"] < second["wall"] and 0 < first["cpu"] < second["cpu"]


# --- answers to the test split ---


def test_every_cell_keeps_its_answers_and_they_are_what_was_scored(
    board: Board, result: dict[str, Any]
) -> None:
    told = result["answers"]
    rows = torch.tensor(told["rows"], dtype=torch.float64)
    assert told["classes"] == list("0123456789") and rows.sum() == 360
    for arm in result["arms"]:
        for seed, score in zip(board.seeds, arm["scores"], strict=True):
            kept = answers.read(answers.place(cell(board, arm["name"], seed), "student"))
            assert kept is not None and 100 * float(kept.right.double().mean()) == pytest.approx(score)
        by_class = torch.tensor([one["mean"] for one in told["arms"][arm["name"]]["by_class"]])
        assert float((by_class * rows).sum() / rows.sum()) == pytest.approx(arm["mean"])
        gaps = torch.tensor([one["mean"] for one in told["arms"][arm["name"]]["gaps"]])
        gap = arm["difference"]["mean"] if arm["difference"] else 0.0
        assert float((gaps * rows).sum() / rows.sum()) == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_answers_are_of_the_epoch_that_is_kept(keep: str, tmp_path: Path) -> None:
    wild = {"student": {"lr": 3.0, "schedule": "constant"}}
    stage = {"learner": "student", "epochs": 4, "batch": 1000, "keep": keep, "optim": wild}
    board = Board(whole(stages=[stage]), {}, [0], tmp_path / "b")
    compute(board)
    told = board.result()["arms"][0]
    kept = answers.read(answers.place(cell(board, "control", 0), "student"))
    assert told["last"]["scores"] != told["best"]["scores"]
    assert kept is not None and 100 * float(kept.right.double().mean()) == pytest.approx(told[keep]["mean"])


def test_the_teacher_answers_once_a_seed_and_all_are_compared_with_it(
    board: Board, result: dict[str, Any]
) -> None:
    told, (teacher,) = result["answers"], result["teachers"]
    assert told["teacher"] == "teacher"
    for seed, score in zip(board.seeds, teacher["scores"], strict=True):
        kept = answers.read(answers.place(board.folder / "shared" / str(seed), "teacher"))
        assert kept is not None and 100 * float(kept.right.double().mean()) == pytest.approx(score)
    same = told["arms"]["nothing"]
    assert same["divergence"] == told["arms"]["control"]["divergence"] != told["arms"]["kd"]["divergence"]
    assert told["taught"]["agreement"]["mean"] == 100.0


def test_a_teacher_that_came_trained_is_asked_as_the_arms_asked_it(tmp_path: Path, board: Board) -> None:
    """Its own eyes too: here it is shown inverted images, as its `normalise` says."""
    file = board.folder / "shared" / "0" / "teacher.safetensors"
    models = {
        "teacher": {"name": "cnn", "widths": [6], "weights": str(file), "normalise": [0.0, -1.0]},
        "student": {"name": "cnn", "widths": [3]},
    }
    stage = {"learner": "student", "epochs": 1, "batch": 1000}
    alone = Board(whole(models=models, stages=[stage]), {"kd": KD}, [0], tmp_path / "b")
    compute(alone)
    kept = answers.read(answers.place(tmp_path / "b" / "shared" / "0", "teacher"))
    plain = answers.read(answers.place(board.folder / "shared" / "0", "teacher"))
    assert kept is not None and plain is not None and kept.y.equal(plain.y)
    teacher = alone._cell_run(alone.cells()[1]).lab.teacher("teacher")
    test = alone._cell_run(alone.cells()[1]).lab.splits.test
    asked = teacher(Batch(test.rows(torch.arange(360))[0])).out
    torch.testing.assert_close(kept.p, asked.double().softmax(1), atol=1e-3, rtol=0)
    assert not torch.allclose(kept.p, plain.p, atol=1e-2)
    result = alone.result()
    assert result["teachers"] == [] and result["answers"]["teacher"] == "teacher"


@pytest.mark.parametrize("moving", ["student", "average"])
def test_who_changes_while_teaching_is_nobody_to_be_compared_with(moving: str, tmp_path: Path) -> None:
    models = {**whole().model_dump(mode="json", by_alias=True)["models"], "average": {"mean_of": "student"}}
    terms = {"terms": [{"method": "kd", "teacher": ["average"]}, {"method": "kd"}]}
    plan = whole(models=models)
    arms = {"both": terms} if moving == "student" else {"mean": {"terms": terms["terms"][:1]}}
    board = Board(plan, arms, [0], tmp_path / "b")
    compute(board)
    assert board.result()["answers"]["teacher"] == ("teacher" if moving == "student" else None)


def test_cells_without_answers_leave_them_out_of_the_result(tmp_path: Path) -> None:
    board = Board(whole(), {"kd": KD}, [0], tmp_path / "b")
    compute(board)
    assert board.result()["answers"]["shown"] == "kd"
    for path in cell(board, "kd", 0).glob("answers-*"):
        path.unlink()
    assert board.result()["answers"] is None


def test_the_arm_whose_samples_are_shown_is_chosen_on_the_validation_split(tmp_path: Path) -> None:
    arms = {"a": KD, "b": {"terms": [{"method": "kd", "temperature": 3}]}, "own": {"epochs": 2}}
    board = Board(whole(), arms, [0], tmp_path / "b")
    compute(board)
    for better in ("a", "b"):
        for arm in ("a", "b", "own"):
            file = cell(board, arm, 0) / "result.json"
            told = json.loads(file.read_text())
            told["scores"] |= {"valid.accuracy": {better: 50.0, "own": 99.0}.get(arm, 40.0)}
            told["scores"]["test.accuracy"] = 10.0 if arm == better else 90.0
            file.write_text(json.dumps(told))
        assert board.result()["answers"]["shown"] == better  # never one that no teacher taught


def test_the_last_and_the_best_epoch_are_both_told(tmp_path: Path) -> None:
    board = Board(whole(), {}, [0, 1], tmp_path / "b")
    compute(board)
    for seed in (0, 1):
        file = cell(board, "control", seed) / "result.json"
        best = {"epoch": 3 + seed, "scores": {"valid.accuracy": 99.0, "test.accuracy": 60.0 + 10 * seed}}
        file.write_text(json.dumps({**json.loads(file.read_text()), "best": best}))
    told = board.result()["arms"][0]
    sd = pytest.approx(math.sqrt(50))
    assert told["best"] == {"scores": [60.0, 70.0], "epochs": [3, 4], "mean": 65.0, "sd": sd}
    assert told["last"]["scores"] == told["scores"] != [60.0, 70.0] and told["last"]["epochs"] == [0, 0]


def test_the_scores_of_a_finished_cell_can_be_asked_for(board: Board, result: dict[str, Any]) -> None:
    assert board.scores(board.cells()[1])["test.accuracy"] == result["arms"][0]["scores"][0]
    assert board.scores(board.cells()[0])["test.accuracy"] == result["teachers"][0]["scores"][0]


# --- stopped and started again ---


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_stopped_board_computes_only_what_is_missing(after: int, tmp_path: Path, board: Board) -> None:
    def fresh() -> Board:
        return Board(whole(), {"kd": KD}, [0], tmp_path / "b")

    first = fresh()
    moments = first.moments()
    done = [next(moments) for _ in range(after)]
    first.stop()
    with pytest.raises(Stopped, match=r"the same command goes on"):
        done += moments  # the batch that is under way is still done
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("result.json")}
    again = compute(fresh())
    assert len([moment for _, moment in [*done, *again] if moment is not None]) == 4  # none of them twice
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    for arm in ("control", "kd"):
        assert weights(fresh(), arm, 0) == weights(board, arm, 0)


def test_a_finished_board_computes_nothing(board: Board) -> None:
    again = Board(whole(), {"kd": KD, "hint": HINT}, [0, 4], board.folder)
    assert all(moment is None for _, moment in compute(again))


def test_another_seed_or_arm_is_added_to_a_finished_board(tmp_path: Path) -> None:
    compute(Board(whole(), {"kd": KD}, [0], tmp_path / "b"))
    more = compute(Board(whole(), {"kd": KD, "hint": HINT}, [0], tmp_path / "b"))
    assert [(c.arm, m.stage) for c, m in more if m is not None] == [("hint", 1)]
    seeds = compute(Board(whole(), {"kd": KD, "hint": HINT}, [0, 4], tmp_path / "b"))
    assert {c.seed for c, m in seeds if m is not None} == {4}
    assert {c.arm for c, m in seeds if m is not None} == {None, "control", "kd", "hint"}


def test_the_folder_of_another_board_is_refused_with_what_differs(board: Board) -> None:
    """At once: before a fresh arm, or the first of its seeds, has been computed for nothing."""
    before = sorted(board.folder.rglob("*"))
    other = {"new": HINT, "kd": {"terms": [{"method": "kd", "temperature": 3}]}}
    with pytest.raises(Refused, match=r"terms.0.temperature is 2 there and 3 here"):
        Board(whole(), other, [7, 4], board.folder)
    assert sorted(board.folder.rglob("*")) == before


def test_a_board_is_not_extended_under_weights_that_have_changed(tmp_path: Path, board: Board) -> None:
    file = tmp_path / "teacher.safetensors"
    weights = load_file(board.folder / "shared" / "0" / "teacher.safetensors")
    save_file(weights, file)
    models = {
        "teacher": {"name": "cnn", "widths": [6], "weights": str(file)},
        "student": {"name": "cnn", "widths": [3]},
    }
    alone = whole(models=models, stages=[{"learner": "student", "epochs": 1, "batch": 1000}])
    compute(Board(alone, {"kd": KD}, [0], tmp_path / "b"))
    save_file({name: 2 * value for name, value in weights.items()}, file)
    with pytest.raises(Refused, match=r"control.*the weights of 'teacher' have changed since"):
        Board(alone, {"kd": KD, "hint": HINT}, [0, 1], tmp_path / "b")


def test_a_run_and_a_board_have_folders_of_their_own(tmp_path: Path, board: Board) -> None:
    with pytest.raises(Refused, match=r"control.0 holds a run, and a board has a folder of its own"):
        Board(whole(), {"kd": KD}, [0], cell(board, "control", 0))
    with pytest.raises(Refused, match=r"tiny holds a board, .* choose another folder"):
        Run(whole(), board.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"file is a file, expected a folder"):
        Board(whole(), {"kd": KD}, [0], tmp_path / "file")


# --- damage ---


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("result.json", "{}", r"result.json .*lacks shipped, scores"),
        ("result.json", None, r"holds no finished run"),
        ("metrics.jsonl", '{"stage": 1, "lo', r"metrics.jsonl cannot be read"),
        ("metrics.jsonl", "[]", r"metrics.jsonl cannot be read"),
        ("metrics.jsonl", "", r"metrics.jsonl tells of 0 epochs, expected the 1 "),
        ("metrics.jsonl", None, r"metrics.jsonl cannot be read"),
        ("run.json", "{}", r"run.json .*lacks environment"),
        ("diverged.json", "{}", r"diverged.json .*lacks why"),
    ],
)
def test_a_damaged_cell_is_refused_in_a_sentence(
    name: str, text: str | None, words: str, tmp_path: Path, board: Board
) -> None:
    folder = shutil.copytree(board.folder, tmp_path / "b")
    copy = Board(whole(), {"kd": KD}, [0, 4], folder)
    file = cell(copy, "kd", 4) / name
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(Refused, match=words) as refusal:
        copy.result()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ['{"wall": ', "{}", "3"])
def test_a_damaged_cost_is_not_told(text: str, tmp_path: Path, board: Board) -> None:
    folder = shutil.copytree(board.folder, tmp_path / "b")
    (folder / "cost.json").write_text(text)
    copy = Board(whole(), {"kd": KD}, [0], folder)
    assert copy.result()["cost"] is None
    compute(copy)
    assert copy.result()["cost"]["wall"] >= 0


# --- what is refused, and then nothing is written ---


@pytest.mark.parametrize(
    ("arms", "seeds", "words"),
    [
        (
            {"odd": {"terms": [{"method": "fitnet", "tap": "stage9"}]}},
            [0],
            "Arm 'odd': .*'stage9' does not exist",
        ),
        ({"odd": {"terms": [{"method": "kdd"}]}}, [0], "arm 'odd'.*no method 'kdd'"),
        ({"odd": {"epoch": 3}}, [0], "arm 'odd'.*unknown key `epoch`.*`epochs`"),
        ({"odd": {"epochs": 0}}, [0], "arm 'odd'.*epochs is 0"),
        ({"kd": KD}, [1, 2, 1], r"seeds \[1, 2, 1\] repeat"),
        ({"control": KD}, [0], "control"),
        ({"": KD}, [0], "An arm is called ''"),
        ({"big": {"learner": "teacher"}}, [0], "In arm 'big': 'teacher' learns first .*begin .*'student'"),
        (
            {"two": {"learner": ["teacher", "student"], "scheme": "online"}},
            [0],
            "In arm 'two': 'teacher' learns first",
        ),
    ],
)
def test_an_arm_that_does_not_fit_is_refused_by_name(
    arms: dict[str, Any], seeds: list[int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=words):
        Board(whole(), arms, seeds, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_task_without_a_score_has_no_board(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"compares scores, and the task 'none' has none; .*limbeck run"):
        Board(whole(task="none"), {"kd": KD}, [0], tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_arms_whose_names_look_alike_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a b", "a_b", "a/b", "shared", "..", "ü"]
    arms = {name: {"optim": {"student": {"lr": 0.01 * (n + 1)}}} for n, name in enumerate(names)}
    alone = whole(stages=[{"learner": "student", "epochs": 1, "batch": 1000}])
    board = Board(alone, arms, [0], tmp_path / "in" / "b")
    compute(board)
    assert len(board.result()["arms"]) == 7
    assert len({path.read_bytes() for path in (tmp_path / "in" / "b").rglob("student.safetensors")}) == 7
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "in" / "b" / "cells").iterdir() if path.name == "0"] == []


# --- boards as files ---


def written(folder: Path, terms: str = "") -> Path:
    (folder / "r.toml").write_text(
        'data = "digits"\nmodels = { teacher = "cnn", student = "cnn" }\n'
        '[[stages]]\nlearner = "teacher"\nepochs = 1\n'
        f'[[stages]]\nlearner = "student"\nepochs = 1\n{terms}\n'
    )
    (folder / "b.toml").write_text(
        'title = "T"\nrecipe = "r.toml"\nseeds = [3, 5]\n'
        '[arms]\nkd = { terms = [{ method = "kd", temperature = 3 }] }\nshort = { epochs = 1 }\n'
    )
    return folder / "r.toml"


def test_a_board_file_names_its_recipe_seeds_and_arms(tmp_path: Path) -> None:
    path = written(tmp_path)
    plan, arms, seeds, how = read(tmp_path / "b.toml", ("stages.0.epochs=9",))
    assert plan == recipe.read(path, ("stages.0.epochs=9",))
    assert (seeds, how) == ([3, 5], {"title": "T", "changes": None})
    assert arms == {"kd": {"terms": [{"method": "kd", "temperature": 3}]}, "short": {"epochs": 1}}


def test_a_board_file_may_hold_its_recipe(tmp_path: Path) -> None:
    path = written(tmp_path)
    text = path.read_text().replace("[[stages]]", "[[recipe.stages]]").replace("data =", "recipe.data =")
    (tmp_path / "w.toml").write_text("arms = {}\n" + text.replace("models =", "recipe.models ="))
    assert read(tmp_path / "w.toml")[0] == recipe.read(path)


def test_methods_take_the_place_of_the_arms(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read(path, methods=("kd", "rkd"))[1] == {
        "kd": {"terms": [{"method": "kd"}]},
        "rkd": {"terms": [{"method": "rkd"}]},
    }
    chosen = read(tmp_path / "b.toml", methods=("kd", "rkd"))[1]
    assert chosen["kd"]["terms"][0]["temperature"] == 3  # the board knows this arm better
    assert list(chosen) == ["kd", "rkd"]


def test_the_number_of_seeds_may_be_given(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert read(path)[2] == [0, 1, 2]
    assert read(tmp_path / "b.toml", seeds=4)[2] == [0, 1, 2, 3]


def test_a_recipes_own_terms_are_an_arm(tmp_path: Path) -> None:
    assert read(written(tmp_path))[1] == {}
    path = written(tmp_path, terms='terms = [{ method = "kd" }]')
    plan, arms, seeds, _ = read(path)
    assert arms == {"as written": {}}
    board = Board(plan, arms, seeds, tmp_path / "b")
    assert [use.method for use in board.plans["as written"].stages[-1].terms] == ["kd"]
    assert board.plans["control"].stages[-1].terms == []


def test_a_board_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    text = (tmp_path / "b.toml").read_text()
    (tmp_path / "b.toml").write_text(text.replace("seeds", "seds"))
    with pytest.raises(Refused, match=r"b.toml: unknown key `seds`.*`seeds`"):
        read(tmp_path / "b.toml")
    (tmp_path / "b.toml").write_text(text.replace("r.toml", "gone.toml"))
    with pytest.raises(Refused, match=r"no file .*gone.toml"):
        read(tmp_path / "b.toml")


# --- the test of the difference ---


def test_the_difference_is_tested_in_pairs() -> None:
    scores, control = [81.0, 84.0, 79.5, 90.0], [80.0, 82.5, 80.0, 86.0]
    gaps = [1.0, 1.5, -0.5, 4.0]
    mean = sum(gaps) / 4
    sd = math.sqrt(sum((g - mean) ** 2 for g in gaps) / 3)
    told = paired(scores, control)
    assert told["mean"] == pytest.approx(mean) and told["sd"] == pytest.approx(sd)
    assert (told["wins"], told["of"]) == (3, 4)
    assert told["p"] == pytest.approx(2 * stats.t.sf(mean / (sd / 2), 3))


@pytest.mark.parametrize(
    ("scores", "control"),
    [
        ([90.0], [80.0]),
        ([90.0, 80.0], [80.0, 60.0]),
        ([90.0, 80.0, 70.0], [90.0, 80.0, 70.0]),
        ([90.0, 80.0, 70.0], [89.0, 79.0, 69.0]),
        # Twelve images more each time, of 360: the gaps differ by rounding only, and p would be 1e-30.
        ([100 * n / 360 for n in (276, 307, 280)], [100 * n / 360 for n in (264, 295, 268)]),
    ],
    ids=["one-seed", "two-seeds", "no-gap", "equal-gaps", "equal-up-to-rounding"],
)
def test_where_the_test_has_no_answer_there_is_none(scores: list[float], control: list[float]) -> None:
    told = paired(scores, control)
    assert told["p"] is None
    assert told["mean"] == pytest.approx(scores[0] - control[0] if len(scores) != 2 else 15.0)
    assert (told["sd"] is None) == (len(scores) == 1)


def test_p_is_corrected_as_holm_says() -> None:
    *three, untested = holm([0.01, 0.04, 0.03, None])
    assert three == pytest.approx([0.03, 0.06, 0.06]) and untested is None
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([None]) == [None] and holm([]) == []


def test_the_verdict_says_no_more_than_the_test() -> None:
    def said(gap: dict[str, Any] | None) -> str:
        return verdict({"difference": gap})

    assert said(None) == "the control"
    assert said(paired([90.0, 91.0, 92.1], [80.0, 81.2, 82.0])) == "helped"
    assert said(paired([80.0, 81.2, 82.0], [90.0, 91.0, 92.1])) == "hurt"
    assert said(paired([80.0, 85.0, 70.0], [79.0, 86.0, 70.5])) == "no difference shown"
    assert said(paired([90.0, 90.0], [80.0, 81.0])) == "too few seeds to say"
    assert "few" not in said(paired([90.0, 80.0, 70.0], [90.0, 80.0, 70.0]))


# --- an arm that diverges ---


def test_an_arm_that_diverges_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    wild = {"terms": [{"method": "kd", "weight": 1e30}], "optim": {"student": {"lr": 1e9}}, "epochs": 3}
    arms = {"wild": wild, "kd": KD}
    table = Board(whole(), arms, [0, 1], tmp_path / "board")
    ends = [done for done, moment in compute(table) if moment is None]
    assert len(ends) == len(table.cells())
    lost = [done for done in ends if table.diverged(done)]
    assert [(done.arm, done.seed) for done in lost] == [("wild", 0), ("wild", 1)]
    assert "became" in str(table.diverged(lost[0])) and table.scores(lost[0]) == {}
    result = table.result()
    assert [arm["name"] for arm in result["arms"]] == ["control", "kd"]
    (wild_row,) = result["diverged"]
    assert (wild_row["name"], wild_row["seeds"], wild_row["changes"]) == ("wild", [0, 1], wild)
    assert "became" in wild_row["why"]
    # Found again, nothing is computed anew.
    again = Board(whole(), arms, [0, 1], tmp_path / "board")
    assert all(moment is None for _, moment in compute(again)) and again.result() == {
        **result,
        "cost": again.result()["cost"],
    }


def test_a_control_that_diverges_ends_the_board(tmp_path: Path) -> None:
    plan = whole().model_dump(mode="json", by_alias=True)
    plan["stages"][-1] |= {"optim": {"student": {"lr": 1e30}}, "epochs": 5}
    table = Board(recipe.parse(plan), {"kd": KD}, [0], tmp_path / "board")
    with pytest.raises(Refused, match=r"The control diverged under seed 0: The .* became"):
        compute(table)


# --- a stage that is not the last ---


def three(**changes: Any) -> Recipe:
    """The student learns by itself or from its teacher; a copy of it goes on alone, on few labels."""
    plan = whole().model_dump(mode="json", by_alias=True)
    copied = {"learner": {"name": "tuned", "from": "student"}, "epochs": 1, "batch": 1000, "labels": 50}
    plan["stages"][1] |= {"epochs": 2, "batch": 100, "labels": None}
    return recipe.parse({**plan, "stages": [*plan["stages"], copied], **changes})


def test_arms_may_change_a_stage_before_the_last(tmp_path: Path) -> None:
    noisy = {"noisy": {"name": "noise"}}
    arms = {"kd": KD, "without": {"skip": True}}
    table = Board(three(tests=noisy), arms, [0], tmp_path / "board", changes=1)
    assert table.plans["without"].stages[1:] == table.plans["kd"].stages[2:]
    compute(table)
    shared = runs.result(table.cell_folder(None, 0))
    assert shared is not None and [one["learner"] for one in shared["stages"]] == ["teacher"]
    result = table.result()
    rows = {row["name"]: row for row in result["arms"]}
    kd, control, without = (rows[name] for name in ("kd", "control", "without"))
    assert [one["name"] for one in kd["stages"]] == ["student"] and without["stages"] == []
    assert kd["stages"][0]["scores"] != control["stages"][0]["scores"], "the student learned otherwise"
    ends = {name: runs.result(table.cell_folder(name, 0)) for name in rows}
    assert ends["kd"] is not None and ends["kd"]["learner"] == "tuned"
    assert kd["scores"] == [ends["kd"]["scores"]["test.accuracy"]]
    assert [record["stage"] for record in kd["curves"][0]] == [1, 1] and without["curves"] == []
    assert set(kd["all"][0]) == {"valid.accuracy", "test.accuracy", "noisy.accuracy"}
    assert kd["all"][0]["noisy.accuracy"] != kd["all"][0]["test.accuracy"]
    assert report.write(tmp_path, result).exists()
    read_back = tmp_path / "again.toml"
    read_back.write_text(report.board_toml(result), encoding="utf-8")
    plan, said, seeds, how = read(read_back)
    assert (plan, said, seeds, how["changes"]) == (table.whole, arms, [0], 1)


@pytest.mark.parametrize(
    ("arms", "changes", "sentence"),
    [
        ({"kd": KD}, 3, r"stage 3, and the recipe has stages 0 to 2"),
        ({"none": {"skip": True}}, None, r"unknown key `skip`"),
        ({"none": {"skip": True, "epochs": 3}}, 1, r"unknown key `skip`"),
    ],
)
def test_a_stage_that_arms_cannot_change(
    arms: dict[str, Any], changes: int | None, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=sentence):
        Board(three(), arms, [0], tmp_path / "board", changes=changes)
    assert not (tmp_path / "board").exists()


def test_a_stage_may_have_a_task_of_its_own(tmp_path: Path) -> None:
    plan = three().model_dump(mode="json", by_alias=True)
    plan["stages"][1] |= {"task": "retrieve"}
    table = Board(recipe.parse(plan), {"hint": HINT}, [0], tmp_path / "board", changes=1)
    compute(table)
    result = table.result()
    assert result["curve"] == "recall@1" and result["metric"] == "test.accuracy"
    (stage,) = result["arms"][1]["stages"]
    assert stage["metric"] == "test.recall@1"


def test_a_condition_is_not_called_as_a_part_of_the_data() -> None:
    with pytest.raises(Refused, match=r"tests\.valid would be taken for a part of the data"):
        whole(tests={"valid": "noise"})
