"""A square of every image set to zero, wherever it falls (T. DeVries, G. W. Taylor; 2017; arXiv:1708.04552).

The paper's square lies around a pixel drawn from the whole image, so part of it may lie outside; 16 pixels a
side is its choice for CIFAR-10 (8 for CIFAR-100, 20 for SVHN). It cuts *normalised* images, where zero is the
mean: that is this view as a model's `view`. In `augment`, where x is still uint8, zero is black.
"""

import torch

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.pieces import images


def cutout(batch: Batch, size: int = 16, purpose: str = "cutout") -> Batch:
    """x (b c h w), of any size and dtype, with a square of `size` pixels a side blanked in each image; all
    else stays. Two models under one `purpose` miss the same square. Raises `Refused` for what is no batch of
    numbered images, and for a size below 0."""
    x, index = images.numbered(batch, "Cutout blanks a square in")
    if size < 0:
        raise Refused(
            f"Cutout blanks a square of `size` pixels a side, and it is {size}; expected 0 or more."
        )
    draw = keyed(batch.lesson, index, purpose, 2).to(x.device)
    down, across = (_within(draw[:, axis], side, size) for axis, side in ((0, x.shape[2]), (1, x.shape[3])))
    return batch.replace(x=x.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0))


def _within(draw: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Which of `side` pixels lie in a stretch of `size` around the drawn one, for each row."""
    first = (draw * side).long()[:, None] - size // 2
    place = torch.arange(side, device=draw.device)
    return (place >= first) & (place < first + size)
