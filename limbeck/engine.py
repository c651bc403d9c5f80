"""The loop. It has never heard of any method: it asks a scheme for turns and steps the player of each."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.keyed import reseed
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme
from limbeck.core.taps import Seen, Tapped
from limbeck.core.task import Task


class Drawn(Protocol):
    """What the engine needs of a loader: `steps` an epoch, and the batches of an epoch from any step on."""

    steps: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


@dataclass
class Pace:
    """An optimiser, and the factor on its learning rate at each step."""

    optimiser: torch.optim.Optimizer
    factor: Callable[[int], float]

    def __post_init__(self) -> None:
        self.full = [group["lr"] for group in self.optimiser.param_groups]

    def set(self, step: int) -> None:
        factor = self.factor(step)
        for group, full in zip(self.optimiser.param_groups, self.full, strict=True):
            group["lr"] = full * factor


@dataclass
class Record:
    """What an epoch gave: mean losses by name (each times its weight), scores on the validation split,
    seconds of training."""

    stage: int
    epoch: int
    steps: int
    losses: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine:
    """One stage of training. `lessons` yields after every batch; between two yields the state is whole and
    may be saved.

    Args:
        scheme: who learns and whose turn it is. loader: where batches come from. paces: an optimiser for each
            player, by name; a player without one uses none and is refused. accumulate: micro-batches a step.
    """

    def __init__(
        self,
        scheme: Scheme,
        loader: Drawn,
        paces: Mapping[str, Pace],
        *,
        epochs: int,
        seed: int = 0,
        accumulate: int = 1,
        device: torch.device | str = "cpu",
        stage: int = 0,
    ) -> None:
        self.scheme, self.loader, self.paces = scheme, loader, dict(paces)
        self.epochs, self.seed, self.accumulate, self.stage = epochs, seed, accumulate, stage
        self.device = torch.device(device)
        self.players = {name: list(parameters.values()) for name, parameters in scheme.players().items()}
        self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, Tensor] = {}
        if self.players.keys() != self.paces.keys():
            raise Refused(
                f"The players are {', '.join(self.players)} and optimisers were given for "
                f"{', '.join(self.paces)}; give each player one."
            )
        whole = scheme.refuse_cut()
        if accumulate > 1 and whole is not None:
            raise Refused(
                f"The loss of '{whole}' compares the rows of a batch, so a batch cannot be cut into "
                f"{accumulate} micro-batches; set accumulate = 1."
            )

    @property
    def done(self) -> bool:
        return self.step >= self.epochs * self.loader.steps

    def lessons(self) -> Iterator[Record | None]:
        """Train to the end from wherever the state is. Yields None after a batch, and a `Record` after the
        last of an epoch."""
        self.scheme.train()
        while not self.done:
            epoch, place = divmod(self.step, self.loader.steps)
            for batch in self.loader.epoch(epoch, place):
                began = time.perf_counter()
                # So that dropout is alike in every arm, and after a resume.
                reseed(self.device, self.seed, "step", self.stage, self.step)
                self._learn(_to(batch, self.device))
                self.scheme.follow()
                self.step += 1
                self.seconds += time.perf_counter() - began
                yield self._record(epoch) if self.step % self.loader.steps == 0 else None

    def refuse_diverged(self) -> None:
        """Refuse to go on from, or to save, a state in which a loss of this epoch was not finite."""
        for name, total in self.sums.items():
            if not torch.isfinite(total):
                raise Refused(
                    f"The loss '{name}' became {float(total)} by step {self.step} of stage {self.stage}; "
                    "lower the learning rate or the loss's weight."
                )

    def _learn(self, batch: Any) -> None:
        """All turns of one batch. Micro-batches go through the plan side by side, so that whoever learns
        first has learned from the whole batch before the next turn looks at it."""
        parts = list(_parts(batch, self.accumulate))
        plans = [(share, self.scheme.turns(part)) for share, part in parts]
        while True:
            player = None
            for share, plan in plans:
                turn = next(plan, None)
                if turn is None:
                    continue
                if player is None:
                    player = turn[0]
                    self.paces[player].optimiser.zero_grad(set_to_none=True)
                assert turn[0] == player, (
                    f"the turn of {turn[0]} in one micro-batch and of {player} in another"
                )
                self._backward(player, turn[1], share)
            if player is None:
                return
            self.paces[player].set(self.step)
            self.paces[player].optimiser.step()

    def _backward(self, player: str, losses: dict[str, Tensor], share: float) -> None:
        loss = self.scheme.combine(player, losses)
        (loss * share if share != 1 else loss).backward(inputs=self.players[player])
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() * share  # type: ignore[operator]

    def _record(self, epoch: int) -> Record:
        self.refuse_diverged()
        losses = {name: float(total) / self.loader.steps for name, total in self.sums.items()}
        record = Record(self.stage, epoch, self.step, losses, seconds=self.seconds)
        self.sums, self.seconds = {}, 0.0
        return record

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "sums": dict(self.sums),
            "scheme": self.scheme.state_dict(),
            "optimisers": {name: pace.optimiser.state_dict() for name, pace in self.paces.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.sums = state["step"], state["seconds"], dict(state["sums"])
        self.scheme.load_state_dict(state["scheme"])
        for name, pace in self.paces.items():
            pace.optimiser.load_state_dict(state["optimisers"][name])


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterator[Batch],
    *,
    taps: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Scores of a model in eval, without gradient; its modes are put back as they were."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return task.score(_answers(Tapped(model, taps), batches, torch.device(device)))
    finally:
        for module, mode in modes:
            module.training = mode


def _answers(tapped: Tapped, batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Seen, Batch]]:
    for batch in batches:
        here = batch.to(device)
        with torch.no_grad():
            seen = tapped(here.x)
        yield seen, here


def _parts(batch: Any, parts: int) -> Iterator[tuple[float, Any]]:
    """(share of the rows, micro-batch). Each is told how many labelled rows its mean divides by, so that the
    sum of the parts is the mean over the whole batch of all processes."""
    if parts == 1:
        yield 1.0, batch
        return
    streams = {"": batch} if isinstance(batch, Batch) else batch
    cut: dict[str, list[Batch]] = {}
    for name, whole in streams.items():
        if whole.rows < parts:
            raise Refused(
                f"A batch of {whole.rows} rows cannot be cut into {parts} micro-batches; lower accumulate."
            )
        if len(streams) > 1 and whole.rows % parts:
            raise Refused(
                f"Stream '{name}' has {whole.rows} rows a batch, and beside other streams they must be cut "
                f"into {parts} equal micro-batches; choose another batch size or accumulate = 1."
            )
        pieces = list(whole.split(parts))
        if whole.y is not None:
            labelled = across.total((whole.y != IGNORE).sum()).double() / across.processes()
            pieces = [piece.replace(labelled=labelled * piece.rows / whole.rows) for piece in pieces]
        cut[name] = pieces
    lead = max(streams, key=lambda name: streams[name].rows)
    for n in range(parts):
        share = cut[lead][n].rows / streams[lead].rows
        yield (
            share,
            cut[""][n] if isinstance(batch, Batch) else {name: pieces[n] for name, pieces in cut.items()},
        )


def _to(batch: Any, device: torch.device) -> Any:
    return (
        batch.to(device)
        if isinstance(batch, Batch)
        else {name: part.to(device) for name, part in batch.items()}
    )
