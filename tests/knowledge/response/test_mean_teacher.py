"""The consistency of two answers against a slow loop, and what the paper says of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.teachers import MeanOf
from limbeck.knowledge.response.mean_teacher import MeanTeacher, consistency


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


def slow_consistency(s: Tensor, t: Tensor) -> float:
    """The squared difference of probabilities, one class of one row at a time; the mean over all of them."""
    gaps = [
        (p - q) ** 2
        for z_s, z_t in zip(s.tolist(), t.tolist(), strict=True)
        for p, q in zip(softmax(z_s), softmax(z_t), strict=True)
    ]
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("k", [2, 7])
def test_equals_the_loop(k: int) -> None:
    s, t = logits(5, k), logits(5, k, seed=1)
    assert consistency(s, t).item() == pytest.approx(slow_consistency(s, t), rel=1e-12)


def test_dense_answers_are_many_rows() -> None:
    s, t = logits(3, 5, 2, 4), logits(3, 5, 2, 4, seed=1)
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 5) for z in (s, t))
    assert consistency(s, t).item() == pytest.approx(slow_consistency(rows_s, rows_t), rel=1e-12)


def test_it_compares_probabilities() -> None:
    s, t = logits(4, 5), logits(4, 5, seed=1)
    torch.testing.assert_close(consistency(s + 3, t - 7), consistency(s, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(consistency(t, s), consistency(s, t), rtol=1e-12, atol=0)


def test_it_is_bounded() -> None:
    """Two sure answers that disagree differ by 2 in squares, over k classes; so a weight of 100 is fine."""
    s = 1000 * torch.eye(4, dtype=torch.float64)
    assert consistency(s, s.roll(1, 0)).item() == pytest.approx(2 / 4, rel=1e-12)
    assert consistency(logits(50, 4, scale=50), logits(50, 4, seed=1, scale=50)) < 0.5


def test_zero_with_zero_slope_at_a_match() -> None:
    s = logits(8, 5).requires_grad_()
    loss = consistency(s, s.detach() + 1)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss.item() < 1e-30 and slope.abs().max() < 1e-15


def test_gradcheck_in_both_arguments() -> None:
    s, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(consistency, (s, t))


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher, (x, _) = pair()
    distiller = Distiller(student, teacher, [MeanTeacher()], example=(x, None), task=None)
    exact = distiller(x)["mean_teacher"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = distiller(x)["mean_teacher"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0)


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_all_rows_count_labelled_or_not() -> None:
    student, teacher, (x, y) = pair()
    distiller = Distiller(student, teacher, [MeanTeacher()], example=(x, y))
    loss = distiller(x, y)["mean_teacher"]
    assert loss.item() == pytest.approx(slow_consistency(student(x), teacher(x)), rel=1e-5)
    assert torch.equal(loss, distiller(x, torch.full_like(y, -100))["mean_teacher"])


def test_a_student_agrees_with_its_mean_at_first_and_is_pulled_back_to_it() -> None:
    student, _, (x, y) = pair()
    mean = MeanOf(student, decay=0.9)
    distiller = Distiller(student, mean, [MeanTeacher()], example=(x, y), task=None)
    assert distiller(x, y)["mean_teacher"] == 0
    with torch.no_grad():
        student.weight.add_(torch.randn(4, 3))
    optimiser = torch.optim.SGD(student.parameters(), 1.0)
    gaps = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = distiller(x, y)["mean_teacher"]
        loss.backward()
        optimiser.step()
        gaps.append(loss.item())
    assert gaps[-1] < 0.5 * gaps[0]
    assert all(p.grad is None for p in mean.model.parameters())


def test_other_classes_are_refused_with_both_counts() -> None:
    student, _, example = pair(4)
    with pytest.raises(Refused, match=r"'mean_teacher'.*4 classes.*7"):
        Distiller(student, nn.Linear(3, 7), [MeanTeacher()], example=example)
