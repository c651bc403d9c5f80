"""Mixed precision: as a loop written by hand has it, stopped and gone on with to the bit, refused where it
would be slow. Half precision is tried on the CPU here, with the refusal out of the way."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import engine as engines
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import number
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme, Term, Turn
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace, evaluate
from limbeck.schemes.offline import Offline
from limbeck.tasks.classify import Classify

CPU = torch.device("cpu")
EPOCHS, STEPS = 3, 4
DATA = Data(
    torch.randn(35, 6, generator=torch.Generator().manual_seed(0)), torch.arange(35) % 3, ("a", "b", "c")
)


def net(seed: int = 1) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


class Shown(Method):
    """Writes down in which precision it is shown both."""

    card = Card("none", 2000, ("response",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        self.dtypes.append((s.out.dtype, t.out.dtype))
        return F.mse_loss(s.out.float(), t.out.float())


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine can do, for these tests it can do everything."""
    monkeypatch.setattr(engines, "has_bfloat16", lambda device: True)


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    monkeypatch.setattr(engines, "refuse_precision", lambda precision, device: None)
    return torch.float16


def engine(
    model: nn.Module, *terms: Term, precision: torch.dtype | None, weight: float = 1.0, **options: Any
) -> Engine:
    loader = Loader(DATA, 8, seed=5, epochs=EPOCHS)
    distiller = Distiller(model, None, terms, example=loader.at(0), task_weight=weight)
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1 / weight, momentum=0.9)
    paces = {"student": Pace(optimiser, lambda step: 1.0)}
    return Engine(Offline(distiller), loader, paces, epochs=EPOCHS, seed=5, precision=precision, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def by_hand(model: nn.Module, precision: torch.dtype, weight: float = 1, clip: float | None = None) -> float:
    """Train, and give the scale that the scaler ends with."""
    optimiser = torch.optim.SGD(model.parameters(), 0.1 / weight, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == torch.float16)
    loader = Loader(DATA, 8, seed=5)
    for step in range(EPOCHS * STEPS):
        batch = loader.at(step)
        torch.manual_seed(number(5, "step", 0, step))  # for dropout
        with torch.autocast("cpu", precision):
            loss = weight * F.cross_entropy(model(batch.x), batch.y)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimiser)
        scaler.update()
    return scaler.get_scale()


def test_bfloat16_is_a_loop_written_by_hand_bit_for_bit() -> None:
    ours, theirs, plain = net(), net(), net()
    work = engine(ours, precision=torch.bfloat16)
    list(work.lessons())
    by_hand(theirs, torch.bfloat16)
    list(engine(plain, precision=None).lessons())
    assert same(ours, theirs) and not same(ours, plain)
    assert not work.scalers
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize("clip", [None, 0.05])
def test_float16_is_a_loop_written_by_hand_bit_for_bit(half: torch.dtype, clip: float | None) -> None:
    """With a weight that makes the first scaled gradients overflow: those steps are left out, and it is no
    divergence. A clipped gradient is the true one, not the scaled one."""
    ours, theirs, start = net(), net(), net()
    work = engine(ours, precision=half, weight=100.0, clip=clip)
    lessons = work.lessons()
    next(lessons)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), start.parameters(), strict=True))
    list(lessons)
    assert by_hand(theirs, half, 100.0, clip) == work.scalers["student"].get_scale() < 2**15
    assert same(ours, theirs) and not same(ours, start)


@pytest.mark.parametrize("k", [1, 2, 7, 12])
def test_a_scaler_goes_on_where_it_was(half: torch.dtype, k: int) -> None:
    whole = net()
    straight = engine(whole, precision=half, weight=100.0)
    list(straight.lessons())
    stopped = engine(net(), precision=half, weight=100.0)
    for _, _ in zip(range(k), stopped.lessons(), strict=False):
        pass
    again = net(3)
    resumed = engine(again, precision=half, weight=100.0)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    list(resumed.lessons())
    assert same(again, whole)
    assert resumed.scalers["student"].state_dict() == straight.scalers["student"].state_dict()


def test_a_loss_that_is_not_finite_is_a_divergence_in_half_precision_too(half: torch.dtype) -> None:
    model = net()
    model[4].bias.data[1] = 1e9  # beyond float16
    with pytest.raises(Refused, match=r"loss 'task' of player 'student' became (nan|inf) in step 0"):
        list(engine(model, precision=half).lessons())


class Watched(Scheme):
    """Two players in two turns; writes down when autocast is on."""

    def __init__(self) -> None:
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        self.on: list[bool] = []

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {name: dict(net.named_parameters()) for name, net in self.modules().items()}

    def turns(self, batch: Batch) -> Iterator[Turn]:
        for name, model in self.modules().items():
            self.on.append(torch.is_autocast_enabled("cpu"))
            yield name, {name: F.cross_entropy(model(batch.x), batch.y)}

    def combine(self, player: str, losses: dict[str, Tensor]) -> Tensor:
        self.outside = not torch.is_autocast_enabled("cpu")
        return super().combine(player, losses)

    def shipped(self) -> nn.Module:
        return self.a

    def modules(self) -> Mapping[str, nn.Module]:
        return {"a": self.a, "b": self.b}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_autocast_is_on_in_a_schemes_turns_and_nowhere_else(accumulate: int) -> None:
    plan = Watched()
    paces = {
        name: Pace(torch.optim.SGD(net.parameters(), 0.1), lambda step: 1.0)
        for name, net in plan.modules().items()
    }
    options: Any = {"accumulate": accumulate, "precision": torch.bfloat16}
    for _ in Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1, **options).lessons():
        assert not torch.is_autocast_enabled("cpu")
    assert plan.on == [True] * (2 * STEPS * accumulate) and plan.outside


def test_every_player_has_a_scaler_of_its_own(half: torch.dtype) -> None:
    plan = Watched()
    plan.b.weight.data.mul_(1e3)
    paces = {
        name: Pace(torch.optim.SGD(net.parameters(), 1e-6), lambda step: 1.0)
        for name, net in plan.modules().items()
    }
    work = Engine(plan, Loader(DATA, 8, seed=0), paces, epochs=1, precision=half)
    assert work.scalers.keys() == {"a", "b"}
    list(work.lessons())
    assert set(work.state_dict()["scalers"]) == {"a", "b"}


def test_a_teacher_answers_in_the_lessons_precision_unless_it_has_its_own() -> None:
    lesson, own = Shown(), Shown()
    terms = [
        Term(lesson, (Frozen(net(2)),)),
        Term(own, (Frozen(net(2), precision=torch.bfloat16),), name="own"),
    ]
    work = engine(net(), *terms, precision=torch.bfloat16)
    lesson.dtypes.clear()
    own.dtypes.clear()
    next(work.lessons())
    assert lesson.dtypes == [(torch.bfloat16, torch.bfloat16)]
    assert own.dtypes == [(torch.bfloat16, torch.float32)]


def test_an_epochs_mean_is_not_counted_in_bfloat16() -> None:
    class Coarse(Method):
        card = Card("none", 2000, ("response",), per_sample=True)

        def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
            return 0 * s.out.float().mean().bfloat16() + (257.0 if batch.lesson.step else 256.0)

    work = engine(net(), Term(Coarse(), (Frozen(net(2)),)), precision=torch.bfloat16)
    first = next(r for r in work.lessons() if r)
    assert first.losses["coarse"] == 256.0  # 257 is 256 in bfloat16, and 4 × 256 needs more bits than it has
    assert work.state_dict()["sums"] == {}
    next(work.lessons())
    assert work.state_dict()["sums"]["student"]["coarse"].dtype == torch.float32


def test_what_ships_is_evaluated_in_float32() -> None:
    class Peeks(Classify):
        def score(self, answers: Any) -> dict[str, float]:
            return {"bits": float({seen.out.dtype for seen, _ in answers} == {torch.float32})}

    model = net()
    work = engine(model, precision=torch.bfloat16)
    next(work.lessons())
    assert evaluate(model, Peeks(), Loader(DATA, 8, seed=0).once(8)) == {"bits": 1.0}


# --- what is refused ---


def test_float16_on_a_cpu_is_refused() -> None:
    words = r"precision = 'float16' .* on a CPU.*take 'bfloat16', or leave precision out\."
    with pytest.raises(Refused, match=words) as refusal:
        engine(net(), precision=torch.float16)
    assert "\n" not in str(refusal.value)


def test_bfloat16_without_hardware_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_bfloat16", lambda device: False)
    with pytest.raises(Refused, match=r"'bfloat16' .* this CPU has no arithmetic for it; leave precision"):
        engine(net(), precision=torch.bfloat16)


@pytest.mark.parametrize(
    ("able", "found"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": False}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "avx2": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_cpu_is_asked_for_bfloat16(
    able: dict[str, Any], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert engines.has_bfloat16(CPU) is found
