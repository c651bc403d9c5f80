r"""Knowledge Distillation from A Stronger Teacher (Huang et al.; NeurIPS 2022; arXiv:2205.10536): DIST.

A strong teacher's probabilities are out of a small student's reach, and their relations are not. So the two
need only correlate (Pearson's $\rho$): each row over the classes, and each class over the rows of the batch.

$$L = \beta\, T^2 \operatorname*{mean}_b \big(1 - \rho(p_s^{b\cdot}, p_t^{b\cdot})\big)
    + \gamma\, T^2 \operatorname*{mean}_k \big(1 - \rho(p_s^{\cdot k}, p_t^{\cdot k})\big), \qquad
  1 - \rho(u, v) = \tfrac12 \lVert \hat u - \hat v \rVert^2$$

where $\hat u$ is $u$, centred and of length 1. Each mean lies between 0 and 2, whatever $k$ and $b$; the
second depends on who else is in the batch.

Knobs are the official code's (hunto/image_classification_sota, `losses/dist_kd.py`): $\beta = \gamma = 1$,
$T = 1$. Its recipes give the term the weight 2 and the task 1, with $T = 4$ for CIFAR-100.

Departures from the paper:
- $T^2$ is the official code's. The pseudocode of the appendix lacks it; at $T = 1$ they agree.

Departures from the official code, all for the sake of numbers:
- $1 - \rho$ is a squared distance: no cancellation near a match, where it is 0.
- There 1e-8 beside the product of norms makes rare classes seem uncorrelated, at a match too. Correlation
  does not see scale: here a class is measured by its highest probability in the batch, and none is too rare.
- A row or class that does not vary, up to rounding, has no direction ($\hat u = 0$): it adds ½, or nothing if
  it varies in neither network, and passes no gradient. There it adds 1, with a gradient in the thousands.
- With several processes the rows are those of all of them.
- Dense logits (`b k h w`) are many rows, as in its code for segmentation.

Two classes are always in line or opposed: the first term then has no gradient.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.softening import log_soften


def dist(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """How far the student's predictions are from correlating with the teacher's. Gradient passes to both."""
    s, t = (log_soften(z, temperature).movedim(1, -1).flatten(0, -2) for z in (s, t))
    return temperature**2 * (beta * _uncorrelated(s, t, 1) + gamma * _uncorrelated(s, t, 0))


class DIST(Method):
    """The relations in the answers of all processes' rows, over the classes and over the rows."""

    card = Card(
        "arXiv:2205.10536",
        2022,
        ("response", "relation"),
        fidelity="code",  # T²; the rest is the paper's
        needs=frozenset({"same_classes"}),
        per_sample=False,
        order_free=True,
        zero_at_match=True,
    )

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise Refused(f"The temperature of 'dist' is {temperature}, expected a number above 0; try 1.")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        here, there = tuple(s.out.shape), tuple(t.out.shape)
        if len(here) < 2 or here[1] < 2 or here != there:
            raise Refused(
                f"Method 'dist' correlates class probabilities, and the student answers {here} where the "
                f"teacher answers {there}, expected the same (rows, classes, …) of both, with at least two "
                "classes."
            )

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = (across.gather(seen.out) for seen in (s, t))
        return dist(here, there, self.beta, self.gamma, self.temperature)


def _uncorrelated(s: Float[Tensor, "rows k"], t: Float[Tensor, "rows k"], axis: int) -> Float[Tensor, ""]:
    """The mean of 1 − ρ of log-probabilities, each ρ along `axis`."""
    return 0.5 * (_direction(s, axis) - _direction(t, axis)).square().sum(axis).mean()


def _direction(log_p: Float[Tensor, "rows k"], axis: int) -> Float[Tensor, "rows k"]:
    """Probabilities along `axis`, centred and of length 1; 0 where they do not vary."""
    p = (log_p - log_p.detach().amax(axis, keepdim=True)).exp()  # in units of the highest
    p = p - p.mean(axis, keepdim=True)
    square = p.square().sum(axis, keepdim=True)
    varies = square > log_p.shape[axis] * (8 * torch.finfo(p.dtype).eps) ** 2
    scale = torch.where(varies, square, 1.0).rsqrt()  # at 0 rsqrt has no gradient
    return torch.where(varies, p * scale, 0.0)
