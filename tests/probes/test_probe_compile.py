"""A Distiller with taps, a ramp and a clock that moves compiles into one graph, and stays compiled.

It runs as a script in a process of its own, where the shapes in signatures are as unchecked as for users.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import IGNORE, Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.scheme import Ramp, Term
from limbeck.core.taps import Seen
from limbeck.models.cnn import CNN

STEPS = 8
ROOT = Path(__file__).parents[2]


class Soft(Method):
    """KL of softened answers, with what methods are tempted to use: the clock and a memory."""

    card = Card("none", 2000, ("response",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.register_buffer("mean", torch.zeros(t.out.shape[1]))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        self.mean.mul_(0.9).add_(t.out.mean(0), alpha=0.1)
        temperature = 4.0 - 2.0 * batch.lesson.epoch / batch.lesson.epochs
        s_log, t_soft = (s.out / temperature).log_softmax(1), ((t.out - self.mean) / temperature).softmax(1)
        return F.kl_div(s_log, t_soft, reduction="batchmean") * temperature**2


class Hint(Method):
    card = Card("none", 2000, ("feature",), taps=("stage2", "pooled"), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Conv2d(s.at["stage2"].shape[1], t.at["stage2"].shape[1], 1)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        pooled = F.cosine_similarity(self.project(s.at["stage2"]).mean((2, 3)), t.at["pooled"]).mean()
        return F.mse_loss(self.project(s.at["stage2"]), t.at["stage2"]) - pooled


def made() -> Distiller:
    torch.manual_seed(0)
    student, teacher = CNN(3, widths=(4, 6)), CNN(3, widths=(6, 8))
    terms = [
        Term(Soft(), ramp=Ramp(3, after=1)),
        Term(Hint(), weight=0.5, ramp=Ramp(4, shape="cosine"), view=flipped),
    ]
    return Distiller(student, teacher, terms, example=batch(0))


def flipped(batch: Batch) -> Batch:
    return batch.replace(x=batch.x.flip(3))


def batch(step: int) -> Batch:
    draw = torch.Generator().manual_seed(step)
    y = torch.randint(3, (8,), generator=draw)
    y[: step % 3] = IGNORE
    lesson = Lesson(seed=1, epoch=step // 2, epochs=4, step=step, samples=8 * STEPS, classes=3)
    return Batch(torch.randn(8, 1, 8, 8, generator=draw), y, torch.arange(8) + 8 * step, lesson)


def trained(forward: object, distiller: Distiller) -> list[list[float]]:
    optimiser = torch.optim.SGD(distiller.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        b = batch(step)
        out = forward(b.x, b.y, b.index, b.lesson)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append([float(out[name].detach()) for name in ("task", "soft", "hint", "loss")])
    return losses


def main(backend: str) -> None:
    """Train twice, eager and compiled, and print what is to be judged."""
    eager, traced = made(), made()
    want = trained(eager, eager)
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    got = trained(compiled, traced)
    gaps = [abs(a - b) for x, y in zip(want, got, strict=True) for a, b in zip(x, y, strict=True)]
    for a, b in zip(eager.state_dict().values(), traced.state_dict().values(), strict=True):
        gaps.append(float((a.double() - b.double()).abs().max()))
    counters = torch._dynamo.utils.counters
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(json.dumps({"losses": want, "gap": max(gaps), "graphs": graphs, "breaks": breaks}))


def report(backend: str, folder: Path, seconds: float) -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, backend],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def judge(found: dict) -> None:
    assert found["breaks"] == 0
    # One for the first lesson, one for all others, one to spare.
    assert 1 <= found["graphs"] <= 3, found["graphs"]
    assert found["gap"] < 1e-6
    soft = [row[1] for row in found["losses"]]
    # The ramp stood at 0 in the first epoch, and grew without a new graph.
    assert soft[:2] == [0.0, 0.0] and min(soft[2:]) > 0
    assert len({tuple(row) for row in found["losses"]}) == STEPS


def test_one_graph_for_all_lessons(tmp_path: Path) -> None:
    judge(report("aot_eager", tmp_path, 60))


COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS[:1])
def test_one_graph_for_all_lessons_with_inductor(tmp_path: Path, compiler: str) -> None:
    judge(report("inductor", tmp_path, 300))


if __name__ == "__main__":
    main(sys.argv[1])
