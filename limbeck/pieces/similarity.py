"""How alike the rows of a batch are, by their directions and inner products. In float32 at least, autocast or
not."""

import torch
from jaxtyping import Float
from torch import Tensor


def unit(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Rows of length 1. A row of zeros has no direction: it stays 0 and passes no gradient.

    `F.normalize` would multiply that gradient by 1e12.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square().sum(1, keepdim=True)
    long = square > 0
    return x * torch.where(long, torch.where(long, square, 1.0).rsqrt(), 0.0)  # at 0 rsqrt has no gradient


def gram(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """The inner product of every two rows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.T
