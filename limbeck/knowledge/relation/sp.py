r"""Similarity-Preserving Knowledge Distillation (Tung, Mori; ICCV 2019; arXiv:1907.09682).

Inputs that excite the teacher alike should excite the student alike. With the maps of a layer flattened to
the rows of $Q$, and each row of their inner products divided by its length:

$$\tilde G = Q Q^\top, \qquad G_i = \tilde G_i / \lVert \tilde G_i \rVert_2, \qquad
  L = \sum_l \frac{1}{b^2} \lVert G^s_l - G^t_l \rVert_F^2$$

Weights: 3,000 is that of the paper, of RepDistiller (`distiller_zoo/SP.py`, verified by the author) and of
mdistiller, on the last map before pooling. Rows of $G$ have length 1 at every batch size, so the loss shrinks
as $1/b$: this weight belongs to batches of 64 to 128.

Departures from the paper:
- A row of $\tilde G$ that is all 0 (a dead map) stays 0 and passes no gradient.
- With several processes the relations are among all their rows.

Layers are paired by tap name. Widths and grids need not agree.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen
from limbeck.pieces.similarity import gram, unit


def sp(s: Float[Tensor, "b d_s"], t: Float[Tensor, "b d_t"]) -> Float[Tensor, ""]:
    """How far the student's similarities are from the teacher's. No gradient passes to `t`."""
    return F.mse_loss(similarities(s), similarities(t.detach()))


def similarities(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """$G$: inner products of rows, each row of them of length 1."""
    return unit(gram(x))


class SP(Method):
    """Similarities among the rows of all processes, at one or several taps."""

    card = Card(
        "arXiv:1907.09682",
        2019,
        ("relation",),
        taps=("stage3",),
        per_sample=False,
        order_free=True,
        zero_at_match=True,
        reads_out=False,
    )

    def __init__(self, taps: Sequence[str] = ("stage3",)) -> None:
        super().__init__()
        self.taps = tuple(taps)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        losses = [sp(*(across.gather(seen.at[tap].flatten(1)) for seen in (s, t))) for tap in self.taps]
        return torch.stack(losses).sum()
