"""Published data sets: where on this machine their files are, whether they are the files that were published,
and the part of them that choices are made on.

Scores are compared over years and machines; they mean nothing once an image, or the split, has moved.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from limbeck.core.keyed import generator
from limbeck.core.refused import Refused
from limbeck.data.loader import Data


def find(
    called: str,
    folder: str,
    forms: Sequence[Sequence[str]],
    get: str,
    root: Path | None = None,
    elsewhere: Sequence[Path] = (),
) -> list[Path]:
    """The files of a data set: of the first place that has any of its forms whole, the first such form.

    A form is the names of all its files. Looked in: `root` and nowhere else if it is given; otherwise
    `folder` in the folder that LIMBECK_DATA names, then `elsewhere`. `get` ends the refusal: how to get the
    files.
    """
    shelf = os.environ.get("LIMBECK_DATA")
    places = [Path(root)] if root else [*([Path(shelf) / folder] if shelf else []), *elsewhere]
    looked = []
    for place in places:
        absent = [[name for name in form if not (place / name).is_file()] for form in forms]
        for form, lacks in zip(forms, absent, strict=True):
            if not lacks:
                return [place / name for name in form]
        begun = [lacks for form, lacks in zip(forms, absent, strict=True) if len(lacks) < len(form)]
        if begun:
            nearest = min(begun, key=len)
            looked.append(f"{place} (lacks {', '.join(nearest)})")
        else:
            looked.append(f"{place} ({'none of its files' if place.is_dir() else 'no such folder'})")
    if not root and not shelf:
        looked.insert(0, f"LIMBECK_DATA/{folder} (the environment variable LIMBECK_DATA is not set)")
    raise Refused(f"{called} was not found; looked in {', '.join(looked)}; {get}.")


def read(path: Path, pinned: dict[str, str]) -> bytes:
    """The bytes of a file, once their sha256 is the one pinned for its name."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from None
    found, expected = sha256(content).hexdigest(), pinned[path.name]
    if found != expected:
        raise Refused(
            f"{path} is not the published file: its {len(content):,} bytes have the sha256 {found}, "
            f"expected {expected}; it was cut short, damaged or changed, so get it again."
        )
    return content


def within(labels: np.ndarray, classes: int, called: Path | str) -> torch.Tensor:
    """A file's labels as Data wants them; the first that is no class is refused with the file's name."""
    odd = np.flatnonzero(labels >= classes)
    if len(odd):
        raise Refused(
            f"{called} has label {labels[odd[0]]} for sample {odd[0]}, expected 0 to {classes - 1}; it is "
            "damaged, so get it again."
        )
    return torch.from_numpy(labels.astype(np.int64))


def split(whole: Data, one_in: int, name: str) -> tuple[Data, Data]:
    """What is learned from, and what choices are made on: of every class one sample in `one_in`, drawn by the
    set's name and by nothing else."""
    order = torch.randperm(len(whole), generator=generator(name, "validation split"))
    chosen = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(len(whole.classes)):
        rows = order[whole.y[order] == label]
        chosen[rows[: len(rows) // one_in]] = True
    train, valid = (replace(whole, x=whole.x[kept], y=whole.y[kept]) for kept in (~chosen, chosen))
    return train, valid
