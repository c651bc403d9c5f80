"""What a model is shown (Batch) and when (Lesson)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The label of a row nobody labelled. Tasks and methods skip it."""


@dataclass(frozen=True)
class Lesson:
    """The only clock, and the few facts about the training set that a method may need.

    `labels` (long, one per training sample, on the CPU) lets a memory bank know every sample's class at build
    time.
    """

    seed: int = 0
    epoch: int = 0
    epochs: int = 1
    step: int = 0
    samples: int = 0
    classes: int = 0
    labels: Tensor | None = None


_NO_LESSON = Lesson()


@dataclass(frozen=True)
class Batch:
    """Rows shown to a model.

    x: a tensor whose first axis is the rows, or a mapping of such tensors (then models are called by
        keyword).
    y: labels, `-100` where there is none; None when the data has no labels at all.
    index: each row's number in its data set (long); everything random about a row is a hash of it.
    labelled: what a mean over labelled rows divides by. None means "the labelled rows here, averaged over
        processes". The engine sets it when a step is cut into micro-batches, so that their sum is the true
        gradient.
    """

    x: Any
    y: Tensor | None = None
    index: Tensor | None = None
    lesson: Lesson = _NO_LESSON
    labelled: Tensor | None = None

    @property
    def rows(self) -> int:
        first = next(iter(self.x.values())) if isinstance(self.x, Mapping) else self.x
        return int(first.shape[0])

    def replace(self, **changes: Any) -> "Batch":
        """A copy with some fields changed. When the number of rows changes, `labelled` follows in
        proportion."""
        changed = replace(self, **changes)
        if self.labelled is not None and "labelled" not in changes and changed.rows != self.rows:
            changed = replace(changed, labelled=self.labelled * (changed.rows / self.rows))
        return changed

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `change` to every tensor of x, y and index (a move to a device, a slice of rows)."""
        x = {k: change(v) for k, v in self.x.items()} if isinstance(self.x, Mapping) else change(self.x)
        y, index = (None if v is None else change(v) for v in (self.y, self.index))
        return replace(self, x=x, y=y, index=index)

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda v: v.to(device, non_blocking=True))

    def split(self, parts: int) -> Iterator["Batch"]:
        """Cut the rows into `parts` consecutive batches of nearly equal size (at most one row apart)."""
        edges = [self.rows * i // parts for i in range(parts + 1)]
        for a, b in pairwise(edges):
            yield self.map(lambda v, a=a, b=b: v[a:b])  # type: ignore[misc]


View = Callable[[Batch], Batch]
"""What a model is shown instead. Draws only from `keyed(lesson, index, purpose)`; same purpose, same draw."""
