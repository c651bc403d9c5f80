"""SP against a slow loop written from the paper's equations, and what follows from them."""

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
from limbeck.knowledge.relation.sp import SP, similarities, sp


def rows(b: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(d: int, wider: int) -> Tensor:
    """Maps d dimensions into `wider` ones, keeping lengths and angles."""
    return torch.linalg.qr(rows(wider, wider, seed=7)).Q[:d]


def slope(s: Tensor, t: Tensor) -> Tensor:
    s = s.detach().clone().requires_grad_()
    return torch.autograd.grad(sp(s, t), s)[0]


# --- the equations, one entry at a time ---


def slow_similarities(x: Tensor) -> list[list[float]]:
    inner = [[sum(u * v for u, v in zip(a, b, strict=True)) for b in x.tolist()] for a in x.tolist()]
    return [[v / (math.hypot(*row) or 1.0) for v in row] for row in inner]


def slow_sp(s: Tensor, t: Tensor) -> float:
    total = 0.0
    for here, there in zip(slow_similarities(s), slow_similarities(t), strict=True):
        total += sum((a - b) ** 2 for a, b in zip(here, there, strict=True))
    return total / len(s) ** 2


@pytest.mark.parametrize("odd", ["", "duplicates", "zeros"])
def test_equals_the_equations(odd: str) -> None:
    s, t = rows(6, 3), rows(6, 5, seed=1)
    if odd == "duplicates":
        s[1], t[4] = s[0], t[2]
    if odd == "zeros":
        s[1], t[4] = 0, 0
    assert sp(s, t).item() == pytest.approx(slow_sp(s, t), rel=1e-12)


def test_gradcheck_and_no_gradient_to_the_teacher() -> None:
    s, t = rows(5, 3).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sp(s, t.detach()), s)
    sp(s, t).backward()
    assert t.grad is None and s.grad is not None and s.grad.any()


# --- what follows ---


def test_each_row_of_similarities_has_length_1() -> None:
    torch.testing.assert_close(similarities(rows(7, 4)).norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_ignores_rotation_scale_and_dimensions() -> None:
    s, t = rows(8, 4), rows(8, 6, seed=1)
    torch.testing.assert_close(sp(0.01 * s @ orthogonal(4, 9), t), sp(s, t))
    torch.testing.assert_close(sp(s, 300 * t @ orthogonal(6, 6)), sp(s, t))
    assert sp(5 * t @ orthogonal(6, 9), t) < 1e-28
    assert sp(s, t) > 1e-3


def test_lengths_of_rows_do_count() -> None:
    """Unlike where cosines are compared: a row is similar to all in proportion to their lengths."""
    t = rows(8, 6)
    lengths = torch.linspace(0.5, 2, 8, dtype=torch.float64)[:, None]
    assert sp(lengths * t, t) > 1e-3


def test_the_order_of_rows_does_not_matter() -> None:
    s, t, order = rows(8, 4), rows(8, 6, seed=1), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(sp(s[order], t[order]), sp(s, t))
    torch.testing.assert_close(slope(s[order], t[order]), slope(s, t)[order])


def test_the_loss_shrinks_as_the_batch_grows() -> None:
    """By 1/b when all is said twice: what the docstring says of the weight."""
    s, t = rows(8, 4), rows(8, 6, seed=1)
    torch.testing.assert_close(sp(torch.cat([s, s]), torch.cat([t, t])), sp(s, t) / 2)


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_where_rows_coincide_or_vanish(dtype: torch.dtype) -> None:
    s, t = 30 * rows(8, 200, dtype=dtype), rows(8, 6, seed=1, dtype=dtype)
    s[1], s[2], s[3], t[4] = s[0], -s[0], 0, 0
    assert sp(s, t).isfinite() and sp(s, t).dtype == torch.float32
    grad = slope(s, t)
    assert grad.isfinite().all() and grad.any()
    assert grad.abs().max() < 1, "F.normalize would pass 1e9 to the row of zeros"
    for flat in (torch.zeros_like(s), torch.ones_like(s)):
        assert sp(flat, t).isfinite() and slope(flat, t).isfinite().all()
        assert sp(s, flat).isfinite() and slope(s, flat).isfinite().all()


def test_float32_is_enough_for_features_that_lie_close() -> None:
    s, t = 20 + rows(64, 32).relu(), 10 + rows(64, 48, seed=1).relu()
    exact, found = slope(s, t), slope(s.float(), t.float()).double()
    assert (found - exact).norm() < 1e-3 * exact.norm()


# --- the method ---


def test_adds_up_its_layers_maps_flattened() -> None:
    one, two, t = rows(6, 24), rows(6, 5, seed=1), rows(6, 7, seed=2)
    s = Seen(None, {"stage2": one.view(6, 2, 3, 4), "stage3": two})
    teacher = Seen(None, {"stage2": t, "stage3": one.view(6, 4, 6)})
    method = SP(taps=["stage2", "stage3"])  # a recipe's list
    assert method.looks() == ("stage2", "stage3") and SP().looks() == SP.card.taps
    expected = sp(one, t) + sp(two, one)
    torch.testing.assert_close(method.loss(s, teacher, Batch(one)), expected)


def test_similarities_reach_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t, batch = rows(6, 4), rows(6, 5, seed=1), Batch(rows(3, 1))
    elsewhere = {4: s[3:], 5: t[3:]}
    monkeypatch.setattr(across, "gather", lambda x: torch.cat([x, elsewhere[x.shape[1]]]))
    here, there = Seen(None, {"stage3": s[:3]}), Seen(None, {"stage3": t[:3]})
    torch.testing.assert_close(SP().loss(here, there, batch), sp(s, t))


def test_teaches_a_narrower_student_through_the_distiller() -> None:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU())
    x, taps = torch.randn(32, 8), {"stage3": ""}
    distiller = Distiller(student, Frozen(teacher, taps=taps), SP(), example=(x, None), task=None, taps=taps)
    adam = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    before = F.mse_loss(similarities(student(x)), similarities(teacher(x))).item()
    for _ in range(100):
        adam.zero_grad()
        (3000 * distiller(x)["loss"]).backward()
        adam.step()
    assert F.mse_loss(similarities(student(x)), similarities(teacher(x))).item() < 0.1 * before
