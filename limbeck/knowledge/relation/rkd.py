r"""Relational Knowledge Distillation (Park, Kim, Lu, Cho; CVPR 2019; arXiv:1904.05068).

The student's embeddings of a batch should lie to one another as the teacher's do, in distances and in angles;
where they lie, and in how many dimensions, is its own business. With the Huber loss $l_\delta$, $\delta = 1$:

$$\psi_D(i,j) = \lVert x_i - x_j \rVert / \mu, \qquad
  \mu = \operatorname*{mean}_{i \ne j} \lVert x_i - x_j \rVert, \qquad
  \psi_A(i,j,k) = \cos \angle\, x_i x_j x_k$$

$$L = \lambda_D \operatorname*{mean}_{i,j}\, l_\delta\big(\psi_D(s), \psi_D(t)\big)
    + \lambda_A \operatorname*{mean}_{i,j,k}\, l_\delta\big(\psi_A(s), \psi_A(t)\big)$$

Each network is divided by its own $\mu$, and gradient passes through the student's.

Defaults are those for classification, on the pooled feature: weights 25 and 50, of RepDistiller
(`distiller_zoo/RKD.py`) and mdistiller (`distillers/RKD.py`), where neither network's feature is normalised.
For other data the authors advise to try 25 to 100 (lenscloth/RKD#6). For metric learning they use 1 and 2 on
the final embedding, with no task loss, the teacher's embedding L2-normalised and the student's not, which did
better (on the sphere of unit vectors distances are bounded): `{ method = "rkd", distance = 1, angle = 2,
tap = "head", normalise_teacher = true }`.

Departures from the paper:
- Means for its sums, so that weights do not depend on the batch size. As in the official code they are
  over all $b^2$ pairs and $b^3$ triples, degenerate ones too (`i = j`, `i = k`, …);
  `mask_degenerate=True` averages over pairs and triples of distinct rows.
- The triplet loss of its metric-learning runs is the task `retrieve`, and no part of this file.

Departures from the official code (lenscloth/RKD, `metric/loss.py`), all for the sake of numbers:
- Rows that coincide up to rounding are at distance 0 (there 1e-6). Directions between them are 0, as
  there, but pass no gradient; there they multiply it by 1e12.
- Angles come from squared distances by the law of cosines, not from `b b d` differences. Distances come
  from a Gram matrix of centred rows in float64, a small part of the work: cancellation between close
  points then costs nothing, and neither autocast nor TF32 reaches it.
- A large batch is done a block of vertices at a time, so memory grows with $b^2$ and not $b^3$ (such a
  loss has no second derivative).
- With several processes the relations are among all their rows; DataParallel would split them.
- A tapped tensor of more than two axes is flattened from axis 1, as RepDistiller does.

Fewer than three rows have no angle, and two rows one distance, which is its own mean: these losses are 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.taps import Seen
from limbeck.pieces.distances import distances, squared_distances
from limbeck.pieces.similarity import unit

DENSE = 64
"""Up to this many rows all b³ angles are held at once, in plain autograd: a few megabytes."""
BLOCK = {"cpu": 2**19}
"""Angles in a block by device: on a CPU it should stay in cache, elsewhere (2**21) keep the device busy."""


def distance(
    s: Float[Tensor, "b d_s"], t: Float[Tensor, "b d_t"], mask_degenerate: bool = False
) -> Float[Tensor, ""]:
    """How far the student's relative distances are from the teacher's. No gradient passes to `t`."""
    b = len(s)
    gap = F.smooth_l1_loss(relative_distances(s), relative_distances(t.detach()), reduction="sum")
    pairs = b * (b - 1) if mask_degenerate else b * b  # the diagonal adds nothing to the sum
    return (gap / max(pairs, 1)).to(_exact(s))


def angle(
    s: Float[Tensor, "b d_s"],
    t: Float[Tensor, "b d_t"],
    mask_degenerate: bool = False,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """How far the student's angles are from the teacher's. No gradient passes to `t`.

    `chunk` vertices are done at once (None: all of few rows, some of many); fewer take less memory.
    """
    b = len(s)
    if chunk is None:
        chunk = b if b <= DENSE else max(1, BLOCK.get(s.device.type, 2**21) // (b * b))
    here, there = (_half_squares(x).to(_exact(s)) for x in (s, t.detach()))
    if chunk >= b:
        gap = F.smooth_l1_loss(cosines(here), cosines(there), reduction="none")
        gap = (gap * _unequal_arms(gap)).sum() if mask_degenerate else gap.sum()
    else:
        gap = _Blockwise.apply(here, there, chunk, mask_degenerate)
    triples = b * (b - 1) * (b - 2) if mask_degenerate else b**3
    return gap / max(triples, 1)


def relative_distances(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    r"""$\psi_D$: distances between rows in units of their mean over $i \ne j$, in float64."""
    length = distances(x)
    mean = length.sum() / max(len(x) * (len(x) - 1), 1)
    return length / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def cosines(half: Float[Tensor, "b b"]) -> Float[Tensor, "b b b"]:
    r"""$\psi_A$ from half the squared distances $u$, vertex first: `[j, i, k]` is
    $(u_{ij} + u_{kj} - u_{ik}) / 2 \sqrt{u_{ij} u_{kj}}$, or 0 where an arm has no length."""
    arm = _inverse_lengths(half)
    return (half[:, :, None] + half[:, None] - half) * arm[:, :, None] * arm[:, None]


class RKD(Method):
    """Distances and angles among the rows of all processes, at one tap."""

    card = Card(
        "arXiv:1904.05068",
        2019,
        ("relation",),
        taps=("pooled",),
        fidelity="code",  # the averages; the equations are the paper's
        per_sample=False,
        order_free=True,
        zero_at_match=True,
        reads_out=False,
    )

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        tap: str = "pooled",
        mask_degenerate: bool = False,
        normalise_teacher: bool = False,
    ) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle
        self.tap = tap
        self.mask_degenerate, self.normalise_teacher = mask_degenerate, normalise_teacher

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = (across.gather(seen.at[self.tap].flatten(1)) for seen in (s, t))
        if self.normalise_teacher:
            there = unit(there)
        loss = self.distance * distance(here, there, self.mask_degenerate)
        if self.angle:  # the cubic part, not to be paid for when off
            loss = loss + self.angle * angle(here, there, self.mask_degenerate)
        return loss


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _half_squares(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Half the squared distances, in units of their mean so that float32 can hold them. Angles do not depend
    on the unit, so it needs no gradient."""
    square = squared_distances(x)
    mean = square.detach().mean()
    return 0.5 * square / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def _inverse_lengths(half: Float[Tensor, "v b"]) -> Float[Tensor, "v b"]:
    apart = half > 0
    return torch.where(apart, torch.where(apart, 2 * half, 1.0).rsqrt(), 0.0)


def _unequal_arms(like: Float[Tensor, "b b b"]) -> Float[Tensor, "b b"]:
    """0 where i = k, else 1. Where i or k is the vertex, both cosines are 0 anyway."""
    return 1 - torch.eye(len(like), dtype=like.dtype, device=like.device)


def _cosines_into(
    room: Float[Tensor, "v b b"], half: Float[Tensor, "b b"], vertices: slice
) -> Float[Tensor, "v b b"]:
    """`cosines` at some vertices, without a new tensor."""
    u = half[vertices]
    arm = _inverse_lengths(u)
    torch.add(u[:, :, None], u[:, None], out=room)
    return room.sub_(half).mul_(arm[:, :, None]).mul_(arm[:, None])


class _Blockwise(torch.autograd.Function):
    r"""The Huber loss summed over all triples, a block of vertices at a time.

    It is a scalar, so its gradient is taken while a block is at hand: none is kept, none is computed twice.
    At vertex $j$ let $r_i = 1 / \sqrt{2 u_{ij}}$, $g_{ik}$ the slope of the loss (the gap, clipped to ±1) and
    $w_{ik} = g_{ik} r_i r_k$. Then

    $$\partial u_{ik} \mathrel{-}= w_{ik}, \qquad
      \partial u_{ij} \mathrel{+}= 2 \sum_k w_{ik} - 2 r_i^2 \sum_k g_{ik} \cos_{ik}$$
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, s: Tensor, t: Tensor, chunk: int, mask_degenerate: bool
    ) -> Tensor:
        b = len(s)
        grad = torch.zeros_like(s)
        losses = []
        rooms = [s.new_empty(chunk, b, b) for _ in range(3)]  # made anew for each block, malloc scatters them
        for start in range(0, b, chunk):
            block = slice(start, min(start + chunk, b))
            cosine, gap, slope = (room[: block.stop - start] for room in rooms)
            _cosines_into(cosine, s, block)
            torch.sub(cosine, _cosines_into(slope, t, block), out=gap)
            if mask_degenerate:
                gap.diagonal(dim1=1, dim2=2).zero_()  # i = k
            torch.clamp(gap, -1, 1, out=slope)
            losses.append(gap.sub_(slope, alpha=0.5).mul_(slope).sum())  # slope · (gap − slope/2)
            arm = _inverse_lengths(s[block])
            grad[block] -= 2 * arm.square() * cosine.mul_(slope).sum(2)
            w = slope.mul_(arm[:, :, None]).mul_(arm[:, None])
            grad[block] += 2 * w.sum(2)
            grad -= w.sum(0)
        ctx.save_for_backward(grad)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, up: Tensor):  # type: ignore[no-untyped-def, override]
        (grad,) = ctx.saved_tensors
        return up * grad, None, None, None
