"""Images as square patches, and which of these are shown."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core.batch import Lesson
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused


def patchify(x: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n d"]:
    """Patches of `patch` pixels a side, row by row; of each its pixels row by row, of each its channels."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Float[Tensor, "b n d"], channels: int) -> Float[Tensor, "b c h w"]:
    """The square images that `patchify` cut."""
    grid, patch = math.isqrt(patches.shape[1]), math.isqrt(patches.shape[2] // channels)
    x = patches.unflatten(2, (patch, patch, channels)).unflatten(1, (grid, grid))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def take(tokens: Float[Tensor, "b n d"], ids: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Of each row the tokens at its own `ids`, in their order."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


def visible(patches: int, ratio: float) -> int:
    """How many of `patches` are shown when the share `ratio` is hidden: rounded, and at least one. Raises
    `Refused` when none would be hidden."""
    kept = max(round(patches * (1 - ratio)), 1) if 0 < ratio < 1 else patches
    if kept == patches:
        raise Refused(
            f"A mask that hides the share {ratio} of {patches} patches hides none or all of them; expected a "
            "share between 0 and 1 that leaves one or more on either side, for example 0.75."
        )
    return kept


def mask(
    lesson: Lesson, index: Int[Tensor, " b"], patches: int, ratio: float, purpose: str = "mask"
) -> tuple[Int[Tensor, "b kept"], Int[Tensor, "b hidden"]]:
    """For each row the patches that are shown and those that are hidden, drawn without favour."""
    order = keyed(lesson, index, purpose, patches).argsort(dim=1, stable=True)
    kept = visible(patches, ratio)
    return order[:, :kept], order[:, kept:]
