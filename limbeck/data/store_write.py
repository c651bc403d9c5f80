"""Writing a store, by one process or several, and asking the teacher again whether it still says so.

A shard's place on disk is taken before its first record, so a disk that is too small is met at the start. Its
batches are those a lesson shows, in that order, and after them the rows they leave over. Every few seconds
the records are brought to the disk and then, in one rename, the note of how far they go: whoever is killed
goes on from that note, with the same batches and so to the same bytes.

Processes that write side by side each take epochs of their own, or with a loader of `ranks` their rows of
each epoch. Each part (an epoch, a rank) has a lock that ends with its process; who ends the last part of a
shard seals it.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from limbeck.core.batch import Batch
from limbeck.core.keyed import generator
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Teacher
from limbeck.data.loader import Loader
from limbeck.data.records import Field, encode
from limbeck.data.store import (
    NOTE,
    Header,
    Store,
    class_names,
    data_witness,
    drawn,
    fingerprint,
    sha256,
    shown,
    witness,
)

NOTED = 5.0
"""Seconds of work that a kill may cost."""


@dataclass(frozen=True)
class Progress:
    """Rows done and in all, of all epochs asked for; `rate` rows a second, since this call began."""

    epoch: int
    done: int
    rows: int
    rate: float

    @property
    def seconds_left(self) -> float:
        return (self.rows - self.done) / self.rate if self.rate else math.inf


@dataclass(frozen=True)
class Deviation:
    """How far a teacher's answers now are from those stored: rows compared, the largest difference by name
    (of probabilities where the top is kept), and the share of the kept classes that are others now."""

    rows: int
    largest: dict[str, float]
    other_classes: float


def write(
    folder: str | Path,
    teacher: Teacher,
    loader: Loader,
    epochs: Sequence[int],
    *,
    kind: str | None = None,
    top: int = 10,
    taps: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> Iterator[Progress]:
    """Store the teacher's answers for every sample in each of `epochs`; go on where an earlier call ended.

    Nothing is written until the result is iterated, and everything is refused before: another run's store, a
    disk that this would fill by more than half of what is free, tensors that are not one record a sample.

    kind: how `out` is kept: "float32", "float16", "bfloat16", or "top" or "top-logits" for the `top` largest;
    None is float16 up to 256 classes and the top above. taps: features to keep, and how: "float32",
    "float16", "bfloat16" or "int8". device: where batches are shown.
    """
    folder = Path(folder)
    if not epochs or min(epochs) < 0:
        raise Refused(f"Epochs {list(epochs)} were asked to be stored; ask for one at least, from 0 on.")
    header = plan(teacher, loader, kind=kind, top=top, taps=taps, device=device)
    if (folder / NOTE).exists():
        _refuse_other(folder, header, loader, teacher)
    refuse_full(folder, header, epochs)
    return _written(folder, header, teacher, loader, epochs, device)


def refuse_full(folder: Path, header: Header, epochs: Sequence[int]) -> None:
    """Refuse to take more than half of what is free on the disk."""
    ahead = [epoch for epoch in epochs if not (folder / f"{epoch:06d}.bin").exists()]
    refuse_more(
        "The store",
        len(ahead) * header.shard_bytes,
        folder,
        f"store fewer epochs than {len(ahead)}, keep less of an answer than {header.record.itemsize} bytes "
        "(kind = 'top'), or name a folder on another disk",
    )


def refuse_more(what: str, need: int, place: Path, instead: str) -> None:
    """Refuse bytes that are more than half of what is free at a place."""
    near = place.absolute()
    near = next(here for here in (near, *near.parents) if here.exists())
    free = shutil.disk_usage(near).free
    if need > free / 2:
        raise Refused(
            f"{what} would take {need / 1e9:,.3g} GB of the {free / 1e9:,.3g} GB that are free at {near}, "
            f"more than half; {instead}."
        )


def plan(
    teacher: Teacher,
    loader: Loader,
    *,
    kind: str | None = None,
    top: int = 10,
    taps: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> Header:
    """The header of the store that `write` would write: `shard_bytes` is what an epoch takes."""
    if loader.per_class is not None and loader.ranks > 1:
        raise Refused(
            f"Batches of {loader.per_class} rows of a class may show a row to two of {loader.ranks} "
            "processes; let each process write epochs of its own, with a loader of one rank."
        )
    taps = dict(taps or {})
    teacher.look(taps)
    batch = drawn(loader, 0)
    seen = teacher.check(batch.to(torch.device(device)))
    for name, v in _tensors(seen, ("out", *taps)).items():
        if not isinstance(v, torch.Tensor) or v.ndim < 1 or len(v) != batch.rows or not v.is_floating_point():
            found = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__
            raise Refused(
                f"'{name}' of the teacher is {found} for {batch.rows} samples, expected a tensor of floats "
                "with a row for each; store one that gives a view's rows as they came."
            )
    kept = kind or ("float16" if seen.out.ndim == 1 or seen.out.shape[1] <= 256 else "top")
    fields = [Field("out", kept, tuple(seen.out.shape[1:]), top if kept.startswith("top") else 0)]
    fields += [Field(name, how, tuple(seen.at[name].shape[1:])) for name, how in sorted(taps.items())]
    return Header(
        fields=tuple(fields),
        samples=len(loader.data),
        seed=loader.seed,
        batch=loader.batch,
        ranks=loader.ranks,
        teacher=fingerprint(teacher),
        shown=shown(teacher, batch),
        classes=class_names(loader),
        data=data_witness(loader),
        views=witness(batch),
        torch=str(torch.__version__),
    )


def verify(
    folder: str | Path, teacher: Teacher, loader: Loader, sample: int = 1000, *, device: str = "cpu"
) -> Deviation:
    """Ask the teacher again for about `sample` rows, in whole batches drawn from all stored epochs.

    0 everywhere says that this machine answers bit for bit as the one that wrote the store. Raises `Refused`
    for another run's store and a damaged one.
    """
    store = Store(folder)
    store.check(loader, teacher)
    teacher.look(store.taps)
    steps = [(epoch, step) for epoch in store.epochs() for step in range(loader.steps)]
    order = torch.randperm(len(steps), generator=generator(loader.seed, "verify")).tolist()
    fields, rows, others, kept = store.header.fields, 0, 0, 0
    largest = dict.fromkeys((field.name for field in fields), 0.0)
    for epoch, step in (steps[k] for k in order[: max(1, math.ceil(sample * loader.ranks / loader.batch))]):
        batch = loader.at(epoch * loader.steps + step)
        assert batch.index is not None
        now = encode(fields, _answer(teacher, batch, fields, device))
        then = store.records(epoch, batch.index.numpy())
        rows += batch.rows
        for field in fields:
            a, b = field.decode(now), field.decode(then)
            if field.top:
                a, b = a.softmax(1), b.softmax(1)
                before, after = (r[f"{field.name}:class"] for r in (then, now))
                still = (before[..., :, None] == after[..., None, :]).any(-1)
                others, kept = others + int((~still).sum()), kept + still.size
            largest[field.name] = max(largest[field.name], float((a - b).abs().max()))
    return Deviation(rows, largest, others / max(kept, 1))


def _written(
    folder: Path, header: Header, teacher: Teacher, loader: Loader, epochs: Sequence[int], device: str
) -> Iterator[Progress]:
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        begin(folder, header, loader, teacher)
    began, asked, rows = time.monotonic(), 0, _mine(loader)
    for place, epoch in enumerate(epochs):
        for new, done in _part(folder, header, teacher, loader, epoch, device):
            asked += new
            rate = asked / max(time.monotonic() - began, 1e-9)
            yield Progress(epoch, place * rows + done, len(epochs) * rows, rate)


def _part(
    folder: Path, header: Header, teacher: Teacher, loader: Loader, epoch: int, device: str
) -> Iterator[tuple[int, int]]:
    """One epoch's rows of this rank: (rows asked for just now, rows of the epoch done)."""
    part = folder / f"{epoch:06d}.part-{loader.rank}-of-{loader.ranks}"
    with alone(part, f"epoch {epoch} of {folder}"):
        if not (folder / f"{epoch:06d}.json").exists():
            with shard_file(folder, epoch, header.shard_bytes) as shard:
                yield from _recorded(folder, header, teacher, loader, epoch, device, part, shard)
    yield 0, _mine(loader)


def _recorded(
    folder: Path,
    header: Header,
    teacher: Teacher,
    loader: Loader,
    epoch: int,
    device: str,
    part: Path,
    shard: int,
) -> Iterator[tuple[int, int]]:
    done, present = progress_of(part, header.samples)
    noted = time.monotonic()
    try:
        for batch in _batches(loader, epoch, done, present):
            assert batch.index is not None
            records = encode(header.fields, _answer(teacher, batch, header.fields, device))
            with on_disk(folder):
                for row, what in zip(batch.index.tolist(), records, strict=True):
                    if not present[row]:  # a row that comes twice is the first's
                        put(shard, what.tobytes(), row * header.record.itemsize)
                        present[row] = True
                done += 1
                if time.monotonic() - noted > NOTED:
                    note_progress(shard, part, done, present)
                    noted = time.monotonic()
            yield batch.rows, int(present.sum())
    except (GeneratorExit, KeyboardInterrupt):
        with suppress(OSError):
            note_progress(shard, part, done, present)
        raise
    with on_disk(folder):
        note_progress(shard, part, loader.steps + 1, present)
        seal(folder, header, loader, epoch, shard)


def _mine(loader: Loader) -> int:
    """The rows of an epoch that are this rank's."""
    dealt = loader.steps * loader.batch
    return dealt // loader.ranks + (0 if loader.rank else len(loader.data) - dealt)


def _batches(loader: Loader, epoch: int, done: int, present: np.ndarray) -> Iterator[Batch]:
    """This rank's batches of an epoch; rank 0 also takes the rows that are left over, in their order."""
    yield from loader.epoch(epoch, min(done, loader.steps))
    if loader.rank or done > loader.steps:
        return
    if loader.per_class is None:
        # The order of an epoch does not depend on the batch; in it pairs of rows stay pairs.
        single = Loader(loader.data, 1, seed=loader.seed, epochs=loader.epochs)
        n = len(loader.data)
        left = (single.drawn(epoch * n + k)[0] for k in range(loader.steps * loader.batch, n))
        rows = torch.tensor([int(row) for row in left], dtype=torch.long)
    else:
        rows = torch.from_numpy(np.flatnonzero(~present))
    lesson = loader.lesson(epoch, (epoch + 1) * loader.steps - 1)
    pairs, last = rows.tensor_split([len(rows) - len(rows) % 2])
    for some in pairs.split(loader.batch) if len(pairs) else ():
        yield loader.rows(some, lesson, loader.augment)
    alone: list[Batch] = []
    if len(last):
        with suppress(Refused):  # a view that mixes pairs has nothing to show of one row alone
            alone.append(loader.rows(last, lesson, loader.augment))
    yield from alone


def _answer(teacher: Teacher, batch: Batch, fields: Sequence[Field], device: str) -> dict[str, torch.Tensor]:
    return _tensors(teacher(batch.to(torch.device(device))), [field.name for field in fields])


def _tensors(seen: Seen, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: seen.out if name == "out" else seen.at[name] for name in names}


# --- on the disk ---


def begin(folder: Path, header: Header, loader: Loader, teacher: Teacher) -> None:
    """Write the header, unless another process has just done so."""
    mine = folder / f"{NOTE}.{os.getpid()}"
    _place(mine, header.text().encode())
    try:
        os.link(mine, folder / NOTE)  # a rename would overwrite
    except FileExistsError:
        _refuse_other(folder, header, loader, teacher)
    finally:
        mine.unlink()


def _refuse_other(folder: Path, header: Header, loader: Loader, teacher: Teacher) -> None:
    store = Store(folder)
    store.check(loader, teacher)
    begun, now = _how(store.header), _how(header)
    for what in sorted(begun.keys() | now.keys()):
        if begun.get(what) != now.get(what):
            raise Refused(
                f"{folder} was begun with {what} = {begun.get(what)}, and is now to be written with "
                f"{now.get(what)}; go on as it was begun, or name another folder."
            )


def _how(header: Header) -> dict[str, object]:
    kinds = {field.name: f"{field.kind} {field.top or ''} {field.shape}" for field in header.fields}
    return {**kinds, "batch": header.batch, "ranks": header.ranks}


@contextmanager
def shard_file(folder: Path, epoch: int, size: int) -> Iterator[int]:
    """The shard's file, open, with all of its place on the disk taken."""
    with on_disk(folder):
        shard = os.open(folder / f"{epoch:06d}.bin", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with on_disk(folder):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(shard, 0, size)
            else:
                os.truncate(shard, size)
        yield shard
    finally:
        os.close(shard)


def put(shard: int, data: bytes, at: int) -> None:
    while data:
        count = os.pwrite(shard, data, at)
        data, at = data[count:], at + count


def note_progress(shard: int, part: Path, done: int, present: np.ndarray) -> None:
    """The records first, then the note that they are there: a power cut leaves no promise of what is not."""
    os.fsync(shard)
    _place(part, done.to_bytes(8, "little") + _bits(present))


def progress_of(part: Path, samples: int) -> tuple[int, np.ndarray]:
    """Batches done and rows present; none of either where no whole note is."""
    data = part.read_bytes() if part.exists() else b""
    if len(data) != 8 + math.ceil(samples / 8):
        return 0, np.zeros(samples, bool)
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=8), count=samples, bitorder="little")
    return int.from_bytes(data[:8], "little"), bits.astype(bool)


def _bits(present: np.ndarray) -> bytes:
    return np.packbits(present, bitorder="little").tobytes()


def seal(folder: Path, header: Header, loader: Loader, epoch: int, shard: int) -> None:
    """Make the shard part of the store, if this was its last part."""
    from fcntl import LOCK_EX, flock  # late: who only reads needs no locks

    name = f"{epoch:06d}"
    parts = [folder / f"{name}.part-{rank}-of-{loader.ranks}" for rank in range(loader.ranks)]
    flock(shard, LOCK_EX)  # two ranks may end at once
    found = [progress_of(part, header.samples) for part in parts]
    if (folder / f"{name}.json").exists() or any(done <= loader.steps for done, _ in found):
        return
    present = np.logical_or.reduce([rows for _, rows in found])
    put(shard, _bits(present), header.samples * header.record.itemsize)
    os.fsync(shard)
    said = {
        "epoch": epoch,
        "sha256": sha256(folder / f"{name}.bin"),
        "present": int(present.sum()),
        "witness": witness(drawn(loader, epoch)),
    }
    _place(folder / f"{name}.json", json.dumps(said, indent=1).encode())
    for part in parts:
        part.unlink(missing_ok=True)


@contextmanager
def alone(part: Path, called: str) -> Iterator[None]:
    """Nobody else writes this part; a process that dies lets go of it."""
    from fcntl import LOCK_EX, LOCK_NB, flock

    path = part.with_name(f"{part.name}.lock")
    with on_disk(part.parent):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"Another process is writing {called}; wait for it, or write other epochs or ranks meanwhile."
            ) from None
        yield
        path.unlink(missing_ok=True)  # whoever still holds this file open finds the part done
    finally:
        os.close(lock)


def _place(path: Path, data: bytes) -> None:
    """Makes `data` the file's contents in one rename."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """An OSError becomes a sentence."""
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{folder} cannot be written ({error.strerror or error}); free some space or mend that, and do "
            "the same again: what was stored is still there and is gone on from."
        ) from error
