"""Data in memory or on the disk, and the batches drawn from it in an order fixed by (seed, epoch)."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch, Lesson, View
from limbeck.core.keyed import generator, number
from limbeck.core.refused import Refused

AHEAD = 2
"""Batches of `Unread` samples that are read while the one before them is learned from."""


@dataclass(frozen=True)
class Data:
    """Samples: `x` (n c h w) stays as small as it came (uint8) until its batch, which is `(x * scale - mean)
    / std`.

    x: a tensor, or `Unread`. y: long, -100 where nobody labelled the sample. classes: their names. files:
        tells the files the samples came from by their names and sizes; empty where nobody looked.
    """

    x: Any
    y: Int[Tensor, " n"]
    classes: tuple[str, ...]
    scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    files: str = ""

    def __post_init__(self) -> None:
        if len(self.x) == 0 or len(self.x) != len(self.y):
            raise Refused(
                f"The data has {len(self.x)} inputs and {len(self.y)} labels; expected as many of one as of "
                "the other, and at least one."
            )
        bad = (
            (~torch.isfinite(self.x)).flatten(1).any(1)
            if self.x.dtype.is_floating_point
            else torch.zeros(1, dtype=torch.bool)
        )
        if bad.any():
            raise Refused(
                f"The data has NaN or infinite values in {int(bad.sum())} of {len(self.x)} samples, first "
                f"in sample {int(bad.nonzero()[0])}; mend or drop them."
            )
        odd = (self.y != IGNORE) & ((self.y < 0) | (self.y >= len(self.classes)))
        if odd.any():
            raise Refused(
                f"Label {int(self.y[odd][0])} of sample {int(odd.nonzero()[0])} is outside the "
                f"{len(self.classes)} classes of the data (0 to {len(self.classes) - 1}); mend it, or use "
                f"{IGNORE} for a sample without a label."
            )

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        return self.to_float(self.x.index_select(0, index)), self.y[index]

    def to_float(self, x: Tensor) -> Tensor:
        """Rows of `x` as models see them, in torch's default dtype."""
        mean, std = (
            torch.as_tensor(v, dtype=torch.get_default_dtype(), device=x.device).reshape(
                -1, *[1] * (x.ndim - 2)
            )
            for v in (self.mean, self.std)
        )
        # In one copy and as few steps: room for each step's result would cost more than the step.
        return x.to(torch.get_default_dtype(), copy=True).mul_(self.scale / std).sub_(mean / std)

    def on(self, device: torch.device) -> "Data":
        """The same samples, with `x` on an accelerator if it takes at most half of what is free there, so
        that batches are cut and changed where they are needed; else as they are. What is unread goes there
        batch by batch."""
        if device.type != "cuda":
            return self
        if isinstance(self.x, Unread):
            return replace(self, x=self.x.on(device))
        if self.x.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, x=self.x.to(device))

    def standardised(self) -> "Data":
        """The same samples, which must be uint8; `mean` and `std` are now those of each of their channels,
        counted exactly. A channel that is all one value is only centred."""
        value = torch.arange(256, dtype=torch.float64) * self.scale
        counts = torch.zeros(self.x.shape[1], 256, dtype=torch.long)
        for first in range(0, len(self), 256):  # all at once they may not fit in memory
            for count, channel in zip(counts, self.x[first : first + 256].unbind(1), strict=True):
                count += torch.bincount(channel.flatten(), minlength=256)
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ value
        std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
        std[std == 0] = 1
        return replace(self, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def split(self, share: float, name: str) -> tuple["Data", "Data"]:
        """The rest, and `share` (0 … 1) of every class, drawn by `name` and by nothing else. The rest keeps
        at least one sample of each class, and those without a label."""
        if not 0 < share < 1:
            raise Refused(
                f"A validation split of {share} was asked for, expected a share between 0 and 1; try 0.1."
            )
        order = torch.randperm(len(self), generator=generator(name, "validation split"))
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for label in range(len(self.classes)):
            rows = order[self.y[order] == label]
            chosen[rows[: min(round(share * len(rows)), len(rows) - 1)]] = True
        if (found := int(chosen.sum())) < len(self.classes):
            raise Refused(
                f"A validation split of {share} takes {found} of {len(self):,} samples, fewer than the "
                f"{len(self.classes)} classes; ask for a larger share, or bring more labelled samples."
            )
        rest, drawn = (replace(self, x=self.x[kept], y=self.y[kept]) for kept in (~chosen, chosen))
        return rest, drawn

    def renormalised(
        self, mean: float | Sequence[float], std: float | Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """(mean, std) that turn this data's normalised values into those of a network that was trained under
        `mean` and `std`, both of values in the units of `x * scale`."""
        m, s, mine, spread = (torch.as_tensor(v) for v in (mean, std, self.mean, self.std))
        return (m - mine) / spread, s / spread

    def with_labels(self, budget: int, seed: int) -> "Data":
        """The same samples, with labels kept for `budget` of them: as equal a number of each class as can be,
        drawn by the seed."""
        labelled = int((self.y != IGNORE).sum())
        if not 0 <= budget <= labelled:
            raise Refused(
                f"A label budget of {budget} was asked for, and the data has {labelled} labelled samples; "
                f"ask for 0 to {labelled}."
            )
        order = torch.randperm(len(self), generator=generator(seed, "label budget"))
        order = order[self.y[order] != IGNORE]
        # Rank each sample within its class; the first of every class come first, then the seconds, ...
        same = self.y[order][:, None] == torch.arange(len(self.classes))
        place = (same.cumsum(0) * same).sum(1)
        kept = order[torch.argsort(place, stable=True)[:budget]]
        y = torch.full_like(self.y, IGNORE)
        y[kept] = self.y[kept]
        return replace(self, y=y)


@dataclass(frozen=True)
class Splits:
    """A data set: what is learned from, what choices are made on, and what is looked at once.

    unseen: a second thing to look at once, rows of classes that are in none of the others.
    """

    train: Data
    valid: Data
    test: Data
    unseen: Data | None = None

    def __post_init__(self) -> None:
        for called, part in (("validation", self.valid), ("test", self.test), ("unseen", self.unseen)):
            if part is not None and part.x.shape[1:] != self.train.x.shape[1:]:
                raise Refused(
                    f"A sample of the {called} data has shape {tuple(part.x.shape[1:])}, expected "
                    f"{tuple(self.train.x.shape[1:])}, the shape of the training data's; bring both to one."
                )
        if len(self.valid) < len(self.valid.classes):
            raise Refused(
                f"The validation data has {len(self.valid)} samples, fewer than its "
                f"{len(self.valid.classes)} classes; bring at least one of each."
            )

    def with_validation(self, share: float, name: str = "") -> "Splits":
        """The same test part, and another validation part: `share` (0 … 1) of every class of all the other
        samples, drawn by `name` (the data set's) and by nothing else."""
        if _kept(self.train) != _kept(self.valid):
            raise Refused(
                "The training and the validation data differ in classes, dtype, scale, mean or std, so no "
                "validation split can be drawn from both; bring them alike, or leave `valid` out."
            )
        unread = isinstance(self.train.x, Unread)
        x = self.train.x + self.valid.x if unread else torch.cat([self.train.x, self.valid.x])
        y = torch.cat([self.train.y, self.valid.y])
        train, valid = replace(self.train, x=x, y=y).split(share, name)
        return replace(self, train=train, valid=valid)


def _kept(data: Data) -> tuple[object, ...]:
    unread = type(data.x) if isinstance(data.x, Unread) else None
    return data.classes, data.x.dtype, unread, data.scale, data.mean, data.std


class Unread(ABC):
    """Samples that are read when a batch asks for them, and a few batches ahead while one is learned from: in
    threads, so what reads must do without Python's lock for most of its time, as Pillow's decoders do.

    `Data` and `Loader` ask of it what they ask of a tensor of samples. `x[5]` and `x[3:7]` are read at once;
    `x[rows]`, by a tensor of numbers or a mask, is fewer samples, still unread.

    device: where a batch goes once it is read.
    """

    dtype: torch.dtype
    device: torch.device

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """(n c h w)."""

    @abstractmethod
    def readers(self, index: Int[Tensor, " b"], lesson: Lesson | None) -> Iterable[Callable[[], np.ndarray]]:
        """What reads these samples, each (c h w) as a lesson shows it, or as it is. Threads call them."""

    @abstractmethod
    def chosen(self, index: Int[Tensor, " b"]) -> "Unread":
        """These samples alone, numbered anew."""

    @abstractmethod
    def on(self, device: torch.device) -> "Unread":
        """The same samples; a batch of them goes to another device."""

    @abstractmethod
    def __add__(self, other: "Unread") -> "Unread":
        """These samples and the others."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Tensor) -> Any:
        index = torch.arange(len(self))[rows]
        if isinstance(rows, Tensor):
            return self.chosen(index)
        return self.index_select(0, index) if index.ndim else self.index_select(0, index[None])[0]

    def index_select(self, axis: int, index: Int[Tensor, " b"]) -> Tensor:
        assert axis == 0, "samples are read whole"
        return next(self.batches([(index, None)]))

    def batches(self, asked: Iterable[tuple[Tensor, Lesson | None]]) -> Iterator[Tensor]:
        """The rows of each batch in turn. What cannot be read is refused when its batch is due."""
        pinned = self.device.type == "cuda"  # only from there are they copied while the device works on
        threads = ThreadPoolExecutor()
        waiting = deque[Callable[[], Tensor]]()
        try:
            for index, lesson in asked:
                waiting.append(self._begun(index, lesson, threads, pinned))
                if len(waiting) > AHEAD:
                    yield waiting.popleft()()
            while waiting:
                yield waiting.popleft()()
        finally:  # also when whoever drew the batches wants no more
            threads.shutdown(cancel_futures=True)

    def _begun(
        self, index: Tensor, lesson: Lesson | None, threads: ThreadPoolExecutor, pinned: bool
    ) -> Callable[[], Tensor]:
        """Have a batch read; what is given waits for it."""
        x = torch.empty(len(index), *self.shape[1:], dtype=self.dtype, pin_memory=pinned)
        places = x.numpy()

        def put(place: int, read: Callable[[], np.ndarray]) -> None:
            places[place] = read()

        parts = [threads.submit(put, *each) for each in enumerate(self.readers(index, lesson))]

        def finished() -> Tensor:
            for part in parts:
                part.result()
            return x.to(self.device, non_blocking=True)

        return finished


class Loader:
    """Batches of one data set. Which rows come in which batch is a function of (seed, epoch), so a run
    resumes anywhere.

    Every epoch is a new permutation, cut into full batches; what is left over waits for another epoch. A set
    smaller than a batch is one batch. With `ranks` processes each takes its part of every batch, equal for
    all. In an even batch rows 2i and 2i+1 of the permutation stay together, so that mixing views find their
    pair.

    With `per_class` a batch is so many rows of each of `batch / per_class` classes, drawn anew for each
    batch; unlabelled rows are not drawn. In an epoch, which has the same number of steps, a class gives all
    its groups of rows before it is shuffled anew. A group stays on one rank.

    `augment` are views of a batch whose x is still as small as it is kept; `once` goes without.
    """

    def __init__(
        self,
        data: Data,
        batch: int,
        *,
        seed: int,
        epochs: int = 1,
        rank: int = 0,
        ranks: int = 1,
        per_class: int | None = None,
        augment: Sequence[View] = (),
    ) -> None:
        least = 2 * ranks if ranks > 1 else 1  # rows for each process, in pairs
        if batch < 1 or batch % least:
            raise Refused(
                f"A batch of {batch} rows cannot be dealt to {ranks} process(es); ask for a positive "
                f"multiple of {least}."
            )
        if len(data) < least:
            raise Refused(
                f"A data set of {len(data)} cannot be dealt to {ranks} processes; bring {least} or more."
            )
        self.data, self.seed, self.epochs = data, seed, epochs
        self.batch = min(batch, len(data) - len(data) % least)
        self.rank, self.ranks = rank, ranks
        self.augment = tuple(augment)
        self.steps = len(data) // self.batch
        self.per_class = per_class
        self._members = None if per_class is None else _members(data, batch, ranks, per_class)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` of it."""
        steps = range(epoch * self.steps + start, (epoch + 1) * self.steps)
        return self._batches(map(self.drawn, steps), self.augment)

    def at(self, step: int, seed: int | None = None) -> Batch:
        """The batch of a step counted over all epochs. `seed` stands in for the loader's own."""
        return self.rows(*self.drawn(step, seed), self.augment)

    def once(self, batch: int) -> Iterator[Batch]:
        """Every row once, in order, as it is: for evaluation."""
        lesson = self.lesson(0, 0)
        return self._batches(((index, lesson) for index in torch.arange(len(self.data)).split(batch)), None)

    def rows(self, index: Int[Tensor, " b"], lesson: Lesson, augment: Sequence[View] | None = None) -> Batch:
        """A batch of these rows as a lesson shows them, through the views `augment`; None: as they are."""
        return next(self._batches([(index, lesson)], augment))

    def lesson(self, epoch: int, step: int) -> Lesson:
        return Lesson(
            self.seed, epoch, self.epochs, step, len(self.data), len(self.data.classes), self.data.y
        )

    def drawn(self, step: int, seed: int | None = None) -> tuple[Tensor, Lesson]:
        """The rows of a step counted over all epochs, and the lesson they are for; nothing is read."""
        epoch, place = divmod(step, self.steps)
        lesson = self.lesson(epoch, step)
        if seed is not None:
            lesson = replace(lesson, seed=seed)
        order = self._order(lesson.seed, epoch)
        share = self.batch // self.ranks
        first = place * self.batch + self.rank * share
        return order[first : first + share], lesson

    def _batches(
        self, drawn: Iterable[tuple[Tensor, Lesson]], augment: Sequence[View] | None
    ) -> Iterator[Batch]:
        """What is random is drawn here, in order, and views are run here: threads only read."""
        kept, home = self.data.x, self.data.x.device
        drawn, asked = tee(drawn)
        if isinstance(kept, Unread):
            xs = kept.batches((index, None if augment is None else lesson) for index, lesson in asked)
        else:  # copies whole samples; `x[index]` would go number by number
            xs = (kept.index_select(0, index.to(home)) for index, _ in asked)
        for (index, lesson), x in zip(drawn, xs, strict=True):
            batch = Batch(x, self.data.y[index].to(home), index.to(home), lesson)
            for view in augment or ():
                batch = view(batch)
            yield batch.replace(x=self.data.to_float(batch.x))

    def _order(self, seed: int, epoch: int) -> Int[Tensor, " n"]:
        key = (seed, epoch)
        if getattr(self, "_shuffled", (None,))[0] != key:
            self._shuffled = (key, self._shuffle(generator(seed, "order", epoch)))
        return self._shuffled[1]

    def _shuffle(self, draw: torch.Generator) -> Int[Tensor, " n"]:
        """The rows of an epoch, batch after batch."""
        if self._members is None or self.per_class is None:
            return torch.randperm(len(self.data), generator=draw)
        classes = self.batch // self.per_class
        chosen = torch.cat(
            [torch.randperm(len(self._members), generator=draw)[:classes] for _ in range(self.steps)]
        )
        order = torch.empty(len(chosen), self.per_class, dtype=torch.long)
        for place, rows in enumerate(self._members):
            turns = (chosen == place).nonzero()[:, 0]
            for some in turns.split(len(rows) // self.per_class):
                shuffled = rows[torch.randperm(len(rows), generator=draw)]
                order[some] = shuffled[: len(some) * self.per_class].view(-1, self.per_class)
        return order.flatten()


def _members(data: Data, batch: int, ranks: int, per_class: int) -> list[Int[Tensor, " m"]]:
    """The labelled rows of each class that has any."""
    if per_class < 1 or batch % (per_class * ranks):
        raise Refused(
            f"A batch of {batch} rows cannot be cut into groups of {per_class} rows of a class for each of "
            f"{ranks} process(es); ask for a multiple of {max(per_class, 1) * ranks}."
        )
    rows = {name: (data.y == number).nonzero()[:, 0] for number, name in enumerate(data.classes)}
    rows = {name: members for name, members in rows.items() if len(members)}
    if len(rows) < batch // per_class:
        raise Refused(
            f"A batch of {batch} rows, {per_class} of a class, takes {batch // per_class} classes, and the "
            f"data has labelled rows of {len(rows)}; make the batch smaller or per_class larger."
        )
    fewest = min(rows, key=lambda name: len(rows[name]))
    if len(rows[fewest]) < per_class:
        raise Refused(
            f"Class '{fewest}' has {len(rows[fewest])} labelled rows, and per_class asks for {per_class} of "
            "each class in a batch; lower it, or label more."
        )
    return list(rows.values())


class Streams:
    """Several loaders side by side: a dict of batches by stream. The longest stream is the epoch; shorter
    ones begin again.

    Each stream keeps its own place, a function of the number of steps taken. Through the lesson's seed each
    pass of each stream has an order and draws of its own: streams over the same samples never walk in step.
    """

    def __init__(self, loaders: Mapping[str, Loader]) -> None:
        self.loaders = dict(loaders)
        self.steps = max(loader.steps for loader in self.loaders.values())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Batch]]:
        for step in range(epoch * self.steps + start, (epoch + 1) * self.steps):
            yield self.at(step)

    def at(self, step: int) -> dict[str, Batch]:
        """The batches of a step counted over all epochs."""
        return {name: self._at(name, loader, step) for name, loader in self.loaders.items()}

    def _at(self, name: str, loader: Loader, step: int) -> Batch:
        drawn = loader.at(step, number(loader.seed, name, step // loader.steps))
        return drawn.replace(lesson=replace(drawn.lesson, epoch=step // self.steps, step=step))
