"""DarkRank against the probability of an order written out, and what an order does not depend on."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.taps import Seen
from limbeck.knowledge.relation.darkrank import DarkRank, darkrank


def rows(b: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(s: Tensor, t: Tensor, alpha: float, beta: float, nearest: int) -> float:
    loss = 0.0
    for q in range(len(s)):
        others = sorted((x for x in range(len(s)) if x != q), key=lambda x: float((t[q] - t[x]).norm()))
        worth = [math.exp(-alpha * float((s[q] - s[x]).norm()) ** beta) for x in others[:nearest]]
        for i in range(len(worth)):
            loss -= math.log(worth[i] / sum(worth[i:]))
    return loss / len(s)


@pytest.mark.parametrize(
    ("alpha", "beta", "nearest"), [(3, 3, 4), (2, 3, 4), (0.5, 1, 2), (1, 2, 6), (1, 2, 99)]
)
def test_it_is_the_equation(alpha: float, beta: float, nearest: int) -> None:
    s, t = 0.4 * rows(7, 3), rows(7, 5, seed=1)
    assert darkrank(s, t, alpha, beta, nearest).item() == pytest.approx(
        slow(s, t, alpha, beta, nearest), rel=1e-9
    )


def test_only_the_teachers_order_counts() -> None:
    s, t = rows(8, 3), rows(8, 4, seed=1)
    expected = darkrank(s, t)
    torch.testing.assert_close(darkrank(s, 7 * t + 3), expected)
    torch.testing.assert_close(darkrank(s @ torch.linalg.qr(rows(3, 3)).Q - 5, t), expected)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(darkrank(s[order], t[order]), expected)


def test_a_student_with_the_same_order_does_better_the_farther_its_rows_are_apart() -> None:
    t = rows(8, 4)
    losses = [float(darkrank(scale * t, t)) for scale in (0, 0.5, 1, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(4 * 3 * 2)) and losses[-1] < 0.1 < darkrank(
        rows(8, 4, seed=1), t
    )


@pytest.mark.parametrize("b", [1, 2])
def test_fewer_than_three_rows_have_no_order(b: int) -> None:
    s = rows(b, 3).requires_grad_()
    loss = darkrank(s, rows(b, 4, seed=1))
    loss.backward()
    assert loss == 0 and s.grad.abs().max() < 1e-12


def test_rows_that_coincide_pass_finite_gradients() -> None:
    s = rows(6, 3)
    s[1:4] = s[0]
    s.requires_grad_()
    darkrank(s, rows(6, 4, seed=1)).backward()
    assert s.grad.isfinite().all() and s.grad.any()


def test_gradient() -> None:
    t = rows(6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: darkrank(s, t), rows(6, 3).requires_grad_())
    darkrank(rows(6, 3).requires_grad_(), t).backward()
    assert t.grad is None


def test_the_method_reads_its_tap_on_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = rows(6, 4), rows(6, 5, seed=1)
    elsewhere = {4: s[3:], 5: t[3:]}
    monkeypatch.setattr(across, "gather", lambda x: torch.cat([x, elsewhere[x.shape[1]]]))
    method = DarkRank(alpha=2, beta=2, nearest=3, tap="head")
    here, there = (Seen(x, {"head": x[:3].unflatten(1, (-1, 1))}) for x in (s, t))
    torch.testing.assert_close(method.loss(here, there, Batch(s[:3])), darkrank(s, t, 2, 2, 3))
