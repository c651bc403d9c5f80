"""Patches of every image set to zero, drawn for each on its own: a view to learn from, and a damage to be
scored under (`tests = { masked = "patch_mask" }` in a recipe)."""

import torch

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.pieces import images, patches


def patch_mask(batch: Batch, ratio: float = 0.25, patch: int = 4, purpose: str = "patch_mask") -> Batch:
    """x (b c h w), of any size and dtype, with the share `ratio` of its patches of `patch` pixels a side
    blanked; all else stays. Zero is the mean of normalised images; in `augment`, where x is still uint8, it
    is black. Two models under one `purpose` miss the same patches. Raises `Refused` for what is no batch of
    numbered images that patches fill, and for a ratio that blanks none or all of them."""
    x, index = images.numbered(batch, "A patch mask blanks patches of")
    h, w = x.shape[2:]
    if patch < 1 or h % patch or w % patch:
        raise Refused(
            f"A patch mask blanks patches of {patch} pixels a side, which do not fill images of {h}x{w}; "
            "choose a `patch` that divides both."
        )
    grid = (h // patch, w // patch)
    _, hidden = patches.mask(batch.lesson, index, grid[0] * grid[1], ratio, purpose)
    blank = torch.zeros(len(x), grid[0] * grid[1], dtype=torch.bool, device=hidden.device)
    blank = blank.scatter(1, hidden, True).view(-1, 1, *grid)
    return batch.replace(
        x=x.masked_fill(blank.repeat_interleave(patch, 2).repeat_interleave(patch, 3).to(x.device), 0)
    )
