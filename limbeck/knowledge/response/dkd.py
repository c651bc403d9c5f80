r"""Decoupled Knowledge Distillation (Zhao, Cui, Song, Qiu, Liang; CVPR 2022; arXiv:2203.08679).

KD is two lessons in one: how likely the labelled class $y$ is (TCKD), and how the others share the rest
(NCKD). The surer the teacher, the less KD cares for the second; apart, each has a weight of its own:

$$\mathrm{TCKD} = T^2\, \mathrm{KL}\big((p_{t,y}, 1 - p_{t,y}) \,\Vert\, (p_{s,y}, 1 - p_{s,y})\big), \qquad
  \mathrm{NCKD} = T^2\, \mathrm{KL}\big(\hat p_t \,\Vert\, \hat p_s\big), \qquad
  \hat p_i = \frac{e^{z_i/T}}{\sum_{j \ne y} e^{z_j/T}}$$

$$L = \operatorname*{mean}_b \big(\alpha\, \mathrm{TCKD} + \beta\, \mathrm{NCKD}\big), \qquad
  \mathrm{KD} = \mathrm{TCKD} + (1 - p_{t,y})\, \mathrm{NCKD}$$

Knobs and weights are those of mdistiller (`distillers/DKD.py`, the official code), term and task both of
weight 1: $\alpha = 1$, $T = 4$, and a $\beta$ that depends on the pair. For CIFAR-100 it is 8 (the default),
but 6 for VGG-13 → VGG-8 or MobileNetV2 and for WRN-40-2 → 16-2 or 40-1, and 2 for ResNet-56 → 20 and
110 → 32. For ImageNet $T = 1$, with $\beta = 0.5$ for ResNet-34 → 18 and 2 for ResNet-50 → MobileNetV1.

Its warm-up on CIFAR-100, $\min(\text{epoch}/20, 1)$ with epochs from 1, belongs to the term:
`ramp = { epochs = 20 }`.

Departures from paper and official code:
- Rows without a label are skipped; the mean is over the labelled rows of all processes.
- The others are picked, not masked: the official code subtracts 1000 from the labelled logit, which logits
  in the thousands survive. $p_y$ and $1 - p_y$ are taken as logarithms, from two logits: there the
  probabilities come first, and the $\log 0$ of a network that is certain is not finite.
- Dense logits (`b k h w`) with dense labels (`b h w`) are many rows.

Of two classes there is but one other: NCKD is 0, and TCKD is all of KD.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import Batch, Lesson
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.softening import kl, log_soften
from limbeck.pieces.target_class import expect_labelled_answers, others, target


def dkd(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    y: Int[Tensor, "b *rest"],
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """The mean of `decoupled` over the rows that carry a label. Gradient passes to both."""
    rows = decoupled(s, t, y, alpha, beta, temperature)
    return across.labelled_mean(rows, Batch(s, y, lesson=Lesson()))  # dynamo cannot take the default lesson


def decoupled(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    y: Int[Tensor, "b *rest"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, "b *rest"]:
    """Both lessons of each row. Where there is no label they mean nothing."""
    return alpha * tckd(s, t, y, temperature) + beta * nckd(s, t, y, temperature)


def tckd(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    y: Int[Tensor, "b *rest"],
    temperature: float,
) -> Float[Tensor, "b *rest"]:
    """How far apart they are on the labelled class against all others together."""
    return temperature**2 * kl(_one_or_other(s, y, temperature), _one_or_other(t, y, temperature))


def nckd(
    s: Float[Tensor, "b k *rest"],
    t: Float[Tensor, "b k *rest"],
    y: Int[Tensor, "b *rest"],
    temperature: float,
) -> Float[Tensor, "b *rest"]:
    """How far apart they are on the others, among themselves."""
    return temperature**2 * kl(log_soften(others(s, y), temperature), log_soften(others(t, y), temperature))


class DKD(Method):
    """The teacher's answer for labelled rows, the labelled class and the others weighted apart."""

    card = Card(
        "arXiv:2203.08679",
        2022,
        ("response",),
        needs=frozenset({"same_classes", "labels"}),
        per_sample=True,
        zero_at_match=True,
    )

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise Refused(f"The temperature of 'dkd' is {temperature}, expected a number above 0; try 4.")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_labelled_answers("dkd", s, t, batch)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        assert batch.y is not None
        rows = decoupled(s.out, t.out, batch.y, self.alpha, self.beta, self.temperature)
        return across.labelled_mean(rows, batch)


def _one_or_other(
    z: Float[Tensor, "b k *rest"], y: Int[Tensor, "b *rest"], temperature: float
) -> Float[Tensor, "b 2 *rest"]:
    r"""$(\log p_y, \log(1 - p_y))$, from the labelled logit and the one that all others make together."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)) / temperature
    return torch.stack((target(z, y), others(z, y).logsumexp(1)), 1).log_softmax(1)
