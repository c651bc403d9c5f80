"""CC against a slow loop written from the paper's equations, and the kernel that it stands for."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.knowledge.relation.cc import CC, cc, correlations


def rows(b: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(d: int, wider: int) -> Tensor:
    """Maps d dimensions into `wider` ones, keeping lengths and angles."""
    return torch.linalg.qr(rows(wider, wider, seed=7)).Q[:d]


def slope(s: Tensor, t: Tensor) -> Tensor:
    s = s.detach().clone().requires_grad_()
    return torch.autograd.grad(cc(s, t, 0.4, 2), s)[0]


# --- the equations, one pair at a time ---


def slow_correlations(x: Tensor, gamma: float, order: int) -> list[list[float]]:
    def kernel(a: list[float], b: list[float]) -> float:
        length = math.hypot(*a) * math.hypot(*b)
        cosine = sum(u * v for u, v in zip(a, b, strict=True)) / length if length else 0.0
        terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms)

    return [[kernel(a, b) for b in x.tolist()] for a in x.tolist()]


def slow_cc(s: Tensor, t: Tensor, gamma: float, order: int) -> float:
    here, there = (slow_correlations(x, gamma, order) for x in (s, t))
    b = range(len(s))
    return sum((here[i][j] - there[i][j]) ** 2 for i in b for j in b) / len(s) ** 2


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.4, 1), (1.3, 5)])
@pytest.mark.parametrize("odd", ["", "duplicates", "zeros"])
def test_equals_the_equations(gamma: float, order: int, odd: str) -> None:
    s, t = rows(6, 3), rows(6, 5, seed=1)
    if odd == "duplicates":
        s[1], t[4] = s[0], t[2]
    if odd == "zeros":
        s[1], t[4] = 0, 0
    assert cc(s, t, gamma, order).item() == pytest.approx(slow_cc(s, t, gamma, order), rel=1e-12)


def test_gradcheck_and_no_gradient_to_the_teacher() -> None:
    s, t = rows(5, 3).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cc(s, t.detach(), 0.4, 2), s)
    cc(s, t, 0.4, 2).backward()
    assert t.grad is None and s.grad is not None and s.grad.any()


# --- the kernel ---


@pytest.mark.parametrize("gamma", [0.1, 0.4, 2.0])
def test_the_expansion_is_the_gaussian_kernel_in_the_limit(gamma: float) -> None:
    x = F.normalize(rows(7, 4))
    gaussian = torch.exp(-gamma * (x[:, None] - x).square().sum(2))
    torch.testing.assert_close(correlations(5 * x, gamma, 40), gaussian)
    errors = [(correlations(x, gamma, order) - gaussian).abs().max().item() for order in (1, 2, 3, 8)]
    assert errors == sorted(errors, reverse=True)


def test_entries_lie_where_the_docstring_says() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = correlations(x, 0.4, 2)
    assert found[0].tolist() == pytest.approx([0.9526, 0.2337, 0.4493], abs=1e-4)


def test_only_directions_count_in_any_number_of_dimensions() -> None:
    s, t = rows(8, 4), rows(8, 6, seed=1)
    lengths = torch.linspace(0.1, 20, 8, dtype=torch.float64)[:, None]
    moved = lengths * (s @ orthogonal(4, 9))
    torch.testing.assert_close(cc(moved, t, 0.4, 2), cc(s, t, 0.4, 2))
    assert cc(moved, s, 0.4, 2) < 1e-28
    assert cc(s, t, 0.4, 2) > 1e-3


def test_the_order_of_rows_does_not_matter() -> None:
    """It does for the loss that RepDistiller calls CC."""
    s, t, order = rows(8, 4), rows(8, 4, seed=1), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(cc(s[order], t[order], 0.4, 2), cc(s, t, 0.4, 2))
    torch.testing.assert_close(slope(s[order], t[order]), slope(s, t)[order])

    def other(s: Tensor, t: Tensor) -> float:
        delta = (s - t).abs()
        return (delta[:-1] * delta[1:]).sum(1).mean().item()

    assert abs(other(s[order], t[order]) - other(s, t)) > 0.01 * other(s, t)


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_where_rows_coincide_or_vanish(dtype: torch.dtype) -> None:
    s, t = rows(8, 4, dtype=dtype), rows(8, 6, seed=1, dtype=dtype)
    s[1], s[2], s[3], t[4] = s[0], -s[0], 0, 0
    assert cc(s, t, 0.4, 2).isfinite() and cc(s, t, 0.4, 2).dtype == torch.float32
    grad = slope(s, t)
    assert grad.isfinite().all() and (grad[3] == 0).all() and grad.any()
    for flat in (torch.zeros_like(s), torch.ones_like(s)):
        assert cc(flat, t, 0.4, 2).isfinite() and slope(flat, t).isfinite().all()


def test_float32_is_enough_for_features_that_lie_close() -> None:
    s, t = 20 + rows(64, 32).relu(), 10 + rows(64, 48, seed=1).relu()
    exact, found = slope(s, t), slope(s.float(), t.float()).double()
    assert (found - exact).norm() < 1e-3 * exact.norm()


# --- the method ---


def seen(x: Tensor, tap: str = "pooled") -> Seen:
    return Seen(x, {tap: x})


def test_hands_on_its_knobs_and_flattens_maps() -> None:
    s, t, batch = rows(6, 24), rows(6, 5, seed=1), Batch(rows(6, 1))
    torch.testing.assert_close(CC().loss(seen(s.view(6, 2, 3, 4)), seen(t), batch), cc(s, t, 0.4, 2))
    method = CC(gamma=1.5, order=4, tap="embedding")
    assert method.looks() == ("embedding",)
    found = method.loss(seen(s, "embedding"), seen(t, "embedding"), batch)
    torch.testing.assert_close(found, cc(s, t, 1.5, 4))


@pytest.mark.parametrize("knobs", [{"gamma": 0.0}, {"gamma": math.inf}, {"gamma": math.nan}, {"order": 0}])
def test_a_kernel_that_is_none_is_refused(knobs: dict) -> None:
    with pytest.raises(Refused, match=rf"gamma {knobs.get('gamma', 0.4)} and order {knobs.get('order', 2)}"):
        CC(**knobs)


def test_correlations_reach_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t, batch = rows(6, 4), rows(6, 5, seed=1), Batch(rows(3, 1))
    elsewhere = {4: s[3:], 5: t[3:]}
    monkeypatch.setattr(across, "gather", lambda x: torch.cat([x, elsewhere[x.shape[1]]]))
    torch.testing.assert_close(CC().loss(seen(s[:3]), seen(t[:3]), batch), cc(s, t, 0.4, 2))


def test_teaches_a_narrower_student_through_the_distiller() -> None:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU())
    x, taps = torch.randn(32, 8), {"pooled": ""}
    distiller = Distiller(student, Frozen(teacher, taps=taps), CC(), example=(x, None), task=None, taps=taps)
    adam = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = distiller(x)["loss"]
        adam.zero_grad()
        (100 * loss).backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
