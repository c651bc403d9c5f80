"""Answers that others stored: TinyViT's files, and a served language model's JSON lines.

They are read as they are, by key or by number (`TinyViT`, `served`), or brought into a store of ours
(`bring`), which then teaches as any store does. What they give is the target, log q (see `records.py`). Their
views are not ours, so such a store is for `epochs = "cycle"` only.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.data.loader import Loader
from limbeck.data.records import Field, dense, encode, spread
from limbeck.data.store import NOTE, Header, Witness, class_names, data_witness, read_header, same
from limbeck.data.store import sha256 as sha256_of
from limbeck.data.store_write import (
    Progress,
    alone,
    note_progress,
    on_disk,
    put,
    refuse_full,
    seal,
    shard_file,
)

TOGETHER = 256  # rows brought at once
UNSEEN: Witness = {"index": [], "value": []}  # what was shown to whoever answered
OVER_ONE = 1e-2  # by how much a hundred probabilities in half precision may sum to more


class TinyViT:
    """One epoch as microsoft/Cream's TinyViT saved it, in `root/logits_top{K}_epoch{epoch}/`.

    Each saving process left `rank{r}-keys.txt`, one key a line, and `rank{r}-values.bin`, a record for each
    key: the seed of the augmentation (int32), K classes (int16) and their probabilities (float16), the most
    probable first. A key that two processes saved is the lower rank's. Values are mapped, not loaded.
    Raises `Refused`, naming the file, where they do not fit each other.
    """

    def __init__(self, root: str | Path, epoch: int, classes: int) -> None:
        found = sorted(Path(root).glob(f"logits_top*_epoch{epoch}"))
        named = re.fullmatch(rf"logits_top(\d+)_epoch{epoch}", found[0].name) if len(found) == 1 else None
        if named is None:
            raise Refused(
                f"{root} has {len(found)} folders logits_top*_epoch{epoch}, expected one, as TinyViT saves "
                "it."
            )
        self.folder, self.classes, self.top = found[0], classes, int(named[1])
        if not 1 <= self.top <= classes:
            raise Refused(
                f"{self.folder} keeps {self.top} of {classes} classes; give the number of classes of its "
                "teacher."
            )
        record = np.dtype([("seed", "<i4"), ("class", "<i2", (self.top,)), ("p", "<f2", (self.top,))])
        self._at: dict[str, tuple[int, int]] = {}
        self._values: list[np.ndarray] = []
        for note, path in self.files():
            keys = note.read_text(encoding="utf-8").splitlines()
            size = path.stat().st_size
            if size != len(keys) * record.itemsize:
                raise Refused(
                    f"{path} has {size:,} bytes, expected {len(keys) * record.itemsize:,} for the "
                    f"{len(keys):,} keys of {note.name}; it was cut short, so get it again."
                )
            mine: dict[str, int] = {}
            for place, key in enumerate(keys):
                if (before := mine.setdefault(key, place)) != place:
                    raise Refused(
                        f"{note} has key '{key}' in lines {before + 1} and {place + 1}, expected it once; "
                        "its answers cannot be told apart, so save them again."
                    )
                self._at.setdefault(key, (len(self._values), place))
            self._values.append(np.memmap(path, record, "r") if keys else np.empty(0, record))

    def files(self) -> list[tuple[Path, Path]]:
        """Keys and values of each rank, in the order of ranks; each has both."""
        names = {int(p.name[4:].split("-")[0]): p for p in self.folder.iterdir() if _PACKAGE.match(p.name)}
        pairs = [
            (self.folder / f"rank{rank}-keys.txt", self.folder / f"rank{rank}-values.bin")
            for rank in sorted(names)
        ]
        for there, absent in (two for pair in pairs for two in (pair, pair[::-1])):
            if not absent.exists():
                raise Refused(f"{there} is there without {absent.name}; get both, or remove it.")
        if not pairs:
            raise Refused(
                f"{self.folder} has no rank0-keys.txt, as TinyViT saves it; it was not saved whole."
            )
        return pairs

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def read(self, keys: Sequence[str]) -> tuple[Int[Tensor, " b"], Float[Tensor, "b k"]]:
        """The seeds and log q of some samples."""
        absent = next((key for key in keys if key not in self._at), None)
        if absent is not None:
            raise Refused(f"{self.folder} has no key '{absent}'; give keys as the data set gave them.")
        rows = np.stack([self._values[package][place] for package, place in map(self._at.__getitem__, keys)])
        self._refuse_odd(rows)
        chosen = rows["class"].astype(np.int64)
        seeds = torch.from_numpy(rows["seed"].astype(np.int64))
        return seeds, torch.from_numpy(dense(chosen, spread(rows["p"], self.classes), self.classes))

    def _refuse_odd(self, rows: np.ndarray) -> None:
        """The format has no header that would tell; records that are none tell by themselves."""
        if _are_records(rows, self.classes):
            return
        if _are_records(rows.byteswap(), self.classes):
            raise Refused(
                f"{self.folder} is big-endian, as the machine that saved it, and expected little-endian; "
                "swap the bytes of each number, or save it again on another machine."
            )
        chosen = rows["class"].astype(np.int64)
        odd = (chosen < 0) | (chosen >= self.classes)
        if odd.any():
            raise Refused(
                f"{self.folder} has class {int(chosen[odd][0])}, expected 0 to {self.classes - 1}; above "
                "32,767 its format overflows, else give the number of classes of its teacher."
            )
        raise Refused(
            f"{self.folder} has records that are no {self.top} classes with falling probabilities; it is "
            "damaged, so get it again."
        )


_PACKAGE = re.compile(r"rank\d+-(keys\.txt|values\.bin)$")


def _are_records(rows: np.ndarray, classes: int) -> bool:
    """Whether they are what `TinyViT` reads: classes, each once, and probabilities that fall."""
    chosen, p = np.sort(rows["class"].astype(np.int64), 1), rows["p"].astype(np.float32)
    return bool(
        chosen[:, 0].min() >= 0
        and chosen[:, -1].max() < classes
        and (np.diff(chosen, axis=1) > 0).all()
        and (np.diff(p, axis=1) <= 0).all()
        and (p[:, -1] >= 0).all()
        and (p.sum(1) <= 1 + OVER_ONE).all()
    )


def served(path: str | Path, classes: int) -> Iterator[tuple[int, Float[Tensor, "n k"]]]:
    """(index, log q of each of its n positions) for each line of a file of top log-probabilities.

    A line is `{"index": 7, "top_logprobs": [{"318": -0.12, "257": -2.5}, …]}`: for each position the most
    probable token ids, as many as there are, each with its log-probability or an object with its `logprob`.
    `classes` is the size of the vocabulary. Raises `Refused` with the number of the line.
    """
    for _, index, positions in _lines(Path(path), classes):
        yield index, torch.stack([_target(logs, classes) for logs in positions])


def _lines(path: Path, classes: int) -> Iterator[tuple[int, int, list[dict[int, float]]]]:
    """The number of each line, its index, and the log-probability of each token that a position has."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                said = json.loads(line)
                positions = [_position(position, classes) for position in said["top_logprobs"]]
                index = int(said["index"])
                if not positions:
                    raise ValueError("it has no position")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Refused(
                    f'Line {number} of {path} is not {{"index": …, "top_logprobs": [{{"token id": log p}}]}} '
                    f"({error}); write it so."
                ) from None
            yield number, index, positions


def _position(said: Mapping[str, Any], classes: int) -> dict[int, float]:
    logs = {int(k): float(v["logprob"] if isinstance(v, dict) else v) for k, v in said.items()}
    if not logs or min(logs) < 0 or max(logs) >= classes or not max(logs.values()) <= 1e-3:
        raise ValueError(
            f"token ids must be 0 to {classes - 1}, at least one, and log-probabilities 0 at most"
        )
    return logs


def _target(logs: Mapping[int, float], classes: int) -> Tensor:
    chosen = sorted(logs, key=lambda token: -logs[token])
    p = np.exp(np.array([[logs[token] for token in chosen]]))
    return torch.from_numpy(dense(np.array([chosen]), spread(p, classes), classes))[0]


# --- into a store of ours ---


def bring(
    answers: str | Path, folder: str | Path, loader: Loader, keys: Sequence[str] | None = None
) -> Iterator[Progress]:
    """Bring others' answers into the store `folder`, for the samples of `loader`; what an earlier call has
    brought whole is left as it is.

    Args:
        answers: TinyViT's folder, with a folder for each epoch; or a served model's file, which is one epoch.
        keys: TinyViT's, of each sample in order; by default they are the samples' numbers. A file tells
            numbers.

    What is kept is the top K of K as it was saved (of a served model the largest K of any line), as
    probabilities. Raises `Refused`, before an epoch is written, for what does not fit: files, classes, a
    sample without an answer, an answer without a sample, the store of something else.
    """
    answers, folder, samples = Path(answers), Path(folder), len(loader.data)
    if keys is not None and (len(keys) != samples or len(set(keys)) != samples):
        raise Refused(
            f"There are {len(keys):,} keys, {len(set(keys)):,} of them different, and {samples:,} samples; "
            "give each sample its own key, in the order of the data."
        )
    source = _Epochs(answers, loader, keys) if answers.is_dir() else _Lines(answers, loader, keys)
    field = Field("out", "top", source.shape, source.top)
    header = Header(
        fields=(field,),
        samples=samples,
        seed=loader.seed,
        batch=loader.batch,
        ranks=1,
        teacher=source.mark,
        shown=UNSEEN,
        classes=class_names(loader),
        data=data_witness(loader),
        views=UNSEEN,
        torch=str(torch.__version__),
    )
    if (folder / NOTE).exists():
        _refuse_other(folder, header)
    refuse_full(folder, header, source.epochs)
    return _brought(folder, header, loader, source)


def _brought(folder: Path, header: Header, loader: Loader, source: "_Epochs | _Lines") -> Iterator[Progress]:
    began, brought, rows = time.monotonic(), 0, header.samples
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _begin(folder, header)
    for place, epoch in enumerate(source.epochs):
        part = folder / f"{epoch:06d}.part-0-of-1"
        with alone(part, f"epoch {epoch} of {folder}"):
            if not (folder / f"{epoch:06d}.json").exists():
                pieces = source.rows(epoch)  # refuses what does not fit
                with shard_file(folder, epoch, header.shard_bytes) as shard:
                    done = 0
                    for index, target in pieces:
                        records = encode(header.fields, {"out": target})
                        with on_disk(folder):
                            for row, what in zip(index, records, strict=True):
                                put(shard, what.tobytes(), row * header.record.itemsize)
                        done, brought = done + len(index), brought + len(index)
                        rate = brought / max(time.monotonic() - began, 1e-9)
                        yield Progress(epoch, place * rows + done, len(source.epochs) * rows, rate)
                    with on_disk(folder):
                        note_progress(shard, part, loader.steps + 1, np.ones(rows, bool))
                        seal(folder, header, loader, epoch, shard)
        rate = brought / max(time.monotonic() - began, 1e-9)
        yield Progress(epoch, (place + 1) * rows, len(source.epochs) * rows, rate)


Pieces = Iterator[tuple[Sequence[int], Tensor]]
"""Rows and log q of each (b k, or b k n), until every row was there."""


class _Epochs:
    """TinyViT's folders."""

    def __init__(self, root: Path, loader: Loader, keys: Sequence[str] | None) -> None:
        found = (re.fullmatch(r"logits_top\d+_epoch(\d+)", path.name) for path in root.iterdir())
        self.epochs = sorted(int(name[1]) for name in found if name)
        if not self.epochs:
            raise Refused(f"{root} has no folder logits_top*_epoch*, as TinyViT saves them; give theirs.")
        self.root, self.classes = root, len(loader.data.classes)
        self.samples, self.numbered = len(loader.data), keys is None
        self.keys = list(map(str, range(self.samples))) if keys is None else list(keys)
        first = TinyViT(root, self.epochs[0], self.classes)
        self.top, self.shape = first.top, (self.classes,)
        self.mark = sha256("".join(sha256_of(path) for _, path in first.files()).encode()).hexdigest()
        next(self.rows(self.epochs[0]))  # what does not fit at all is said before anything is written

    def rows(self, epoch: int) -> Pieces:
        saved = TinyViT(self.root, epoch, self.classes)
        if saved.top != self.top:
            raise Refused(
                f"{saved.folder} keeps {saved.top} classes and another epoch {self.top}; bring each alone."
            )
        if self.numbered:
            known = set(self.keys)
            for key in saved:
                if key not in known:
                    raise Refused(
                        f"{saved.folder} has key '{key}', and the data has samples 0 to {self.samples - 1}; "
                        "give the keys of its samples, or the data it was saved of."
                    )
        _refuse_lacking(saved.folder, [key for key in self.keys if key not in saved], self.samples)
        return (
            (range(first, first + len(some)), saved.read(some)[1])
            for first in range(0, self.samples, TOGETHER)
            if (some := self.keys[first : first + TOGETHER])
        )


class _Lines:
    """A served model's file: every line is read once before anything is written."""

    def __init__(self, path: Path, loader: Loader, keys: Sequence[str] | None) -> None:
        if keys is not None:
            raise Refused(f"{path} tells samples by their numbers, so keys say nothing; leave them out.")
        if not path.is_file():
            raise Refused(f"{path} is not there; give TinyViT's folder, or a file of JSON lines.")
        self.path, self.classes, self.epochs = path, len(loader.data.classes), [0]
        samples, lines, self.top, many = len(loader.data), dict[int, int](), 1, 0
        for number, index, positions in _lines(path, self.classes):
            if not 0 <= index < samples:
                raise Refused(
                    f"Line {number} of {path} is of sample {index}, and the data has samples 0 to "
                    f"{samples - 1}; give the data it was asked about."
                )
            if index in lines:
                raise Refused(
                    f"Lines {lines[index]} and {number} of {path} are both of sample {index}; keep one."
                )
            many = many or len(positions)
            if len(positions) != many:
                raise Refused(
                    f"Line {number} of {path} has {len(positions)} positions and line 1 has {many}, and a "
                    "store keeps records of one size; cut or pad them to one length."
                )
            lines[index] = number
            self.top = max(self.top, *map(len, positions))
        _refuse_lacking(path, [str(row) for row in range(samples) if row not in lines], samples)
        self.shape = (self.classes,) if many == 1 else (self.classes, many)
        self.mark = sha256_of(path)

    def rows(self, epoch: int) -> Pieces:
        for index, target in served(self.path, self.classes):
            yield [index], (target if len(self.shape) == 1 else target.T[None])


def _refuse_lacking(where: Path, lacking: Sequence[str], samples: int) -> None:
    if lacking:
        raise Refused(
            f"{where} has no answer for {len(lacking):,} of {samples:,} samples, first for '{lacking[0]}'; a "
            "lesson would ask for it, so get them all, or leave those samples out of the data."
        )


def _begin(folder: Path, header: Header) -> None:
    """Write the header, unless another process has just done so."""
    mine = folder / f"{NOTE}.{os.getpid()}"
    mine.write_text(header.text(), encoding="utf-8")
    try:
        os.link(mine, folder / NOTE)  # a rename would overwrite
    except FileExistsError:
        _refuse_other(folder, header)
    finally:
        mine.unlink()


def _refuse_other(folder: Path, header: Header) -> None:
    there = read_header(folder)
    for what, equal in (
        ("answers", there.teacher == header.teacher and there.fields == header.fields),
        ("samples", there.samples == header.samples and same(there.data, header.data)),
        ("classes", there.classes == header.classes),
    ):
        if not equal:
            raise Refused(
                f"{folder} is the store of another run: its {what} are others than those to be brought; name "
                "another folder."
            )
