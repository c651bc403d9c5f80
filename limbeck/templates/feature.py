r"""TITLE OF THE PAPER (Authors; VENUE 2026; arXiv:0000.00000).

TODO: the method in a sentence or two. A linear projector $r$ lifts the student's feature to the teacher's
width, and both should agree:

$$L = \operatorname*{mean}_b \tfrac12 \lVert r(s) - t \rVert^2$$

Departures from the paper: TODO, every one of them, from its official code too; or say that there is none.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def name_here(s: Float[Tensor, "b d"], t: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Half the squared distance between a projected row of the student and the teacher's."""
    exact = torch.promote_types(s.dtype, torch.float32)  # the square of 256 is no float16
    return 0.5 * (s.to(exact) - t.to(exact)).square().sum(1).mean()


class NameHere(Method):
    """TODO: what is taught, and what a term of weight 1 means.

    tap: a look that shows one vector a row.
    """

    card = Card("arXiv:0000.00000", 2026, ("feature",), taps=("pooled",), per_sample=True)

    def __init__(self, tap: str = "pooled") -> None:
        super().__init__()
        self.tap = tap

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        here, there = s.at[self.tap].shape, t.at[self.tap].shape
        if not len(here) == len(there) == 2:
            raise Refused(
                f"Method 'name_here' compares one vector a row, and tap '{self.tap}' shows "
                f"{tuple(here)} in the student and {tuple(there)} in the teacher; tap a pooled feature."
            )
        self.project = nn.Linear(here[1], there[1])

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        return name_here(self.project(s.at[self.tap]), t.at[self.tap])
