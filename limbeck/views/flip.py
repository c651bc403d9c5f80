"""Left and right changed over in half of the images, drawn for each on its own."""

import torch

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.pieces import images


def flip(batch: Batch) -> Batch:
    """x (b c h w), of any size and dtype, each image mirrored with probability one half; all else stays.
    Raises `Refused` for what is no batch of numbered images."""
    x, index = images.numbered(batch, "Flip mirrors")
    mirrored = keyed(batch.lesson, index, "flip").to(x.device)[:, 0] < 0.5
    # Copying whole images from both kinds is faster than asking number by number.
    rows = torch.arange(len(x), device=x.device) + len(x) * mirrored
    return batch.replace(x=torch.cat([x, x.flip(3)]).index_select(0, rows))
