"""Four quarter turns of every image, with one joint label: which class, and how is it turned?

Self-supervised Label Augmentation (Lee, Hwang, Shin; ICML 2020; arXiv:1910.05872). HSSAKD distils such joint
answers (Yang, An, Cai, Xu; TNNLS 2022; arXiv:2109.03075), and the layout is that of its code (winycg/HSAKD):
the four turns of an image lie together, row `4i + r` is image `i` turned by `r` quarters counter-clockwise,
and the upright images are rows `0::4`. The joint label is `4y + r`: class `y // 4`, turn `y % 4`.
"""

from limbeck.core.batch import Batch
from limbeck.pieces.images import TURNS, joint_labels, square, turned


def rotations(batch: Batch) -> Batch:
    """b square images become 4b. No label stays no label; `index` keeps telling which sample a row is.

    The lesson is untouched: its `classes` and `labels` are those of the data, not the joint ones.
    """
    x = turned(square(batch))
    y = None if batch.y is None else joint_labels(batch.y)
    index = None if batch.index is None else batch.index.repeat_interleave(TURNS)
    return batch.replace(x=x, y=y, index=index)
