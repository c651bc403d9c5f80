"""Four quarter turns of every image, with one joint label: which class, and how is it turned?

Self-supervised Label Augmentation (Lee, Hwang, Shin; ICML 2020; arXiv:1910.05872). HSSAKD distils such joint
answers (Yang, An, Cai, Xu; TNNLS 2022; arXiv:2109.03075), and the layout is that of its code (winycg/HSAKD):
the four turns of an image lie together, row `4i + r` is image `i` turned by `r` quarters counter-clockwise,
and the upright images are rows `0::4`. The joint label is `4y + r`: class `y // 4`, turn `y % 4`.
"""

import torch
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused


def rotations(batch: Batch) -> Batch:
    """b square images become 4b. No label stays no label; `index` keeps telling which sample a row is.

    The lesson is untouched: its `classes` and `labels` are those of the data, not the joint ones.
    """
    x, y, index = batch.x, batch.y, batch.index
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
    turned = torch.stack([x.rot90(r, (2, 3)) for r in range(4)], 1).flatten(0, 1)
    if y is not None:
        joint = 4 * y[:, None] + torch.arange(4, device=y.device)
        y = torch.where(y[:, None] == IGNORE, IGNORE, joint).flatten()
    return batch.replace(x=turned, y=y, index=None if index is None else index.repeat_interleave(4))
