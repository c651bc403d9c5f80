r"""Distilling Knowledge via Knowledge Review (Chen, Liu, Zhao, Jia; CVPR 2021; arXiv:2104.09044).

Each stage of the student, fused with what its deeper stages hold, should give the teacher's stage. From the
deepest ($l = n$, with nothing above it) downwards, where $\uparrow$ is a resizing to the grid at hand:

$$f_n = \mathrm{BN}(W_n s_n), \qquad
  f_l = a_1 \cdot \mathrm{BN}(W_l s_l) + a_2 \cdot {\uparrow} f_{l+1}, \qquad
  (a_1, a_2) = \sigma\big(A_l [\mathrm{BN}(W_l s_l), {\uparrow} f_{l+1}]\big)$$

$$L = \sum_l \mathrm{HCL}\big(\mathrm{BN}(V_l * f_l), t_l\big), \qquad
  \mathrm{HCL}(s, t) = \sum_p w_p \operatorname{mean} \big(P_p (s - t)\big)^2 \Big/ \sum_p w_p$$

$W$ and $A$ are 1x1 and $V$ are 3x3 convolutions. The pyramid $P$ is the map itself and its averages over
4x4, 2x2 and 1x1 cells; levels no coarser than the map are left out, and each that is not has half the
weight of the one before: $w = 1, \tfrac12, \tfrac14, \tfrac18$.

Weights mean what they mean in the official code and in mdistiller. The official CIFAR-100 runs take 5 for
resnet32x4 → resnet8x4 and with WRN-40-2, 8 for resnet32x4 → ShuffleNetV2, 1 for ResNet-110 → 32 and 0.6 for
ResNet-56 → 20. Their warm-up over 20 epochs is the term's: `ramp = { epochs = 20 }` is mdistiller's, and
`{ epochs = 20, after = 1 }` the official one, which stands at 0 for the first epoch.

From the official code (dvlab-research/ReviewKD; mdistiller has the same) is what the paper leaves open:
widths, BatchNorms, initial weights, the nearest neighbour for resizing, a fused map that goes on in the
teacher's grid, and three stages with the pooled feature, a map of 1x1, behind them (it has more where a
network has more).

Departures from that code:
- It reads the teacher's stages before their ReLU and the student's after; its authors "didn't pay much
  attention to this part" (ReviewKD#11). Here a tap has one name for both, by default after. A table of taps
  for the teacher (`taps = { stage1 = "…" }`) gives theirs.
- It is told each pair's shapes; here they are read off the example.
- $A$ sees its two halves one after the other, $f_{l+1}$ before it is resized, and the pyramid averages the
  gap and not two maps: the same numbers in less memory.
- Tokens are reviewed as the map that they make; the paper has none.
- The shorter side of a map says which levels are left out; there, the height does.

BatchNorm compares the rows of a batch, here as in the student itself. A pooled feature has one number a
channel and row, so a batch to learn from must have two rows.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, shown


def hcl(
    s: Float[Tensor, "b c h w"], t: Float[Tensor, "b c h w"], levels: tuple[int, ...] = (4, 2, 1)
) -> Float[Tensor, ""]:
    """How far two maps are apart, at their own grid and averaged over ever coarser ones."""
    exact = torch.promote_types(s.dtype, torch.float32)
    gap = s.to(exact) - t.to(exact)
    loss, weight, weights = gap.square().mean(), 1.0, 1.0
    for level in levels:
        if level < min(gap.shape[-2:]):
            weight /= 2
            weights += weight
            loss = loss + weight * F.adaptive_avg_pool2d(gap, level).square().mean()
    return loss / weights


class ABF(nn.Module):
    """Attention-based fusion: a stage's own map and what comes from above, mixed anew at each position."""

    def __init__(self, inputs: int, width: int, outputs: int, fuses: bool) -> None:
        super().__init__()
        self.own = _normed(nn.Conv2d(inputs, width, 1, bias=False))
        self.attend = nn.Conv2d(2 * width, 2, 1) if fuses else None
        self.give = _normed(nn.Conv2d(width, outputs, 3, padding=1, bias=False))

    def forward(
        self, x: Float[Tensor, "b c h w"], above: Float[Tensor, "b m h2 w2"] | None, grid: torch.Size
    ) -> tuple[Float[Tensor, "b k h3 w3"], Float[Tensor, "b m h3 w3"]]:
        """What is compared, and what goes on to the stage below; both on `grid`."""
        x = self.own(x)
        if self.attend is not None:
            assert above is not None
            to_own, to_above = self.attend.weight.chunk(2, dim=1)
            seen = F.conv2d(x, to_own, self.attend.bias) + _resized(F.conv2d(above, to_above), x.shape[-2:])
            share = seen.sigmoid()
            x = share[:, :1] * x + share[:, 1:] * _resized(above, x.shape[-2:])
        x = _resized(x, grid)
        return self.give(x), x


class ReviewKD(Method):
    """The student's stages, from deep to shallow, reviewed against the teacher's.

    taps: from shallow to deep, maps, tokens or pooled features. width: of what goes from stage to stage, at
        most; the deepest tap's width when that is less. levels: of the pyramid below the map itself.
    """

    card = Card(
        "arXiv:2104.09044",
        2021,
        ("feature",),
        taps=("stage1", "stage2", "stage3", "pooled"),
        fidelity="code",
        per_sample=True,
        reads_out=False,
    )

    def __init__(
        self,
        taps: tuple[str, ...] = ("stage1", "stage2", "stage3", "pooled"),
        width: int = 512,
        levels: tuple[int, ...] = (4, 2, 1),
    ) -> None:
        super().__init__()
        if not taps or width < 1 or any(level < 1 for level in levels):
            raise Refused(
                f"Method 'reviewkd' was given {len(taps)} taps, width {width} and levels {tuple(levels)}; "
                "expected at least one tap, a width of 1 or more and levels of 1 or more."
            )
        self.taps, self.width, self.levels = tuple(taps), width, tuple(levels)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        widths = []
        for tap in self.taps:
            try:
                widths.append((_as_map(s.at[tap]).shape[1], _as_map(t.at[tap]).shape[1]))
            except Refused:
                raise Refused(
                    "Method 'reviewkd' compares maps (rows, channels, height, width), tokens of a square "
                    "grid (rows, tokens, width) and pooled features (rows, channels), and "
                    f"{shown(tap, s, t)}; tap layers that show such."
                ) from None
        width = min(self.width, widths[-1][0])
        self.reviews = nn.ModuleList(
            ABF(here, width, there, fuses=place > 0) for place, (here, there) in enumerate(widths[::-1])
        )

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        losses, above = [], None
        for tap, review in zip(self.taps[::-1], self.reviews, strict=True):
            there = _as_map(t.at[tap])
            given, above = review(_as_map(s.at[tap]), above, there.shape[-2:])
            losses.append(hcl(given, there, self.levels))
        return torch.stack(losses).sum()


def _normed(conv: nn.Conv2d) -> nn.Sequential:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


def _resized(x: Float[Tensor, "b c h w"], grid: torch.Size) -> Float[Tensor, "b c h2 w2"]:
    return x if x.shape[-2:] == grid else F.interpolate(x, size=grid, mode="nearest")


def _as_map(x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b channels h w"]:
    return x[:, :, None, None] if x.ndim == 2 else as_map(x)
