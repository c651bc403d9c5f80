"""A transform of another library (torchvision's `transforms.v2`, `kornia.augmentation`, your own class) as a
view that can be shown again.

    augment = [{ name = "torchvision.transforms.v2:RandomRotation", degrees = 10 }]

Such a transform draws from torch's global generator. So each image is shown to it alone, with that generator
seeded by (seed, epoch, index): an image looks the same whatever batch, process or run it comes in. That takes
a call an image, so what limbeck has a view for is faster as that view.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import forked
from limbeck.core.refused import Refused
from limbeck.pieces import images


def as_view(made_by: type, path: str) -> Callable[..., Batch]:
    """`view(batch, **knobs)`, the knobs those of the class `made_by`; `path` is what it is called."""

    def view(batch: Batch, **knobs: Any) -> Batch:
        return transformed(batch, made_by(**knobs), path)

    knobs = [p for p in inspect.signature(made_by).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    first = inspect.Parameter("batch", inspect.Parameter.POSITIONAL_ONLY)
    view.__signature__ = inspect.Signature([first, *knobs])  # type: ignore[attr-defined]
    view.__name__ = path
    return view


def transformed(batch: Batch, change: Callable[[Any], Any], path: str) -> Batch:
    """x (b c h w) image by image through `change`. It is given images of x's dtype (uint8 in a stage's
    `augment`, normalised floats in a `view`) as (1 c h w), and may give them back as (1 c h w) or (c h w),
    all of one shape."""
    x, index = images.numbered(batch, "A transform changes")
    seen = []
    for image, row in zip(x.split(1), index.tolist(), strict=True):
        with forked(batch.lesson.seed, batch.lesson.epoch, row, "transform", path):
            shown = change(image)
        if not isinstance(shown, Tensor) or shown.numel() == 0 or shown.dtype != x.dtype:
            tensor = isinstance(shown, Tensor)
            found = f"{shown.dtype} {tuple(shown.shape)}" if tensor else type(shown).__name__
            raise Refused(
                f"The transform {path} gives {found} for an image {x.dtype} {tuple(image.shape)}, expected "
                "an image of the same dtype; let it give tensors, or put it where values are of its kind."
            )
        seen.append(shown.reshape(1, *shown.shape[-3:]))
    return batch.replace(x=torch.cat(seen))
