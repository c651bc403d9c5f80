r"""mixup: Beyond Empirical Risk Minimization (Zhang, Cisse, Dauphin, Lopez-Paz; ICLR 2018; arXiv:1710.09412).

Every row is replaced by a mix of itself and its partner, rows 2i and 2i+1 of the batch being partners:

$$\tilde x = \lambda x + (1 - \lambda) x', \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)$$

The paper's target mixes both labels as well, and the loss of a row is $\lambda \ell(y) + (1 - \lambda)
\ell(y')$. Here y stays one class a row: its own with probability $\lambda$, else its partner's, so *in
expectation* the loss is the paper's, and whatever reads labels still can. A pair keeps or exchanges its
labels together. In distillation the teacher's answer to the mix is the target: a stage with `task_weight = 0`
learns from that alone ("patient and consistent", Beyer et al.; 2021; arXiv:2106.05237).

Departures from the paper: the label, as told; and it shuffles a batch under one lambda, here a pair has its
own, and mixes the same whatever batch it is in.
"""

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.pieces import pairs


def mixup(batch: Batch, alpha: float = 1.0, purpose: str = "mixup") -> Batch:
    """x (b ...), uint8 (then rounded) or float, mixed within pairs; `alpha` 0 mixes nothing; `index` stays.
    Raises `Refused` for what is no even batch of numbered rows, or has more than a class a row."""
    if alpha == 0:
        return batch
    x = batch.x
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
        found = f"{x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise Refused(
            f"Mixup takes means of inputs, and x is {found}, expected uint8 or float numbers; leave it out."
        )
    draw = keyed(batch.lesson, pairs.keys(batch, "Mixup"), purpose, 2)
    share = pairs.beta(draw[:, 0], alpha)
    own = draw[:, 1] < share
    y = None if batch.y is None else pairs.label(batch.y, own.to(batch.y.device))
    exact = x.float() if x.dtype == torch.uint8 else x
    share = share.to(exact).view(-1, *[1] * (x.ndim - 1))
    mixed = exact * share + pairs.partner(exact) * (1 - share)
    return batch.replace(x=mixed if mixed.dtype == x.dtype else mixed.round().to(x.dtype), y=y)
