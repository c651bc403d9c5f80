"""The loop does what a loop written by hand does, to the bit, from any step on."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import forked, number
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Scheme, Term, Turn
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen, MeanOf
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace, Record, _parts, evaluate
from limbeck.schemes.offline import Offline
from limbeck.tasks.classify import Classify

EPOCHS, STEPS = 3, 4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DATA = Data(randn(35, 6), torch.arange(35) % 3, ("a", "b", "c"))


def net(seed: int = 1, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3)
        )


def cosine(step: int) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * step / (EPOCHS * STEPS))


class Hint(Method):
    """Has a module that learns and a buffer that remembers."""

    card = Card("none", 2000, ("feature",), taps=("2",))

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["2"].shape[1], t.at["2"].shape[1])
        self.register_buffer("scale", torch.ones(()))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        self.scale = 0.9 * self.scale + 0.1 * t.at["2"].std()
        return F.mse_loss(self.project(s.at["2"]), t.at["2"]) / self.scale


def engine(
    model: nn.Module, *terms: Term, data: Data = DATA, seed: int = 5, stage: int = 0, accumulate: int = 1
) -> Engine:
    loader = Loader(data, 8, seed=seed, epochs=EPOCHS)
    scheme = Offline(Distiller(model, None, terms, example=loader.at(0)))
    values = list(scheme.players()["student"].values())
    pace = Pace(torch.optim.SGD(values, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3), cosine)
    return Engine(
        scheme, loader, {"student": pace}, epochs=EPOCHS, seed=seed, stage=stage, accumulate=accumulate
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- the truth: a loop written by hand ---


def test_plain_training_is_a_loop_written_by_hand_bit_for_bit() -> None:
    ours, theirs = net(), net()
    records = [r for r in engine(ours, stage=2).lessons() if r]

    loader = Loader(DATA, 8, seed=5)
    optimiser = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    means = []
    theirs.train()
    for epoch in range(EPOCHS):
        losses = []
        for step, batch in enumerate(loader.epoch(epoch), start=epoch * STEPS):
            torch.manual_seed(number(5, "step", 2, step))  # for dropout
            for group in optimiser.param_groups:
                group["lr"] = 0.1 * cosine(step)
            loss = F.cross_entropy(theirs(batch.x), batch.y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        means.append(sum(losses) / STEPS)

    assert same(ours, theirs)
    assert not same(ours, net())
    assert [r.losses["task"] for r in records] == pytest.approx(means, rel=1e-6)


def test_every_lesson_yields_and_the_last_of_an_epoch_gives_its_record() -> None:
    work = engine(net())
    seen = list(work.lessons())
    assert [record is not None for record in seen] == [False, False, False, True] * EPOCHS
    records = [r for r in seen if r]
    assert [(r.stage, r.epoch, r.steps) for r in records] == [(0, 0, 4), (0, 1, 8), (0, 2, 12)]
    assert all(r.seconds > 0 and r.scores == {} for r in records)
    assert work.done and list(work.lessons()) == []


def test_a_record_holds_the_mean_of_every_loss_over_its_epoch() -> None:
    """Without learning the losses of the epoch can be computed again."""
    teacher = Frozen(net(2))
    model = net().eval()
    model[3].p = 0.0
    distiller = Distiller(
        model, teacher, Term(Hint(), weight=2.0, ramp=Ramp(2)), example=Loader(DATA, 8, seed=5).at(0)
    )
    still = copy.deepcopy(distiller)
    pace = Pace(torch.optim.SGD(distiller.parameters(), 0.0), cosine)
    work = Engine(Offline(distiller), Loader(DATA, 8, seed=5, epochs=EPOCHS), {"student": pace}, epochs=2)
    for record in (r for r in work.lessons() if r):
        sums = {"task": 0.0, "hint": 0.0}
        for batch in Loader(DATA, 8, seed=5, epochs=EPOCHS).epoch(record.epoch):
            losses = still(batch)
            sums = {name: sums[name] + float(losses[name].detach()) for name in sums}
        assert record.losses == pytest.approx({name: total / STEPS for name, total in sums.items()}, rel=1e-5)
        assert record.as_dict()["losses"] == record.losses


def test_the_global_generator_is_a_function_of_the_step() -> None:
    """So dropout is alike in every arm of a board and after a resume, whatever ran in between."""

    def draws(noise: int) -> list[Tensor]:
        seen = []
        for _ in engine(net()).lessons():
            seen.append(torch.rand(1))
            torch.rand(noise)
        return seen

    assert draws(0) == draws(9)
    assert len({float(d) for d in draws(0)}) == EPOCHS * STEPS


# --- stop and go on ---


@pytest.mark.parametrize("k", [1, 4, 6, 11, 12])
def test_saved_after_step_k_and_loaded_elsewhere_it_ends_bit_identical(k: int) -> None:
    def fresh(seed: int) -> tuple[nn.Module, MeanOf, Engine]:
        model = net(seed)
        mean = MeanOf(net(seed + 7), decay=0.9)
        mean.learner = model
        return model, mean, engine(model, Term(Hint(), (Frozen(net(2, width=5)), mean)))

    whole, whole_mean, straight = fresh(1)
    everything = list(straight.lessons())

    half, _, stopped = fresh(1)
    lessons = stopped.lessons()
    before = [next(lessons) for _ in range(k)]
    state = copy.deepcopy(stopped.state_dict())
    list(lessons)  # the run that was saved may go on; the state must not

    again, again_mean, resumed = fresh(3)
    assert not same(again, half)
    resumed.load_state_dict(state)
    assert resumed.step == k
    after = list(resumed.lessons())

    assert same(again, whole)
    assert same(resumed.scheme.modules()["distiller"], straight.scheme.modules()["distiller"])
    assert same(again_mean.model, whole_mean.model)
    assert losses(before + after) == losses(everything)


def losses(records: list[Record | None]) -> list[dict[str, float]]:
    return [r.losses for r in records if r]


def test_what_was_done_in_a_batch_is_done_when_it_yields() -> None:
    """Between two yields nothing is pending: closing the generator there is a clean stop."""
    one, other = net(), net()
    lessons = engine(one).lessons()
    next(lessons)
    next(lessons)
    lessons.close()
    for _, _ in zip(range(2), engine(other).lessons(), strict=False):
        pass
    assert same(one, other)


# --- players and their paces ---


class Duel(Scheme):
    """The scale turns first, then the net; they share a graph. Writes down what happens."""

    def __init__(self) -> None:
        self.net, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))
        self.told: list[str] = []
        self.stepped: list[bool] = []
        self.clean: list[bool] = []

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {"scale": {"scale": self.scale}, "net": dict(self.net.named_parameters())}

    def turns(self, batch: Batch) -> Iterator[Turn]:
        before, grad = self.scale.detach().clone(), copy.deepcopy(self.net.weight.grad)
        self.told.append("scale")
        yield "scale", {"scaled": (self.net(batch.x) * self.scale).square().mean()}
        self.told.append("net")
        self.stepped.append(not torch.equal(self.scale, before))
        self.clean.append(grad is self.net.weight.grad is None or torch.equal(grad, self.net.weight.grad))
        yield "net", {"fit": F.cross_entropy(self.net(batch.x) * self.scale, batch.y)}

    def shipped(self) -> nn.Module:
        return self.net

    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def follow(self) -> None:
        self.told.append("follow")


def duel(**paces: Pace) -> Engine:
    return Engine(Duel(), Loader(DATA, 8, seed=0), paces, epochs=1)


def pace(parameters: Any, lr: float, factor: Any = lambda step: 1.0) -> Pace:
    return Pace(torch.optim.SGD(parameters, lr), factor)


def test_each_player_steps_its_own_optimiser_at_its_own_pace() -> None:
    plan = Duel()
    start = copy.deepcopy(plan)
    paces = {
        "scale": pace([plan.scale], 0.5, lambda step: 1 / (step + 1)),
        "net": pace(plan.net.parameters(), 0.1),
    }
    work = Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1)
    rates = [tuple(p.optimiser.param_groups[0]["lr"] for p in paces.values()) for _ in work.lessons()]
    assert rates == [(0.5 / (step + 1), 0.1) for step in range(4)]
    assert plan.told == ["scale", "net", "follow"] * 4

    weight, bias, scale = (
        p.detach().clone().requires_grad_() for p in (*start.net.parameters(), start.scale)
    )
    for step, batch in enumerate(Loader(DATA, 8, seed=0).epoch(0)):
        gap = (F.linear(batch.x, weight, bias) * scale).square().mean()
        (gradient,) = torch.autograd.grad(gap, [scale])
        with torch.no_grad():
            scale -= 0.5 / (step + 1) * gradient
        fit = F.cross_entropy(F.linear(batch.x, weight, bias) * scale, batch.y)
        gradients = torch.autograd.grad(fit, [weight, bias])
        with torch.no_grad():
            weight -= 0.1 * gradients[0]
            bias -= 0.1 * gradients[1]
    assert torch.allclose(plan.scale, scale) and torch.allclose(plan.net.weight, weight)


def test_a_turn_is_resumed_after_its_step_and_leaves_no_gradient_in_another_player() -> None:
    plan = Duel()
    paces = {"scale": pace([plan.scale], 0.5), "net": pace(plan.net.parameters(), 0.1)}
    list(Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1).lessons())
    assert plan.stepped == [True] * 4
    assert plan.clean == [True] * 4


@pytest.mark.parametrize("names", [("scale",), ("scale", "net", "judge")])
def test_a_player_without_an_optimiser_or_the_other_way_round_is_refused(names: tuple[str, ...]) -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(
        Refused, match=rf"players are scale, net and optimisers were given for {', '.join(names)}"
    ):
        duel(**{name: pace([parameter], 0.1) for name in names})


def test_a_pace_is_a_factor_on_the_rate_of_each_group() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.2}])
    course = Pace(groups, lambda step: 0.5**step)
    for step in (0, 3, 1):  # any order: the rate is a function of the step
        course.set(step)
        assert [g["lr"] for g in groups.param_groups] == [0.5**step, 0.2 * 0.5**step]


# --- micro-batches ---


def test_a_loss_that_compares_rows_refuses_to_be_cut_by_name() -> None:
    with pytest.raises(
        Refused, match=r"'hint' compares the rows of a batch.*3 micro-batches; set accumulate = 1"
    ):
        engine(net(), Term(Hint(), (Frozen(net(2)),)), accumulate=3)


def test_a_batch_of_too_few_rows_to_cut_is_refused() -> None:
    with pytest.raises(Refused, match="batch of 8 rows cannot be cut into 9"):
        next(engine(net(), accumulate=9).lessons())


# --- what diverges ---


class Bursts(Method):
    """Is finite until a step of the clock."""

    card = Card("none", 2000, ("response",), per_sample=True)

    def __init__(self, at: int, value: float = math.nan) -> None:
        super().__init__()
        self.at, self.value = at, value

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return s.out.square().mean() * (self.value if batch.lesson.step == self.at else 1.0)


def bursting(model: nn.Module, at: int, value: float = math.nan, **options: Any) -> Engine:
    return engine(model, Term(Bursts(at, value), (Frozen(net(2)),)), **options)


@pytest.mark.parametrize(("value", "written"), [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_its_step_and_is_named(
    value: float, written: str, accumulate: int
) -> None:
    model, other = net(), net()
    work = bursting(model, 5, value, accumulate=accumulate, stage=2)
    words = rf"The loss 'bursts' of player 'student' became {written} in step 5 of stage 2; lower the"
    with pytest.raises(Refused, match=words) as refusal:
        list(work.lessons())
    assert "\n" not in str(refusal.value)
    assert work.step == 5
    good = bursting(other, 99, accumulate=accumulate, stage=2)
    for _, _ in zip(range(5), good.lessons(), strict=False):
        pass
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_player_whose_loss_diverges_is_named() -> None:
    plan = Duel()
    paces = {"scale": pace([plan.scale], 0.5), "net": pace(plan.net.parameters(), 1e30)}
    with pytest.raises(Refused, match="loss 'scaled' of player 'scale' became inf in step 1 "):
        list(Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1).lessons())


def test_weights_that_are_not_finite_are_refused_though_the_losses_are() -> None:
    """A gradient may overflow where the loss does not; such a state must not become a checkpoint."""
    model = net()
    work = engine(model)
    next(work.lessons())
    work.refuse_diverged()
    model[4].bias.data[0] = math.inf
    with pytest.raises(Refused, match="norm of the weights of player 'student' became inf in step 0 "):
        work.refuse_diverged()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not the CPU, as far as the engine can tell."""
    monkeypatch.setattr("limbeck.engine._to", lambda batch, device: batch)
    return torch.device("meta")


def test_an_accelerator_is_looked_at_now_and_then_and_before_a_save(
    elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limbeck.engine.LOOK", 3)
    work = bursting(net(), 4)
    work.device = elsewhere
    lessons = work.lessons()
    for _ in range(5):
        next(lessons)
    words = "The loss 'bursts' of player 'student' became nan in step 4 of stage 0"  # by now every loss is
    unlooked = copy.copy(work)
    with pytest.raises(Refused, match=words):
        unlooked.refuse_diverged()
    with pytest.raises(Refused, match=words):
        next(lessons)


def test_a_step_on_an_accelerator_waits_for_nothing(
    elsewhere: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(device: torch.device) -> int:
        work, count = bursting(net(), 99), 0
        work.device = device
        lessons = work.lessons()

        def counted(old: Any) -> Any:
            def asked(self: Tensor, *args: Any) -> Any:
                nonlocal count
                count += 1
                return old(self, *args)

            return asked

        with monkeypatch.context() as patch:
            for name in ("__float__", "__bool__", "__int__", "item", "tolist"):
                patch.setattr(Tensor, name, counted(getattr(Tensor, name)))
            for _ in range(3):
                next(lessons)
        return count

    assert waits(torch.device("cpu")) >= 3
    assert waits(elsewhere) == 0


def test_losses_of_one_name_are_told_apart_by_their_player() -> None:
    class Same(Duel):
        def turns(self, batch: Batch) -> Iterator[Turn]:
            for player, losses in super().turns(batch):
                yield player, {"gap": sum(losses.values()), "one" + player: losses.popitem()[1]}

    plan = Same()
    paces = {"scale": pace([plan.scale], 0.0), "net": pace(plan.net.parameters(), 0.0)}
    (record,) = (r for r in Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1).lessons() if r)
    assert record.losses.keys() == {"gap", "onescale", "net.gap", "onenet"}
    assert record.losses["gap"] == record.losses["onescale"] != record.losses["net.gap"]
    assert record.losses["net.gap"] == record.losses["onenet"]


# --- clipping ---


def test_a_gradient_that_is_too_long_is_shortened_for_each_player_by_itself() -> None:
    with forked(0):
        plan = Duel()
    plan.net.weight.data.mul_(30)
    start = copy.deepcopy(plan)
    paces = {"scale": pace([plan.scale], 1.0), "net": pace(plan.net.parameters(), 1.0)}
    next(Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1, clip=0.01).lessons())
    pairs = zip(plan.net.parameters(), start.net.parameters(), strict=True)
    moved = torch.cat([(p - q).detach().flatten() for p, q in pairs])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    assert float((plan.scale - start.scale).detach().norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_short_enough_by_itself_is_left_alone() -> None:
    with forked(0):
        start = Duel()
    start.scale.data.mul_(5)

    def after_a_step(clip: float | None) -> tuple[Tensor, Tensor]:
        plan = copy.deepcopy(start)
        paces = {"scale": pace([plan.scale], 1.0), "net": pace(plan.net.parameters(), 1.0)}
        next(Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1, clip=clip).lessons())
        pairs = zip(plan.net.parameters(), start.net.parameters(), strict=True)
        return (plan.scale - start.scale).detach(), torch.cat([(p - q).detach().flatten() for p, q in pairs])

    free = after_a_step(None)
    norms = sorted(float(moved.norm()) for moved in free)
    assert norms[0] > 0.05 * norms[1], "both at once must be longer than each"
    for clip in (1.0001 * norms[1], 1e6):
        assert all(map(torch.equal, free, after_a_step(clip)))
    assert not torch.equal(free[1], after_a_step(0.5 * norms[0])[1])


# --- evaluation ---


def test_evaluation_is_in_eval_without_gradient_and_leaves_every_mode_as_it_was() -> None:
    model = net()
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model)
    loader = Loader(DATA, 8, seed=0)
    score = evaluate(model, Classify(), loader.once(8))

    assert [m.training for m in model.modules()] == modes
    assert same(model, before)
    answers = copy.deepcopy(model).eval()(DATA.x).argmax(1)
    assert score == {"accuracy": pytest.approx(100 * float((answers == DATA.y).float().mean()))}


def test_evaluation_puts_modes_back_when_the_task_fails() -> None:
    class Fails(Classify):
        def score(self, answers: Any) -> dict[str, float]:
            for seen, _ in answers:
                assert not seen.out.requires_grad
            raise ZeroDivisionError

    model = net().train()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, Fails(), Loader(DATA, 8, seed=0).once(8))
    assert all(m.training for m in model.modules())


def test_streams_that_cannot_be_cut_evenly_are_refused_by_name() -> None:
    batch = {"source": Batch(torch.zeros(8, 1)), "target": Batch(torch.zeros(6, 1))}
    with pytest.raises(Refused, match=r"'target' has 6 rows .* 4 equal"):
        list(_parts(batch, 4))
    assert len(list(_parts(batch, 2))) == 2
