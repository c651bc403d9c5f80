"""Left and right changed over in half of the images, drawn for each on its own."""

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused


def flip(batch: Batch) -> Batch:
    """x (b c h w), of any size and dtype, each image mirrored with probability one half; all else stays.
    Raises `Refused` for what is no batch of numbered images."""
    x, index = batch.x, batch.index
    if not isinstance(x, Tensor) or x.ndim != 4 or index is None:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise Refused(
            f"Flip mirrors images by draws of their own, and x has {found} with{'out' * (index is None)} an "
            "index, expected (rows, channels, height, width) and each row's number; leave this view out."
        )
    mirrored = keyed(batch.lesson, index, "flip").to(x.device) < 0.5
    return batch.replace(x=torch.where(mirrored[:, :, None, None], x.flip(3), x))
