"""Answers that others stored, read-only: TinyViT's files, and a served language model's JSON lines.

Their views are not ours, so they are no `Stored` teacher; what they give is the target, log q (see
`records.py`), by key or by number.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.data.records import dense, spread


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
        notes = self.folder.glob("rank*-keys.txt")
        for note in sorted(notes, key=lambda path: int(re.sub(r"\D", "", path.name))):
            keys = note.read_text(encoding="utf-8").splitlines()
            path = note.with_name(note.name.replace("-keys.txt", "-values.bin"))
            size = path.stat().st_size if path.exists() else 0
            if size != len(keys) * record.itemsize:
                raise Refused(
                    f"{path} has {size:,} bytes, expected {len(keys) * record.itemsize:,} for the "
                    f"{len(keys):,} keys of {note.name}; it was cut short, so get it again."
                )
            for place, key in enumerate(keys):
                self._at.setdefault(key, (len(self._values), place))
            self._values.append(np.memmap(path, record, "r") if keys else np.empty(0, record))

    def __len__(self) -> int:
        return len(self._at)

    def read(self, keys: Sequence[str]) -> tuple[Int[Tensor, " b"], Float[Tensor, "b k"]]:
        """The seeds and log q of some samples."""
        absent = next((key for key in keys if key not in self._at), None)
        if absent is not None:
            raise Refused(f"{self.folder} has no key '{absent}'; give keys as the data set gave them.")
        rows = np.stack([self._values[package][place] for package, place in map(self._at.__getitem__, keys)])
        chosen = rows["class"].astype(np.int64)
        odd = (chosen < 0) | (chosen >= self.classes)
        if odd.any():
            raise Refused(
                f"{self.folder} has class {int(chosen[odd][0])}, expected 0 to {self.classes - 1}; above "
                "32,767 its format overflows, else give the number of classes of its teacher."
            )
        seeds = torch.from_numpy(rows["seed"].astype(np.int64))
        return seeds, torch.from_numpy(dense(chosen, spread(rows["p"], self.classes), self.classes))


def served(path: str | Path, classes: int) -> Iterator[tuple[int, Float[Tensor, "n k"]]]:
    """(index, log q of each of its n positions) for each line of a file of top log-probabilities.

    A line is `{"index": 7, "top_logprobs": [{"318": -0.12, "257": -2.5}, …]}`: for each position the most
    probable token ids, as many as there are, each with its log-probability or an object with its `logprob`.
    `classes` is the size of the vocabulary. Raises `Refused` with the number of the line.
    """
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                said = json.loads(line)
                index = int(said["index"])
                targets = [_position(position, classes) for position in said["top_logprobs"]]
                target = torch.stack(targets)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise Refused(
                    f'Line {number} of {path} is not {{"index": …, "top_logprobs": [{{"token id": log p}}]}} '
                    f"({error}); write it so."
                ) from None
            yield index, target


def _position(said: dict[str, object], classes: int) -> Tensor:
    logs = {int(k): float(v["logprob"] if isinstance(v, dict) else v) for k, v in said.items()}  # type: ignore[arg-type]
    if not logs or min(logs) < 0 or max(logs) >= classes or not max(logs.values()) <= 1e-3:
        raise ValueError(
            f"token ids must be 0 to {classes - 1}, at least one, and log-probabilities 0 at most"
        )
    chosen = sorted(logs, key=lambda token: -logs[token])
    p = np.exp(np.array([[logs[token] for token in chosen]]))
    return torch.from_numpy(dense(np.array([chosen]), spread(p, classes), classes))[0]
