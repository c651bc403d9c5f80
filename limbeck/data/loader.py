"""Data in memory, and the batches drawn from it in an order fixed by (seed, epoch)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch, Lesson
from limbeck.core.keyed import generator, number
from limbeck.core.refused import Refused


@dataclass(frozen=True)
class Data:
    """Samples in memory. `x` (n c h w) stays as small as it came (uint8) until its batch, which is `(x *
    scale - mean) / std`.

    y: long, -100 where nobody labelled the sample. classes: their names.
    """

    x: Tensor
    y: Int[Tensor, " n"]
    classes: tuple[str, ...]
    scale: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if len(self.x) == 0 or len(self.x) != len(self.y):
            raise Refused(
                f"The data has {len(self.x)} inputs and {len(self.y)} labels; expected as many of one as of "
                "the other, and at least one."
            )
        bad = (
            (~torch.isfinite(self.x)).flatten(1).any(1)
            if self.x.is_floating_point()
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
        x = self.x[index].float() * self.scale
        mean, std = (torch.as_tensor(v).reshape(-1, *[1] * (x.ndim - 2)) for v in (self.mean, self.std))
        return (x - mean) / std, self.y[index]

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
    """A data set: what is learned from, what choices are made on, and what is looked at once."""

    train: Data
    valid: Data
    test: Data


class Loader:
    """Batches of one data set. Which rows come in which batch is a function of (seed, epoch), so a run
    resumes anywhere.

    Every epoch is a new permutation, cut into full batches; what is left over waits for another epoch. A set
    smaller than a batch is one batch. With `ranks` processes each takes its part of every batch, equal for
    all. In an even batch rows 2i and 2i+1 of the permutation stay together, so that mixing views find their
    pair.
    """

    def __init__(
        self, data: Data, batch: int, *, seed: int, epochs: int = 1, rank: int = 0, ranks: int = 1
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
        self.steps = len(data) // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` of it."""
        for step in range(start, self.steps):
            yield self.at(epoch * self.steps + step)

    def at(self, step: int, seed: int | None = None) -> Batch:
        """The batch of a step counted over all epochs. `seed` stands in for the loader's own."""
        epoch, place = divmod(step, self.steps)
        lesson = self.lesson(epoch, step)
        if seed is not None:
            lesson = replace(lesson, seed=seed)
        order = self._order(lesson.seed, epoch)
        share = self.batch // self.ranks
        first = place * self.batch + self.rank * share
        return self.rows(order[first : first + share], lesson)

    def once(self, batch: int) -> Iterator[Batch]:
        """Every row once, in order: for evaluation."""
        for index in torch.arange(len(self.data)).split(batch):
            yield self.rows(index, self.lesson(0, 0))

    def rows(self, index: Int[Tensor, " b"], lesson: Lesson) -> Batch:
        x, y = self.data.rows(index)
        return Batch(x, y, index, lesson)

    def lesson(self, epoch: int, step: int) -> Lesson:
        return Lesson(
            self.seed, epoch, self.epochs, step, len(self.data), len(self.data.classes), self.data.y
        )

    def _order(self, seed: int, epoch: int) -> Int[Tensor, " n"]:
        key = (seed, epoch)
        if getattr(self, "_shuffled", (None,))[0] != key:
            self._shuffled = (key, torch.randperm(len(self.data), generator=generator(seed, "order", epoch)))
        return self._shuffled[1]


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
