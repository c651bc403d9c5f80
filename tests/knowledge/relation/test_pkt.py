"""PKT against a slow loop written from its equation, and what the paper claims of it."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.knowledge.relation.pkt import PKT, neighbours, pkt


def rows(b: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(d: int, wider: int) -> Tensor:
    """Maps d dimensions into `wider` ones, keeping lengths and angles."""
    return torch.linalg.qr(rows(wider, wider, seed=7)).Q[:d]


def slope(s: Tensor, t: Tensor) -> Tensor:
    s = s.detach().clone().requires_grad_()
    return torch.autograd.grad(pkt(s, t), s)[0]


# --- the equation, one pair at a time ---


def slow_neighbours(x: Tensor) -> list[list[float]]:
    def cosine(a: list[float], b: list[float]) -> float:
        dot, length = sum(u * v for u, v in zip(a, b, strict=True)), math.hypot(*a) * math.hypot(*b)
        return dot / length if length else 0.0

    kernel = [[0.5 * (cosine(a, b) + 1) for b in x.tolist()] for a in x.tolist()]
    return [[k / sum(row) for k in row] for row in kernel]


def slow_pkt(s: Tensor, t: Tensor) -> float:
    total = 0.0
    for here, there in zip(slow_neighbours(s), slow_neighbours(t), strict=True):
        for p, q in zip(here, there, strict=True):
            total += q * math.log((q + 1e-7) / (p + 1e-7))
    return total / len(s) ** 2


@pytest.mark.parametrize("odd", ["", "duplicates", "zeros", "opposite"])
def test_equals_the_equation(odd: str) -> None:
    s, t = rows(6, 3), rows(6, 5, seed=1)
    if odd == "duplicates":
        s[1], t[4] = s[0], t[2]
    if odd == "zeros":
        s[1], t[4] = 0, 0
    if odd == "opposite":
        s[1] = -3 * s[0]
    assert pkt(s, t).item() == pytest.approx(slow_pkt(s, t), rel=1e-9)


def test_equals_the_official_code() -> None:
    """Which pads lengths by ε and computes in the precision of the features."""

    def similarity(x: Tensor) -> Tensor:
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        k = (x @ x.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    s, t = rows(32, 8).relu(), rows(32, 12, seed=1).relu()
    official = (similarity(t) * ((similarity(t) + 1e-7) / (similarity(s) + 1e-7)).log()).mean()
    torch.testing.assert_close(pkt(s, t), official, rtol=1e-5, atol=0)


def test_gradcheck_and_no_gradient_to_the_teacher() -> None:
    s, t = rows(5, 3).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: pkt(s, t.detach()), s)
    pkt(s, t).backward()
    assert t.grad is None and s.grad is not None and s.grad.any()


# --- what the paper claims ---


def test_each_row_is_a_distribution() -> None:
    p = neighbours(rows(9, 4))
    torch.testing.assert_close(p.sum(1), torch.ones(9, dtype=torch.float64))
    assert (p >= 0).all()
    assert (p.argmax(1) == torch.arange(9)).all(), "nobody is nearer to a row than the row"


def test_only_directions_count_in_any_number_of_dimensions() -> None:
    s, t = rows(8, 4), rows(8, 6, seed=1)
    lengths = torch.linspace(0.1, 20, 8, dtype=torch.float64)[:, None]
    moved = lengths * (s @ orthogonal(4, 9))
    torch.testing.assert_close(pkt(moved, t), pkt(s, t))
    assert pkt(moved, s).abs() < 1e-15
    assert pkt(s, t) > 1e-4


def test_it_is_no_less_than_0_and_0_only_at_a_match() -> None:
    """Row by row it is a Kullback-Leibler divergence, but for ε."""
    for seed in range(5):
        s, t = rows(6, 3, seed), rows(6, 4, seed + 100)
        assert pkt(s, t) > 1e-4
        near = t + 1e-3 * rows(6, 4, seed + 200)
        assert 0 < pkt(near, t) < 1e-6


def test_the_order_of_rows_does_not_matter() -> None:
    s, t, order = rows(8, 4), rows(8, 6, seed=1), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(pkt(s[order], t[order]), pkt(s, t))
    torch.testing.assert_close(slope(s[order], t[order]), slope(s, t)[order])


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_where_rows_coincide_oppose_or_vanish(dtype: torch.dtype) -> None:
    s, t = rows(8, 4, dtype=dtype), rows(8, 6, seed=1, dtype=dtype)
    s[1], s[2], s[3], t[4] = s[0], -s[0], 0, 0
    assert pkt(s, t).isfinite() and pkt(s, t).dtype == torch.float32
    grad = slope(s, t)
    assert grad.isfinite().all() and (grad[3] == 0).all() and grad.any()
    for flat in (torch.zeros_like(s), torch.ones_like(s)):
        assert pkt(flat, t).isfinite() and slope(flat, t).isfinite().all()
        assert pkt(s, flat).isfinite() and slope(s, flat).isfinite().all()


def test_float32_is_enough_for_features_that_lie_close() -> None:
    """Pooled after a ReLU, late in training: all cosines near 1."""
    s, t = 20 + rows(64, 32).relu(), 10 + rows(64, 48, seed=1).relu()
    exact, found = slope(s, t), slope(s.float(), t.float()).double()
    assert (found - exact).norm() < 1e-3 * exact.norm()


def test_one_row_has_no_neighbours() -> None:
    s = rows(1, 4).requires_grad_()
    loss = pkt(s, rows(1, 3))
    loss.backward()
    assert loss == 0 and s.grad is not None and s.grad.abs().max() < 1e-9


# --- the method ---


def seen(x: Tensor, tap: str = "pooled") -> Seen:
    return Seen(x, {tap: x})


def test_reads_its_tap_and_flattens_maps() -> None:
    s, t, batch = rows(6, 24), rows(6, 5, seed=1), Batch(rows(6, 1))
    torch.testing.assert_close(PKT().loss(seen(s.view(6, 2, 3, 4)), seen(t), batch), pkt(s, t))
    method = PKT(tap="embedding")
    assert method.looks() == ("embedding",)
    torch.testing.assert_close(method.loss(seen(s, "embedding"), seen(t, "embedding"), batch), pkt(s, t))


def test_neighbours_are_sought_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t, batch = rows(6, 4), rows(6, 5, seed=1), Batch(rows(3, 1))
    elsewhere = {4: s[3:], 5: t[3:]}
    monkeypatch.setattr(across, "gather", lambda x: torch.cat([x, elsewhere[x.shape[1]]]))
    torch.testing.assert_close(PKT().loss(seen(s[:3]), seen(t[:3]), batch), pkt(s, t))


def test_teaches_a_narrower_student_through_the_distiller() -> None:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU())
    x, taps = torch.randn(32, 8), {"pooled": ""}
    distiller = Distiller(student, Frozen(teacher, taps=taps), PKT(), example=(x, None), task=None, taps=taps)
    adam = torch.optim.Adam(distiller.parameters(), lr=1e-2)

    def gap() -> float:
        return F.mse_loss(neighbours(student(x)), neighbours(teacher(x))).item()

    before = gap()
    for _ in range(100):
        adam.zero_grad()
        (30000 * distiller(x)["loss"]).backward()
        adam.step()
    assert gap() < 0.1 * before
