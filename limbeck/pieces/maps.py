"""Maps (`b c h w`) of two networks, side by side."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def expect_maps(method: str, taps: Sequence[str], s: Seen, t: Seen) -> None:
    """Refuse a tap that does not show a map in both networks, naming both shapes."""
    for tap in taps:
        here, there = s.at[tap].shape, t.at[tap].shape
        if len(here) != 4 or len(there) != 4:
            raise Refused(
                f"Method '{method}' compares maps (rows, channels, height, width), and tap '{tap}' shows "
                f"{tuple(here)} in the student and {tuple(there)} in the teacher; tap a layer that shows a "
                "map in each."
            )


def on_smaller_grid(
    s: Float[Tensor, "b c_s h_s w_s"], t: Float[Tensor, "b c_t h_t w_t"]
) -> tuple[Float[Tensor, "b c_s h w"], Float[Tensor, "b c_t h w"]]:
    """Both maps on the smaller of their two grids: the larger one is averaged, by adaptive pooling."""
    h, w = (min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True))
    here, there = (x if x.shape[2:] == (h, w) else F.adaptive_avg_pool2d(x, (h, w)) for x in (s, t))
    return here, there
