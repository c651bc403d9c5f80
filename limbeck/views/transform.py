"""A transform of another library (torchvision's `transforms.v2`, `kornia.augmentation`, or your own), as a
view that can be shown again.

    [[stages.augment]]
    name = "transform"
    of = "torchvision.transforms.v2:RandomRotation"
    knobs = { degrees = 10 }

Such a transform draws from torch's global generator. So each image is shown to it alone, with that generator
seeded by (seed, epoch, index): an image looks the same whatever batch, process or run it comes in. That takes
a call an image, so what limbeck has a view for is faster as that view.
"""

import importlib
import json
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import forked
from limbeck.core.refused import Refused
from limbeck.pieces import images


def transform(batch: Batch, of: str, knobs: dict[str, Any] | None = None) -> Batch:
    """x (b c h w) image by image through what `of` names (`package.module:name`, a class or a function);
    `knobs` are its keywords. It is given images of x's dtype (uint8 in a stage's `augment`, normalised floats
    in a `view`) as (1 c h w), and may give them back as (1 c h w) or (c h w), all of one shape."""
    x, index = images.numbered(batch, "A transform changes")
    change = _made(of, json.dumps(knobs or {}))
    seen = []
    for image, row in zip(x.split(1), index.tolist(), strict=True):
        with forked(batch.lesson.seed, batch.lesson.epoch, row, "transform", of):
            shown = change(image)
        if not isinstance(shown, Tensor) or shown.numel() == 0 or shown.dtype != x.dtype:
            tensor = isinstance(shown, Tensor)
            found = f"{shown.dtype} {tuple(shown.shape)}" if tensor else type(shown).__name__
            raise Refused(
                f"The transform {of} gives {found} for an image {x.dtype} {tuple(image.shape)}, expected an "
                "image of the same dtype; let it give tensors, or put it where values are of its kind."
            )
        seen.append(shown.reshape(1, *shown.shape[-3:]))
    return batch.replace(x=torch.cat(seen))


@cache
def _made(of: str, knobs: str) -> Any:
    module, colon, name = of.partition(":")
    try:
        thing = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Refused(
            f"The transform {of} cannot be had ({str(error).splitlines()[0]}); install its package, or "
            "correct the name."
        ) from None
    if not callable(thing):
        raise Refused(
            f"The transform '{of}' names nothing to call; expected package.module:name, for example "
            "torchvision.transforms.v2:RandomRotation."
        )
    return thing(**json.loads(knobs)) if isinstance(thing, type) else partial(thing, **json.loads(knobs))
