"""Directions and inner products of rows, also where there is no direction and where precision is short; HSIC
as a mean over quadruples of rows, and what CKA does not see."""

from itertools import combinations, permutations
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.pieces.similarity import MANY, _as_maps, cka, gram, hsic, hsic_terms, products, unit, weighted


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


# --- HSIC and CKA ---


def slow_hsic(s: Tensor, t: Tensor) -> float:
    """The mean over all quadruples of different rows; no diagonal, no closed form."""
    terms = [
        float(s[i, j] * t[i, j] + s[i, j] * t[k, m] - 2 * s[i, j] * t[i, k])
        for i, j, k, m in permutations(range(len(s)), 4)
    ]
    return fmean(terms)


def alike(x: Tensor, y: Tensor) -> float:
    return float(cka(hsic_terms(x, y)))


def biased(x: Tensor, y: Tensor) -> float:
    """CKA as it was first defined (Kornblith et al. 2019)."""
    k, m = (gram(v - v.mean(0)) for v in (x, y))
    return float((k * m).sum() / (k.norm() * m.norm()))


@pytest.mark.parametrize("b", [4, 5, 7])
def test_hsic_is_the_mean_over_quadruples(b: int) -> None:
    s, t = gram(rows(b, 3)), gram(rows(b, 6, seed=1))
    assert float(hsic(s, t)) == pytest.approx(slow_hsic(s, t), rel=1e-11)


def test_hsic_terms_are_of_the_pair_and_of_each_alone() -> None:
    x, y = 2 + rows(5, 3), rows(5, 4, seed=1)
    k, m = gram(x), gram(y)
    expected = [slow_hsic(k, m), slow_hsic(k, k), slow_hsic(m, m)]
    assert hsic_terms(x, y).tolist() == pytest.approx(expected, rel=1e-11)


def test_batches_average_to_the_whole() -> None:
    """So a running mean over batches says of the data what a large batch would."""
    x, y = rows(6, 3), rows(6, 4, seed=1)
    each = [hsic_terms(x[list(some)], y[list(some)]) for some in combinations(range(6), 4)]
    torch.testing.assert_close(torch.stack(each).mean(0), hsic_terms(x, y))


def test_cka_is_a_ratio_of_the_terms_for_each_stage() -> None:
    terms = torch.tensor([[3.0, 4.0, 9.0], [-1.0, 1.0, 4.0], [1.0, 0.0, 2.0], [1.0, -1e-9, 2.0]])
    assert cka(terms).tolist() == pytest.approx([0.5, -0.5, 0, 0])


def test_cka_is_1_for_the_same_and_symmetric() -> None:
    x, y = rows(16, 5), rows(16, 7, seed=1)
    assert alike(x, x) == pytest.approx(1, rel=1e-12)
    assert alike(x, y) == pytest.approx(alike(y, x), rel=1e-12)
    assert abs(alike(x, y)) < 0.5


def test_cka_sees_no_rotation_scale_shift_or_order_of_rows_but_a_linear_map() -> None:
    x, order = rows(16, 5), torch.randperm(16, generator=torch.Generator().manual_seed(3))
    y = x[:, :3] @ rows(3, 7, seed=1) + 0.5 * rows(16, 7, seed=2)
    found, (rotation, _) = alike(x, y), torch.linalg.qr(rows(5, 5, seed=4))
    assert 0.2 < found < 0.95, "else there is nothing to see"
    for other in (x @ rotation, -3 * x, x + 100):
        assert alike(other, y) == pytest.approx(found, rel=1e-9)
    assert alike(x[order], y[order]) == pytest.approx(found, rel=1e-9)
    assert abs(alike(x[order], y) - found) > 0.1
    stretch = torch.diag(torch.tensor([1.0, 1, 1, 1, 10]).double())
    assert abs(alike(x @ stretch, y) - found) > 0.1


def test_independent_features_are_unlike_on_average_and_the_biased_cka_does_not_say_so() -> None:
    pairs = [(rows(64, 300, seed=2 * n), rows(64, 300, seed=2 * n + 1)) for n in range(40)]
    found = [alike(x, y) for x, y in pairs]
    assert abs(fmean(found)) < 3 * stdev(found) / len(found) ** 0.5
    assert max(map(abs, found)) < 0.05
    assert min(biased(x, y) for x, y in pairs[:5]) > 0.7


def test_few_rows_leave_it_to_chance() -> None:
    spread = {
        b: stdev(alike(rows(b, 20, seed=2 * n), rows(b, 20, seed=2 * n + 1)) for n in range(60))
        for b in (8, 32)
    }
    assert spread[8] > 0.15 and spread[32] < 0.06


def test_hsic_gradcheck() -> None:
    x, y = rows(5, 3).requires_grad_(), rows(5, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(hsic_terms, (x, y))
    assert torch.autograd.gradcheck(lambda x, y: cka(hsic_terms(x, y)), (x, y))


def test_features_that_do_not_vary_are_like_nothing() -> None:
    flat = torch.zeros(8, 3).double().requires_grad_()
    found = cka(hsic_terms(flat, rows(8, 4)))
    found.backward()
    assert found == 0 and not flat.grad.any()


def test_what_all_rows_share_costs_no_precision() -> None:
    x, y = rows(32, 20), rows(32, 20, seed=1)
    y = y + x
    exact = alike(x, y)
    assert alike((1000 + x).float(), (1000 + y).float()) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hsic_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = (30 * rows(8, 300)).to(dtype), (30 * rows(8, 200, seed=1)).to(dtype)
    found = hsic_terms(x, y)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found, hsic_terms(x.float(), y.float()))


# --- products with a bank ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [100, MANY + 1, 4099, 5000, 19_991])  # 4097 = 17 * 241; primes; 25 * 8 * 25
def test_products_with_a_bank_are_those_of_matrices(n: int, dtype: torch.dtype) -> None:
    bank, few, weights = rows(n, 6).to(dtype), rows(3, 6, 1).to(dtype), rows(n, 3, 2).to(dtype)
    torch.testing.assert_close(products(bank, few), bank @ few.T)
    torch.testing.assert_close(weighted(bank, weights), weights.T @ bank, rtol=1e-4, atol=1e-3)
    assert products(bank, few).is_contiguous()


def test_a_large_bank_is_taken_the_faster_way() -> None:
    assert _as_maps(torch.empty(50_000, 4)).shape == (16, 4, 625, 5)
    assert _as_maps(torch.empty(4099, 4)) is None and _as_maps(torch.empty(5000, 4).double()) is None


def test_products_can_be_traced() -> None:
    bank, few = rows(5000, 6).float(), rows(3, 6, 1).float()
    traced = torch.compile(lambda b, r: weighted(b, products(b, r)), backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(bank, few), weighted(bank, products(bank, few)))
