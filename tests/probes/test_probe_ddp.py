"""Two processes with unequal labelled rows take the very steps that one process takes on all rows.

Each rank runs this file as a script (gloo over a file) and writes what it found; the tests compare, to
the last digits of float64, and leave no process behind.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 6, 3  # rows a rank
LABELLED = {"unequal": (5, 1), "one with none": (4, 0), "nobody": (0, 0)}


class Soft(Method):
    """A mean of one term a row: equal rows a rank, so the mean of the ranks' means is the mean."""

    card = Card("none", 2000, ("response",), per_sample=True)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return F.kl_div(s.out.log_softmax(1), t.out.softmax(1), reduction="batchmean")


class Right(Method):
    """A labelled mean: the teacher's confidence in the label weighs the student's error there."""

    card = Card("none", 2000, ("response",), needs=frozenset({"labels"}), per_sample=True)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        trust = F.cross_entropy(t.out, batch.y, reduction="none", ignore_index=IGNORE).neg().exp()
        return across.labelled_mean(
            trust * F.cross_entropy(s.out, batch.y, reduction="none", ignore_index=IGNORE), batch
        )


class Hint(Method):
    card = Card("none", 2000, ("feature",), taps=("1",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["1"].shape[1], t.at["1"].shape[1])

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return F.mse_loss(self.project(s.at["1"]), t.at["1"])


class Distances(Method):
    """Distances between all pairs of rows, wherever they are; the projector learns through the gather."""

    card = Card("none", 2000, ("relation",), taps=("1",))

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["1"].shape[1], 3)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        mine, theirs = across.gather(self.project(s.at["1"])), across.gather(t.at["1"])
        return F.smooth_l1_loss(F.pdist(mine), F.pdist(theirs))


def rows(case: str, step: int) -> Batch:
    """All rows of a step; the first half is rank 0's."""
    draw = torch.Generator().manual_seed(step)
    y = torch.full((2, ROWS), IGNORE)
    for rank, labelled in enumerate(LABELLED[case]):
        where = torch.randperm(ROWS, generator=draw)[:labelled]
        y[rank, where] = torch.randint(4, (labelled,), generator=draw)
    return Batch(torch.randn(2 * ROWS, 5, generator=draw), y.flatten(), torch.arange(2 * ROWS))


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4))


def trained(case: str) -> dict[str, Tensor]:
    """Three steps on this process' rows; every gradient and every weight."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    student, teacher = net(6), net(8)
    mine = [list(rows(case, step).split(across.processes()))[across.rank()] for step in range(STEPS)]
    methods = [Soft(), Right(), Hint(), Distances()]
    distiller = Distiller(student, teacher, methods, example=mine[0])
    wrapped = distiller if across.processes() == 1 else DistributedDataParallel(distiller)
    optimiser = torch.optim.SGD(distiller.parameters(), 0.1)
    found = {}
    for step, batch in enumerate(mine):
        optimiser.zero_grad()
        losses = wrapped(batch.x, batch.y, batch.index, batch.lesson)
        losses["loss"].backward()
        found |= {f"{step} grad {name}": p.grad.clone() for name, p in distiller.named_parameters()}
        optimiser.step()
        for name in ("task", "right", "distances"):
            found[f"{step} loss {name}"] = losses[name].detach().clone()
    assert all(p.grad is None for p in teacher.parameters())
    return found | {f"end {name}": p.detach().clone() for name, p in distiller.named_parameters()}


def gathered(counts: tuple[int, int]) -> dict[str, Tensor]:
    """across.gather of unequal rows: what comes, what goes back. Each rank's loss is its own."""
    torch.set_default_dtype(torch.float64)
    rank = across.rank()
    x = (
        torch.arange(12.0).view(6, 2)[: counts[0]]
        if rank == 0
        else torch.arange(100.0, 112.0).view(6, 2)[: counts[1]]
    )
    x = x.clone().requires_grad_()
    everything = across.gather(x)
    weight = torch.arange(1.0, 1 + everything.numel()).view_as(everything) * (10 if rank else 1)
    (everything * weight).sum().backward()
    index = across.gather(torch.arange(counts[rank]) + 10 * rank)
    return {"rows": everything.detach().clone(), "index": index, "grad": x.grad.clone(), "weight": weight}


def main(rank: int, folder: Path) -> None:
    """One rank of two: everything, in one meeting."""
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = {case: trained(case) for case in LABELLED} | {"gather": gathered((2, 5))}
    for case, tensors in found.items():
        save_file(
            {name: v.contiguous() for name, v in tensors.items()}, folder / f"{case}-{rank}.safetensors"
        )
    dist.barrier()
    os._exit(0)  # gloo's threads may still hold tensors, and would abort a Python that is taking itself down


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Tensor]]]:
    """What both ranks found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(2):
            with open(folder / f"{rank}.log", "w") as log:
                call = [sys.executable, "-W", "error", __file__, str(rank), str(folder)]
                running.append(subprocess.Popen(call, env=environment, stdout=log, stderr=subprocess.STDOUT))
        until = time.monotonic() + 90
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            assert time.monotonic() < until, f"the ranks hang: {logs(folder)}"
            time.sleep(0.02)
    finally:
        for one in running:  # the other of one that failed waits for ever
            one.kill()
            one.wait()
    assert [one.returncode for one in running] == [0, 0], logs(folder)
    return {
        case: [load_file(folder / f"{case}-{rank}.safetensors") for rank in range(2)]
        for case in (*LABELLED, "gather")
    }


def logs(folder: Path) -> str:
    return "\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(2))


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", LABELLED)
def test_two_processes_are_one(ranks: dict[str, list[dict[str, Tensor]]], case: str) -> None:
    want = trained(case)
    assert (want["0 loss task"] == 0) == (case == "nobody")
    shares = {f"{step} loss {name}" for step in range(STEPS) for name in ("task", "right")}
    # Losses; gradients and weights of student and projectors.
    assert len(want) == 3 * STEPS + (STEPS + 1) * (4 + 2 + 2)
    for got in ranks[case]:
        assert got.keys() == want.keys()
        for name in want.keys() - shares:
            gap = (got[name] - want[name]).abs().max()
            assert gap <= 1e-12, f"{name}: {gap}"
    assert all(torch.equal(*(rank[name] for rank in ranks[case])) for name in want if name.startswith("end"))


@pytest.mark.parametrize("name", ["0 loss task", "2 loss right"])
def test_the_ranks_shares_of_a_labelled_mean_average_to_it(
    ranks: dict[str, list[dict[str, Tensor]]], name: str
) -> None:
    want = trained("unequal")[name]
    first, second = (rank[name] for rank in ranks["unequal"])
    torch.testing.assert_close((first + second) / 2, want, rtol=0, atol=1e-12)
    assert first > 2 * second > 0  # five labelled rows and one
    assert ranks["one with none"][1][name] == 0


def test_gather_takes_unequal_rows_and_returns_their_gradient(
    ranks: dict[str, list[dict[str, Tensor]]],
) -> None:
    want = torch.cat([torch.arange(4.0).view(2, 2), torch.arange(100.0, 110.0).view(5, 2)])
    first, second = ranks["gather"]
    for got in (first, second):
        assert torch.equal(got["rows"], want)
        assert torch.equal(got["index"], torch.tensor([0, 1, 10, 11, 12, 13, 14]))
    both = first["weight"] + second["weight"]  # each rank's loss saw every row
    assert torch.equal(first["grad"], both[:2])
    assert torch.equal(second["grad"], both[2:])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
