r"""Logit Standardization in Knowledge Distillation (Sun et al.; CVPR 2024; arXiv:2403.01427): a lens.

A shared temperature asks the student for logits as widely spread as its teacher's. Standardised, each row has
a temperature of its own, in each network, and what is left to learn is how the logits lie to one another:

$$z \mapsto \frac{z - \operatorname{mean} z}{\operatorname{std} z + 10^{-7}}$$

The method that looks through the lens then divides by its temperature $T$, the *base* temperature, and
multiplies by $T^2$: the official code (sunshangquan/logit-standardization-KD, `distillers/KD.py`) has
`loss_kd *= temperature**2` with that $T$, and nothing for the deviation. So the factor of this lens is 1.

A term of KD: `{ method = "kd", temperature = 2, weight = 9, through = ["logit_standard"] }` with
`task_weight = 0.1`; the official logs have base temperatures from 2 to 4 and weights from 1 to 18, by pair.
DKD: such a weight on the term, with its own $\alpha$ and $\beta$, and `task_weight = 1`.

As in the official code the deviation is over $k - 1$, and gradient passes through mean and deviation.

Departures from paper and official code:
- A row of equal logits, up to rounding, stays flat and passes no gradient. There a head that begins at zero
  has its gradient multiplied by 1e7, and the rounding errors of a mean become logits of almost 1.
- Dense logits (`b k h w`) are standardised at each position, over the classes.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def logit_standard(s: Seen, t: Seen) -> tuple[Seen, Seen, float]:
    """Both answers standardised; the loss keeps its factor."""
    here, there = tuple(s.out.shape), tuple(t.out.shape)
    if min(len(here), len(there)) < 2 or min(here[1], there[1]) < 2:
        raise Refused(
            f"Lens 'logit_standard' divides by the deviation over classes, and the student answers {here} "
            f"where the teacher answers {there}, expected (rows, classes, …) with at least two classes."
        )
    return replace(s, out=standard(s.out)), replace(t, out=standard(t.out)), 1.0


def standard(z: Float[Tensor, "b k *rest"]) -> Float[Tensor, "b k *rest"]:
    """Each row's logits with mean 0 and deviation 1, in float32 at least; 0 where they do not differ."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    apart = z - z.mean(1, keepdim=True)
    variance = apart.square().sum(1, keepdim=True) / (z.shape[1] - 1)
    rounding = 8 * torch.finfo(z.dtype).eps * z.detach().amax(1, keepdim=True)
    differs = variance > rounding.square()
    deviation = torch.where(differs, variance, 1.0).sqrt()  # at 0 sqrt has no gradient
    return torch.where(differs, apart / (deviation + 1e-7), 0.0)
