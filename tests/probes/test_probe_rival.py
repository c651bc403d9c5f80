"""A method with a rival (a critic telling student features from the teacher's) bears gradient accumulation.

The truth is a loop written by hand on the whole batch: the critic steps first on detached features, then the
student takes the gradient of its whole loss at the critic as it now is.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import build, recipe
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine, Pace
from limbeck.schemes.offline import Offline


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


ROWS, STEPS = 6, 3  # cut into 4, six rows are parts of one and of two: shares must follow


def net(classes: int = 3, channels: int = 5, width: int = 4) -> nn.Module:
    """Flattens, one hidden layer tapped as `hidden`, a head."""
    layers = {
        "flat": nn.Flatten(),
        "fc": nn.Linear(channels, width),
        "hidden": nn.Tanh(),
        "head": nn.Linear(width, classes),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


class Adversary(Method):
    """Projected student features should pass for the teacher's. The projector learns with the student."""

    card = Card("none", 2000, ("feature",), taps=("hidden",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["hidden"].shape[1], t.at["hidden"].shape[1])
        self.critic = nn.Sequential(nn.Linear(t.at["hidden"].shape[1], 8), nn.Tanh(), nn.Linear(8, 1))

    def rivals(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return (
            F.softplus(self.critic(self.project(s.at["hidden"]))) + F.softplus(-self.critic(t.at["hidden"]))
        ).mean()

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return F.softplus(-self.critic(self.project(s.at["hidden"]))).mean()


class Pairwise(Adversary):
    card = Card("none", 2000, ("relation",), taps=("hidden",), per_sample=False)


class Broken(Adversary):
    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return self.critic(s.at["hidden"]).mean()  # not projected: of the student's width


class Drawn:
    """The same float64 batches in every epoch; some rows nobody labelled."""

    steps = STEPS

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.batches = []
        for _ in range(STEPS):
            y = torch.randint(3, (ROWS,), generator=draw)
            y[torch.randperm(ROWS, generator=draw)[:1]] = IGNORE
            self.batches.append(Batch(torch.randn(ROWS, 5, generator=draw), y))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from self.batches[start:]


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return net(), net(width=7)


def sgd(parameters: Iterator[nn.Parameter] | list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def lesson(accumulate: int, method: Method | None = None) -> tuple[Engine, Distiller, nn.Module]:
    student, teacher = pair()
    distiller = Distiller(student, teacher, [method or Adversary()], example=Drawn().batches[0])
    scheme = Offline(distiller)
    paces = {
        name: Pace(sgd(list(own.values()), 0.5 if name == "student" else 0.2), lambda step: 1.0)
        for name, own in scheme.players().items()
    }
    return Engine(scheme, Drawn(), paces, epochs=1, accumulate=accumulate), distiller, teacher


def by_hand(
    batches: list[Batch], project: nn.Linear, critic: nn.Module
) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
    """(student, projector, critic) after each step, their gradients still on them."""
    student, teacher = pair()
    learners = [*student.parameters(), *project.parameters()]
    slow, fast = sgd(learners, 0.5), sgd(critic.parameters(), 0.2)
    for batch in batches:
        hidden = torch.tanh(student.fc(batch.x))
        logits = student.head(hidden)
        with torch.no_grad():
            shown = torch.tanh(teacher.fc(batch.x))
            mine = project(hidden)
        fast.zero_grad()
        (F.softplus(critic(mine)) + F.softplus(-critic(shown))).mean().backward()
        fast.step()
        own_grads = [p.grad for p in critic.parameters()]

        fooled = F.softplus(-critic(project(hidden))).mean()
        loss = F.cross_entropy(logits, batch.y, ignore_index=IGNORE) + fooled
        for p, grad in zip(learners, torch.autograd.grad(loss, learners), strict=True):
            p.grad = grad
        slow.step()
        for p, grad in zip(critic.parameters(), own_grads, strict=True):
            p.grad = grad
        yield student, project, critic


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulated_turns_are_the_true_ones(accumulate: int) -> None:
    engine, distiller, teacher = lesson(accumulate)
    method = distiller.methods["adversary"]
    truth = by_hand(Drawn().batches, copy.deepcopy(method.project), copy.deepcopy(method.critic))
    steps = 0
    for _ in engine.lessons():
        steps += 1
        mine = (distiller.student, method.project, method.critic)
        for name, got, want in zip(("student", "projector", "critic"), mine, next(truth), strict=True):
            for (where, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
                # Equal also says that no turn left anything in another player: it would be added here.
                torch.testing.assert_close(
                    p.grad, q.grad, rtol=0, atol=1e-10, msg=lambda m, n=f"{name}.{where}": f"{n} grad: {m}"
                )
                torch.testing.assert_close(
                    p, q, rtol=0, atol=1e-10, msg=lambda m, n=f"{name}.{where}": f"{n}: {m}"
                )
        assert all(p.grad is None for p in teacher.parameters())
    assert steps == STEPS


def test_each_turn_touches_its_player_alone() -> None:
    """The critic's turn leaves no gradient in the student, whose losses then follow the critic's step."""
    _, distiller, _ = lesson(1)
    plan = Offline(distiller).turns(Drawn().batches[0])
    players = distiller.players()
    assert players.keys() == {"student", "adversary.critic"}
    assert {id(p) for p in players["adversary.critic"].values()} == {
        id(p) for p in distiller.methods["adversary"].critic.parameters()
    }
    assert not players["student"].keys() & players["adversary.critic"].keys()
    player, losses = next(plan)
    assert (player, set(losses)) == ("adversary.critic", {"adversary.critic"})
    (before,) = losses.values()
    before.backward()  # everything it can reach, on purpose: detached features end at the projector
    assert all(p.grad is None for p in distiller.student.parameters())
    with torch.no_grad():
        for p in distiller.methods["adversary"].critic.parameters():
            p.zero_()
    player, losses = next(plan)
    assert player == "student"
    # Softplus(0): the new critic.
    assert losses["adversary"].item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-12)


def test_a_loss_that_compares_rows_is_refused_by_name() -> None:
    lesson(1, Pairwise())
    with pytest.raises(Refused, match=r"'pairwise' compares the rows .* accumulate = 1"):
        lesson(2, Pairwise())


def test_a_rival_that_cannot_work_is_refused_before_the_first_step() -> None:
    with pytest.raises(Refused, match=r"'broken' cannot compare this pair"):
        lesson(1, Broken())


def test_a_rival_is_not_trained_by_one_sum_of_losses() -> None:
    """The critic would learn to be fooled: that sum has a gradient in it as well."""
    _, distiller, _ = lesson(1)
    batch = Drawn().batches[0]
    with pytest.raises(Refused, match=r"'adversary' brings a rival .* offline scheme"):
        distiller(batch.x, batch.y)
    assert torch.equal(distiller.eval()(batch.x), distiller.student(batch.x))


def tiny() -> Splits:
    draw = torch.Generator().manual_seed(0)
    data = Data(torch.randn(8, 5, generator=draw), torch.arange(8) % 3, ("a", "b", "c"))
    return Splits(data, data, data)


@pytest.mark.parametrize("own", [True, False])
def test_a_rival_has_its_own_optimiser_or_one_like_the_students(own: bool) -> None:
    optim = {"student": {"name": "sgd", "lr": 0.03}} | (
        {"adversary.critic": {"name": "adam", "lr": 0.004}} if own else {}
    )
    model = {"name": f"{__name__}:net", "channels": 5, "taps": {"hidden": "hidden"}}
    plan = recipe.parse(
        {
            "data": f"{__name__}:tiny",
            "models": {"teacher": model | {"width": 7}, "student": model},
            "stages": [
                {
                    "learner": "student",
                    "epochs": 1,
                    "batch": 8,
                    "terms": [{"method": f"{__name__}:Adversary"}],
                    "optim": optim,
                }
            ],
        }
    )
    change = 'stages.0.optim."adversary.critic".lr=0.5'
    changed = recipe.apply(plan.model_dump(mode="json", by_alias=True), [change])
    assert recipe.parse(changed).stages[0].optim["adversary.critic"].lr == 0.5
    engine = build.lab(plan).engine(0)
    student, critic = (engine.paces[name].optimiser for name in ("student", "adversary.critic"))
    assert (type(student), student.param_groups[0]["lr"]) == (torch.optim.SGD, 0.03)
    want = (torch.optim.Adam, 0.004) if own else (torch.optim.SGD, 0.03)
    assert (type(critic), critic.param_groups[0]["lr"]) == want
    assert critic is not student

    before = {name: p.clone() for name, p in engine.scheme.players()["adversary.critic"].items()}
    list(engine.lessons())
    assert all(
        not torch.equal(p, before[name]) for name, p in engine.scheme.players()["adversary.critic"].items()
    )


def test_an_optimiser_for_nobody_is_refused() -> None:
    plan = recipe.parse(
        {
            "data": f"{__name__}:tiny",
            "models": {
                "teacher": {"name": f"{__name__}:net", "channels": 5},
                "student": {"name": f"{__name__}:net", "channels": 5},
            },
            "stages": [
                {
                    "learner": "student",
                    "epochs": 1,
                    "terms": [{"method": f"{__name__}:Adversary"}],
                    "optim": {"critic": {}},
                }
            ],
        }
    )
    with pytest.raises(
        Refused, match=r"`optim.critic` names no player; the players are student, adversary.critic"
    ):
        build.lab(plan).engine(0)
