"""How far apart the rows of a batch are.

In float64, a small part of any work on pairs: cancellation between close points then costs nothing, and
neither autocast nor TF32 reaches it. (float32 on Apple's GPUs, which know no float64.)
"""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_distances(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Squared Euclidean distances; exactly 0 on the diagonal and where rows coincide up to rounding."""
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        x = x - x.mean(0)  # moves nothing apart, but keeps small what cancels below
        gram = x @ x.T
    norm = x.square().sum(1)  # not gram.diagonal(): torch 2.13's inductor gets that view's gradient wrong
    norms = norm[:, None] + norm
    square = norms - 2 * gram
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    same = itself | (square <= 512 * torch.finfo(x.dtype).eps * norms)
    return square.masked_fill(same, 0.0)


def distances(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Euclidean distances. Rows that coincide have no direction between them: their 0 passes no gradient."""
    square = squared_distances(x)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)  # at 0 sqrt has no gradient
