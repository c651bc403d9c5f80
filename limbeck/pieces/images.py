"""A batch of images, each with a number to draw by; and images in four turns, with one label for class and
turn."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused

TURNS = 4


def numbered(batch: Batch, view: str) -> tuple[Shaped[Tensor, "b c h w"], Int[Tensor, " b"]]:
    """x and index of a batch of images. Raises `Refused` for any other; `view` says who asks, and what it
    does: "Crop shifts"."""
    x, index = batch.x, batch.index
    if not isinstance(x, Tensor) or x.ndim != 4 or index is None:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise Refused(
            f"{view} images by draws of their own, and x has {found} with{'out' * (index is None)} an "
            "index, expected (rows, channels, height, width) and each row's number; leave this view out."
        )
    return x, index


def square(batch: Batch) -> Shaped[Tensor, "b c n n"]:
    """x of a batch of square images. Raises `Refused` for any other, and where y is not one class a row."""
    x, y = batch.x, batch.y
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] != x.shape[3]:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise Refused(
            f"Rotations turn square images, and x has {found}, expected (rows, channels, size, size); crop "
            "or pad the images first."
        )
    if y is not None and y.ndim != 1:
        raise Refused(
            f"Rotations label an image by class and turn, and y has shape {tuple(y.shape)}, expected one "
            "class a row; leave this view out."
        )
    return x


def turned(x: Shaped[Tensor, "b c n n"]) -> Shaped[Tensor, "b4 c n n"]:
    """Row `4i + r` is image `i` turned by `r` quarters counter-clockwise; upright images are rows `0::4`."""
    return torch.stack([x.rot90(r, (2, 3)) for r in range(TURNS)], 1).flatten(0, 1)


def joint_labels(y: Int[Tensor, " b"], ways: int = TURNS) -> Int[Tensor, " b2"]:
    """Class `y` in the r-th of `ways` ways is `ways * y + r`, in the order of `turned`. No label stays no
    label."""
    joint = ways * y[:, None] + torch.arange(ways, device=y.device)
    return torch.where(y[:, None] == IGNORE, IGNORE, joint).flatten()
