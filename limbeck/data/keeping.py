"""A live teacher whose answers are stored as it gives them, and read where they are already there.

The first student that learns under it pays for it; those that follow, in the same lesson under the same
views, read. All learn from the very same numbers: what is handed on is always what the store gives back.
"""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Teacher
from limbeck.data.loader import Loader
from limbeck.data.records import encode
from limbeck.data.store import Absent, Header, Store, drawn, same, shown, witness
from limbeck.data.store_write import (
    NOTED,
    alone,
    begin,
    note_progress,
    on_disk,
    plan,
    progress_of,
    refuse_full,
    seal,
    shard_file,
)

TAPS_AS = "float16"
"""How tapped features are kept."""


class Keeping(Teacher):
    """Args:
        teacher: who answers what is not stored yet; it must stand still (`Frozen`, or an `Ensemble`).
        loader: whose batches it is shown.
        place: the folder for stores, each of which has a folder of its own there: what is asked of another
            teacher, under other views or of other taps is another store. None: nothing is written.
        called: its name, which a store's folder begins with.

    Answers are kept as `limbeck.data.store_write.write` does by default, once `check` has seen that they can
    be; before that, in dry runs, nothing is written. The teacher answers in its own precision, whatever the
    lesson computes in, so that it does not matter who asked first. Methods that need the live teacher refuse
    it by name, as they do a `Stored` one. Where another process is writing the same epoch this one only
    answers.
    """

    offers = frozenset[str]()

    def __init__(self, teacher: Teacher, loader: Loader, place: Path | None, called: str = "teacher") -> None:
        self.teacher, self.loader, self.place, self.called = teacher, loader, place, called
        self._names: tuple[str, ...] = ()
        self._planned: Header | None = None
        self._folder: Path | None = None
        self._shard: _Shard | None = None
        self._checked = False
        self._device = torch.device("cpu")

    @property
    def header(self) -> Header:
        """What is kept of whom."""
        if self._planned is None:
            taps = dict.fromkeys(self._names, TAPS_AS)
            self._planned = plan(self.teacher, self.loader, taps=taps, device=str(self._device))
        return self._planned

    @property
    def folder(self) -> Path | None:
        """Where this very lesson's answers are."""
        if self._folder is None and self.place is not None:
            # The header tells of epoch 0, where a view of old draws still shows what every other one does.
            later = drawn(self.loader, 1)
            told = f"{self.header.text()} {witness(later)} {shown(self.teacher, later)}"
            key = sha256(told.encode()).hexdigest()[:12]
            self._folder = self.place / f"{quote(self.called, safe=' ')}-{key}"
        return self._folder

    @property
    def kept(self) -> str:
        """What is kept of whom, in words."""
        return f"{self.called}'s {' and '.join(['answers', *self._names])}"

    @property
    def bytes(self) -> int:
        """What all epochs of the lesson take on the disk."""
        return self.header.shard_bytes * self.loader.epochs

    # A compiler cannot follow a look into a file.
    @torch.compiler.disable
    def __call__(self, batch: Batch) -> Seen:
        if batch.index is None:
            raise Refused(
                f"The answers of the {self.called} are kept by the samples' numbers, and the batch has no "
                "`index`; leave its `store` out."
            )
        index = batch.index.cpu().numpy()
        shard = self._of(batch.lesson.epoch)
        found = None if shard is None else shard.read(index)
        if found is None:
            with torch.autocast(batch.index.device.type, enabled=False):
                found = self._recorded(self.teacher(batch))
            if shard is not None:
                found = shard.write(index, found)
        if shard is not None and (batch.lesson.step + 1) % self.loader.steps == 0:
            shard.end()
        return self._seen(found, batch)

    def through(self, x: Any) -> Seen:
        raise Refused(
            f"The {self.called} is stored as it answers, so no gradient passes through it; leave its `store` "
            "out."
        )

    def look(self, names: Iterable[str]) -> None:
        names = [name for name in names if name not in self._names]
        self.teacher.look(names)
        self._names, self._planned, self._folder = (*self._names, *names), None, None

    def check(self, batch: Batch) -> Seen:
        rows = batch.rows if batch.index is None else len(batch.index.unique())
        if batch.index is None or rows < batch.rows:
            raise Refused(
                f"The {self.called} is shown {batch.rows} rows of {rows} samples at once, and a store keeps "
                "one answer for each; leave its `store` out."
            )
        if self.loader.per_class is not None and self._mixes():
            raise Refused(
                f"With `per_class` a sample may come twice in an epoch, and is shown to the {self.called} "
                "mixed with another one each time, where a store keeps one answer; leave its `store` out."
            )
        self._device = batch.index.device
        if (folder := self.folder) is not None:
            refuse_full(folder, self.header, range(self.loader.epochs))
        self._checked = True
        return self._seen(self._recorded(self.teacher.check(batch)), batch)

    def how(self) -> str:
        return f"stored as it answers, {self.header.record.itemsize} bytes a sample; {self.teacher.how()}"

    def _mixes(self) -> bool:
        """Whether what is shown of a row depends on its neighbours."""
        batch, view = self.loader.at(0), getattr(self.teacher, "view", None)
        assert batch.index is not None
        beside_others = self.loader.rows(batch.index.roll(1), batch.lesson, self.loader.augment)
        one, other = (part if view is None else view(part) for part in (batch, beside_others))
        return not same(witness(one.map(lambda v: v.roll(1, 0))), witness(other))

    def _of(self, epoch: int) -> "_Shard | None":
        """The shard of an epoch; None where nothing is to be written."""
        if not self._checked or self.place is None:
            return None
        if self._shard is None:
            folder = self.folder
            assert folder is not None
            with on_disk(folder):
                folder.mkdir(parents=True, exist_ok=True)
                begin(folder, self.header, self.loader, self.teacher)
            self._shard = _Shard(folder, self.header, self.loader, epoch)
        elif self._shard.epoch != epoch:
            self._shard.close()
            self._shard = _Shard(self._shard.folder, self.header, self.loader, epoch)
        return self._shard

    def _recorded(self, seen: Seen) -> np.ndarray:
        tensors = {"out": seen.out, **{name: seen.at[name] for name in self._names}}
        return encode(self.header.fields, tensors)

    def _seen(self, found: np.ndarray, batch: Batch) -> Seen:
        first = next(iter(batch.x.values())) if isinstance(batch.x, dict) else batch.x
        told = {
            field.name: field.decode(found).to(first.device, non_blocking=True)
            for field in self.header.fields
        }
        tokens = isinstance(batch.x, dict) and "attention_mask" in batch.x
        return Seen(told.pop("out"), told, batch.x["attention_mask"].bool() if tokens else None)


class _Shard:
    """One epoch of a store that is being written, or is there already."""

    def __init__(self, folder: Path, header: Header, loader: Loader, epoch: int) -> None:
        self.folder, self.header, self.loader, self.epoch = folder, header, loader, epoch
        self._part = folder / f"{epoch:06d}.part-0-of-1"
        self._open = ExitStack()
        self._store: Store | None = None
        self._records: np.ndarray | None = None
        if (folder / f"{epoch:06d}.json").exists():
            self._found()
            return
        try:
            self._open.enter_context(alone(self._part, f"epoch {epoch} of {folder}"))
        except Refused:
            return  # another process has it
        self._file = self._open.enter_context(shard_file(folder, epoch, header.shard_bytes))
        with on_disk(folder):
            _, self._present = progress_of(self._part, header.samples)
            whole = np.memmap(folder / f"{epoch:06d}.bin", np.uint8, "r+")
        self._records = whole[: header.samples * header.record.itemsize].view(header.record)
        self._noted = time.monotonic()

    def read(self, index: np.ndarray) -> np.ndarray | None:
        """The records of these samples; None unless all are there."""
        if self._store is not None:
            try:
                return self._store.records(self.epoch, index)
            except Absent:
                return None
        if self._records is None or not self._present[index].all():
            return None
        return np.asarray(self._records.take(index))

    def write(self, index: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Put records where they belong, and give what is there now: of a row that was there the first."""
        if self._records is None:
            return found
        new = ~self._present[index]
        self._records[index[new]] = found[new]
        self._present[index] = True
        if time.monotonic() - self._noted > NOTED:
            self._note(0)
        return np.asarray(self._records.take(index))

    def end(self) -> None:
        """Make it part of the store, if it is not and the epoch's last batch is there whole."""
        if self._records is None or not self._present[self._last_rows()].all():
            return
        self._note(self.loader.steps + 1)
        with on_disk(self.folder):
            seal(self.folder, self.header, self.loader, self.epoch, self._file)
        self._records = None
        self._open.close()
        self._found()

    def close(self) -> None:
        """Let others write it, from where it is."""
        if self._records is not None:
            self._note(0)
            self._records = None
        self._open.close()

    def _note(self, done: int) -> None:
        with on_disk(self.folder):
            note_progress(self._file, self._part, done, self._present)
        self._noted = time.monotonic()

    def _found(self) -> None:
        store = Store(self.folder)
        # A view of somebody's own may change with the epoch: what it shows now is asked for now.
        if same(store.witness(self.epoch), witness(drawn(self.loader, self.epoch))):
            self._store = store

    def _last_rows(self) -> np.ndarray:
        last, _ = self.loader.drawn((self.epoch + 1) * self.loader.steps - 1)
        return last.numpy()
