"""A learner that is made from a trained model when its stage starts: a copy with fake-quantised convolutions.

Weights are rounded to int8 in the forward and learn through the rounding (straight-through, Bengio et al.
2013); the scales are buffers computed from the trained weights. `change` is a function in a user's file.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import build, checkpoint, recipe
from limbeck.core.refused import Refused
from limbeck.run import Run, Stopped, resume

MINE = '''
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

seen = []  # the convolutions' weights at every call, untrained rehearsals included


class Rounded(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("scale", weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127)

    def forward(self, weight):
        rounded = (weight / self.scale).round().clamp(-127, 127) * self.scale
        return weight + (rounded - weight).detach()


def quantised(model):
    seen.append([m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.Conv2d)])
    small = copy.deepcopy(model)
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            parametrize.register_parametrization(module, "weight", Rounded(module.weight))
    return small


class Gated(nn.Module):
    def __init__(self, model, keep):
        super().__init__()
        self.model, self.gates = model, nn.Parameter(torch.ones(keep))

    def forward(self, x):
        z = self.model(x)
        return z * torch.cat([self.gates, self.gates.new_ones(z.shape[1] - len(self.gates))])


def gated(model):
    """How many gates there are is a function of the weights, as what is left after pruning would be."""
    total = sum(float(p.detach().abs().sum()) for p in model.parameters())
    return Gated(copy.deepcopy(model), int(total * 1000) % 10)
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "my_quantiser.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_quantiser", raising=False)
    return importlib.import_module("my_quantiser")


def plan(*more: dict[str, Any], change: str = "my_quantiser:quantised") -> recipe.Recipe:
    made = {"name": "student8", "from": "teacher", "change": change}
    term = {"method": "kd", "teacher": "teacher", "temperature": 2.0}
    return recipe.parse(
        {
            "data": "digits",
            "models": {"teacher": {"name": "cnn", "widths": [4, 8]}},
            "stages": [
                {"learner": "teacher", "epochs": 1, "batch": 256},
                {
                    "learner": made,
                    "epochs": 1,
                    "batch": 256,
                    "terms": [term],
                    "optim": {"student": {"lr": 0.01}},
                },
                *more,
            ],
        }
    )


def halfway(run: Run, stage: int, step: int) -> None:
    """Let it go until a few batches into a stage, then interrupt it."""
    batches = 0
    with pytest.raises(Stopped):
        for moment in run.moments():
            batches += moment.stage == stage
            if batches == step:
                run.stop()


def shipped(folder: Path, name: str = "student8") -> dict[str, Tensor]:
    return checkpoint.load_weights(folder / f"{name}.safetensors")


def whole_run(folder: Path, stages: recipe.Recipe) -> Run:
    run = Run(stages, folder)
    for _ in run.moments():
        pass
    return run


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_change_is_made_from_the_trained_weights_and_leaves_them_alone(
    mine: ModuleType, tmp_path: Path
) -> None:
    run = Run(plan(), tmp_path / "run")
    trained: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for moment in run.moments():
        if moment.stage == 0:
            weights = run.lab.models["teacher"].state_dict()
            trained = {name: p.clone() for name, p in weights.items()}
    same(run.lab.models["teacher"].state_dict(), trained)  # a whole stage of student8 did not move it
    conv = [name for name in trained if trained[name].ndim == 4]
    for got, name in zip(mine.seen[-1], conv, strict=True):
        assert torch.equal(got, trained[name])
    untrained = build.lab(plan()).models["teacher"].state_dict()
    assert all(not torch.equal(got, untrained[name]) for got, name in zip(mine.seen[-1], conv, strict=True))

    losses = [
        json.loads(line)["losses"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [set(epoch) for epoch in losses] == [{"task"}, {"task", "kd"}]
    assert losses[1]["kd"] > 0


def test_what_ships_is_the_quantised_state_dict(mine: ModuleType, tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", plan())
    learner = run.lab.models["student8"]
    same(shipped(tmp_path / "run"), learner.state_dict())
    scales = {name: p for name, p in shipped(tmp_path / "run").items() if name.endswith("scale")}
    assert len(scales) == 2
    teacher = dict(run.lab.models["teacher"].named_modules())
    for name, scale in scales.items():  # of the trained weights
        conv = name.partition(".parametrizations")[0]
        torch.testing.assert_close(
            scale, teacher[conv].weight.abs().amax((1, 2, 3), keepdim=True) / 127, rtol=0, atol=0
        )
    weight = dict(learner.named_modules())[conv].weight / scale
    torch.testing.assert_close(weight, weight.round(), rtol=0, atol=1e-4)
    assert weight.unique().numel() > 2
    assert run.result is not None
    assert run.result["parameters"] == sum(p.numel() for p in run.lab.models["teacher"].parameters())


def test_a_run_stopped_in_that_stage_goes_on_as_if_nothing_had_been(mine: ModuleType, tmp_path: Path) -> None:
    whole_run(tmp_path / "whole", plan())
    halfway(Run(plan(), tmp_path / "cut", every=0), 1, 2)
    assert not (tmp_path / "cut" / "student8.safetensors").exists()
    assert len(list(resume(tmp_path / "cut", every=0).moments())) == 2  # of four batches
    same(shipped(tmp_path / "cut"), shipped(tmp_path / "whole"))
    for epochs in zip(*(records(tmp_path / name) for name in ("cut", "whole")), strict=True):
        assert epochs[0] == epochs[1]


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the clock's."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "asking")} for line in lines]


def test_shapes_that_follow_from_trained_weights_are_resumed_in_a_later_stage(
    mine: ModuleType, tmp_path: Path
) -> None:
    """A pruned copy's shapes are known only once its origin has its trained weights back."""
    later = {"learner": {"name": "last", "from": "student8"}, "epochs": 1, "batch": 256}
    stages = plan(later, change="my_quantiser:gated")
    whole_run(tmp_path / "whole", stages)
    halfway(Run(stages, tmp_path / "cut", every=0), 2, 2)
    assert len(list(resume(tmp_path / "cut", every=0).moments())) == 2
    same(shipped(tmp_path / "cut", "last"), shipped(tmp_path / "whole", "last"))


@pytest.mark.parametrize(
    ("change", "says"),
    [("my_quantiser:quantized", "has no 'quantized'"), ("no_such_file:quantised", "cannot be imported")],
)
def test_a_change_that_is_not_there_is_refused_before_anything_is_written(
    mine: ModuleType, tmp_path: Path, change: str, says: str
) -> None:
    with pytest.raises(Refused, match=says):
        Run(plan(change=change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_made_needs_a_name_of_its_own() -> None:
    with pytest.raises(Refused, match=r"stages.2.learner.name is 'student8', which is a model already"):
        plan({"learner": {"name": "student8", "from": "teacher"}, "epochs": 1})
