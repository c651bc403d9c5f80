"""What is compiled learns what the plain loop learns, from one trace for all lessons; nobody else notices."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import forked
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Scheme, Term, Turn
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen, MeanOf
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace, evaluate
from limbeck.schemes.offline import Offline
from limbeck.tasks.classify import Classify

# Torch asks for it on purpose, and hides the warning in a way that pytest does not see.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

EPOCHS = 3
torch_compile = torch.compile
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
DATA = Data(X, torch.arange(24) % 3, ("a", "b", "c"))


def net(seed: int, width: int = 4) -> nn.Module:
    with forked(seed):
        return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


class Hint(Method):
    """Has a module that learns, a buffer that remembers, and looks at the clock."""

    card = Card("none", 2000, ("feature",), taps=("2",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["2"].shape[1], t.at["2"].shape[1])
        self.register_buffer("scale", torch.ones(()))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        self.scale.mul_(0.9).add_(0.1 * t.at["2"].std())
        gap = F.mse_loss(self.project(s.at["2"]), t.at["2"]) / self.scale
        return gap * (1 + batch.lesson.epoch / batch.lesson.epochs + batch.lesson.step)


def flipped(batch: Batch) -> Batch:
    return batch.replace(x=batch.x.flip(1))


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by the tracer alone: what a compiler then makes of it is torch's affair."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled_by(monkeypatch, "aot_eager")


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    def compile(f: Any, **options: Any) -> Any:
        return torch_compile(f, **{**options, "backend": backend})

    monkeypatch.setattr(torch, "compile", compile)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def engine(compile: bool, seed: int = 0, **options: Any) -> Engine:
    student = net(seed)
    loader = Loader(DATA, 8, seed=5, epochs=EPOCHS)
    terms = [
        Term(Hint(), (Frozen(net(9, 5)),), 0.01, Ramp(EPOCHS), view=flipped),
        Term(Hint(), (MeanOf(student, decay=0.5),), 0.01, name="own"),
    ]
    distiller = Distiller(student, None, terms, example=loader.at(0))
    optimiser = torch.optim.SGD(distiller.parameters(), 0.05, momentum=0.9)
    paces = {"student": Pace(optimiser, lambda step: 1.0)}
    return Engine(Offline(distiller), loader, paces, epochs=EPOCHS, compile=compile, **options)


def close(a: nn.Module, b: nn.Module, digits: int) -> None:
    options = {"rtol": 10**-digits, "atol": 10 ** -(digits + 1)}
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), **options)


def test_it_learns_the_same_from_one_trace_for_all_lessons() -> None:
    plain, work = engine(False), engine(True)
    want = [r.losses for r in plain.lessons() if r]
    assert graphs() == 0
    got, seen = [], []
    for record in (r for r in work.lessons() if r):
        got.append(record.losses)
        seen.append(graphs())
    assert [pytest.approx(losses, rel=1e-5) for losses in want] == got
    close(work.scheme.modules()["distiller"], plain.scheme.modules()["distiller"], 5)
    # What the student shows, what the teachers say, the losses; and each again when the clock first moves.
    assert 3 <= seen[1] <= 6 and seen[1:] == [seen[1]] * (EPOCHS - 1)


def test_what_ships_is_the_plain_model() -> None:
    work = engine(True)
    next(work.lessons())
    traces = graphs()
    student = work.scheme.shipped()
    assert type(student) is nn.Sequential and list(student.state_dict()) == list(net(1).state_dict())
    score = evaluate(student, Classify(), Loader(DATA, 8, seed=0).once(5))
    fresh = net(1)
    fresh.load_state_dict(student.state_dict())
    assert score == evaluate(fresh, Classify(), Loader(DATA, 8, seed=0).once(5))
    assert graphs() == traces


def test_many_runs_of_a_process_do_not_use_up_each_others_traces() -> None:
    """Torch gives up on a function that was traced too often, and says so to nobody."""
    counts = [graphs()]
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            next(engine(True).lessons())
            counts.append(graphs())
    assert counts[2] - counts[1] == counts[1] - counts[0] == 3


@pytest.mark.slow
def test_it_is_saved_and_resumed_bit_for_bit() -> None:
    whole = engine(True)
    list(whole.lessons())
    stopped = engine(True)
    for _, _ in zip(range(5), stopped.lessons(), strict=False):
        pass
    resumed = engine(True, seed=1)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    list(resumed.lessons())
    ends = [work.scheme.modules()["distiller"].state_dict() for work in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_it_may_be_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limbeck.engine.has_bfloat16", lambda device: True)
    plain, work = (engine(compile, precision=torch.bfloat16) for compile in (False, True))
    for one in (plain, work):
        next(one.lessons())
    assert graphs() >= 3
    close(work.scheme.shipped(), plain.scheme.shipped(), 3)


def test_a_copy_is_not_compiled() -> None:
    """Its traces would train the original."""
    work = engine(True)
    next(work.lessons())
    twin = copy.deepcopy(work.scheme.modules()["distiller"])
    traces = graphs()
    batch = Loader(DATA, 8, seed=5, epochs=EPOCHS).at(0)
    twin(batch)["loss"].backward()
    assert graphs() == traces
    assert any(p.grad is not None for p in twin.student.parameters())


def test_what_cannot_be_compiled_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    compiled_by(monkeypatch, broken)
    with pytest.raises(Refused, match=r"compile was asked for, and fails here .*leave it out") as refusal:
        next(engine(True).lessons())
    assert "\n" not in str(refusal.value)


class Bare(Scheme):
    """A lesson without a Distiller."""

    def __init__(self) -> None:
        self.net = nn.Linear(6, 3)

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {"net": dict(self.net.named_parameters())}

    def turns(self, batch: Batch) -> Iterator[Turn]:
        yield "net", {"task": F.cross_entropy(self.net(batch.x), batch.y)}

    def shipped(self) -> nn.Module:
        return self.net

    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}


def test_a_scheme_that_has_nothing_to_compile_is_refused() -> None:
    plan = Bare()
    paces = {"net": Pace(torch.optim.SGD(plan.net.parameters(), 0.1), lambda step: 1.0)}
    make = partial(Engine, plan, Loader(DATA, 8, seed=0), paces, epochs=1)
    with pytest.raises(Refused, match=r"Bare has no Distiller, .* leave compile out"):
        make(compile=True)
    make(compile=False)
