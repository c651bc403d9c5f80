"""What a plan will take, measured before it begins: a few steps of every stage are done on the side, and
thrown away."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck import build
from limbeck.data.loader import Loader
from limbeck.engine import evaluate
from limbeck.recipe import Recipe

STEPS = 3
"""Steps that are timed, after one that warms up; of these the middle one counts."""


@dataclass(frozen=True)
class Cost:
    """seconds of training and scoring; memory, the most bytes that this process (or the GPU) has held; disk,
    the most bytes of checkpoints, weights and answers at a time."""

    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        return (
            f"about {duration(self.seconds)}, {size(self.memory)} of memory at its peak, "
            f"{size(self.disk)} on disk"
        )


def of_board(
    whole: Recipe, plans: Sequence[Recipe], seeds: int, device: str = "cpu", begin: int | None = None
) -> Cost:
    """What a board takes: the stages before `begin` (the last, if not said) once a seed, the others once an
    arm and seed."""
    begin = len(whole.stages) - 1 if begin is None else begin
    first = whole.model_copy(update={"stages": whole.stages[:begin]})
    runs = [(first, 0)] if begin else []
    cells = [_run(plan, start, device) for plan, start in [*runs, *((plan, begin) for plan in plans)]]
    # Everything is kept; while the largest cell is at work, its checkpoint is there twice.
    kept = seeds * sum(cell.kept for cell in cells)
    more = max(cell.working - cell.kept for cell in cells)
    return Cost(seeds * sum(cell.seconds for cell in cells), _peak(device), kept + max(more, 0))


@dataclass(frozen=True)
class _Cell:
    """Bytes that a finished run leaves, and the most that one at work has there."""

    seconds: float
    kept: int
    working: int


def _run(plan: Recipe, begin: int, device: str) -> _Cell:
    """What a run takes from its stage `begin` on; the stages before come from another's checkpoint."""
    lab = build.lab(plan, device=device)
    seconds, written, working = 0.0, 0, 0
    trained: dict[str, int] = {}  # bytes of every learner's weights: each checkpoint holds them all
    for number, stage in enumerate(plan.stages):
        learners = {name: _bytes(net.state_dict()) for name, net in lab.learners(stage).items()}
        if number >= begin:
            took, state, ships, answers = _stage(lab, number)
            best = ships if lab.tasks[number].headline else 0
            seconds += took
            working = max(working, written + 2 * (sum(trained.values()) + state + best))
            written += ships + answers
        trained |= learners
    return _Cell(seconds, written + sum(trained.values()), working)


def _stage(lab: build.Lab, number: int) -> tuple[float, int, int, int]:
    """Seconds that a stage will take, and bytes of its state at work, of what it ships, and of its answers to
    the test split."""
    stage, task, engine = lab.recipe.stages[number], lab.tasks[number], lab.engine(number)
    lessons = engine.lessons()
    steps = stage.epochs * engine.loader.steps
    each = [_timed(lambda: next(lessons), lab.device) for _ in range(min(1 + STEPS, steps))]
    few = Loader(lab.splits.valid, 256, seed=0)

    def score() -> None:
        evaluate(engine.scheme.ships(), task, iter([few.at(0)]), device=lab.device)

    scored = (stage.epochs + 1) * len(lab.splits.valid) + (1 + len(lab.recipe.tests)) * len(lab.splits.test)
    seconds = steps * statistics.median(each[1:] or each) + scored / few.batch * _timed(score, lab.device)
    shipped = engine.scheme.ships()
    answers = len(lab.splits.test) * (2 * len(lab.splits.test.classes) + 8)  # half logits, and the label
    return (
        seconds,
        _bytes(engine.state_dict()),
        _bytes(shipped.state_dict()),
        answers if task.headline == "accuracy" else 0,
    )


def _timed(what: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _bytes(state: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # bytes there, kilobytes elsewhere


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes as `12 MB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
