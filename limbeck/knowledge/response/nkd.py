r"""NKD, of From Knowledge Distillation to Self-Knowledge Distillation (Yang et al.; ICCV 2023;
arXiv:2303.13005).

The student raises the labelled class $y$ as far as its teacher believes in it, and matches how the teacher
shares the rest among the others. These shares are normalised, for the two rests differ in size:

$$L = \operatorname*{mean}_b \Big( -\,p_{t,y} \log p_{s,y}
    \;-\; \gamma\, T^2 \sum_{i \ne y} \hat p_{t,i} \log \hat p_{s,i} \Big), \qquad
  \hat p_i = \frac{e^{z_i/T}}{\sum_{j \ne y} e^{z_j/T}}$$

with $p_y$ at temperature 1, whatever $T$ is. Both terms are cross-entropies: where the student says what its
teacher says they are not 0, and the first still pulls.

Knobs and weights are the official code's (yzd-v/cls_KD), where the loss stands beside the whole cross-entropy
with the label, both of weight 1: $\gamma = 1.5$, $T = 1$ for ImageNet (the defaults), $\gamma = 3.5$, $T = 3$
for CIFAR-100 (ResNet-34 → 18). The second term has the gradient of $\gamma$ times DKD's NCKD.

Departures from paper and official code:
- Rows without a label are skipped; the mean is over the labelled rows of all processes.
- Dense logits (`b k h w`) with dense labels (`b h w`) are many rows. A soft label is refused; there its
  largest entry is taken.
- Some releases of the code (cls_KD#16, of October 2023) leave class $y$ among the others.

Of two classes there is but one other, and the second term is 0.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import Batch, Lesson
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.softening import log_soften
from limbeck.pieces.target_class import expect_labelled_answers, others, target


def nkd(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    y: Int[Tensor, "b *rest"],
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """The mean of `normalised` over the rows that carry a label. Gradient passes to both."""
    rows = normalised(s, t, y, gamma, temperature)
    return across.labelled_mean(rows, Batch(s, y, lesson=Lesson()))  # dynamo cannot take the default lesson


def normalised(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    y: Int[Tensor, "b *rest"],
    gamma: float,
    temperature: float,
) -> Float[Tensor, "b *rest"]:
    """Both terms of each row. Where there is no label they mean nothing."""
    s_y, t_y = (target(log_soften(z, 1.0), y) for z in (s, t))
    s_rest, t_rest = (log_soften(others(z, y), temperature) for z in (s, t))
    return -t_y.exp() * s_y - gamma * temperature**2 * (t_rest.exp() * s_rest).sum(1)


class NKD(Method):
    """The teacher's answer for labelled rows: its belief in the label, and the shares of the others."""

    card = Card(
        "arXiv:2303.13005",
        2023,
        ("response",),
        needs=frozenset({"same_classes", "labels"}),
        per_sample=True,
    )

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise Refused(f"The temperature of 'nkd' is {temperature}, expected a number above 0; try 1.")
        self.gamma, self.temperature = gamma, temperature

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_labelled_answers("nkd", s, t, batch)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        assert batch.y is not None
        rows = normalised(s.out, t.out, batch.y, self.gamma, self.temperature)
        return across.labelled_mean(rows, batch)
