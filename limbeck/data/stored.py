"""A teacher that answers from a store: no network, no memory of one."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Teacher
from limbeck.data.store import Store, same, span, witness


class Stored(Teacher):
    """What a teacher once said of these samples under these views.

    Answers kept as float32 are those of the live teacher bit for bit, at equal chunk size, threads, machine
    and taps (fast paths depend on where a teacher is looked into). Methods that need the live teacher (its
    weights or gradient) refuse it by name.

    Args:
        store: the store, or its folder.
        epochs: "exact" refuses a lesson of another seed, data set or view, or longer than the store; "cycle"
            reuses the stored epochs in turn for a lesson of any seed and length, which is inexact: the
            teacher has then seen other views than the student.
    """

    offers = frozenset[str]()

    def __init__(self, store: Store | str | Path, *, epochs: str = "exact", called: str = "teacher") -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        self.exact, self.called = epochs == "exact", called
        self._names: tuple[str, ...] = ()
        self._epochs = self.store.epochs()
        self._compared: int | None = None
        if epochs not in ("exact", "cycle"):
            raise Refused(f"A stored teacher's epochs are '{epochs}', expected 'exact' or 'cycle'.")
        if not self._epochs:
            raise Refused(f"{self.store.folder} holds no finished epoch; write one first.")
        for epoch in () if self.exact else self._epochs:
            if lacking := self.store.lacking(epoch):
                raise Refused(
                    f"{self.store.folder} lacks {lacking} of {self.store.header.samples} samples in epoch "
                    f"{epoch}, which its batches left over, and a lesson that reuses epochs may show any; "
                    "write a store with `limbeck store write`, which asks for all."
                )

    # A compiler cannot follow a look into a file.
    @torch.compiler.disable
    def __call__(self, batch: Batch) -> Seen:
        if batch.index is None:
            raise Refused(f"The stored {self.called} knows samples by number, and the batch has no `index`.")
        epoch = batch.lesson.epoch
        if not self.exact:
            epoch = self._epochs[epoch % len(self._epochs)]
        else:
            self._refuse_other(batch)
        first = next(iter(batch.x.values())) if isinstance(batch.x, Mapping) else batch.x
        found = self.store.read(epoch, batch.index, ("out", *self._names))
        at = {name: found[name].to(first.device, non_blocking=True) for name in self._names}
        tokens = isinstance(batch.x, Mapping) and "attention_mask" in batch.x
        mask = batch.x["attention_mask"].bool() if tokens else None
        return Seen(found["out"].to(first.device, non_blocking=True), at, mask)

    def through(self, x: Any) -> Seen:
        raise Refused(f"The {self.called} is stored, so no gradient passes through it; use it live.")

    def how(self) -> str:
        return f"from a store, {self.store.header.record.itemsize} bytes a sample"

    def look(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.store.taps:
                raise Refused(
                    f"The store {self.store.folder} does not hold tap '{name}' of the {self.called}; it "
                    f"holds {', '.join(self.store.taps) or 'answers only'}: write it with that tap, or use "
                    "the teacher live."
                )
            if name not in self._names:
                self._names = (*self._names, name)

    def check(self, batch: Batch) -> Seen:
        self._compared = None
        missing = sorted(set(range(batch.lesson.epochs)) - set(self._epochs))
        if self.exact and missing:
            raise Refused(
                f"The lesson has {batch.lesson.epochs} epochs, and {self.store.folder} holds "
                f"{span(self._epochs)}: write epoch {missing[0]} and what follows, or let the teacher's "
                "`epochs` be 'cycle'."
            )
        return self(batch)

    def _refuse_other(self, batch: Batch) -> None:
        """A lesson in which the teacher was never asked: another seed, other samples, another view."""
        lesson, header = batch.lesson, self.store.header
        for what, found, kept in (
            ("seed", lesson.seed, header.seed),
            ("number of samples", lesson.samples or header.samples, header.samples),
        ):
            if found != kept:
                raise Refused(
                    f"The lesson's {what} is {found}, and {self.store.folder} was written for {kept}; write "
                    "one for this lesson, or let the teacher's `epochs` be 'cycle' if only the seed differs."
                )
        if lesson.epoch != self._compared and lesson.epoch in self._epochs:
            # The first batch of an epoch has the rows that were looked at; a resumed run may begin later.
            self._compared = lesson.epoch
            kept_rows = self.store.witness(lesson.epoch)
            count = len(kept_rows["index"])
            if batch.index is not None and batch.index[:count].tolist() == kept_rows["index"]:
                found_rows = witness(batch)
                if not same(found_rows, kept_rows):
                    raise Refused(
                        f"The lesson shows other views of the samples in epoch {lesson.epoch} than when "
                        f"{self.store.folder} was written; give it the same `augment` and data, or write it "
                        "again."
                    )
