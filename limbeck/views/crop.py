"""Every image shifted by up to four pixels each way; what comes in from outside is zero: black, in uint8.

The customary augmentation of CIFAR (K. He, X. Zhang, S. Ren, J. Sun; CVPR 2016; arXiv:1512.03385, section
4.2): pad four pixels on each side, cut the image's own size out at random.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused

PAD = 4


def crop(batch: Batch) -> Batch:
    """x (b c h w), of any size and dtype, each image cut from one of 9 x 9 equally likely places; all else
    stays. Raises `Refused` for what is no batch of numbered images."""
    x, index = batch.x, batch.index
    if not isinstance(x, Tensor) or x.ndim != 4 or index is None:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise Refused(
            f"Crop shifts images by draws of their own, and x has {found} with{'out' * (index is None)} an "
            "index, expected (rows, channels, height, width) and each row's number; leave this view out."
        )
    h, w = x.shape[2:]
    top, left = (keyed(batch.lesson, index, "crop", 2) * (2 * PAD + 1)).long().to(x.device).unbind(1)
    places = F.pad(x, [PAD] * 4).unfold(2, h, 1).unfold(3, w, 1)  # b c 9 9 h w, nothing copied yet
    return batch.replace(x=places[torch.arange(len(x), device=x.device), :, top, left])
