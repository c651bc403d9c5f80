"""The loop. It has never heard of any method: it asks a scheme for turns and steps the player of each."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch, View
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import reseed
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme
from limbeck.core.taps import Seen, Tapped
from limbeck.core.task import Task

LOOK = 50
"""Steps between two looks at whether losses on an accelerator are finite: a look waits for the device."""


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
    """What an epoch gave: mean losses by name (each times its weight), what methods found worth watching in
    its last batch, scores on the validation split, seconds of training and those of them that went into
    asking the teachers."""

    stage: int
    epoch: int
    steps: int
    losses: dict[str, float]
    figures: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    asking: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Diverged(Refused):
    """A loss or a weight is not finite any more."""


class Engine:
    """One stage of training. `lessons` yields after every batch; between two yields the state is whole and
    may be saved.

    Args:
        scheme: who learns and whose turn it is. loader: where batches come from. paces: an optimiser for each
            player, by name; a player without one uses none and is refused. accumulate: micro-batches a step.
        clip: the largest norm of a player's gradient, all its parameters together; a longer one is shortened.
        precision: bfloat16 or float16 for autocast around what a scheme computes in its turns; weights,
            optimisers and evaluation stay in float32. A gradient that overflows float16 is a step left out.
        compile: trace the scheme's Distillers with `torch.compile`. Losses are the same but for rounding, and
            dropout draws other numbers.

    A loss that is not finite is refused before its step is taken; on an accelerator, where looking costs
    time, at most `LOOK` steps later. It never gets into a checkpoint.
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
        clip: float | None = None,
        precision: torch.dtype | None = None,
        compile: bool = False,
        device: torch.device | str = "cpu",
        stage: int = 0,
    ) -> None:
        self.scheme, self.loader, self.paces = scheme, loader, dict(paces)
        self.epochs, self.seed, self.accumulate, self.stage = epochs, seed, accumulate, stage
        self.clip = clip
        self.device = torch.device(device)
        self.players = {name: list(parameters.values()) for name, parameters in scheme.players().items()}
        self.step = 0
        self.seconds = self.asking = 0.0
        self.sums: dict[str, dict[str, Tensor]] = {}  # of an epoch's losses, by player and name
        self._unseen: list[tuple[int, str, str, Tensor]] = []  # step, player, name and value of a loss
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
        if precision is not None:
            refuse_precision(precision, self.device)
        self._casting = (
            nullcontext() if precision is None else torch.autocast(self.device.type, dtype=precision)
        )
        # One for each player: a scaler waits for an `update` before it steps the same optimiser again.
        half = self.players if precision == torch.float16 else ()
        self.scalers = {player: torch.amp.GradScaler(self.device.type) for player in half}
        self.compiled = compile
        if compile:
            lessons = [module for module in scheme.modules().values() if isinstance(module, Distiller)]
            if not lessons:
                raise Refused(
                    f"The scheme {type(scheme).__name__} has no Distiller, which is what is compiled; leave "
                    "compile out."
                )
            for lesson in lessons:
                lesson.compile()

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
                began, asked = time.perf_counter(), self.scheme.asking
                # So that dropout is alike in every arm, and after a resume.
                reseed(self.device, self.seed, "step", self.stage, self.step)
                try:
                    self._learn(_to(batch, self.device))
                except RuntimeError as error:
                    if not self.compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                        raise
                    why = str(error).partition("\n")[0]
                    raise Refused(f"compile was asked for, and fails here ({why}); leave it out.") from error
                self.scheme.follow()
                self.step += 1
                self.seconds += time.perf_counter() - began
                self.asking += self.scheme.asking - asked
                if self.device.type != "cpu" and self.step % LOOK == 0:
                    self.refuse_diverged()
                yield self._record(epoch) if self.step % self.loader.steps == 0 else None

    def refuse_diverged(self) -> None:
        """Refuse to go on from, or to save, a state that is not finite: a loss until now, or a weight."""
        unseen, self._unseen = self._unseen, []
        if unseen:  # all of them in one look
            finite = torch.isfinite(torch.stack([value.float() for *_, value in unseen])).tolist()
            for (step, player, name, value), fine in zip(unseen, finite, strict=True):
                if not fine:
                    raise self._diverged(f"loss '{name}' of player '{player}'", value, step)
        for player, parameters in self.players.items():
            norm = torch.nn.utils.get_total_norm(parameters)
            if not math.isfinite(norm):
                raise self._diverged(f"norm of the weights of player '{player}'", norm, self.step - 1)

    def _diverged(self, what: str, value: Tensor, step: int) -> Diverged:
        return Diverged(
            f"The {what} became {float(value)} in step {step} of stage {self.stage}; lower the learning rate "
            "or the loss's weight, or clip the gradient."
        )

    def _learn(self, batch: Any) -> None:
        """All turns of one batch. Micro-batches go through the plan side by side, so that whoever learns
        first has learned from the whole batch before the next turn looks at it."""
        parts = list(_parts(batch, self.accumulate))
        plans = [(share, self.scheme.turns(part)) for share, part in parts]
        while True:
            player = None
            for share, plan in plans:
                with self._casting:
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
            self._step(player)

    def _backward(self, player: str, losses: dict[str, Tensor], share: float) -> None:
        sums = self.sums.setdefault(player, {})
        for name, value in losses.items():
            value = value.detach()
            if self.device.type != "cpu":
                self._unseen.append((self.step, player, name, value))
            elif not math.isfinite(value):
                raise self._diverged(f"loss '{name}' of player '{player}'", value, self.step)
            exact = torch.promote_types(value.dtype, torch.float32)
            sums[name] = sums.get(name, 0.0) + value.to(exact) * share
        loss = self.scheme.combine(player, losses)
        loss = loss * share if share != 1 else loss
        if self.scalers:
            loss = self.scalers[player].scale(loss)
        loss.backward(inputs=self.players[player])

    def _step(self, player: str) -> None:
        pace, scaler = self.paces[player], self.scalers.get(player)
        pace.set(self.step)
        if scaler is not None:
            scaler.unscale_(pace.optimiser)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.players[player], self.clip)
        if scaler is None:
            pace.optimiser.step()
        else:
            scaler.step(pace.optimiser)
            scaler.update()

    def _record(self, epoch: int) -> Record:
        self.refuse_diverged()
        losses: dict[str, float] = {}
        for player, named in self.sums.items():
            for name, total in named.items():
                key = name if name not in losses else f"{player}.{name}"
                losses[key] = float(total) / self.loader.steps
        figures = self.scheme.figures()
        record = Record(
            self.stage, epoch, self.step, losses, figures, seconds=self.seconds, asking=self.asking
        )
        self.sums, self.seconds, self.asking = {}, 0.0, 0.0
        return record

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "asking": self.asking,
            "sums": {player: dict(named) for player, named in self.sums.items()},
            "scheme": self.scheme.state_dict(),
            "optimisers": {name: pace.optimiser.state_dict() for name, pace in self.paces.items()},
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.asking = state["step"], state["seconds"], state["asking"]
        self.sums = {player: dict(named) for player, named in state["sums"].items()}
        self.scheme.load_state_dict(state["scheme"])
        for name, pace in self.paces.items():
            pace.optimiser.load_state_dict(state["optimisers"][name])
        for name, scaler in self.scalers.items():
            scaler.load_state_dict(state["scalers"][name])


def refuse_precision(precision: torch.dtype, device: torch.device) -> None:
    """Refuse what the device would compute slowly, in software."""
    name = str(precision).removeprefix("torch.")
    if device.type == "cpu" and precision == torch.float16:
        raise Refused(
            f"precision = '{name}' was asked for on a CPU, where float16 is for storage; take 'bfloat16', or "
            "leave precision out."
        )
    if precision == torch.bfloat16 and not has_bfloat16(device):
        raise Refused(
            f"precision = '{name}' was asked for, and this {device.type.upper()} has no arithmetic for it; "
            "leave precision out."
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 (torch would emulate it otherwise, slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterator[Batch],
    *,
    taps: Mapping[str, str] | None = None,
    view: View | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Scores of a model in eval, without gradient; its modes are put back as they were. `view` is what it is
    shown instead of the batches."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return task.score(_answers(Tapped(model, taps), batches, view, torch.device(device)))
    finally:
        for module, mode in modes:
            module.training = mode


def _answers(
    tapped: Tapped, batches: Iterator[Batch], view: View | None, device: torch.device
) -> Iterator[tuple[Seen, Batch]]:
    for batch in batches:
        here = batch.to(device) if view is None else view(batch.to(device))
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
