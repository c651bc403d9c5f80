"""Maps (`b c h w`) of two networks, side by side; tokens (`b n d`) that are the cells of a square grid are
maps too."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def expect_maps(method: str, taps: Sequence[str], s: Seen, t: Seen) -> None:
    """Refuse a tap that does not show a map, or tokens that make one, in both networks; names both layers and
    shapes."""
    for tap in taps:
        if _grid(s.at[tap]) is None or _grid(t.at[tap]) is None:
            raise Refused(
                f"Method '{method}' compares maps (rows, channels, height, width) or tokens of a square grid "
                f"(rows, tokens, width), and {shown(tap, s, t)}; tap a layer that shows such in each."
            )


def shown(tap: str, s: Seen, t: Seen) -> str:
    """The layers that a tap names in both networks, and what they show."""
    here, there = tuple(s.at[tap].shape), tuple(t.at[tap].shape)
    return (
        f"tap '{tap}'{_path(tap, s)} shows {here} in the student and "
        f"tap '{tap}'{_path(tap, t)} {there} in the teacher"
    )


def as_map(
    x: Float[Tensor, "b c *grid"], grid: tuple[int, int] | None = None
) -> Float[Tensor, "b channels h w"]:
    """A map as it is; tokens `b n d`, read row by row, as the map `b d h w`.

    A class token in front of them is left out: there is one if all but the first make a grid. grid: (h, w)
    when it is not square. Raises `Refused` for what makes no such grid.
    """
    if x.ndim == 4:
        return x
    h, w = grid or _grid(x) or (0, 0)
    if x.ndim != 3 or not h or x.shape[1] - h * w not in (0, 1):
        raise Refused(
            f"Tokens of a {f'{h}x{w}' if grid else 'square'} grid (rows, tokens, width) were expected, with "
            f"or without a class token in front, and {tuple(x.shape)} was found; tap a layer that shows such."
        )
    return x[:, -h * w :].mT.unflatten(2, (h, w))


def on_smaller_grid(
    s: Float[Tensor, "b c_s h_s w_s"], t: Float[Tensor, "b c_t h_t w_t"]
) -> tuple[Float[Tensor, "b c_s h w"], Float[Tensor, "b c_t h w"]]:
    """Both maps on the smaller of their two grids: the larger one is averaged, by adaptive pooling."""
    h, w = (min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True))
    here, there = (x if x.shape[2:] == (h, w) else F.adaptive_avg_pool2d(x, (h, w)) for x in (s, t))
    return here, there


def _grid(x: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a map, or of the square that tokens make, less a class token; None if neither."""
    if x.ndim == 4:
        return x.shape[2], x.shape[3]
    for tokens in (x.shape[1], x.shape[1] - 1) if x.ndim == 3 else ():
        side = math.isqrt(max(tokens, 0))
        if side and side * side == tokens:
            return side, side
    return None


def _path(tap: str, seen: Seen) -> str:
    """The layer's path in its network, where that is known and says more than the tap's name."""
    modules = seen.model.named_modules() if seen.model is not None else ()
    path = next((path for path, module in modules if module is seen.modules.get(tap)), "")
    return f" ({path})" if path and path != tap else ""
