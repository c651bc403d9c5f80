r"""DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer (Chen, Wang, Zhang;
AAAI 2018; arXiv:1707.01220).

Every row asks: who of the batch is nearest to me, who is next? The student should give the teacher's order
$\pi$ of the nearest $n$ a high probability, when rows are picked one after the other in proportion to
$\exp S(q, x)$:

$$S(q, x) = -\alpha \lVert q - x \rVert^\beta, \qquad
  L = -\operatorname*{mean}_q \sum_{i=1}^{n} \log
      \frac{\exp S(q, \pi_i)}{\sum_{k=i}^{n} \exp S(q, \pi_k)}$$

This is the paper's *hard* loss, in the form that RKD's official code (lenscloth/RKD, `metric/loss.py`) gives
it as a baseline for metric learning: α = 3 (2 in its script), β = 3, n = 4. Choose α for the scale of the
student's distances: scores grow with their cube.

Departures from the paper:
- Each row of the batch is a query, and its candidates are the teacher's n nearest; the paper orders a list of
  candidates of one query.
- The *soft* loss, a KL divergence over all n! orders of the list, is left out.

Departures from the official code: distances are RKD's here (float64, exactly 0 between rows that coincide).
With several processes the rows of all are ordered. A tapped tensor of more than two axes is flattened from
axis 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen
from limbeck.pieces.distances import distances


def darkrank(
    s: Float[Tensor, "b d_s"],
    t: Float[Tensor, "b d_t"],
    alpha: float = 3.0,
    beta: float = 3.0,
    nearest: int = 4,
) -> Float[Tensor, ""]:
    """How unlikely the teacher's order of each row's `nearest` is to the student. No gradient passes to `t`.

    Fewer than three rows have nothing to order: 0.
    """
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    far = distances(t.detach()).masked_fill(itself, torch.inf)
    order = far.sort(dim=1, stable=True).indices[:, : min(nearest, len(s) - 1)]
    score = (-alpha * distances(s).pow(beta)).gather(1, order)
    left = score.flip(1).logcumsumexp(1).flip(1)  # of the candidates not picked yet
    loss = (left - score).sum() / len(s)
    return loss.to(torch.promote_types(s.dtype, torch.float32))


class DarkRank(Method):
    """The order of each row's nearest among the rows of all processes, at one tap."""

    card = Card(
        "arXiv:1707.01220",
        2018,
        ("relation",),
        taps=("pooled",),
        fidelity="code",
        per_sample=False,
        order_free=True,
        zero_at_match=False,
        reads_out=False,
    )

    def __init__(self, alpha: float = 3.0, beta: float = 3.0, nearest: int = 4, tap: str = "pooled") -> None:
        super().__init__()
        self.alpha, self.beta, self.nearest = alpha, beta, nearest
        self.tap = tap

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = (across.gather(seen.at[self.tap].flatten(1)) for seen in (s, t))
        return darkrank(here, there, self.alpha, self.beta, self.nearest)
