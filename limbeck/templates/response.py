r"""TITLE OF THE PAPER (Authors; VENUE 2026; arXiv:0000.00000).

TODO: the method in a sentence or two. The log-probabilities of both should agree, class by class:

$$L = \operatorname*{mean}_b \tfrac12 \lVert \log p_s - \log p_t \rVert^2, \qquad
  p_i = \frac{e^{z_i}}{\sum_j e^{z_j}}$$

Departures from the paper: TODO, every one of them, from its official code too; or say that there is none.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def name_here(s: Float[Tensor, "b k"], t: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Half the squared distance between two rows of log-probabilities; 0 when they agree."""
    exact = torch.promote_types(s.dtype, torch.float32)  # half precision would lose small probabilities
    return 0.5 * (s.to(exact).log_softmax(1) - t.to(exact).log_softmax(1)).square().sum(1).mean()


class NameHere(Method):
    """TODO: what is taught, and what a term of weight 1 means."""

    card = Card(
        "arXiv:0000.00000",
        2026,
        ("response",),
        needs=frozenset({"same_classes"}),
        per_sample=True,
        zero_at_match=True,
    )

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        here, there = tuple(s.out.shape), tuple(t.out.shape)
        if len(here) != 2 or here != there:
            raise Refused(
                f"Method 'name_here' compares class scores, and the student answers {here} where "
                f"the teacher answers {there}, expected the same (rows, classes) of both; give them one head."
            )

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        return name_here(s.out, t.out)
