r"""FitNets: Hints for Thin Deep Nets (Romero et al.; ICLR 2015; arXiv:1412.6550).

A projector $r$ lifts a layer of the student (guided) to one of the teacher (the hint); they should agree:

$$L = \tfrac12 \operatorname{mean} \big(r(s) - t\big)^2$$

Departures from the paper:
- The mean over elements for its sum, so the weight does not grow with layer size. RepDistiller's weight of
  100, on a squared error without the half, is 200 here.
- The paper has two stages: the student up to the guided layer learns from the hint alone, then all of it by
  KD without the hint (in the official code at T = 3, weight 4 falling to 1, no T²). Here the hint may also
  stand beside the task throughout, as in RepDistiller and mdistiller; the paper's schedule is a recipe of two
  stages, `fitnet` without the task and then `kd`.
- $r$ is a 1x1 convolution with bias. The paper's is a convolution without padding, whose kernel brings the
  student's grid down to the teacher's, followed by the hint's own activation.
- When grids differ, the projected map is resized to the teacher's grid, bilinearly and without antialiasing;
  in the paper the student's grid is never the smaller.

Departures from the official code (adri-romsor/FitNets), besides these:
- It sums over one axis and averages over the others, and takes a cross-entropy for tanh and sigmoid hints.
- It has no regressor where shapes agree. Here there always is one: the channels of two networks have no
  common order. So the loss is not 0 when both show the same map, until the projector has learned to be the
  identity.

Maps (`b c h w`) are compared, tokens as the map that they make, and vectors (`b d`) of both networks, then
with a linear $r$.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, expect_maps


def hint(s: Float[Tensor, "b c h w"], t: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Half the mean squared gap between a projected student map and the teacher's."""
    return 0.5 * F.mse_loss(s, t)


class FitNet(Method):
    """One hint layer, matched through a 1x1 projector that is dropped after training."""

    card = Card("arXiv:1412.6550", 2015, ("feature",), taps=("stage2",), per_sample=True, reads_out=False)

    def __init__(self, tap: str = "stage2") -> None:
        super().__init__()
        self.tap = tap

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        if not s.at[self.tap].ndim == t.at[self.tap].ndim == 2:
            expect_maps("fitnet", (self.tap,), s, t)
        here, there = _map(s.at[self.tap]), _map(t.at[self.tap])
        self.project = nn.Conv2d(here.shape[1], there.shape[1], kernel_size=1)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = self.project(_map(s.at[self.tap])), _map(t.at[self.tap])
        if here.shape[-2:] != there.shape[-2:]:
            here = F.interpolate(here, size=there.shape[-2:], mode="bilinear")
        return hint(here, there)


def _map(x: Tensor) -> Float[Tensor, "b c h w"]:
    """A vector is a map of one place."""
    return x[:, :, None, None] if x.ndim == 2 else as_map(x)
