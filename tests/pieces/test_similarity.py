"""Directions and inner products of rows, also where there is no direction and where precision is short."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.pieces.similarity import gram, unit


def rows(b: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unit_rows_have_length_1_and_point_where_they_pointed() -> None:
    x = 7 * rows(5, 3)
    for row, found in zip(x.tolist(), unit(x).tolist(), strict=True):
        length = sum(v * v for v in row) ** 0.5
        assert found == pytest.approx([v / length for v in row], rel=1e-14)


def test_gram_holds_every_inner_product() -> None:
    x = rows(4, 3)
    for i in range(4):
        for j in range(4):
            assert gram(x)[i, j].item() == pytest.approx(sum((x[i] * x[j]).tolist()), rel=1e-13)


def test_gradcheck() -> None:
    x = rows(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gram(unit(x)), x)


def test_a_row_of_zeros_stays_and_passes_no_gradient() -> None:
    x, up = rows(4, 3), rows(4, 3, seed=1)
    x[2] = 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad((unit(x) * up).sum(), x)
    assert (unit(x)[2] == 0).all() and (grad[2] == 0).all()
    (official,) = torch.autograd.grad((F.normalize(x) * up).sum(), x)
    assert official[2].abs().max() > 1e11, "else this care is not needed"
    torch.testing.assert_close(grad[[0, 1, 3]], official[[0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = (30 + rows(6, 300)).to(dtype)
    for function in (unit, gram):
        assert function(x).dtype == torch.float32
        assert torch.equal(function(x), function(x.float()))
        assert function(x).isfinite().all()  # 300 · 30² is beyond float16


def test_autocast_does_not_reach_it() -> None:
    x = rows(6, 300).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram(unit(x))
    assert torch.equal(inside, gram(unit(x)))
