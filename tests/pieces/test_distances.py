"""Distances against plain loops, and where a naive distance would fail."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.pieces.distances import distances, squared_distances


def rows(b: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_they_are_euclidean() -> None:
    x = rows(5, 3)
    slow = [[math.dist(a, b) for b in x.tolist()] for a in x.tolist()]
    torch.testing.assert_close(distances(x), torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(squared_distances(x), distances(x) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_points_far_from_the_origin_keep_their_distances(dtype: torch.dtype) -> None:
    x = (rows(6, 4) + 10_000).to(dtype)
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distances(x), exact, rtol=1e-9, atol=0)


def test_rows_that_coincide_are_at_0_and_pass_no_gradient() -> None:
    x = rows(5, 3)
    x[3] = x[1]
    x.requires_grad_()
    far = distances(x)
    assert far[1, 3] == far[3, 1] == 0 and (far.diagonal() == 0).all()
    (grad,) = torch.autograd.grad(far[1, 3], x, retain_graph=True)
    assert (grad == 0).all()
    (grad,) = torch.autograd.grad(far.sum(), x)
    assert grad.isfinite().all() and grad.any()


def test_rows_that_coincide_are_at_0_though_sums_are_rounded() -> None:
    x = rows(20, 301).float()
    far = distances(torch.cat([x, x]))
    assert (far[:20, 20:].diagonal() == 0).all()
    assert far.count_nonzero() == 40 * 38


def test_gradient() -> None:
    assert torch.autograd.gradcheck(distances, rows(5, 3).requires_grad_())
