"""The last epoch and the best one: both scored, each once; which ships; when to stop waiting for a better."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck import checkpoint, recipe
from limbeck.core.refused import Refused
from limbeck.recipe import Recipe
from limbeck.run import Run, Stopped, resume

NET = {"name": "cnn", "widths": [3, 4]}
EPOCHS, STEPS = 6, 2  # 1257 // 600

# Best in the middle of the run: logits shrink as they are trained, and pass by this size.
MOODY = """
from limbeck.tasks.classify import Classify

class Moody(Classify):
    headline = "mood"

    def score(self, answers):
        sizes = [float(seen.out.double().abs().mean()) for seen, _ in answers]
        size = sum(sizes) / len(sizes)
        return {"mood": -abs(size - 0.175), "size": size}
"""


@pytest.fixture(scope="module", autouse=True)
def moody(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "moody_task.py").write_text(MOODY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def plan(task: str = "moody_task:Moody", models: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    learns = {"learner": "student", "epochs": EPOCHS, "batch": 600, **stage}
    return recipe.parse(
        {"data": "digits", "task": task, "models": {"student": NET, **(models or {})}, "stages": [learns]}
    )


def finish(run: Run) -> dict[str, Any]:
    for _ in run.moments():
        pass
    assert run.result is not None
    return run.result


def stop(run: Run, k: int) -> None:
    moments = run.moments()
    for _ in range(k):
        next(moments)
    run.stop()
    with pytest.raises(Stopped):
        next(moments)


def untimed(run: Run) -> list[dict[str, Any]]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("seconds", "asking")} for line in lines]


def moods(run: Run) -> list[float]:
    return [line["scores"]["mood"] for line in untimed(run)]


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    stages = [
        {k: v for k, v in stage.items() if k not in ("seconds", "asking")} for stage in result["stages"]
    ]
    return {k: v for k, v in result.items() if k not in ("seconds", "asking", "stages")} | {"stages": stages}


def shipped(run: Run) -> dict[str, Tensor]:
    return load_file(run.folder / "student.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(plan(), tmp_path_factory.mktemp("runs") / "last")
    finish(run)
    return run


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(plan(keep="best"), tmp_path_factory.mktemp("runs") / "best")
    finish(run)
    return run


# --- last and best ---


def test_both_are_given_and_the_last_ships(last: Run) -> None:
    result, valid = last.result, moods(last)
    assert result is not None
    peak = valid.index(max(valid))
    assert 0 < peak < EPOCHS - 1, "with the best first or last these tests are blind"
    assert (result["last"]["epoch"], result["best"]["epoch"]) == (EPOCHS - 1, peak)
    assert result["last"]["scores"]["valid.mood"] == valid[-1]
    assert result["best"]["scores"]["valid.mood"] == valid[peak]
    names = {"valid.mood", "valid.size", "test.mood", "test.size"}
    assert result["scores"].keys() == result["best"]["scores"].keys() == names
    assert result["scores"] == result["last"]["scores"] != result["best"]["scores"]
    assert same(shipped(last), last.lab.models["student"].state_dict())


def test_the_best_ships_where_the_stage_keeps_it(best: Run, last: Run) -> None:
    assert best.result is not None and last.result is not None
    assert untimed(best) == untimed(last)
    assert best.result["scores"] == best.result["best"]["scores"] == last.result["best"]["scores"]
    assert best.result["last"] == last.result["last"]
    assert not same(shipped(best), shipped(last))
    # It is the network of that epoch: one trained no longer than that has the same weights.
    stopped = Run(plan(), best.folder.parent / "stopped")
    stop(stopped, STEPS * (best.result["best"]["epoch"] + 1))
    assert same(shipped(best), stopped.lab.models["student"].state_dict())


def test_the_network_the_checkpoint_and_the_file_are_one(best: Run) -> None:
    held = checkpoint.load(best.folder)
    assert same(held["models"]["student"], shipped(best)) and held["best"] is None
    assert same(best.lab.models["student"].state_dict(), shipped(best))


def looks(run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the test split is scored."""
    scores, count = run._scores, 0

    def counted(engine: Any, split: str, *task: Any) -> dict[str, float]:
        nonlocal count
        count += split == "test"
        return scores(engine, split, *task)

    monkeypatch.setattr(run, "_scores", counted)
    finish(run)
    return count


def test_the_test_split_is_looked_at_once_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(Run(plan(), tmp_path / "two"), monkeypatch) == 2
    assert looks(Run(plan(epochs=1), tmp_path / "one"), monkeypatch) == 1


def test_of_equal_scores_the_first_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(plan(epochs=4), tmp_path / "run")
    told = iter([0.1, 0.7, 0.7, math.nan])
    monkeypatch.setattr(run, "_scores", lambda engine, split, *task: {"mood": next(told, 0.0)})
    assert finish(run)["best"]["epoch"] == 1


# --- patience ---


def test_patience_ends_a_stage_that_no_longer_improves(tmp_path: Path, last: Run) -> None:
    """What was learned until then is what a stage of full length learns, at its learning rates."""
    valid = moods(last)
    patience = 2
    ends = next(e for e in range(EPOCHS) if e - valid.index(max(valid[: e + 1])) >= patience)
    assert ends < EPOCHS - 1, "patience that is never lost tests nothing"
    run = Run(plan(patience=patience), tmp_path / "run")
    result = finish(run)
    assert untimed(run) == untimed(last)[: ends + 1]
    assert result["last"]["epoch"] == ends
    assert result["best"]["epoch"] == valid.index(max(valid[: ends + 1]))


def test_patience_longer_than_the_stage_changes_nothing(tmp_path: Path, last: Run) -> None:
    run = Run(plan(patience=EPOCHS), tmp_path / "run")
    finish(run)
    assert same(shipped(run), shipped(last))


@pytest.mark.parametrize("every", [2, 3])
def test_stopped_again_and_again_it_ends_bit_identical(every: int, tmp_path: Path) -> None:
    whole = Run(plan(patience=2, keep="best"), tmp_path / "whole")
    ended = timeless(finish(whole))
    steps = STEPS * len(untimed(whole))
    run = Run(plan(patience=2, keep="best"), tmp_path / "run")
    for done in range(every, steps + 1, every):
        stop(run, every)
        run = resume(tmp_path / "run")
        assert done <= steps
    assert timeless(finish(run)) == ended
    assert untimed(run) == untimed(whole) and same(shipped(run), shipped(whole))


def test_stopped_when_its_patience_was_lost_it_learns_no_more(tmp_path: Path) -> None:
    whole = Run(plan(patience=2), tmp_path / "whole")
    finish(whole)
    run = Run(plan(patience=2), tmp_path / "run")
    stop(run, STEPS * len(untimed(whole)))
    again = resume(tmp_path / "run")
    assert list(again.moments()) == []
    assert again.result is not None and whole.result is not None
    assert timeless(again.result) == timeless(whole.result)


# --- what ships in the learner's place ---


def test_a_running_mean_that_ships_is_what_the_learner_becomes(tmp_path: Path, last: Run) -> None:
    models = {"slow": {"mean_of": "student", "decay": 0.9}}
    run = Run(plan(models=models, ships="slow"), tmp_path / "run")
    engine = None
    make = run.lab.engine

    def kept(stage: int) -> Any:
        nonlocal engine
        engine = make(stage)
        return engine

    object.__setattr__(run.lab, "engine", kept)
    result = finish(run)
    assert engine is not None and engine.scheme.ships() is not run.lab.models["student"]
    assert same(shipped(run), engine.scheme.ships().state_dict())
    assert same(shipped(run), run.lab.models["student"].state_dict())
    assert same(shipped(run), checkpoint.load(run.folder)["models"]["student"])
    assert not same(shipped(run), shipped(last))
    assert result["scores"]["valid.mood"] == moods(run)[-1]


# --- no score ---


UNSCORED: dict[str, Any] = {
    "task": "none",
    "models": {"teacher": {"name": "cnn", "widths": [4, 6]}},
    "terms": [{"method": "kd"}],
    "epochs": 2,
}


def test_a_run_without_a_score_ships_its_last_epoch(tmp_path: Path) -> None:
    run = Run(plan(**UNSCORED), tmp_path / "run")
    result = finish(run)
    assert result["scores"] == {}
    assert result["last"] == result["best"] == {"epoch": 1, "scores": {}}
    assert all(line["scores"] == {} and set(line["losses"]) == {"kd"} for line in untimed(run))
    assert same(shipped(run), run.lab.models["student"].state_dict())


@pytest.mark.parametrize("more", [{"patience": 2}, {"keep": "best"}])
def test_without_a_score_there_is_no_best(more: dict[str, Any], tmp_path: Path) -> None:
    words = "In stage 0: .* compare validation scores, and the task 'none' has none; leave them out"
    with pytest.raises(Refused, match=words):
        Run(plan(**UNSCORED, **more), tmp_path / "run")
    assert not list(tmp_path.iterdir())
