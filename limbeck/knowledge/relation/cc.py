r"""Correlation Congruence for Knowledge Distillation (Peng et al.; ICCV 2019; arXiv:1904.01802).

How alike the features of a batch are, two by two, should be as for the teacher. Alike means a Gaussian kernel
on features of length 1, expanded to order $P$ in their cosine $c_{ij}$ (as $\lVert x_i - x_j \rVert^2 =
2 - 2 c_{ij}$):

$$e^{-\gamma \lVert x_i - x_j \rVert^2} \approx C_{ij}
  = e^{-2\gamma} \sum_{p=0}^P \frac{(2\gamma)^p}{p!}\, c_{ij}^p, \qquad
  L = \frac{1}{b^2} \lVert C^s - C^t \rVert_F^2$$

**This is the paper's loss, and not the one called CC in RepDistiller** (`distiller_zoo/CC.py`, mailed by the
author), which is $\operatorname{mean}_i \sum_d |s_i - t_i|_d\, |s_{i+1} - t_{i+1}|_d$ of features projected
to 128 dimensions: it compares instances, not correlations, and depends on the order of the rows. Its weight
of 0.02, and the CIFAR-100 figures that are usually quoted for CC, belong to that loss.

Weights: at the defaults entries of $C$ lie between 0.23 and 0.95, so the loss is small: AberHu's
Knowledge-Distillation-Zoo, which has this kernel, weighs it by 100.

Departures from the paper, as in that code:
- Correlations alone: KD, or a squared error on features beside it, is a term of its own.
- Features are compared as they are, of any two widths; its networks end in embeddings of equal width.
- Any batch will do; it draws batches that hold several rows of a class, or of a cluster, so that there is
  more to correlate.
- Of its kernels only the Gaussian, which it found best.

A feature of zeros has cosine 0 with all and passes no gradient. With several processes the relations are
among all their rows. A tapped tensor of more than two axes is flattened from axis 1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.similarity import gram, unit


def cc(s: Float[Tensor, "b d_s"], t: Float[Tensor, "b d_t"], gamma: float, order: int) -> Float[Tensor, ""]:
    """How far the student's correlations are from the teacher's. No gradient passes to `t`."""
    return F.mse_loss(correlations(s, gamma, order), correlations(t.detach(), gamma, order))


def correlations(x: Float[Tensor, "b d"], gamma: float, order: int) -> Float[Tensor, "b b"]:
    """$C$: the Gaussian kernel of every two rows, of length 1, as a polynomial in their cosine."""
    cosine = gram(unit(x))
    term = total = torch.full_like(cosine, math.exp(-2 * gamma))
    for p in range(1, order + 1):
        term = term * cosine * (2 * gamma / p)
        total = total + term
    return total


class CC(Method):
    """Correlations among the rows of all processes, at one tap."""

    card = Card(
        "arXiv:1904.01802",
        2019,
        ("relation",),
        taps=("pooled",),
        per_sample=False,
        order_free=True,
        zero_at_match=True,
        reads_out=False,
    )

    def __init__(self, gamma: float = 0.4, order: int = 2, tap: str = "pooled") -> None:
        super().__init__()
        if not 0 < gamma < math.inf or order < 1:
            raise Refused(
                f"The kernel of 'cc' has gamma {gamma} and order {order}, expected a number above 0 and an "
                "order of at least 1; try 0.4 and 2."
            )
        self.gamma, self.order = gamma, order
        self.tap = tap

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = (across.gather(seen.at[self.tap].flatten(1)) for seen in (s, t))
        return cc(here, there, self.gamma, self.order)
