"""Every image shifted by a few pixels each way; what comes in from outside is zero: black, in uint8.

The customary augmentation of CIFAR (K. He, X. Zhang, S. Ren, J. Sun; CVPR 2016; arXiv:1512.03385, section
4.2): pad four pixels on each side, cut the image's own size out at random.
"""

import torch
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.pieces import images


def crop(batch: Batch, pad: int = 4, purpose: str = "crop") -> Batch:
    """x (b c h w), of any size and dtype, each image shifted by up to `pad` pixels each way, all places
    equally likely; all else stays. Two models under one `purpose` see the same cut. Raises `Refused` for what
    is no batch of numbered images, and for a pad below 0."""
    x, index = images.numbered(batch, "Crop shifts")
    if pad < 0:
        raise Refused(f"Crop shifts images by up to `pad` pixels, and it is {pad}; expected 0 or more.")
    h, w = x.shape[2:]
    top, left = (keyed(batch.lesson, index, purpose, 2) * (2 * pad + 1)).long().to(x.device).unbind(1)
    padded = F.pad(x, [pad] * 4)
    # Numbers lie in one long line, and a cut is made of lines of w: one copy a line, not one a number.
    b, c, high, wide = padded.shape
    each, planes, lines = (torch.arange(n, device=x.device) for n in (b, c, h))
    first = each * (c * high * wide) + top * wide + left
    starts = first[:, None] + (planes[:, None] * (high * wide) + lines * wide).flatten()
    return batch.replace(x=padded.flatten().unfold(0, w, 1).index_select(0, starts.flatten()).view_as(x))
