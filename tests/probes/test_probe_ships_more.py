"""A plan that ships more than the student: its body, its projector, the teacher's own head.

Chen et al., Knowledge Distillation with the Reused Teacher Classifier (SimKD), CVPR 2022: the only loss is
the squared gap between projected student features and the teacher's; what answers is the teacher's classifier
on projected student features.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import checkpoint, recipe
from limbeck.core.batch import Batch
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.scheme import Scheme, Turn, to_work
from limbeck.core.taps import Seen
from limbeck.core.teachers import Teacher
from limbeck.data.loader import Data, Loader, Splits
from limbeck.engine import Engine, Pace, evaluate
from limbeck.run import Run
from limbeck.tasks.classify import Classify


class Net(nn.Module):
    """A body, and a head with everything in it that a careless train() would move."""

    TAPS: ClassVar = {"features": "body"}

    def __init__(self, classes: int, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class SameFeatures(Method):
    card = Card("none", 2022, ("feature",), taps=("features",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["features"].shape[1], t.at["features"].shape[1])

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return F.mse_loss(self.project(s.at["features"]), t.at["features"])


class Reused(nn.Module):
    """What ships. The head is a copy, frozen: the teacher's own flags are left as they are."""

    def __init__(self, body: nn.Module, project: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.project, self.head = body, project, copy.deepcopy(head).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.project(self.body(x)))


class SimKD(Scheme):
    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller
        method = distiller.methods["samefeatures"]
        self.learner = Reused(distiller.student.body, method.project, distiller.teachers()[0].model.head)
        self.modes: list[bool] = []  # of everything below the head, at every turn

    @classmethod
    def staged(cls, cast: Cast) -> "SimKD":
        (student,) = cast.names("simkd", "student")
        return cls(cast.distiller(student))

    def turns(self, batch: Batch) -> Iterator[Turn]:
        self.modes += [m.training for m in self.learner.head.modules()]
        assert self.learner.body.training and self.learner.project.training
        yield "student", self.distiller.losses(self.distiller.see(batch))

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {"student": {name: p for name, p in self.learner.named_parameters() if p.requires_grad}}

    def shipped(self) -> nn.Module:
        return self.learner

    def modules(self) -> Mapping[str, nn.Module]:
        return {"distiller": self.distiller, "learner": self.learner}

    def teachers(self) -> tuple[Teacher, ...]:
        return self.distiller.teachers()


def tiny() -> Splits:
    """Three blobs in six dimensions."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    x = torch.randn(3, 6, generator=draw)[y] * 2 + torch.randn(96, 6, generator=draw)
    parts = [Data(x[a:b], y[a:b], ("a", "b", "c")) for a, b in ((0, 48), (48, 72), (72, 96))]
    return Splits(*parts)


def teacher() -> Net:
    """Its statistics and weights are those of some training."""
    torch.manual_seed(0)
    net = Net(3, width=8)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    data = tiny().train
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(net(data.x), data.y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return net


def trained() -> tuple[SimKD, Net]:
    old = teacher()
    torch.manual_seed(1)
    loader = Loader(tiny().train, 16, seed=0, epochs=4)
    scheme = SimKD(Distiller(Net(3), old, [SameFeatures()], example=loader.at(0), task=None))
    pace = Pace(
        torch.optim.SGD(list(scheme.players()["student"].values()), 0.1, momentum=0.9), lambda step: 1.0
    )
    for _ in Engine(scheme, loader, {"student": pace}, epochs=4).lessons():
        pass
    return scheme, old


def test_the_head_that_ships_is_the_teachers_untouched() -> None:
    scheme, old = trained()
    fresh = teacher()
    shipped = scheme.shipped()
    assert scheme.modes == [False] * (4 * 12)  # head and its three layers, at each of 12 steps
    for mine, theirs, before in zip(
        *(n.head.state_dict().values() for n in (shipped, old, fresh)), strict=True
    ):
        assert torch.equal(mine, before) and torch.equal(theirs, before)
    for p in old.parameters():
        assert p.requires_grad and p.grad is None
    torch.manual_seed(1)
    body = Net(3).body
    assert all(
        not torch.equal(p, q) for p, q in zip(shipped.body.parameters(), body.parameters(), strict=True)
    )
    assert all(p.grad is not None for p in shipped.project.parameters())


def test_what_is_below_a_frozen_subtree_is_in_eval_and_the_rest_works() -> None:
    module = Reused(Net(3).body, nn.Sequential(nn.Linear(4, 8), nn.Dropout()), Net(3, 8).head).eval()
    to_work(module)
    training = {name: m.training for name, m in module.named_modules()}
    assert all(mode != name.startswith("head") for name, mode in training.items()), training
    assert {type(m) for m in module.head} == {nn.BatchNorm1d, nn.Dropout, nn.Linear}


def test_what_ships_is_what_is_scored_and_counted() -> None:
    scheme, old = trained()
    shipped, student = scheme.shipped(), scheme.distiller.student
    test = Loader(tiny().test, 8, seed=0)
    score = evaluate(shipped, Classify(), test.once(8))["accuracy"]
    with torch.no_grad():
        x, y = tiny().test.rows(torch.arange(24))
        features = scheme.distiller.methods["samefeatures"].project(student.eval().body(x))
        by_hand = (old.eval().head(features).argmax(1) == y).double().mean().item() * 100
    assert score == pytest.approx(by_hand, abs=1e-9)
    # The student's own head never learned.
    assert score > 80 > evaluate(student, Classify(), test.once(8))["accuracy"]
    body, project, head = ((6 * 4 + 4) + 2 * 4, 4 * 8 + 8, 2 * 8 + (8 * 3 + 3))
    assert sum(p.numel() for p in shipped.parameters()) == body + project + head


def test_what_ships_goes_to_a_file_and_into_a_fresh_copy(tmp_path: Path) -> None:
    scheme, _ = trained()
    shipped = scheme.shipped().eval()
    checkpoint.save_weights(tmp_path / "small.safetensors", shipped.state_dict(), {"model": "small"})
    fresh = Reused(Net(3).body, nn.Linear(4, 8), Net(3, 8).head).eval()
    x = tiny().test.x
    assert not torch.equal(fresh(x), shipped(x))
    fresh.load_state_dict(checkpoint.load_weights(tmp_path / "small.safetensors"))
    assert torch.equal(fresh(x), shipped(x))


def test_a_recipe_ships_it_too(tmp_path: Path) -> None:
    """The run scores, counts and saves what the scheme ships; the scheme is the user's own."""
    net = {"name": f"{__name__}:Net"}
    term = {"method": f"{__name__}:SameFeatures", "teacher": "teacher"}
    plan = recipe.parse(
        {
            "data": f"{__name__}:tiny",
            "models": {"teacher": net | {"width": 8}, "student": net},
            "stages": [
                {"learner": "teacher", "epochs": 6, "batch": 16},
                {
                    "learner": "student",
                    "epochs": 20,
                    "batch": 16,
                    "scheme": f"{__name__}:SimKD",
                    "task_weight": 0.0,
                    "terms": [term],
                },
            ],
        }
    )
    run = Run(plan, tmp_path / "run")
    assert [moment.record.stage for moment in run.moments() if moment.record] == [0] * 6 + [1] * 20
    weights = checkpoint.load_weights(tmp_path / "run" / "student.safetensors")
    model = Reused(Net(3).body, nn.Linear(4, 8), Net(3, 8).head)
    model.load_state_dict(weights)
    for name, p in run.lab.models["teacher"].head.state_dict().items():
        assert torch.equal(weights[f"head.{name}"], p), name
    assert run.result is not None
    assert run.result["parameters"] == sum(p.numel() for p in model.parameters())
    test = Loader(tiny().test, 8, seed=0)
    assert run.result["scores"]["test.accuracy"] == evaluate(model, Classify(), test.once(8))["accuracy"] > 80
