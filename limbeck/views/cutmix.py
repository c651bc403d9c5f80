r"""CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (Yun, Han, Oh, Chun,
Choe, Yoo; ICCV 2019; arXiv:1905.04899).

In every image a box is replaced by what its partner has there, rows 2i and 2i+1 of the batch being partners:

$$\tilde x = M \odot x + (1 - M) \odot x', \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)$$

where $M$ is zero in a box of $\sqrt{1 - \lambda}$ of the image's height and width around a pixel drawn from
all. What of it lies outside is cut off, and $\lambda$ becomes the share that really stays.

The paper's target is $\lambda$ of one label and $1 - \lambda$ of the other. Here y stays one class a row: its
own with probability $\lambda$, else its partner's, so *in expectation* the loss is the paper's, and whatever
reads labels still can. A pair keeps or exchanges its labels together. To learn from a teacher's answer to the
mix alone, give the stage `task_weight = 0`.

Departures from the paper: the label, as told; and it shuffles a batch under one box, here a pair has its own,
and mixes the same whatever batch it is in.
"""

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.pieces import images, pairs


def cutmix(batch: Batch, alpha: float = 1.0, chance: float = 1.0, purpose: str = "cutmix") -> Batch:
    """x (b c h w), of any size and dtype, mixed within a share of `chance` of the pairs (the paper's is 1 for
    ImageNet, 0.5 for CIFAR); `index` stays. Raises `Refused` for what is no even batch of numbered images, or
    has more than a class a row."""
    x, _ = images.numbered(batch, "CutMix pastes boxes between")
    if not 0 <= chance <= 1:
        raise Refused(f"CutMix mixes a share of `chance` of all pairs, and it is {chance}; expected 0 to 1.")
    draw = keyed(batch.lesson, pairs.keys(batch, "CutMix"), purpose, 5)
    sides = (1 - pairs.beta(draw[:, 0], alpha)).sqrt() * (draw[:, 4] < chance)
    h, w = x.shape[2:]
    down, right = _stretch(draw[:, 1], sides, h), _stretch(draw[:, 2], sides, w)
    own = draw[:, 3] < 1 - down.sum(1) * right.sum(1) / (h * w)
    y = None if batch.y is None else pairs.label(batch.y, own.to(batch.y.device))
    pasted = (down[:, :, None] & right[:, None, :])[:, None].to(x.device)
    return batch.replace(x=torch.where(pasted, pairs.partner(x), x), y=y)


def _stretch(draw: Tensor, share: Tensor, side: int) -> Tensor:
    """Which of `side` pixels lie in a stretch of `share` of them around the drawn one, for each row."""
    size = (share * side).long()[:, None]
    first = (draw * side).long()[:, None] - size // 2
    place = torch.arange(side, device=draw.device)
    return (place >= first) & (place < first + size)
