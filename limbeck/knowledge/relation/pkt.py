r"""Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis, Tefas; ECCV 2018;
arXiv:1803.10837).

How likely a row would pick each row of the batch as its neighbour, by the cosine $c$ between features, should
be as for the teacher:

$$p_{ij} = \frac{K_{ij}}{\sum_k K_{ik}}, \qquad K_{ij} = \tfrac12 (c_{ij} + 1), \qquad
  L = \operatorname*{mean}_{i,j}\, p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon},
  \qquad \epsilon = 10^{-7}$$

Weights: 30,000 is that of RepDistiller and mdistiller, on the pooled feature. It is large because a row's KL
is divided by $b$ once more: this weight belongs to batches of 64 to 128.

Departures from the paper, all but the last as in the official code (passalis/probabilistic_kt, `nn/pkt.py`),
which RepDistiller and mdistiller repeat:
- The mean over pairs for its sum.
- A row may pick itself; in the paper $k \ne i$ and $j \ne i$.
- The $\epsilon$, without which opposite features ($K = 0$) would cost infinitely much.
- Of its kernels only the cosine, which has no width to tune. Its other transfers (from hand-crafted features,
  or with a similarity made of labels) are no part of this file.
- With several processes the relations are among all their rows.

Departures from the official code: lengths are not padded by $\epsilon$ before cosines are taken; a feature of
zeros has cosine 0 with all, as there, and passes no gradient. A tapped tensor of more than two axes is
flattened from axis 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen
from limbeck.pieces.similarity import gram, unit

EPSILON = 1e-7


def pkt(s: Float[Tensor, "b d_s"], t: Float[Tensor, "b d_t"]) -> Float[Tensor, ""]:
    """How far the student's neighbourhoods are from the teacher's. No gradient passes to `t`."""
    here, there = neighbours(s) + EPSILON, neighbours(t.detach())
    return (there * torch.log((there + EPSILON) / here)).mean()


def neighbours(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """$p$: each row is a distribution over the batch."""
    kernel = 0.5 * (gram(unit(x)) + 1)
    return kernel / kernel.sum(1, keepdim=True)


class PKT(Method):
    """Neighbourhoods among the rows of all processes, at one tap."""

    card = Card(
        "arXiv:1803.10837",
        2018,
        ("relation",),
        taps=("pooled",),
        fidelity="code",
        per_sample=False,
        order_free=True,
        zero_at_match=True,
        reads_out=False,
    )

    def __init__(self, tap: str = "pooled") -> None:
        super().__init__()
        self.tap = tap

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        return pkt(*(across.gather(seen.at[self.tap].flatten(1)) for seen in (s, t)))
