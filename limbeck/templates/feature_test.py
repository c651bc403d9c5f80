"""name_here against a slow reference written from the equation, and what the paper says of it."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.templates.feature import NameHere, name_here

S, T = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow(s: Tensor, t: Tensor) -> float:
    total = 0.0
    for u, v in zip(s.tolist(), t.tolist(), strict=True):
        total += 0.5 * sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
    return total / len(s)


def test_it_is_the_equation() -> None:
    assert name_here(S, T).item() == pytest.approx(slow(S, T), rel=1e-10)


def test_zero_at_a_match_and_nowhere_else() -> None:
    assert name_here(T, T).item() == 0
    assert name_here(S, T).item() > 0.1


def test_its_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(name_here, (S.clone().requires_grad_(), T))


def test_the_student_learns_and_the_teacher_does_not() -> None:
    torch.manual_seed(0)
    x, student, teacher = torch.randn(32, 3), nn.Linear(3, 4), nn.Linear(3, 6)
    distiller = Distiller(student, teacher, NameHere(tap=""), example=(x, None), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.1)
    before = distiller(x)["loss"].item()
    for _ in range(200):
        optimiser.zero_grad()
        distiller(x)["loss"].backward()
        optimiser.step()
    assert distiller(x)["loss"].item() < 0.1 * before
    assert all(p.grad is None for p in teacher.parameters())


def test_looks_that_do_not_compare_are_refused_with_their_shapes() -> None:
    example = torch.randn(2, 4, 3), None
    with pytest.raises(Refused, match=r"'name_here'.*\(2, 4, 3\).*\(2, 4, 5\)"):
        Distiller(nn.Linear(3, 3), nn.Linear(3, 5), NameHere(tap=""), example=example, task=None)
