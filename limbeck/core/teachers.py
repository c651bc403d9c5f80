"""Who teaches. A teacher does not learn by gradient; it is always in eval and nothing of it moves, BatchNorm
included."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limbeck.core.batch import Batch, View
from limbeck.core.fast import Fast, shortcut, unhooked
from limbeck.core.keyed import forked
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen, Tapped, laid, unmoved, usual


class Teacher(ABC):
    """Two verbs: `teacher(batch)` without gradient, and `through(x)`, which lets gradient pass to x but never
    to a parameter."""

    offers: frozenset[str] = frozenset({"teacher_model", "teacher_gradient"})

    @abstractmethod
    def __call__(self, batch: Batch) -> Seen:
        """Answer a batch, without gradient."""

    @abstractmethod
    def through(self, x: Any) -> Seen:
        """Answer x (as the teacher's own view would show it) with gradient to x only."""

    @abstractmethod
    def look(self, names: Iterable[str]) -> None:
        """Show these taps too from now on."""

    def at_taps(self, batch: Batch) -> Seen:
        """As `teacher(batch)`, for who reads the taps only: `out` may be None where that saves work."""
        return self(batch)

    def check(self, batch: Batch) -> Seen:
        """The eager dry call, which also notices taps changed in place."""
        return self(batch)

    def how(self) -> str:
        """By which way it answers, in words."""
        return "live"

    def follow(self) -> None:  # noqa: B027 (only means move)
        """Move after a step, if this teacher is one that moves."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (only means have state)
        pass


class Frozen(Teacher):
    """A trained model that answers and never changes.

    Args:
        model: any module. Its flags are left as they are: it may learn again in a later stage.
        taps: names for looks inside it, as in `Tapped`.
        view: what it is shown instead of the batch.
        normalise: (mean, std), numbers or one per channel, applied to x after the view: for a teacher trained
            on other statistics.
        device: where it lives; None follows the batch, and answers come back to the batch's device.
        precision: a dtype for autocast (bfloat16, float16); answers come back in float32.
        batch: as many rows are answered at a time, so that a large model takes less memory; None is all.
        columns: for each of the student's classes, the teacher's output column that scores it.
        fold, channels_last: answers without gradient come from convolutions with their BatchNorm folded in,
            and in the layout that suits them, where that equals the plain answer to rounding (see
            `limbeck.core.fast`) and the call is not compiled.
        stop: `at_taps` leaves the model after its last tap.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        taps: Mapping[str, str] | None = None,
        view: View | None = None,
        normalise: tuple[Any, Any] | None = None,
        device: str | torch.device | None = None,
        precision: torch.dtype | None = None,
        batch: int | None = None,
        columns: Sequence[int] | None = None,
        called: str = "teacher",
        fold: bool = True,
        channels_last: bool = True,
        stop: bool = True,
    ) -> None:
        self.model = model
        self.tapped = Tapped(model, taps, called)
        if batch is not None and batch < 1:
            raise Refused(f"The {called} is to answer {batch} rows at a time, expected 1 or more.")
        self.view, self.normalise, self.precision, self.batch = view, normalise, precision, batch
        self.device = None if device is None else torch.device(device)
        self.columns = None if columns is None else torch.as_tensor(columns, dtype=torch.long)
        self._columns = 0 if columns is None else max(columns) + 1
        self.fold, self.channels_last, self.stop = fold, channels_last, stop
        self.fast: Fast | None = None
        """The shorter way that answers take, once it was looked for and found."""
        self._sought = self._left = False
        self._modules = list(model.modules())

    def __call__(self, batch: Batch) -> Seen:
        return self._ask(batch, until_seen=False)

    def at_taps(self, batch: Batch) -> Seen:
        return self._ask(batch, until_seen=self.stop and bool(self.tapped.names))

    def through(self, x: Any) -> Seen:
        learning = [p for p in self.model.parameters() if p.requires_grad]
        for p in learning:
            p.requires_grad_(False)
        try:
            return self._answer(x, self.tapped)
        finally:
            for p in learning:
                p.requires_grad_(True)

    def check(self, batch: Batch) -> Seen:
        shown = batch if self.view is None else self.view(batch)
        with torch.no_grad():
            return self._answer(shown.x, self._checked_in_parts)

    def look(self, names: Iterable[str]) -> None:
        self.fast, self._sought = None, False
        self.tapped.look(names)

    def how(self) -> str:
        short = [] if self.fast is None else [str(self.fast)]
        left = ["left after its last tap"] if self._left else []
        half = [] if self.precision is None else [str(self.precision).removeprefix("torch.")]
        parts = [] if self.batch is None else [f"{self.batch} rows at a time"]
        return ", ".join(["live", *short, *left, *half, *parts])

    def _ask(self, batch: Batch, until_seen: bool) -> Seen:
        shown = batch if self.view is None else self.view(batch)
        self._left = until_seen
        with torch.no_grad():  # not inference_mode: a loss may have to save the answers for its backward
            return self._answer(shown.x, self._in_parts(partial(self._run, until_seen=until_seen)))

    def _in_parts(self, ask: Callable[[Any], Seen]) -> Callable[[Any], Seen]:
        """The same, asked about `batch` rows at a time."""
        rows = self.batch
        if rows is None:
            return ask

        def each(x: Any) -> Seen:
            return self._together([ask(part) for part in _cut(x, rows)])

        return each

    def _refuse_rowless(self, x: Any) -> None:
        """A tap that one row and two do not change in its first axis alone could not be put together."""
        one, two = (self.tapped(next(_cut(x, rows))).at for rows in (1, 2))
        several = len(one) and tree_leaves(x)[0].shape[0] > 1
        for name in one if several else ():
            if (one[name].shape[0], two[name].shape[0]) != (1, 2):
                raise Refused(
                    f"Tap '{name}' of the {self.tapped.called} has {two[name].shape[0]} entries for 2 rows, "
                    "and who answers a few rows at a time must show one for each; leave `batch` out."
                )

    def _together(self, parts: Sequence[Seen]) -> Seen:
        first, outs = parts[0], [part.out for part in parts]
        if not isinstance(first.out, Tensor | None):
            raise Refused(
                f"The {self.tapped.called} answers {self.batch} rows at a time, and its answers, each a "
                f"{type(first.out).__name__}, cannot be put together; leave `batch` out."
            )
        out = None if first.out is None else torch.cat(outs)
        at = {name: torch.cat([part.at[name] for part in parts]) for name in first.at}
        masks = [part.mask for part in parts if part.mask is not None]
        return replace(first, out=out, at=at, mask=torch.cat(masks) if masks else None)

    def _run(self, x: Any, until_seen: bool) -> Seen:
        if torch.compiler.is_compiling():  # it cannot see whether the weights have changed
            x = laid(x) if self.fast is not None and self.fast.channels_last else x
            seen = self.tapped.until_seen(x) if until_seen else self.tapped(x)
            return replace(seen, out=usual(seen.out))
        if not self._sought:
            self._seek(x)
        if self.fast is not None:
            return self.fast(x, until_seen)
        return self.tapped.until_seen(x) if until_seen and unhooked(self._modules) else self.tapped(x)

    def _checked_in_parts(self, x: Any) -> Seen:
        if self.batch is not None:
            self._refuse_rowless(x)
        return self._in_parts(self._checked)(x)

    def _checked(self, x: Any) -> Seen:
        seen = self.tapped.check(x)
        if not self._sought:
            self._seek(x)  # on the example, so that a resumed run goes the same way
        return seen

    def _seek(self, x: Any) -> None:
        self._sought = True
        self.fast = shortcut(self.tapped, x, fold=self.fold, channels_last=self.channels_last)

    def _answer(self, x: Any, ask: Any) -> Seen:
        if any(m.training for m in self._modules):  # someone called train() on a parent: undo it
            self.model.eval()
        first = next(iter(x.values())) if isinstance(x, Mapping) else x
        home, device = first.device, self.device or first.device
        here = next(self.model.parameters(), None)
        if here is not None and here.device != device:
            self.model.to(device)
        if self.normalise is not None:
            x = _normalised(x, self.normalise)
        if device != home:
            x = {k: v.to(device) for k, v in x.items()} if isinstance(x, Mapping) else x.to(device)
        if self.precision is None:
            seen = ask(x)
        else:
            with torch.autocast(device.type, self.precision):
                seen = ask(x)
        return self._as_asked(seen, home)

    def _as_asked(self, seen: Seen, home: torch.device) -> Seen:
        """The answer on the batch's device, in float32 if it was computed in less, with the student's
        classes."""

        def back(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return v
            return v.to(
                home, torch.float32 if self.precision is not None and v.is_floating_point() else v.dtype
            )

        out = back(seen.out)
        if self.columns is not None and out is not None:
            if self._columns > out.shape[1]:
                raise Refused(
                    f"`columns` asks the {self.tapped.called} for output {self._columns - 1}, and it has "
                    f"{out.shape[1]} (0 to {out.shape[1] - 1}); name its output for each of the student's "
                    "classes."
                )
            out = out.index_select(1, self.columns.to(home))
        at = {name: back(v) for name, v in seen.at.items()}
        return Seen(out, at, seen.mask, seen.model, seen.modules)


class MeanOf(Teacher):
    """A running mean of a learner's weights (Tarvainen & Valpola 2017; arXiv:1703.01780), moved after each of
    its steps.

    Float buffers are averaged and integer ones copied: a mean of the weights with the first day's BatchNorm
    statistics is no model. The decay grows as `min(1 - 1/(steps + 1), decay)`, so that early weights are
    forgotten.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        decay: float = 0.999,
        taps: Mapping[str, str] | None = None,
        view: View | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise Refused(f"The decay of a mean teacher is {decay}, expected a number in [0, 1); try 0.999.")
        self.learner, self.decay, self.steps = learner, decay, 0
        # Its weights move at every step, so what is folded would have to be folded anew each time.
        self.mean = Frozen(
            copy.deepcopy(learner),
            taps=taps,
            view=view,
            called="mean teacher",
            fold=False,
            channels_last=False,
        )

    @property
    def model(self) -> nn.Module:
        return self.mean.model

    def __call__(self, batch: Batch) -> Seen:
        return self.mean(batch)

    def at_taps(self, batch: Batch) -> Seen:
        return self.mean.at_taps(batch)

    def through(self, x: Any) -> Seen:
        return self.mean.through(x)

    def check(self, batch: Batch) -> Seen:
        return self.mean.check(batch)

    def how(self) -> str:
        return "live, a running mean"

    def look(self, names: Iterable[str]) -> None:
        self.mean.look(names)

    @torch.no_grad()
    def follow(self) -> None:
        self.steps += 1
        decay = min(1 - 1 / (self.steps + 1), self.decay)
        mine, theirs = _tensors(self.model), _tensors(self.learner)
        floats = [name for name, v in mine.items() if v.is_floating_point()]
        here, there = [mine[n] for n in floats], [theirs[n].to(mine[n].device) for n in floats]
        torch._foreach_lerp_(here, there, 1 - decay)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])


class Peer(Teacher):
    """A learner as another learner's teacher: it answers with what it has just shown in its own lesson,
    detached.

    So nothing is run twice, and the answer is that of a network in training, BatchNorm on the batch. The
    scheme calls `told` before anybody asks. Outside a lesson (`check`) the network is run on `example`, the
    example as this learner's own view shows it; whoever asks may see another, and nothing of it moves.
    """

    offers = frozenset[str]()

    def __init__(
        self,
        learner: nn.Module,
        example: Batch,
        *,
        taps: Mapping[str, str] | None = None,
        called: str = "peer",
    ) -> None:
        self.model, self.example, self.called = learner, example, called
        self.tapped = Tapped(learner, taps, called)
        self._shown: Seen | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The taps it is asked for, which its own lesson has to look at."""
        return self.tapped.names

    def told(self, shown: Seen) -> None:
        """What the learner showed for the batch at hand."""
        self._shown = shown.detach()

    def __call__(self, batch: Batch) -> Seen:
        assert self._shown is not None, f"{self.called} has shown nothing yet"
        return self._shown

    def through(self, x: Any) -> Seen:
        raise Refused(f"'{self.called}' learns while it teaches, so no gradient passes through it.")

    def look(self, names: Iterable[str]) -> None:
        self.tapped.look(names)

    def how(self) -> str:
        return "what it shows in its own lesson"

    def check(self, batch: Batch) -> Seen:
        with torch.no_grad(), unmoved(self.model), forked("dry run", self.called):
            return self.tapped.check(self.example.x)


class Ensemble(Teacher):
    """Several teachers with one voice: the log of their weighted mean probability. It has no inside, so it
    refuses taps.

    Probabilities are mixed, never logits: a confident teacher's large logits would drown the others.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None) -> None:
        if not teachers:
            raise Refused("An ensemble of no teachers was asked for; give it at least one.")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or not all(0 <= w < math.inf for w in weights) or sum(weights) == 0:
            raise Refused(
                f"An ensemble of {len(teachers)} teachers has weights {weights}; expected one number >= 0 "
                "for each, not all 0."
            )
        self.teachers = tuple(teachers)
        self.offers = frozenset({"teacher_gradient"}).intersection(*(one.offers for one in teachers))
        self.weights = [w / sum(weights) for w in weights]

    def __call__(self, batch: Batch) -> Seen:
        return self._mix([teacher(batch) for teacher in self.teachers])

    def through(self, x: Any) -> Seen:
        return self._mix([teacher.through(x) for teacher in self.teachers])

    def check(self, batch: Batch) -> Seen:
        return self._mix([teacher.check(batch) for teacher in self.teachers])

    def look(self, names: Iterable[str]) -> None:
        names = list(names)
        if names:
            raise Refused(
                f"An ensemble of teachers has no tap '{names[0]}': it mixes answers only; give the method "
                "one of its teachers, or all of them as `teachers`."
            )

    def how(self) -> str:
        return f"{len(self.teachers)} together: {'; '.join(teacher.how() for teacher in self.teachers)}"

    def follow(self) -> None:
        for teacher in self.teachers:
            teacher.follow()

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": [teacher.state_dict() for teacher in self.teachers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for teacher, its in zip(self.teachers, state["teachers"], strict=True):
            teacher.load_state_dict(its)

    def _mix(self, answers: list[Seen]) -> Seen:
        shapes = [tuple(a.out.shape) for a in answers]
        if len(set(shapes)) > 1:
            raise Refused(
                "An ensemble mixes answers of one shape, and its teachers answer "
                f"{', '.join(map(str, shapes))}; say with `columns` which of a teacher's outputs scores "
                "each class."
            )
        logs = torch.stack([a.out.log_softmax(1) for a in answers])
        weights = torch.tensor(self.weights, dtype=logs.dtype, device=logs.device)
        return Seen(torch.logsumexp(logs + weights.log().view(-1, *[1] * (logs.ndim - 1)), 0))


def _cut(x: Any, rows: int) -> Iterator[Any]:
    """The inputs of so many rows at a time."""
    if isinstance(x, Mapping):
        for part in zip(*(v.split(rows) for v in x.values()), strict=True):
            yield dict(zip(x, part, strict=True))
    else:
        yield from x.split(rows)


def each_once(teachers: Iterable[Teacher]) -> tuple[Teacher, ...]:
    """The same teachers in their order, each once: who is named by two terms is asked, and moves, once."""
    return tuple({id(teacher): teacher for teacher in teachers}.values())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once: a tied weight is in a `state_dict` twice, and would move twice."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _normalised(x: Any, normalise: tuple[Any, Any]) -> Any:
    if isinstance(x, Mapping):
        raise Refused(
            "`normalise` works on a single input tensor, found a mapping of inputs; normalise it in the "
            "teacher's view."
        )
    mean, std = (
        torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 2)) for v in normalise
    )
    return (x - mean) / std
