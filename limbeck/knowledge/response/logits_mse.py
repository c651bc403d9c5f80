r"""Do Deep Nets Really Need to be Deep? (Ba, Caruana; NIPS 2014; arXiv:1312.6184).

The student regresses the teacher's logits. They say more than probabilities, of which most are nearly 0:

$$L = \operatorname*{mean}_b \tfrac12 \lVert z_s - z_t \rVert^2, \qquad
  \frac{\partial L}{\partial z_s} = \frac1b (z_s - z_t)$$

The mean is over rows and, for dense logits (`b k h w`), positions; never over classes. `MSELoss()` divides by
$k$ and not by 2: its weight $w$ (Knowledge-Distillation-Zoo, `kd_losses/logits.py`: 0.1) is $2w/k$ here. For
centred logits the loss is $k$ times that of KD at a high temperature.

Departures from the paper, which has no official code:
- It trains on this loss alone, in part on data without labels: `task_weight = 0`. Beside a task the weights
  are yours to choose.
- The teacher's logits are not standardised over the training set, which it finds to help slightly.
- The linear bottleneck that speeds up its shallow students is a matter of the student's.

A shift of a whole row, which no softmax sees, costs. One output is enough: a regression can be learnt so.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def logits_mse(s: Float[Tensor, "b k *rest"], t: Float[Tensor, "b k *rest"]) -> Float[Tensor, ""]:
    """Half the squared distance between two rows of logits. Gradient passes to both."""
    exact = torch.promote_types(s.dtype, torch.float32)  # the square of 256 is no float16
    return 0.5 * (s.to(exact) - t.to(exact)).square().sum(1).mean()


class LogitsMSE(Method):
    """The raw answer of a teacher, for every row, labelled or not."""

    card = Card(
        "arXiv:1312.6184",
        2014,
        ("response",),
        needs=frozenset({"same_classes"}),
        per_sample=True,
        zero_at_match=True,
    )

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        here, there = tuple(s.out.shape), tuple(t.out.shape)
        if len(here) < 2 or here != there:
            raise Refused(
                f"Method 'logits_mse' compares logits one by one, and the student answers {here} where the "
                f"teacher answers {there}, expected the same (rows, classes, …) of both; give them one head."
            )

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        return logits_mse(s.out, t.out)
