"""The plan's small parts: a ramp's course, who is at work, and what a plan sums, moves and remembers."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from limbeck.core.batch import Lesson
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Scheme, Turn, to_work
from limbeck.core.teachers import MeanOf, Teacher


def course(ramp: Ramp, epochs: int) -> list[float]:
    return [ramp(Lesson(epoch=epoch, epochs=epochs)) for epoch in range(epochs)]


def test_a_linear_ramp_waits_and_then_grows_by_equal_steps() -> None:
    assert course(Ramp(4, after=2), 8) == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_ramp_over_one_epoch_is_full_at_once() -> None:
    for shape in ("linear", "cosine", "sigmoid"):
        assert course(Ramp(1, shape=shape), 3) == [1, 1, 1]
        assert course(Ramp(1, after=1, shape=shape), 3) == [0, 1, 1]


def test_a_cosine_ramp_is_half_way_at_half_time() -> None:
    ramp = course(Ramp(4, shape="cosine"), 5)
    expected = [(1 - math.cos(math.pi * quarter / 4)) / 2 for quarter in (1, 2, 3, 4, 4)]
    assert ramp == pytest.approx(expected)
    assert ramp[1] == pytest.approx(0.5)


def test_a_sigmoid_ramp_is_that_of_the_mean_teachers() -> None:
    expected = [math.exp(-5 * (1 - part) ** 2) for part in (0.25, 0.5, 0.75, 1)]
    assert course(Ramp(4, shape="sigmoid"), 4) == pytest.approx(expected)
    assert course(Ramp(2, after=3, shape="sigmoid"), 5)[:3] == [0, 0, 0]


def test_a_ramp_that_falls_begins_full_and_ends_at_nothing() -> None:
    assert course(Ramp(4, falls=True), 6) == [1, 0.75, 0.5, 0.25, 0, 0]
    assert course(Ramp(2, after=2, falls=True), 6) == [1, 1, 1, 0.5, 0, 0]
    assert course(Ramp(1, shape="sigmoid", falls=True), 3) == [1, 0, 0]


@pytest.mark.parametrize(
    ("epochs", "after", "shape"), [(0, 0, "linear"), (3, -1, "linear"), (3, 0, "stairs")]
)
def test_a_ramp_that_cannot_be_is_refused(epochs: int, after: int, shape: str) -> None:
    words = f"{epochs} epochs after {after} with shape '{shape}'.*linear, cosine, sigmoid"
    with pytest.raises(Refused, match=words):
        Ramp(epochs, after, shape)


def test_to_work_leaves_a_frozen_subtree_in_eval_with_everything_below_it() -> None:
    frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).requires_grad_(False)
    half = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    half[0].bias.requires_grad_(False)
    model = nn.Sequential(frozen, half, nn.Dropout()).eval()
    to_work(model)
    assert [m.training for m in frozen.modules()] == [False] * 4
    assert [m.training for m in half.modules()] == [True] * 3
    assert model.training and model[2].training  # it has no parameter of its own that could be frozen


def test_to_work_begins_again_when_something_is_unfrozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    to_work(model)
    assert not model.training
    model.requires_grad_(True)
    to_work(model)
    assert all(m.training for m in model.modules())


class Plan(Scheme):
    """One learner and its running mean."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net, self.helper = nn.Linear(2, 2), nn.Linear(2, 2)
        self.mean = MeanOf(self.net, decay=0.5)

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {"student": dict(self.net.named_parameters())}

    def turns(self, batch: Any) -> Iterator[Turn]:
        yield "student", {"task": self.net(batch).sum()}

    def shipped(self) -> nn.Module:
        return self.net

    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net, "helper": self.helper}

    def teachers(self) -> tuple[Teacher, ...]:
        return (self.mean,)


def weights(plan: Plan) -> list[float]:
    modules = (plan.net, plan.helper, plan.mean.model)
    return torch.cat([p.detach().flatten() for m in modules for p in m.parameters()]).tolist()


def test_a_plan_sums_its_losses_unless_it_says_otherwise() -> None:
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.5)}
    assert Plan(0).combine("student", losses) == 3.5


def test_a_plan_remembers_its_modules_and_its_teachers() -> None:
    plan, again = Plan(0), Plan(1)
    with torch.no_grad():
        plan.net.weight.add_(1.0)
    plan.follow()
    assert plan.mean.steps == 1
    assert weights(again) != weights(plan)
    again.load_state_dict(copy.deepcopy(plan.state_dict()))
    assert weights(again) == weights(plan)
    assert again.mean.steps == 1


def test_a_plan_puts_its_modules_to_work() -> None:
    plan = Plan(0)
    plan.helper.requires_grad_(False)
    plan.net.eval()
    plan.train()
    assert plan.net.training and not plan.helper.training
