r"""Variational Information Distillation for Knowledge Transfer (Ahn et al.; CVPR 2019; arXiv:1904.05835).

The student should hold what it takes to tell the teacher's map: a lower bound on their mutual information
is raised, by a Gaussian $q(t \mid s)$ whose mean is a small network of the student's map $s$ and whose
variance is learned for each channel of the teacher. Channels that cannot be told get a large variance, and
are let go:

$$\sigma_c^2 = \log(1 + e^{\alpha_c}) + \epsilon, \qquad
  L = \sum_{\text{taps}} \tfrac12 \operatorname*{mean}_{b,\,c,\,h,\,w}
      \Big( \frac{(t - \mu(s))^2}{\sigma_c^2} + \log \sigma_c^2 \Big)$$

It is $-\log q$ without its constant, so it may be negative, down to $\tfrac12 \log \epsilon$ a tap. For a
given $\mu$ it is lowest where $\sigma_c^2$ is the channel's mean squared gap, and then is half the mean of
$1 + \log \sigma_c^2$.

Weight: 1 in RepDistiller and mdistiller, which take this mean, at the end of each stage.

Departures from the paper:
- The mean over elements for its sum, so the weight does not grow with layer size.
- $\mu$ is three 1x1 convolutions without bias, with ReLUs between, as wide as the teacher's map; variances
  begin at 5, and $\epsilon = 10^{-5}$. These are RepDistiller's, which had them from the authors, whose own
  repository is gone.
- Only maps are told, and tokens as the map that they make; the paper tells vectors (pooled features, logits)
  too.
- When grids differ, the larger map is averaged down to the smaller by adaptive pooling, as RepDistiller does.

Departures from RepDistiller (`distiller_zoo/VID.py`): $\log(1 + e^\alpha)$ does not overflow, and gaps are
averaged for each channel before they are divided, with fewer tensors as large as a map. In mdistiller the
variances are missing from the optimiser, so there they stay at 5; here they learn.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, expect_maps, on_smaller_grid

EPSILON = 1e-5
"""No variance is smaller: a channel that is told exactly would pull its own to 0, and the loss to -inf."""


def vid(
    mean: Float[Tensor, "b c h w"], t: Float[Tensor, "b c h w"], variance: Float[Tensor, " c"]
) -> Float[Tensor, ""]:
    """How unlikely a map is under a Gaussian with this mean and variance, per element, up to a constant."""
    exact = torch.promote_types(mean.dtype, torch.float32)
    gap = (mean.to(exact) - t.to(exact)).square().mean((0, 2, 3))
    return 0.5 * (gap / variance + variance.log()).mean()


class Gaussian(nn.Module):
    r"""$q(t \mid s)$: its mean, a network of the student's map, and its variance, one for each channel."""

    def __init__(self, s: int, t: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(s, t, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t, t, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t, t, kernel_size=1, bias=False),
        )
        over = variance - EPSILON
        self.alpha = nn.Parameter(torch.full((t,), over + math.log(-math.expm1(-over))))  # softplus undone

    def forward(self, s: Float[Tensor, "b c_s h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " c"]]:
        alpha = self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32))
        return self.mean(s), F.softplus(alpha) + EPSILON


class VID(Method):
    """A Gaussian for each stage of the teacher, told from the student's; dropped after training."""

    card = Card(
        "arXiv:1904.05835",
        2019,
        ("feature",),
        taps=("stage1", "stage2", "stage3"),
        fidelity="code",  # the mean network and the averages; the Gaussian is the paper's
        per_sample=True,
        reads_out=False,
    )

    def __init__(self, variance: float = 5.0, taps: Sequence[str] = ("stage1", "stage2", "stage3")) -> None:
        super().__init__()
        if not EPSILON < variance < math.inf:
            raise Refused(
                f"The first variance of 'vid' is {variance}, expected a number above {EPSILON}; try 5."
            )
        self.variance, self.taps = variance, tuple(taps)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_maps("vid", self.taps, s, t)
        widths = [(as_map(s.at[tap]).shape[1], as_map(t.at[tap]).shape[1]) for tap in self.taps]
        self.gaussians = nn.ModuleList(Gaussian(here, there, self.variance) for here, there in widths)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        losses = []
        for tap, gaussian in zip(self.taps, self.gaussians, strict=True):
            here, there = on_smaller_grid(as_map(s.at[tap]), as_map(t.at[tap]))
            mean, variance = gaussian(here)
            losses.append(vid(mean, there, variance))
        return torch.stack(losses).sum()
