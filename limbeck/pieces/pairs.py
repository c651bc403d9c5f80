"""Rows 2i and 2i+1 of a batch are a pair: who mixes with whom, by which key, and what a mix is called.

A loader keeps the two together in an even batch, on one rank. Both draw by the *lower* of their two numbers:
no other pair of the epoch has it, and the two may change places.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import betaincinv
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused


def keys(batch: Batch, view: str) -> Int[Tensor, " b"]:
    """The number that each row's pair draws by. Raises `Refused` where there are no pairs, or where y is more
    than a class a row; `view` says who asks: "Mixup"."""
    index, y = batch.index, batch.y
    if index is None or batch.rows % 2 or (y is not None and y.ndim != 1):
        found = f"{batch.rows} rows with{'out' * (index is None)} an index"
        labels = "" if y is None else f" and labels of shape {tuple(y.shape)}"
        raise Refused(
            f"{view} mixes rows 2i and 2i+1, and the batch has {found}{labels}, expected an even number of "
            "rows, each with its number and one class at most; make the batch even, or leave this view out."
        )
    return index.unflatten(0, (-1, 2)).amin(1).repeat_interleave(2)


def partner(x: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "b *rest"]:
    """To each row the other of its pair."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def label(y: Int[Tensor, " b"], own: Bool[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A mix' label: its own part's or its partner's. A row without a label stays without."""
    return torch.where(own | (y == IGNORE), y, partner(y))


@torch.compiler.disable
def beta(u: Float[Tensor, " b"], alpha: float) -> Float[Tensor, " b"]:
    """Beta(alpha, alpha) from uniform numbers, by the inverse of its distribution: one draw makes one."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise Refused(
            f"Shares are drawn from Beta(alpha, alpha), and alpha is {alpha}; expected a number > 0."
        )
    return torch.from_numpy(betaincinv(alpha, alpha, u.double().cpu().numpy())).to(u)
