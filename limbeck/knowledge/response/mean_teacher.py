r"""Mean teachers are better role models (Tarvainen, Valpola; NeurIPS 2017; arXiv:1703.01780).

The student should answer, under its own noise, as the running mean of its weights does under another:

$$L = \tfrac1{k} \lVert \mathrm{softmax}(s) - \mathrm{softmax}(t) \rVert^2$$

averaged over all rows, labelled or not. The teacher is a model `{ mean_of = "student" }` of the recipe, the
weight grows from 0 to 100 over the first 5 epochs by `exp(-5 (1-p)^2)` (the ramp `sigmoid`), and what ships
is the mean: `ships = "mean"`. See recipes/mean_teacher.toml.

Departures: the authors' code keeps the teacher in train mode, so that its BatchNorm has statistics of its
own; here it is in eval, and the student's running statistics are averaged as its weights are. The second
output layer of their ResNets, which frees the consistency from the classification, is left out.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen


def consistency(s: Float[Tensor, "b k *rest"], t: Float[Tensor, "b k *rest"]) -> Float[Tensor, ""]:
    """Mean squared difference of the two softmax answers, over rows and classes."""
    return (s.softmax(1) - t.softmax(1)).square().mean()


class MeanTeacher(Method):
    """The consistency of a student with (the running mean of) itself."""

    card = Card(
        "arXiv:1703.01780",
        2017,
        ("response",),
        needs=frozenset({"same_classes"}),
        per_sample=True,
        zero_at_match=True,
    )

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        exact = torch.promote_types(s.out.dtype, torch.float32)
        return consistency(s.out.to(exact), t.out.to(exact))
