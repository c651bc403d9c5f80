r"""TITLE OF THE PAPER (Authors; VENUE 2026; arXiv:0000.00000).

TODO: the method in a sentence or two. Rows that are alike to the teacher should be alike to the student. With
$S_{ij}$ the cosine between the features of rows $i$ and $j$:

$$L = \frac{1}{b^2} \lVert S^s - S^t \rVert_F^2$$

Departures from the paper: TODO, every one of them, from its official code too; or say that there is none.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen


def name_here(s: Float[Tensor, "b d_s"], t: Float[Tensor, "b d_t"]) -> Float[Tensor, ""]:
    """How far the student's cosines between rows are from the teacher's; widths need not agree."""
    return F.mse_loss(cosines(s), cosines(t))


def cosines(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """$S$: the cosine between each two rows."""
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)))
    return unit @ unit.T


class NameHere(Method):
    """TODO: what is taught, and what a term of weight 1 means.

    tap: the look whose rows are compared; maps and tokens are flattened.
    """

    card = Card("arXiv:0000.00000", 2026, ("relation",), taps=("pooled",), zero_at_match=True)

    def __init__(self, tap: str = "pooled") -> None:
        super().__init__()
        self.tap = tap

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        """The relations are among the rows of all processes."""
        return name_here(*(across.gather(seen.at[self.tap].flatten(1)) for seen in (s, t)))
