"""Two runs in one process take turns batch by batch, under one teacher: neither notices the other."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import keyed
from limbeck.core.method import Card, Method
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace
from limbeck.models.cnn import CNN
from limbeck.schemes.offline import Offline

STEPS = 6


class Match(Method):
    """Projected student maps should equal the teacher's at one tap."""

    card = Card("none", 2000, ("feature",), per_sample=True)

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Conv2d(s.at[self.tap].shape[1], t.at[self.tap].shape[1], 1)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return F.mse_loss(self.project(s.at[self.tap]), t.at[self.tap])


def noisy(batch: Batch) -> Batch:
    assert batch.index is not None
    return batch.replace(x=batch.x + keyed(batch.lesson, batch.index, "noise", 64).view_as(batch.x))


def teacher() -> CNN:
    torch.manual_seed(0)
    return CNN(3, widths=(6, 8))


def run(old: nn.Module, tap: str, seed: int) -> tuple[Engine, Distiller]:
    """A student with dropout and BatchNorm, under a teacher looked at in a place of this run's own."""
    draw = torch.Generator().manual_seed(seed)
    data = Data(
        torch.randn(24, 1, 8, 8, generator=draw), torch.randint(3, (24,), generator=draw), ("a", "b", "c")
    )
    torch.manual_seed(seed)
    student = CNN(3, widths=(4, 4))
    student.head = nn.Sequential(nn.Dropout(0.5), student.head)
    loader = Loader(data, 8, seed=seed, epochs=2)
    terms = [Term(Match(tap), (Frozen(old, view=noisy),))]
    distiller = Distiller(student, None, terms, example=loader.at(0), view=noisy, seed=seed)
    scheme = Offline(distiller)
    pace = Pace(torch.optim.Adam(list(scheme.players()["student"].values()), 0.01), lambda step: 1.0)
    return Engine(scheme, loader, {"student": pace}, epochs=2, seed=seed), distiller


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def end(engine: Engine, distiller: Distiller) -> dict[str, Tensor]:
    state = {name: p.clone() for name, p in distiller.state_dict().items()}
    return state | {
        f"grad {name}": p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None
    }


ARMS = (("stage1", 1), ("stage2", 2))


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    """Each run under a teacher of its own, to the end, before the other begins."""
    ends = []
    for tap, seed in ARMS:
        engine, distiller = run(teacher(), tap, seed)
        assert sum(1 for _ in engine.lessons()) == STEPS
        ends.append(end(engine, distiller))
    return ends


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("order", ["ABABABABABAB", "AABBBAABBABA"])
def test_interleaved_runs_are_each_the_run_alone(alone: list[dict[str, Tensor]], order: str) -> None:
    old = teacher()
    runs = [run(old, tap, seed) for tap, seed in ARMS]
    lessons = [engine.lessons() for engine, _ in runs]
    for letter in order:
        next(lessons["AB".index(letter)])
        torch.rand(1)  # somebody else draws in between
    for (engine, distiller), want in zip(runs, alone, strict=True):
        assert engine.done
        same(end(engine, distiller), want)
    assert any(name.startswith("grad methods") for name in alone[0])


def test_a_run_may_begin_in_the_middle_of_another(alone: list[dict[str, Tensor]]) -> None:
    """Assembling a run (dry batch, new modules, new hooks) does not move one that is under way."""
    old = teacher()
    first, first_distiller = run(old, *ARMS[0])
    lessons = first.lessons()
    for _ in range(STEPS // 2):
        next(lessons)
    second, second_distiller = run(old, *ARMS[1])
    list(second.lessons())
    list(lessons)
    same(end(first, first_distiller), alone[0])
    same(end(second, second_distiller), alone[1])


def test_a_teacher_is_left_as_it_was_found() -> None:
    old = teacher()
    before = {name: p.clone() for name, p in old.state_dict().items()}
    runs = [run(old, tap, seed) for tap, seed in ARMS]
    assert hooks(old) == 2  # each run's own tap
    lessons = [engine.lessons() for engine, _ in runs]
    for pair in zip(*lessons, strict=True):
        assert len(pair) == 2
    gone = [weakref.ref(distiller) for _, distiller in runs]
    del runs[0], lessons[0]
    gc.collect()
    assert hooks(old) == 1  # the other still looks
    del runs, lessons
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert hooks(old) == 0
    same(dict(old.state_dict()), before)
