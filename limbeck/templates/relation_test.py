"""name_here against a slow reference written from the equation, and what the paper says of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.templates.relation import NameHere, name_here

DRAW = torch.Generator().manual_seed(0)
S = torch.randn(5, 3, generator=DRAW, dtype=torch.float64)
T = torch.randn(5, 4, generator=DRAW, dtype=torch.float64)


def slow(s: Tensor, t: Tensor) -> float:
    def cosine(u: list[float], v: list[float]) -> float:
        return sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))

    b, s_rows, t_rows = len(s), s.tolist(), t.tolist()
    pairs = [(i, j) for i in range(b) for j in range(b)]
    gaps = [cosine(s_rows[i], s_rows[j]) - cosine(t_rows[i], t_rows[j]) for i, j in pairs]
    return sum(gap**2 for gap in gaps) / b**2


def test_it_is_the_equation() -> None:
    assert name_here(S, T).item() == pytest.approx(slow(S, T), rel=1e-10)


def test_only_relations_count() -> None:
    """A student that is turned and scaled has the same ones."""
    turned = torch.linalg.qr(torch.randn(4, 4, generator=DRAW, dtype=torch.float64))[0]
    assert name_here(3 * T @ turned, T).item() < 1e-20
    assert name_here(S, T).item() > 0.01


def test_its_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(name_here, (S.clone().requires_grad_(), T))


def test_the_student_learns_and_the_teacher_does_not() -> None:
    torch.manual_seed(0)
    x, student, teacher = torch.randn(32, 6), nn.Linear(6, 4), nn.Linear(6, 5)
    distiller = Distiller(student, teacher, NameHere(tap=""), example=(x, None), task=None)
    optimiser = torch.optim.Adam(distiller.parameters(), lr=0.05)
    before = distiller(x)["loss"].item()
    for _ in range(100):
        optimiser.zero_grad()
        distiller(x)["loss"].backward()
        optimiser.step()
    assert distiller(x)["loss"].item() < 0.3 * before
    assert all(p.grad is None for p in teacher.parameters())
