"""The files that CIFAR-10 and CIFAR-100 come in: the official binary version, as an archive or unpacked; or
`.npz` files of differences between neighbouring pixels, which are a third smaller and lose nothing.
"""

import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.data.published import read, within

IMAGE = (3, 32, 32)  # red, green, blue; a plane is stored row by row


def parts(
    files: Sequence[Path], pinned: dict[str, str], members: Sequence[str], label_bytes: int, classes: int
) -> list[tuple[Tensor, Tensor]]:
    """The images and labels of each file in order; an archive is its `members` in order, never unpacked to
    disk."""
    found = []
    for path in files:
        for called, content in _opened(path, read(path, pinned), members):
            if path.suffix == ".npz":
                x, y = _differences(content, called)
            else:
                x, y = _records(content, called, label_bytes)
            if len(x) == 0:
                raise Refused(f"{called} holds no images; expected at least one, so get it again.")
            found.append((torch.from_numpy(x), within(y, classes, called)))
    return found


def _opened(path: Path, content: bytes, members: Sequence[str]) -> list[tuple[str, bytes]]:
    """What to call each piece, and its bytes: the file itself, or the members of an archive."""
    if not path.name.endswith(".tar.gz"):
        return [(str(path), content)]
    found = {}
    try:
        with tarfile.open(fileobj=BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and member.name in members:
                    found[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise Refused(f"{path} cannot be unpacked: {error}; it is damaged, so get it again.") from None
    absent = [name for name in members if name not in found]
    if absent:
        raise Refused(f"{path} lacks {', '.join(absent)}; it is damaged, so get it again.")
    return [(f"{path}: {name}", found[name]) for name in members]


def _records(content: bytes, called: str, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The official form: label and image, label and image. Of CIFAR-100's two labels the second is the fine
    one."""
    record = label_bytes + 3 * 32 * 32
    if len(content) % record:
        raise Refused(
            f"{called} has {len(content):,} bytes, expected a multiple of {record:,} (label and image); it "
            "was cut short or damaged, so get it again."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return rows[:, label_bytes:].reshape(-1, *IMAGE).copy(), rows[:, label_bytes - 1]


def _differences(content: bytes, called: str) -> tuple[np.ndarray, np.ndarray]:
    """Red and blue minus green, then each pixel minus its left neighbour, and that minus the same of the row
    above, all modulo 256."""
    try:
        with np.load(BytesIO(content), allow_pickle=False) as arrays:
            delta, labels = arrays["delta"], arrays["labels"]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        raise Refused(f"{called} cannot be read as .npz: {error}; it is damaged, so get it again.") from None
    shapes = delta.shape == (labels.size, *IMAGE) and labels.ndim == 1
    if not shapes or delta.dtype != np.uint8 or labels.dtype != np.uint8:
        raise Refused(
            f"{called} holds `delta` {delta.shape} of {delta.dtype} and `labels` {labels.shape} of "
            f"{labels.dtype}, expected (n, 3, 32, 32) and (n,) of uint8."
        )
    x = np.cumsum(np.cumsum(delta, 2, dtype=np.uint8), 3, dtype=np.uint8)
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    return x, labels
