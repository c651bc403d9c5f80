"""A teacher's stored answers: it is asked once for every (epoch, sample), and then no more.

A store is a folder:

    store.json            what is kept of whom, written first and never changed
    000007.bin            the shard of epoch 7: a record for each sample, by the sample's index, then a
                          bitmap of the samples that are present
    000007.json           its sha256; the shard is part of the store from the moment this file is there
    000007.part-0-of-1    while it is written: how many batches are done, and the bitmap so far; somebody
                          who writes holds the lock beside it

Everything is little-endian and nothing is a pickle. Records stand in `records.py`. Views need no seed here,
as every draw is a hash of (seed, epoch, index), but a few numbers computed from what the loader showed tell
whether it still shows the same (`witness`).
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import generator, number
from limbeck.core.refused import Refused
from limbeck.core.teachers import Ensemble, Frozen, Teacher
from limbeck.data.loader import Loader
from limbeck.data.records import Field, record

FORMAT = 1
NOTE = "store.json"
WITNESSES = 8  # rows that are looked at to tell whether a view is the same
CLOSE = 1e-3  # far more than another machine's rounding, far less than another crop

Witness = dict[str, list[Any]]
"""`index`: rows; `value`: a number from what each showed."""


@dataclass(frozen=True)
class Header:
    """What is kept of whom.

    samples: of the data set. seed, batch, ranks: the loader's; the batches that the teacher was shown are
    those that a lesson with these shows. teacher: sha256 of its weights and of how it is asked. shown: a
    witness of what the teacher's own view makes of the first batch. classes: sha256 of the classes' names.
    data: a witness of the decoded samples. views: one of epoch 0's first batch as the loader shows it.
    """

    fields: tuple[Field, ...]
    samples: int
    seed: int
    batch: int
    ranks: int
    teacher: str
    shown: Witness
    classes: str
    data: Witness
    views: Witness
    torch: str

    @cached_property
    def record(self) -> np.dtype:
        return record(self.fields)

    @property
    def shard_bytes(self) -> int:
        return self.samples * self.record.itemsize + math.ceil(self.samples / 8)

    def text(self) -> str:
        columns = {c: [self.record[c].base.str, *self.record[c].shape] for c in self.record.names or ()}
        said = {"format": FORMAT, "byteorder": "little", **asdict(self), "record": columns}
        return json.dumps(said, indent=1)


class Absent(Refused):
    """A sample without an answer: the lesson did not show it in that epoch."""


class Store:
    """The answers in a folder, read-only. One shard is mapped at a time: memory does not grow with the store.

    The sha256 of a shard is checked when it is first opened. Raises `Refused`, naming the file, for what is
    not a store, damaged or another format's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self._open: tuple[int, np.ndarray, np.ndarray | None] | None = None
        self._sound: set[int] = set()

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.header.fields if field.name != "out")

    def epochs(self) -> list[int]:
        """Those that are wholly written, in order."""
        return sorted(int(note.stem) for note in self.folder.glob("[0-9]*.json"))

    def info(self) -> dict[str, Any]:
        """What a user wants to know, ready to be printed as JSON."""
        begun = {int(p.name.partition(".")[0]) for p in self.folder.glob("[0-9]*.bin")} - set(self.epochs())
        kept = {f.name: f"{f.kind} {f.top or ''}".strip() + f" of {f.shape}" for f in self.header.fields}
        return {
            "folder": str(self.folder),
            "samples": self.header.samples,
            "kept": kept,
            "bytes_per_sample": self.header.record.itemsize,
            "epochs": self.epochs(),
            "unfinished_epochs": sorted(begun),
            "bytes": sum(p.stat().st_size for p in self.folder.glob("[0-9]*.bin")),
            "seed": self.header.seed,
            "batch": self.header.batch,
            "teacher": self.header.teacher,
        }

    def records(self, epoch: int, index: Int[np.ndarray, " b"]) -> np.ndarray:
        """The records of some samples, in the order asked for."""
        records, present = self._shard(epoch)
        if len(index) and index.astype(np.uint64).max() >= self.header.samples:  # a number below 0 is huge
            raise Refused(
                f"Sample {index.min() if index.min() < 0 else index.max()} was asked of {self.folder}, which "
                f"holds samples 0 to {self.header.samples - 1}; use the data set it was written for."
            )
        if present is not None:
            there = (present[index >> 3] >> (index & 7)) & 1
            if not there.all():
                raise Absent(
                    f"{self.folder} has no answer for sample {index[there == 0][0]} in epoch {epoch}; a "
                    f"lesson must show the batches it was written with (batch = {self.header.batch}, seed = "
                    f"{self.header.seed})."
                )
        return records.take(index)

    def lacking(self, epoch: int) -> int:
        """How many samples have no answer in a finished epoch."""
        return int(self.header.samples - _note(self.folder / f"{epoch:06d}.json")["present"])

    def read(
        self, epoch: int, index: Int[Tensor, " b"], names: Sequence[str] = ("out",)
    ) -> dict[str, Tensor]:
        """The kept tensors of some samples by name, float32, on the CPU."""
        found = self.records(epoch, index.cpu().numpy())
        return {field.name: field.decode(found) for field in self.header.fields if field.name in names}

    def witness(self, epoch: int) -> Witness:
        """Of the first batch of an epoch, as the loader showed it when the shard was written."""
        return _note(self.folder / f"{epoch:06d}.json")["witness"]

    def check(self, loader: Loader, teacher: Teacher | None = None, *, views: bool = True) -> None:
        """Refuse a loader that shows something else than when this was written, or another teacher. Without
        `views` only its samples have to be the same."""
        h = self.header
        first = drawn(loader, 0)
        pairs = [
            ("samples", h.samples, len(loader.data), h.samples == len(loader.data)),
            ("classes", h.classes, class_names(loader), h.classes == class_names(loader)),
            ("decoded data", h.data, w := data_witness(loader), same(h.data, w)),
        ]
        if views and not h.views["index"]:
            raise Refused(
                f"{self.folder} was imported, and nobody knows what its teacher was shown; let the teacher's "
                "`epochs` be 'cycle'."
            )
        if views:
            pairs += [
                ("seed", h.seed, loader.seed, h.seed == loader.seed),
                ("views", h.views, w := witness(first), same(h.views, w)),
            ]
        if teacher is not None:
            pairs += [
                ("teacher", h.teacher, f := fingerprint(teacher), h.teacher == f),
                ("teacher's view", h.shown, w := shown(teacher, first), same(h.shown, w)),
            ]
        for what, kept, found, equal in pairs:
            if not equal:
                raise Refused(
                    f"{self.folder} is the store of another run: its {what} {_short(kept)}, here "
                    f"{_short(found)}; use what it was written with, or name another folder."
                )

    def _shard(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Its records, and the bitmap of those present unless all are."""
        if self._open is None or self._open[0] != epoch:
            self._open = (epoch, *self._mapped(epoch))
        return self._open[1:]

    def _mapped(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        note, path, h = self.folder / f"{epoch:06d}.json", self.folder / f"{epoch:06d}.bin", self.header
        if not note.exists():
            raise Refused(
                f"{self.folder} holds no answers for epoch {epoch}; it holds {span(self.epochs())}: write "
                "that epoch, or let the teacher's `epochs` be 'cycle'."
            )
        said = _note(note)
        size = path.stat().st_size if path.exists() else 0
        if size != h.shard_bytes:
            raise Refused(
                f"{path} has {size:,} bytes, expected {h.shard_bytes:,}; it was cut short, so restore it, or "
                f"remove it and {note.name} and write that epoch again."
            )
        if epoch not in self._sound and (found := sha256(path)) != said["sha256"]:
            raise Refused(
                f"{path} is damaged: its sha256 is {found[:12]}, expected {said['sha256'][:12]}; restore it, "
                f"or remove it and {note.name} and write that epoch again."
            )
        self._sound.add(epoch)
        # A plain array over the map: a memmap's own take would be slower.
        whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
        records = whole[: h.samples * h.record.itemsize].view(h.record)
        present = None if said["present"] == h.samples else whole[h.samples * h.record.itemsize :]
        return records, present


def read_header(folder: Path) -> Header:
    """What `store.json` says, once it is one that this machine can read."""
    note = _note(folder / NOTE)
    if sys.byteorder != "little" or note.get("byteorder") != "little":
        raise Refused(
            f"{folder} is {note.get('byteorder')}-endian and this machine {sys.byteorder}-endian, expected "
            "little-endian of both; write the store again."
        )
    if note.get("format") != FORMAT:
        raise Refused(
            f"{folder} is a store of format {note.get('format')!r}, expected {FORMAT}; read it with the "
            "limbeck that wrote it, or write it again."
        )
    try:
        fields = [Field(f["name"], f["kind"], tuple(f["shape"]), f["top"]) for f in note["fields"]]
        rest = {name: note[name] for name in Header.__dataclass_fields__ if name != "fields"}
        header = Header(tuple(fields), **rest)
        counts = (header.samples, header.batch, header.ranks)
        if not all(isinstance(n, int) and n > 0 for n in counts) or json.loads(header.text()) != note:
            raise ValueError("its entries do not fit each other")
    except Refused as error:
        raise Refused(f"{folder / NOTE} is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"{folder / NOTE} is damaged ({error}); restore it, or write the store again."
        ) from None
    return header


def span(epochs: Sequence[int]) -> str:
    if not epochs:
        return "none yet"
    whole = list(epochs) == list(range(epochs[0], epochs[-1] + 1))
    return f"{epochs[0]} to {epochs[-1]}" if whole and len(epochs) > 1 else ", ".join(map(str, epochs))


# --- who and what ---


def fingerprint(teacher: Teacher) -> str:
    """sha256 of a teacher's weights and of how it is asked. Raises `Refused` for one that does not stand
    still."""
    found = hashlib.sha256()
    if isinstance(teacher, Ensemble):
        for member in teacher.teachers:
            found.update(fingerprint(member).encode())
        found.update(repr(teacher.weights).encode())
        return found.hexdigest()
    if not isinstance(teacher, Frozen):
        raise Refused(
            f"A {type(teacher).__name__} teacher may answer otherwise tomorrow, so its answers are not "
            "stored; store those of a trained network (Frozen) or of an Ensemble of them."
        )
    for name, tensor in teacher.model.state_dict().items():
        v = tensor.detach().cpu().contiguous()
        found.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        found.update(v.reshape(-1).view(torch.uint8).numpy())
    normalise = [torch.as_tensor(part).tolist() for part in teacher.normalise or ()]
    columns = None if teacher.columns is None else teacher.columns.tolist()
    asked = (normalise, str(teacher.precision), columns, sorted(teacher.tapped.table.items()))
    found.update(f"{type(teacher.model).__name__} {asked}".encode())
    return found.hexdigest()


def drawn(loader: Loader, epoch: int) -> Batch:
    """The first batch of an epoch, of all ranks together."""
    if loader.ranks > 1:
        loader = Loader(
            loader.data,
            loader.batch,
            seed=loader.seed,
            epochs=loader.epochs,
            per_class=loader.per_class,
            augment=loader.augment,
        )
    return next(loader.epoch(epoch))


def witness(batch: Batch) -> Witness:
    """A number from what each of the first rows shows: its product with a fixed random direction."""
    assert batch.index is not None
    rows = batch.map(lambda v: v[:WITNESSES].cpu())
    parts = rows.x if isinstance(rows.x, Mapping) else {"x": rows.x}
    value = torch.zeros(rows.rows, dtype=torch.float64)
    for name, part in parts.items():
        flat = part.reshape(len(part), -1).double()
        direction = torch.randn(flat.shape[1], generator=generator("witness", name), dtype=torch.float64)
        value = value + flat @ direction / math.sqrt(flat.shape[1])
    return {"index": rows.index.tolist(), "value": value.tolist()}  # type: ignore[union-attr]


def data_witness(loader: Loader) -> Witness:
    """Of samples anywhere in the data, as they are without augmentation."""
    rows = sorted({number("data witness", k) % len(loader.data) for k in range(WITNESSES)})
    return witness(loader.rows(torch.tensor(rows), loader.lesson(0, 0)))


def shown(teacher: Teacher, batch: Batch) -> Witness:
    """Of what the teacher's own view, and those of an ensemble's members, make of a batch."""
    if isinstance(teacher, Ensemble):
        found = [shown(member, batch) for member in teacher.teachers]
        return {key: [v for one in found for v in one[key]] for key in ("index", "value")}
    view = getattr(teacher, "view", None)
    return {"index": [], "value": []} if view is None else witness(view(batch))


def same(a: Witness, b: Witness) -> bool:
    pairs = zip(a["value"], b["value"], strict=False)  # as many as rows, which are compared first
    return a["index"] == b["index"] and all(
        math.isclose(x, y, rel_tol=CLOSE, abs_tol=CLOSE) for x, y in pairs
    )


def class_names(loader: Loader) -> str:
    return hashlib.sha256("\n".join(loader.data.classes).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _note(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise Refused(
            f"{path} cannot be read ({error.strerror}), expected a store's; write one with "
            "`limbeck store write`, or correct the path."
        ) from None
    except ValueError as error:
        raise Refused(f"{path} is damaged ({error}); restore it, or write the store again.") from None
    if not isinstance(found, dict):
        raise Refused(f"{path} is damaged (a {type(found).__name__}); restore it, or write the store again.")
    return found


def _short(value: object) -> str:
    if isinstance(value, dict):
        return f"shows {[round(v, 3) for v in value['value'][:3]]} …"
    return f"is {value[:12] if isinstance(value, str) else value}"
