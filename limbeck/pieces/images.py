"""A batch of images, each with a number to draw by."""

from jaxtyping import Int, Shaped
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused


def numbered(batch: Batch, view: str) -> tuple[Shaped[Tensor, "b c h w"], Int[Tensor, " b"]]:
    """x and index of a batch of images. Raises `Refused` for any other; `view` says who asks, and what it
    does: "Crop shifts"."""
    x, index = batch.x, batch.index
    if not isinstance(x, Tensor) or x.ndim != 4 or index is None:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise Refused(
            f"{view} images by draws of their own, and x has {found} with{'out' * (index is None)} an "
            "index, expected (rows, channels, height, width) and each row's number; leave this view out."
        )
    return x, index
