"""Mean teacher by a recipe: who is the mean of whom, what noise each sees, and that the mean ships."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from limbeck import build, recipe
from limbeck.core.batch import IGNORE
from limbeck.core.refused import Refused
from limbeck.core.teachers import MeanOf
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine
from limbeck.run import Run, Stopped, resume

ROWS = 8


def tiny() -> Splits:
    draw = torch.Generator().manual_seed(0)
    data = Data(torch.randn(4 * ROWS, 1, 8, 8, generator=draw), torch.arange(4 * ROWS) % 3, ("x", "y", "z"))
    return Splits(data, data, data)


def plan(*more: dict[str, Any], data: str | None = None, **stage: Any) -> recipe.Recipe:
    """A student under the mean of itself, each under noise of its own; 6 of the rows are labelled."""
    return recipe.parse(
        {
            "data": data or f"{__name__}:tiny",
            "models": {
                "student": {"name": "cnn", "widths": [3, 4]},
                "other": {"name": "cnn", "widths": [3, 4]},
                "mean": {"mean_of": "student", "decay": 0.7, "view": {"name": "noise", "purpose": "mean"}},
            },
            "stages": [
                {
                    "learner": "student",
                    "epochs": 2,
                    "batch": ROWS,
                    "labels": 6,
                    "view": {"name": "noise", "purpose": "student"},
                    "terms": [
                        {
                            "method": "mean_teacher",
                            "teacher": "mean",
                            "weight": 100,
                            "ramp": {"epochs": 2, "shape": "sigmoid"},
                        }
                    ],
                    "ships": "mean",
                    **stage,
                },
                *more,
            ],
        }
    )


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: v.clone() for name, v in model.state_dict().items()}


def lesson() -> tuple[build.Lab, Engine, MeanOf]:
    lab = build.lab(plan())
    engine = lab.engine(0)
    (mean,) = engine.scheme.teachers()
    assert isinstance(mean, MeanOf) and engine.scheme.ships() is mean.model
    return lab, engine, mean


def test_the_mean_is_that_of_the_students_weights_after_each_step() -> None:
    """In closed form: the i-th weights count (1 - d_i) times all later d, which are 1/2, 2/3, then 0.7."""
    lab, engine, mean = lesson()
    seen = [state(lab.models["student"])]
    decays = [1 - 1 / 2, 1 - 1 / 3, *[0.7] * 6]
    for k, _ in enumerate(engine.lessons(), 1):
        seen.append(state(lab.models["student"]))
        shares = [1.0, *(1 - d for d in decays[:k])]
        for i, decay in enumerate(decays[:k], 1):
            shares[:i] = [share * decay for share in shares[:i]]
        assert sum(shares) == pytest.approx(1)
        for name, v in mean.model.state_dict().items():
            if v.is_floating_point():
                expected = sum(share * then[name] for share, then in zip(shares, seen, strict=True))
                torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(v, seen[-1][name])
    assert engine.step == mean.steps == 8
    assert not torch.equal(mean.model.head.weight, lab.models["student"].head.weight)


def test_student_and_mean_see_the_same_rows_under_other_noise() -> None:
    lab, engine, mean = lesson()
    shown: dict[str, Tensor] = {}
    for who, model in (("student", lab.models["student"]), ("mean", mean.model)):
        model.register_forward_pre_hook(lambda module, args, who=who: shown.__setitem__(who, args[0]))
    batch = engine.loader.at(0)
    next(engine.scheme.turns(batch))
    a, b = shown["student"] - batch.x, shown["mean"] - batch.x
    assert a.std().item() == pytest.approx(0.15, rel=0.1) and b.std().item() == pytest.approx(0.15, rel=0.1)
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.1


def test_its_weight_grows_by_the_papers_ramp() -> None:
    _, engine, mean = lesson()
    engine.scheme.train()
    with torch.no_grad():
        for p in mean.model.parameters():
            p.add_(1.0)
        weights = []
        for epoch in (0, 1, 5):
            batch = engine.loader.at(0).replace(lesson=engine.loader.lesson(epoch, 0))
            _, losses = next(engine.scheme.turns(batch))
            s = engine.scheme.modules()["distiller"].show(batch)[0][0].out  # type: ignore[operator]
            gap = (s.softmax(1) - mean(batch).out.softmax(1)).square().mean()
            weights.append(float(losses["mean_teacher"] / gap))
    assert weights == pytest.approx([100 * math.exp(-5 * 0.5**2), 100, 100], rel=1e-3)


def test_unlabelled_rows_teach_by_consistency_alone() -> None:
    _, engine, _ = lesson()
    engine.scheme.train()
    batch = engine.loader.at(0)
    assert (batch.y == IGNORE).any()
    _, losses = next(engine.scheme.turns(batch.replace(y=torch.full_like(batch.y, IGNORE))))
    assert losses["task"] == 0 and losses["mean_teacher"] > 0


def finish(run: Run) -> Run:
    for _ in run.moments():
        pass
    return run


def test_the_mean_is_scored_and_shipped_and_gone_on_from(tmp_path: Path) -> None:
    lab, engine, mean = lesson()
    list(engine.lessons())
    once = finish(Run(plan(), tmp_path / "once"))
    shipped = load_file(tmp_path / "once" / "student.safetensors")
    assert shipped.keys() == mean.model.state_dict().keys()
    assert all(torch.equal(v, shipped[name]) for name, v in mean.model.state_dict().items())
    assert any(not torch.equal(v, shipped[name]) for name, v in lab.models["student"].state_dict().items())
    assert all(torch.equal(v, shipped[name]) for name, v in once.lab.models["student"].state_dict().items())

    # A later stage goes on from the mean: a teacher that it is asked to be answers with those weights.
    last = {"learner": "other", "epochs": 1, "batch": ROWS, "terms": [{"method": "kd", "teacher": "student"}]}
    twice = finish(Run(plan(last), tmp_path / "twice"))
    assert all(torch.equal(v, shipped[name]) for name, v in twice.lab.models["student"].state_dict().items())


def test_a_stopped_run_ends_as_it_would_have(tmp_path: Path) -> None:
    finish(Run(plan(), tmp_path / "whole"))
    run = Run(plan(), tmp_path / "stopped")
    moments = run.moments()
    for _ in range(3):
        next(moments)
    run.stop()
    with pytest.raises(Stopped):
        list(moments)
    finish(resume(tmp_path / "stopped"))
    ends = [load_file(tmp_path / name / "student.safetensors") for name in ("whole", "stopped")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(v, ends[1][name]) for name, v in ends[0].items())


def test_the_mean_of_somebody_else_is_not_shipped() -> None:
    with pytest.raises(Refused, match=r"stages\.0\.ships is 'mean', which is not a running mean of 'other'"):
        plan(learner="other")
    with pytest.raises(Refused, match="'student', which is not a running mean"):
        plan(ships="student")


def test_a_mean_that_only_ships_is_moved_too() -> None:
    """Without a term it is weight averaging."""
    lab = build.lab(plan(terms=[]))
    engine = lab.engine(0)
    list(engine.lessons())
    assert engine.scheme.mean is not None and engine.scheme.mean.steps == 8
    assert not torch.equal(engine.scheme.ships().head.weight, lab.models["student"].head.weight)
