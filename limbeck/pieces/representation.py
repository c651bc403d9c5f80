r"""How alike two layers of a network are, by what they show of the same samples: one number, whatever their
widths.

Canonical correlation, as the mean over the narrower layer's dimensions (R2-CCA); and centred kernel
alignment (CKA; Kornblith, Norouzi, Lee, Hinton; ICML 2019; arXiv:1905.00414). With $Q_x$ an orthonormal basis
of what the $p$ columns of $x$ span over the samples, and columns centred:

$$R^2_{CCA} = \frac{\lVert Q_x^\top Q_y \rVert_F^2}{\min(p, q)}, \qquad
  CKA = \frac{\lVert x^\top y \rVert_F^2}{\lVert x^\top x \rVert_F \, \lVert y^\top y \rVert_F}$$

R2-CCA does not see an invertible linear map of either side, and is 1 as soon as one side spans what the other
does. CKA does not see rotations and scale, but does see other maps. Both need many more samples than columns:
independent features read about max(p, q) / n, not 0.

Departures from the code that is usually taken: the basis is of the span's true dimension, by singular values
where a QR without pivots gives a column that depends on others an arbitrary direction; columns that never
change are left out, which such a QR cannot digest; CKA is taken between features, equal to that between
n x n Gram matrices at a thousandth of their memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.pieces.distances import squared_distances

DEAD = 1e-8
"""A column of a smaller standard deviation tells nothing: a unit that never fires."""

BLOCK = 256
"""Rows of a kernel matrix that are made at a time."""

PAIRS = 2000
"""Samples, evenly spaced, whose distances a kernel's width is the median of."""


def alive(x: Float[Tensor, "n p"]) -> Bool[Tensor, " p"]:
    """Which columns change at all over the samples."""
    return x.double().std(0, correction=0) >= DEAD


def r2_cca(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"], centre: bool = True) -> Float[Tensor, ""]:
    """The mean squared canonical correlation, in 0 … 1, in float64. Without `centre` columns keep their
    means, as in PURSUhInT's code; two layers of positive units then look alike for being positive."""
    return _alignment(_span(x, centre), _span(y, centre))


def cka(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """Linear CKA, in 0 … 1, in float64."""
    return _alignment(_scaled(x), _scaled(y))


def cka_rbf(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"], fraction: float = 1.0) -> Float[Tensor, ""]:
    """CKA of the kernels exp(-d² / (2 (fraction · m)²)), m² the median squared distance (over all pairs of at
    most 2,000 samples, evenly spaced), in 0 … 1, in float64."""
    return _by_kernel([x, y], fraction)[0, 1]


def similarities(
    layers: Sequence[Float[Tensor, "n _"]], metric: str = "r2_cca", centre: bool = True
) -> Float[Tensor, "l l"]:
    """Every two layers' likeness; what one layer alone needs is done once. Raises `Refused`."""
    if metric not in METRICS:
        raise Refused(f"There is no metric '{metric}'; expected one of {', '.join(METRICS)}.")
    if metric != "r2_cca" and not centre:
        raise Refused(f"The metric '{metric}' is of centred features; leave `centre` on, or take r2_cca.")
    return METRICS[metric](layers, centre)


# --- by a basis or the features themselves ---


@dataclass(frozen=True)
class _Side:
    """One layer, as two of them are compared: columns, and the most that they can agree."""

    columns: Float[Tensor, "n r"]
    most: float


def _alignment(a: _Side, b: _Side) -> Float[Tensor, ""]:
    return ((a.columns.T @ b.columns).square().sum() / min(a.most, b.most)).clamp(max=1.0)


def _span(x: Float[Tensor, "n p"], centre: bool = True) -> _Side:
    x = _live(x)
    x = (x - x.mean(0)) if centre else x
    x = x / x.norm(dim=0)  # a weak column spans as much as a strong one
    u, values, _ = torch.linalg.svd(x, full_matrices=False)
    rank = int((values > values[0] * max(x.shape) * torch.finfo(x.dtype).eps).sum())
    return _Side(u[:, :rank], rank)


def _scaled(x: Float[Tensor, "n p"]) -> _Side:
    x = _live(x)
    x = x - x.mean(0)
    return _Side(x / (x.T @ x).norm().sqrt(), 1.0)


def _live(x: Float[Tensor, "n p"]) -> Float[Tensor, "n r"]:
    live = alive(x)
    if not live.any():
        raise Refused(
            f"A layer shows the same of all {len(x)} samples, so it is like nothing; bring other samples, or "
            "a network that learned."
        )
    return x.double()[:, live]


def _each_pair(sides: Sequence[_Side]) -> Float[Tensor, "l l"]:
    found = torch.eye(len(sides), dtype=torch.float64)
    for i, j in combinations(range(len(sides)), 2):
        found[i, j] = found[j, i] = _alignment(sides[i], sides[j])
    return found


# --- by kernels ---


def _by_kernel(layers: Sequence[Float[Tensor, "n _"]], fraction: float) -> Float[Tensor, "l l"]:
    """All layers' kernels pass by in blocks of rows, so that no n x n matrix is ever held."""
    scaled = [_live(x) / _width(x, fraction) for x in layers]
    n, count = len(scaled[0]), len(scaled)
    products = torch.zeros(count, count, dtype=torch.float64)
    sums = torch.zeros(count, n, dtype=torch.float64)
    for start in range(0, n, BLOCK):
        rows = torch.stack([_kernel(x[start : start + BLOCK], x).flatten() for x in scaled])
        products += rows @ rows.T
        sums[:, start : start + BLOCK] = rows.view(count, -1, n).sum(2)
    total = sums.sum(1)
    # <HKH, L> of the centring H = 1 - 1/n, written out
    aligned = products - 2 / n * sums @ sums.T + torch.outer(total, total) / n**2
    own = aligned.diagonal().sqrt()
    return (aligned / torch.outer(own, own)).clamp(0.0, 1.0)


def _kernel(some: Float[Tensor, "m d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    return torch.exp(-0.5 * torch.cdist(some, x).square())


def _width(x: Float[Tensor, "n p"], fraction: float) -> Float[Tensor, ""]:
    some = x[torch.linspace(0, len(x) - 1, min(len(x), PAIRS)).long()]
    width = fraction * squared_distances(some).median().sqrt()
    if width == 0:
        raise Refused(
            f"Most of {len(some)} samples look the same to a layer, so no kernel is wide enough to tell them "
            "apart; bring other samples, or take the metric cka."
        )
    return width


METRICS: dict[str, Callable[[Sequence[Tensor], bool], Tensor]] = {
    "r2_cca": lambda layers, centre: _each_pair([_span(x, centre) for x in layers]),
    "cka": lambda layers, centre: _each_pair([_scaled(x) for x in layers]),
    "cka_rbf": lambda layers, centre: _by_kernel(layers, 1.0),
}
