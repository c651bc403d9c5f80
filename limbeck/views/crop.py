"""Every image shifted by up to four pixels each way; what comes in from outside is zero: black, in uint8.

The customary augmentation of CIFAR (K. He, X. Zhang, S. Ren, J. Sun; CVPR 2016; arXiv:1512.03385, section
4.2): pad four pixels on each side, cut the image's own size out at random.
"""

import torch
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.pieces import images

PAD = 4


def crop(batch: Batch) -> Batch:
    """x (b c h w), of any size and dtype, each image cut from one of 9 x 9 equally likely places; all else
    stays. Raises `Refused` for what is no batch of numbered images."""
    x, index = images.numbered(batch, "Crop shifts")
    h, w = x.shape[2:]
    top, left = (keyed(batch.lesson, index, "crop", 2) * (2 * PAD + 1)).long().to(x.device).unbind(1)
    padded = F.pad(x, [PAD] * 4)
    # Numbers lie in one long line, and a cut is made of lines of w: one copy a line, not one a number.
    b, c, high, wide = padded.shape
    planes = torch.arange(b * c, device=x.device).view(b, c, 1) * (high * wide)
    lines = (top[:, None, None] + torch.arange(h, device=x.device)) * wide
    starts = planes + lines + left[:, None, None]
    return batch.replace(x=padded.flatten().unfold(0, w, 1).index_select(0, starts.flatten()).view_as(x))
