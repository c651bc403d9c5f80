r"""The triplet loss, and which triplets of a batch it is taken of.

A row, the anchor $a$, should lie closer to a row of its class $p$ than to one of another class $n$, by a
margin:

$$L = \operatorname{mean}_{(a, p, n)} \max\big(0,\; d_{ap} - d_{an} + m\big)$$

(Schroff, Kalenichenko, Philbin; FaceNet; CVPR 2015; arXiv:1503.03832.) Every two rows of one class are an
anchor and its positive; what differs is the choice of negatives. Rows without a label (`-100`) are in no
triplet.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from limbeck.core.batch import IGNORE

CLOSE, FAR = 0.5, 1.4
"""Distances below the first count as it, or noise is all that would be drawn; negatives beyond the second
cost nothing any more."""


def triplet(
    far: Float[Tensor, "b b"], triplets: Int[Tensor, "m 3"], margin: float = 0.2
) -> Float[Tensor, ""]:
    """The mean cost of (anchor, positive, negative) triplets, given all distances; 0 when there are none."""
    anchor, positive, negative = triplets.unbind(1)
    cost = (far[anchor, positive] - far[anchor, negative] + margin).clamp(min=0)
    return cost.sum() / max(len(triplets), 1)


def all_triplets(y: Int[Tensor, " b"]) -> Int[Tensor, "m 3"]:
    """Every positive pair with each of its negatives: about b²(b/classes) of them."""
    pairs, negatives = _pairs(y)
    which, negative = negatives.nonzero().unbind(1)
    return torch.cat([pairs[which], negative[:, None]], 1)


def semi_hard(far: Float[Tensor, "b b"], y: Int[Tensor, " b"]) -> Int[Tensor, "m 3"]:
    """For every positive pair the nearest negative that is farther than the positive; where none is, the
    farthest (FaceNet; as RKD's code has it)."""
    pairs, negatives = _pairs(y)
    anchor, positive = pairs.unbind(1)
    lengths = far.detach()[anchor]
    farther = negatives & (lengths > far.detach()[anchor, positive][:, None])
    nearest = lengths.masked_fill(~farther, torch.inf).argmin(1)
    farthest = lengths.masked_fill(~negatives, -torch.inf).argmax(1)
    return torch.cat([pairs, torch.where(farther.any(1), nearest, farthest)[:, None]], 1)


def distance_weighted(
    far: Float[Tensor, "b b"], y: Int[Tensor, " b"], width: int, draw: Float[Tensor, "b 2"]
) -> Int[Tensor, "m 3"]:
    r"""For every positive pair one negative, drawn so that all distances are about as likely (Wu, Manmatha,
    Smola, Krähenbühl; ICCV 2017; arXiv:1706.07567).

    On the unit sphere in `width` dimensions distances crowd around $\sqrt 2$, with density
    $q(r) \propto r^{d-2} (1 - r^2/4)^{(d-3)/2}$; a negative at distance $r$ is drawn in proportion to
    $1 / q(\max(r, 0.5))$, one beyond 1.4 never. An anchor that has negatives only there draws among all of
    them alike. `far` holds distances between rows of length 1; `draw`, in [0, 1), two numbers a row, of which
    a pair takes one from each of its rows.
    """
    pairs, negatives = _pairs(y)
    anchor, positive = pairs.unbind(1)
    r = far.detach()[anchor].clamp(min=CLOSE)
    near = negatives & (r <= FAR)
    chance = -(width - 2) * r.log() - 0.5 * (width - 3) * torch.log1p(-0.25 * r.clamp(max=FAR).square())
    chance = chance.masked_fill(~near, -torch.inf)
    chance = torch.where(near.any(1, keepdim=True), chance.softmax(1), negatives.to(r.dtype))
    until = chance.cumsum(1)
    # The sum of two uniform numbers is uniform again, modulo 1.
    number = (draw[anchor, 0] + draw[positive, 1]).to(r.dtype) % 1
    negative = torch.searchsorted(until, (number * until[:, -1])[:, None], right=True)
    return torch.cat([pairs, negative], 1)


def _pairs(y: Int[Tensor, " b"]) -> tuple[Int[Tensor, "m 2"], Bool[Tensor, "m b"]]:
    """Every (anchor, positive) that has a negative, and for each which rows are its negatives."""
    labelled = y != IGNORE
    same = y[:, None] == y
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    negatives = ~same & labelled[:, None] & labelled
    pairs = (same & ~itself & negatives.any(1, keepdim=True)).nonzero()
    return pairs, negatives[pairs[:, 0]]
