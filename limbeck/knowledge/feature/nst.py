r"""Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
(Huang, Wang; 2017; arXiv:1707.01219).

A channel's map says what its neuron likes in an image. As a unit vector over positions it is one sample; the
student's samples should be distributed as the teacher's, by the maximum mean discrepancy (MMD) with kernel
$k(u, v) = \langle u, v \rangle^2$. With a row's $\hat s$ ($c_s \times n$) and $\hat t$ ($c_t \times n$):

$$L = \sum_{\text{taps}} \operatorname*{mean}_b \Big(
      \operatorname*{mean}_{i,j} k(\hat s_i, \hat s_j) + \operatorname*{mean}_{i,j} k(\hat t_i, \hat t_j)
      - 2 \operatorname*{mean}_{i,j} k(\hat s_i, \hat t_j) \Big)
    = \sum_{\text{taps}} \operatorname*{mean}_b
      \Big\lVert \tfrac1{c_s} \hat s^\top \hat s - \tfrac1{c_t} \hat t^\top \hat t \Big\rVert_F^2$$

The order of channels and their number do not matter, nor does the strength or sign of any one of them. The
two forms are one: the first takes $c \times c$ matrices, the second $n \times n$, and the smaller work is
done.

Weight: 50 in the official code, RepDistiller and mdistiller, which all take these means.

Departures from the paper:
- Of its three kernels only the polynomial one ($d = 2$, $c = 0$), which alone the official code kept; neither
  the linear nor the Gaussian.
- When grids differ, the larger map is averaged down to the smaller by adaptive pooling, as RepDistiller does.
- Tokens are looked at as the map that they make; the paper has none.

Departures from the official code (TuSimple/neuron-selectivity-transfer, `symbol/transfer.py`):
- It leaves out the teacher's own term, which is constant; without it the loss is not 0 at a match.
- It compares the last maps before their ReLU. Here the tap says which; `stage3` is usually behind it.

RepDistiller and mdistiller compare every stage, each at weight 50: `taps = ["stage1", "stage2", "stage3"]`.
They hold $c_s c_t n$ products a row: a gigabyte for 64 rows of 64 channels on 32x32, where this has a
megabyte of products.

A channel of zeros likes nothing: its vector is 0, it counts in the mean and gets no gradient.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, expect_maps, on_smaller_grid


def nst(s: Float[Tensor, "b c_s h w"], t: Float[Tensor, "b c_t h w"]) -> Float[Tensor, ""]:
    """Squared MMD between the channels of two maps on one grid, mean over rows. Gradient passes to both."""
    with torch.autocast(s.device.type, enabled=False):
        u, v = selectivity(s), selectivity(t)
        (_, c_s, n), c_t = u.shape, v.shape[1]
        if n * (c_s + c_t) <= c_s * c_s + c_s * c_t + c_t * c_t:
            return (u.mT @ u / c_s - v.mT @ v / c_t).square().sum((1, 2)).mean()
        return kernel(u, u) + kernel(v, v) - 2 * kernel(u, v)


def selectivity(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c n"]:
    """What each channel likes: a unit vector over positions, in float32 at least."""
    return F.normalize(x.flatten(2).to(torch.promote_types(x.dtype, torch.float32)), dim=2)


def kernel(u: Float[Tensor, "b i n"], v: Float[Tensor, "b j n"]) -> Float[Tensor, ""]:
    r"""The mean of $\langle u_i, v_j \rangle^2$ over pairs and rows."""
    return (u @ v.mT).square().mean()


class NST(Method):
    """What the channels of the last map like; nothing learns but the student."""

    card = Card(
        "arXiv:1707.01219",
        2017,
        ("feature",),
        taps=("stage3",),
        per_sample=True,
        zero_at_match=True,
        reads_out=False,
    )

    def __init__(self, taps: Sequence[str] = ("stage3",)) -> None:
        super().__init__()
        self.taps = tuple(taps)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_maps("nst", self.taps, s, t)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        pairs = [on_smaller_grid(as_map(s.at[tap]), as_map(t.at[tap])) for tap in self.taps]
        return torch.stack([nst(here, there) for here, there in pairs]).sum()
