"""What the house costs: `python benchmarks/speed.py`.

With networks so small that nothing else counts, one step through Engine + Offline + Distiller is timed
against a hand-written loop of the same method, interleaved in one process at one thread, in CPU time. Also:
what `import limbeck` adds to `import torch`, and how long `limbeck --help` takes. Prints a table; writes
nothing.
"""

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace
from limbeck.knowledge.response.kd import KD
from limbeck.schemes.offline import Offline

ROUNDS, STEPS, ROWS = 15, 200, 16


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Same:
    """A loader that costs nothing: the same batch again and again."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.steps = batch, STEPS

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for _ in range(start, self.steps):
            yield self.batch


def ours(student: nn.Module, teacher: nn.Module, batch: Batch) -> Callable[[], None]:
    distiller = Distiller(student, teacher, KD(), example=batch)
    engine = Engine(
        Offline(distiller), Same(batch), {"student": Pace(_sgd(student), lambda step: 1.0)}, epochs=10**9
    )
    lessons = engine.lessons()

    def go() -> None:
        for _ in range(STEPS):
            next(lessons)

    return go


def by_hand(student: nn.Module, teacher: nn.Module, batch: Batch) -> Callable[[], None]:
    teacher.eval()
    optimiser = _sgd(student)

    def go() -> None:
        for _ in range(STEPS):
            s = student(batch.x)
            with torch.no_grad():
                t = teacher(batch.x)
            kl = F.kl_div(
                F.log_softmax(s / 4, 1), F.log_softmax(t / 4, 1), reduction="batchmean", log_target=True
            )
            loss = F.cross_entropy(s, batch.y) + 16 * kl
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return go


def _sgd(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(student.parameters(), 0.01, 0.9)


def step_cost() -> tuple[float, float]:
    """Median milliseconds a step: (ours, by hand)."""
    torch.manual_seed(0)
    student, teacher = tiny(), tiny()
    data = Data(torch.randn(ROWS, 8), torch.randint(4, (ROWS,)), tuple("abcd"))
    batch = next(Loader(data, ROWS, seed=0).epoch(0))
    arms = [
        ours(copy.deepcopy(student), teacher, batch),
        by_hand(copy.deepcopy(student), copy.deepcopy(teacher), batch),
    ]
    times: list[list[float]] = [[], []]
    for round_ in range(ROUNDS + 1):
        for arm, kept in zip(arms, times, strict=True):
            began = time.process_time()
            arm()
            if round_:  # the first round warms up
                kept.append((time.process_time() - began) / STEPS * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def seconds(*command: str) -> float:
    """Median wall seconds of a command over five runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    mine, hand = step_cost()
    bare = seconds("-c", "import torch")
    rows = [
        ("framework cost of a step (ms over a hand-written loop)", mine - hand, 0.5),
        (
            "`from limbeck import Distiller` over `import torch` (s)",
            seconds("-c", "from limbeck import Distiller") - bare,
            0.2,
        ),
        ("`limbeck --help` (s)", seconds("-m", "limbeck.cli", "--help"), 0.4),
    ]
    print(f"torch {torch.__version__}, one thread; step by hand {hand:.3f} ms, ours {mine:.3f} ms")
    for what, value, limit in rows:
        print(f"{what:58s} {value:7.3f}   aim <= {limit}")
