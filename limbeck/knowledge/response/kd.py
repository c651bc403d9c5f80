r"""Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean; 2015; arXiv:1503.02531).

The student gives each class the probability its teacher gives it, both softened so that small ones count too:

$$p(z, T)_i = \frac{e^{z_i/T}}{\sum_j e^{z_j/T}}, \qquad
  L = T^2 \operatorname*{mean}_b\, \mathrm{KL}\big(p(z_t, T) \,\Vert\, p(z_s, T)\big), \qquad
  \frac{\partial L}{\partial z_s} = \frac{T}{b} \big(p(z_s, T) - p(z_t, T)\big)$$

The paper's factor $T^2$ undoes the $1/T^2$ by which gradients shrink, so a weight keeps its meaning when $T$
changes. For large $T$ what is left is to match logits, each row centred:
$L \to \operatorname{mean}_b \lVert z_s - z_t \rVert^2 / 2k$.

The mean is over rows and, for dense logits (`b k h w`), positions; never over classes. `KLDivLoss()` divides
by $k$ too unless told not to, and so do some releases (TAKD, DGKD, Tf-KD): their weight $w$ is $w/k$ here.

Departures from the paper, which has no official code:
- KL for its cross-entropy. They differ by the teacher's entropy: the same gradient, but 0 at a match.
- Its objective is a weighted mean with the ordinary loss. Here they are summed, and the weights belong to
  the term and the task: RepDistiller and mdistiller use 0.9 and 0.1.
- It tries several temperatures and recommends none; 4 is the custom of those two.
"""

import math

from jaxtyping import Float
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.softening import kl, log_soften


def kd(s: Float[Tensor, "b k *rest"], t: Float[Tensor, "b k *rest"], temperature: float) -> Float[Tensor, ""]:
    """How far the student's softened answer is from the teacher's. Gradient passes to both."""
    return temperature**2 * kl(log_soften(s, temperature), log_soften(t, temperature)).mean()


class KD(Method):
    """The softened answer of a teacher, for every row, labelled or not."""

    card = Card(
        "arXiv:1503.02531",
        2015,
        ("response",),
        needs=frozenset({"same_classes"}),
        per_sample=True,
        zero_at_match=True,
    )

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise Refused(f"The temperature of 'kd' is {temperature}, expected a number above 0; try 4.")
        self.temperature = temperature

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        if s.out.ndim < 2 or s.out.shape[1] < 2:  # the softmax of one class is 1, whatever its logit
            raise Refused(
                f"Method 'kd' compares class probabilities, and the student answers {tuple(s.out.shape)}, "
                "expected (rows, classes, …) with at least two classes; let a single logit z answer (0, z)."
            )

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        return kd(s.out, t.out, self.temperature)
