"""Images of which most patches are hidden, as an autoencoder is shown them (Masked Autoencoders Are Scalable
Vision Learners, He, Chen, Xie, Li, Dollár, Girshick; CVPR 2022; arXiv:2111.06377).

Each image misses patches of its own, drawn anew in every epoch. The same mask is drawn for whoever is shown
the batch through this view with this `ratio` and `patch`: give it to a stage and to its teacher, and the two
see the same patches.

Departure from the authors' code: the number of patches that stay is rounded where theirs is cut off, so that
of 196 a ratio of 0.95 leaves 10 and one of 0.98 leaves 4, as DMAE's paper says (arXiv:2208.12256).
"""

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.pieces import images, patches


def mask(batch: Batch, ratio: float = 0.75, patch: int = 4) -> Batch:
    """x (b c h w) becomes a mapping: `x` as it was; `keep` (b n), the patches that are shown, and `hide`,
    those that are not, by their numbers on the grid, counted row by row; all else stays.

    ratio: the share that is hidden. patch: pixels a side. Raises `Refused` for what is no batch of numbered
    square images that patches fill, and for a ratio that hides nothing.
    """
    x, index = images.numbered(batch, "A mask hides patches of")
    size = x.shape[3]
    if x.shape[2] != size or patch < 1 or size % patch:
        raise Refused(
            f"A mask hides square patches of {patch} pixels a side, and the images are {x.shape[2]}x{size}; "
            "expected square images of a multiple of `patch`: crop or pad them, or choose another `patch`."
        )
    keep, hide = patches.mask(batch.lesson, index, (size // patch) ** 2, ratio)
    return batch.replace(x={"x": x, "keep": keep.to(x.device), "hide": hide.to(x.device)})
