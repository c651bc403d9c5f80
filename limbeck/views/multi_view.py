"""The multi-view images of cross-architecture distillation (Liu et al.; ACCV 2022; arXiv:2207.05273).

Each image stays as it is or, with probability `chance`, goes through one of `ops`, all equally likely:
changed colours, a crop, a small rotation, masked patches. In a stage's `augment` everybody sees the same
images, as a method that compares places needs it.

The paper names these four "and so on" and not their strengths, which are ours; corners that a rotation leaves
open are black, like what a crop leaves open and what is masked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.pieces import images
from limbeck.views.colour import colour
from limbeck.views.crop import crop
from limbeck.views.patch_mask import patch_mask
from limbeck.views.randaugment import OPS

PAPER = ("colour", "crop", "rotate", "mask")
FULL = 30.0
"""Degrees of RandAugment's rotation at its full level."""


def multi_view(
    batch: Batch,
    chance: float = 0.5,
    ops: Sequence[str] = PAPER,
    degrees: float = 15.0,
    ratio: float = 0.25,
    patch: int = 4,
    purpose: str = "multi_view",
) -> Batch:
    """x (b 3 h w) or (b 1 h w), uint8; all else stays.

    degrees: a rotation is drawn from that many to either side. ratio, patch: share of masked patches, and
    their side in pixels. Two models under one `purpose` see the same images. Raises `Refused` for other x,
    operations that are not there and knobs outside their range.
    """
    x, index = images.numbered(batch, "Multi-view changes")
    if x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
        raise Refused(
            f"Multi-view changes uint8 pixels of 1 or 3 channels, and x has {x.shape[1]} of {x.dtype}; use "
            "it in `augment`, where x is as it is kept."
        )
    unknown = [name for name in ops if name not in PAPER]
    if unknown or not ops:
        raise Refused(
            f"Multi-view draws from `ops`, which has {repr(unknown[0]) if unknown else 'nothing'}; expected "
            f"some of {', '.join(PAPER)}."
        )
    if not 0 <= chance <= 1 or not 0 <= degrees <= 180:
        raise Refused(
            f"Multi-view has chance = {chance} and degrees = {degrees}; expected 0 to 1, and 0 to 180."
        )
    draw = keyed(batch.lesson, index, purpose, 3).to(x.device)
    chosen = torch.where(draw[:, 0] < chance, (draw[:, 1] * len(ops)).long(), -1)
    x = x.clone(memory_format=torch.contiguous_format)
    for number, name in enumerate(ops):
        rows = (chosen == number).nonzero()[:, 0]
        some = batch.map(lambda v, rows=rows: v[rows.to(v.device)])  # type: ignore[misc]
        own = f"{purpose} {name}"
        if not len(rows):
            continue
        if name == "colour":
            x[rows] = colour(some, chance=1.0, grey=0.0, purpose=own).x
        elif name == "crop":
            x[rows] = crop(some, purpose=own).x
        elif name == "mask":
            x[rows] = patch_mask(some, ratio, patch, purpose=own).x
        else:
            x[rows] = _rotated(some.x, (2 * draw[rows, 2] - 1) * degrees)
    return batch.replace(x=x)


def _rotated(x: Tensor, degrees: Tensor) -> Tensor:
    """Each image by its own angle. RandAugment makes corners grey, so a white image says where they are."""
    level = degrees.double() / FULL
    inside = OPS["rotate"](torch.full_like(x, 255), level) == 255
    return OPS["rotate"](x, level).where(inside, 0)
