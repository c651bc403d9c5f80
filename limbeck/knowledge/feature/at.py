r"""Paying More Attention to Attention (Zagoruyko, Komodakis; ICLR 2017; arXiv:1612.03928).

At each stage the student should look where its teacher looks: the energy of a map's positions, as a unit
vector $q$ over the $n = hw$ positions of a row, should agree. Which channels carry it, how many there are and
how strong they are, does not matter:

$$Q_i = \sum_c |x_{ci}|^p, \qquad q = Q / \lVert Q \rVert_2, \qquad
  L = \sum_{\text{taps}} \operatorname*{mean}_{b,\,i}\, (q_s - q_t)^2$$

Weight: 1000 is that of the official code, RepDistiller and mdistiller, which all take this mean. It is no
large weight: $\lVert q_s - q_t \rVert^2$ is at most 2, so a tap's loss is at most $2/n$.

Departures from the paper:
- Its equation has the norm of the difference, with $\beta / 2$ before it and $\beta = 10^3$ divided by the
  number of positions and rows. As in the official code it is the square here, and there is no half.
- When grids differ, the larger map is averaged down to the smaller by adaptive pooling *before* its energy
  is taken, as RepDistiller and mdistiller do; the paper interpolates attention maps.
- Of its attentions only $F^p_{sum}$, the one it uses, is here: neither the maximum over channels nor the
  gradient with respect to the input.
- Tokens are looked at as the map that they make; the paper has none.
- Beside KD its weight decays during training, in a way that it does not tell; here it stays.

Departures from the official code (szagoruyko/attention-transfer, `cifar.py`), for the sake of numbers: the
mean over channels is a sum, and energies are in units of a row's largest, both undone by the norm. A map of
zeros attends nowhere: $q = 0$.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.attention_maps import attention
from limbeck.pieces.maps import as_map, expect_maps, on_smaller_grid


def at(s: Float[Tensor, "b c_s h w"], t: Float[Tensor, "b c_t h w"], power: float = 2.0) -> Float[Tensor, ""]:
    """Mean squared gap between two attentions on one grid. Gradient passes to both."""
    return F.mse_loss(attention(s, power), attention(t, power))


class AT(Method):
    """Attention at the end of each stage; nothing learns but the student."""

    card = Card(
        "arXiv:1612.03928",
        2017,
        ("feature",),
        taps=("stage1", "stage2", "stage3"),
        fidelity="code",  # the square, and the mean
        per_sample=True,
        zero_at_match=True,
        reads_out=False,
    )

    def __init__(self, power: float = 2.0, taps: Sequence[str] = ("stage1", "stage2", "stage3")) -> None:
        super().__init__()
        if not 1 <= power < math.inf:
            raise Refused(f"The power of 'at' is {power}, expected a number of at least 1; try 2.")
        self.power, self.taps = power, tuple(taps)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_maps("at", self.taps, s, t)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        pairs = [on_smaller_grid(as_map(s.at[tap]), as_map(t.at[tap])) for tap in self.taps]
        return torch.stack([at(here, there, self.power) for here, there in pairs]).sum()
