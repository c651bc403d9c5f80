"""Likeness of layers against slow references, what it does not see, and what is refused."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.pieces import representation
from limbeck.pieces.representation import METRICS, cka, cka_rbf, r2_cca, similarities

N = 400


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


Z = normal(N, 8)
X = Z @ normal(8, 5, seed=1) + 2  # far from centred
Y = (Z @ normal(8, 6, seed=2)).relu() + 0.3 * normal(N, 6, seed=3)
PAIR = {"r2_cca": r2_cca, "cka": cka, "cka_rbf": cka_rbf}
every = pytest.mark.parametrize("likeness", PAIR.values(), ids=PAIR)


def gram_cka(k: Tensor, m: Tensor) -> float:
    """Kornblith's definition, with the centring matrix written out."""
    h = torch.eye(len(k), dtype=k.dtype) - 1 / len(k)
    hsic = [torch.trace(a @ h @ b @ h).item() for a, b in ((k, m), (k, k), (m, m))]
    return hsic[0] / math.sqrt(hsic[1] * hsic[2])


def kernel(x: Tensor, fraction: float) -> Tensor:
    square = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-square / (2 * fraction**2 * square.flatten().sort().values[(square.numel() - 1) // 2]))


def correlations(x: Tensor, y: Tensor) -> Tensor:
    """Canonical correlations by whitening both covariances, another way than by a basis."""
    x, y = x - x.mean(0), y - y.mean(0)

    def whitening(z: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(z.T @ z)
        return vectors @ torch.diag(values.rsqrt()) @ vectors.T

    return torch.linalg.svdvals(whitening(x) @ x.T @ y @ whitening(y))


def test_r2_cca_is_the_mean_squared_canonical_correlation() -> None:
    assert r2_cca(X, Y).item() == pytest.approx(correlations(X, Y).square().mean().item(), rel=1e-9)


def test_uncentred_it_is_that_of_the_thin_qr() -> None:
    overlap = torch.linalg.qr(X)[0].T @ torch.linalg.qr(Y)[0]
    assert r2_cca(X, Y, centre=False).item() == pytest.approx(overlap.square().sum().item() / 5, rel=1e-9)
    a, b = normal(2000, 16, seed=4) + 5, normal(2000, 16, seed=5) + 5  # positive, and otherwise unrelated
    assert r2_cca(a, b, centre=False) > r2_cca(a, b) + 1 / 20


def test_cka_is_that_of_gram_matrices() -> None:
    assert cka(X, Y).item() == pytest.approx(gram_cka(X @ X.T, Y @ Y.T), rel=1e-9)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_cka_rbf_is_that_of_kernels_whatever_the_blocks(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = gram_cka(kernel(X, fraction), kernel(Y, fraction))
    for rows in (1000, 64, 7):
        monkeypatch.setattr(representation, "BLOCK", rows)
        assert cka_rbf(X, Y, fraction).item() == pytest.approx(slow, rel=1e-8)


@every
def test_it_is_symmetric_1_on_itself_and_between_0_and_1(likeness: Callable[..., Tensor]) -> None:
    assert likeness(X, Y).item() == pytest.approx(likeness(Y, X).item(), rel=1e-12)
    assert likeness(X, X).item() == pytest.approx(1, abs=1e-12)
    assert 0 < likeness(X, Y) < 1
    assert likeness(X.float(), Y.float()).dtype == torch.float64


@every
def test_the_order_of_samples_does_not_matter(likeness: Callable[..., Tensor]) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert likeness(X[order], Y[order]).item() == pytest.approx(likeness(X, Y).item(), rel=1e-9)
    assert abs(likeness(X[order], Y) - likeness(X, Y)) > 0.05


@every
def test_no_rotation_shift_or_scale_matters(likeness: Callable[..., Tensor]) -> None:
    moved = 3 * X @ orthogonal(5) - 7
    assert likeness(moved, Y).item() == pytest.approx(likeness(X, Y).item(), rel=1e-8)


def test_r2_cca_sees_no_invertible_map_and_cka_does() -> None:
    bent = X @ (normal(5, 5, seed=6) + torch.diag(torch.tensor([9.0, 1, 1, 1, 0.1], dtype=torch.float64)))
    assert r2_cca(bent, Y).item() == pytest.approx(r2_cca(X, Y).item(), rel=1e-9)
    assert r2_cca(Y, bent).item() == pytest.approx(r2_cca(Y, X).item(), rel=1e-9)
    units = X * torch.tensor([1e9, 1, 1, 1, 1e-7], dtype=torch.float64)
    assert r2_cca(units, Y).item() == pytest.approx(r2_cca(X, Y).item(), rel=1e-6)
    assert abs(cka(bent, Y) - cka(X, Y)) > 0.02


def test_r2_cca_is_1_where_one_spans_the_other_and_cka_is_not() -> None:
    part = X @ normal(5, 2, seed=7)
    assert r2_cca(part, X).item() == pytest.approx(1, abs=1e-12)
    assert r2_cca(X, part) <= 1
    assert cka(part, X) < 0.99


def test_a_dead_unit_and_one_that_repeats_another_change_nothing() -> None:
    dead = torch.cat([X, torch.full((N, 1), 0.7, dtype=torch.float64), torch.zeros(N, 2)], 1)
    for likeness in PAIR.values():
        assert likeness(dead, Y).item() == pytest.approx(likeness(X, Y).item(), rel=1e-12)
    twice = torch.cat([X, X[:, :1] * 1e-4], 1)
    assert r2_cca(twice, Y).item() == pytest.approx(r2_cca(X, Y).item(), rel=1e-9)


def test_unrelated_features_read_width_over_samples() -> None:
    a, b = normal(4000, 20, seed=8), normal(4000, 10, seed=9)
    assert r2_cca(a, b).item() == pytest.approx(20 / 4000, rel=0.25)


def test_with_fewer_samples_than_columns_it_tells_shapes_only() -> None:
    assert r2_cca(normal(30, 40, seed=10), normal(30, 50, seed=11)).item() == pytest.approx(1)


@pytest.mark.parametrize("metric", METRICS)
def test_every_two_of_several(metric: str) -> None:
    layers = [X, Y, Z, X @ normal(5, 3, seed=12)]
    found = similarities(layers, metric)
    each = torch.stack([torch.stack([PAIR[metric](a, b) for b in layers]) for a in layers])
    torch.testing.assert_close(found, each, rtol=1e-9, atol=1e-12)


def test_a_kernels_width_of_many_samples_is_of_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation, "PAIRS", 200)
    assert cka_rbf(X, Y).item() == pytest.approx(gram_cka(kernel(X, 1.0), kernel(Y, 1.0)), rel=0.03)


def test_what_is_no_layer_is_refused() -> None:
    for metric in METRICS:
        with pytest.raises(Refused, match="the same of all 400 samples"):
            similarities([X, torch.ones(N, 3)], metric)
    with pytest.raises(Refused, match="Most of 400 samples look the same"):
        cka_rbf(X, (torch.arange(N) < 9).double()[:, None])
    with pytest.raises(Refused, match="no metric 'cca'; expected one of r2_cca, cka, cka_rbf"):
        similarities([X, Y], "cca")
    with pytest.raises(Refused, match="'cka' is of centred features"):
        similarities([X, Y], "cka", centre=False)
