"""Logit regression against a slow loop written from the paper's equation, and what the paper says of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.knowledge.response.kd import kd
from limbeck.knowledge.response.logits_mse import LogitsMSE, logits_mse


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_logits_mse(s: Tensor, t: Tensor) -> float:
    """Section 2.3: ½ · mean over rows of ‖z_s − z_t‖², one class at a time."""
    total = 0.0
    for z_s, z_t in zip(s.tolist(), t.tolist(), strict=True):
        total += sum((a - b) ** 2 for a, b in zip(z_s, z_t, strict=True))
    return total / (2 * len(s))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_equals_the_loop(k: int) -> None:
    s, t = logits(5, k), logits(5, k, seed=1)
    assert logits_mse(s, t).item() == pytest.approx(slow_logits_mse(s, t), rel=1e-12)


def test_the_slope_is_the_residual() -> None:
    s, t = logits(5, 7).requires_grad_(), logits(5, 7, seed=1)
    (slope,) = torch.autograd.grad(logits_mse(s, t), s)
    torch.testing.assert_close(slope, (s.detach() - t) / 5, rtol=1e-12, atol=0)


def test_dense_logits_are_many_rows() -> None:
    s, t = logits(3, 5, 2, 4), logits(3, 5, 2, 4, seed=1)
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 5) for z in (s, t))
    assert logits_mse(s, t).item() == pytest.approx(slow_logits_mse(rows_s, rows_t), rel=1e-12)


def test_a_class_both_agree_on_changes_nothing() -> None:
    """So the mean is not over classes, as the zoo's is: its weight w is 2w/k here."""
    s, t = logits(4, 3), logits(4, 3, seed=1)
    s_more, t_more = (torch.cat([z, torch.full((4, 5), -7.0, dtype=z.dtype)], 1) for z in (s, t))
    torch.testing.assert_close(logits_mse(s_more, t_more), logits_mse(s, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(logits_mse(s, t) * 2 / 3, nn.functional.mse_loss(s, t), rtol=1e-12, atol=0)


def test_it_is_k_times_hot_kd_of_centred_logits() -> None:
    """Hinton et al., section 2.1, and the reason why this method is the elder brother of KD."""
    s, t = logits(4, 5), logits(4, 5, seed=1)
    s, t = (z - z.mean(1, keepdim=True) for z in (s, t))
    torch.testing.assert_close(logits_mse(s, t), 5 * kd(s, t, 1e4), rtol=1e-3, atol=0)


def test_it_sees_what_a_softmax_does_not() -> None:
    """The paper's reason to leave the softmax out: a teacher's 10, 20, 30 is not its -10, 0, 10."""
    s, t = torch.tensor([[-10.0, 0, 10]]), torch.tensor([[10.0, 20, 30]])
    assert kd(s, t, 1.0) == 0
    assert logits_mse(s, t) == 0.5 * 3 * 20**2


def test_zero_with_zero_slope_at_a_match() -> None:
    t = logits(8, 5, seed=1)
    s = t.clone().requires_grad_()
    loss = logits_mse(s, t)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0 and not slope.any()


def test_gradcheck_in_both_arguments() -> None:
    s, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(logits_mse, (s, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing_but_its_input(dtype: torch.dtype) -> None:
    """Squares of float16 end at 65504, the square of 256; and near a match both have few digits."""
    s = logits(4, 10, scale=300.0).to(dtype).requires_grad_()
    t = (s.detach().double() + logits(4, 10, seed=1)).to(dtype)
    for other in (t, -t):
        loss = logits_mse(s, other)
        (slope,) = torch.autograd.grad(loss, s)
        torch.testing.assert_close(loss.double(), logits_mse(s.double(), other.double()), rtol=1e-4, atol=0)
        assert slope.isfinite().all() and slope.any()


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_labels_are_not_read_and_the_teacher_is_told_nothing() -> None:
    student, teacher, (x, y) = pair()
    distiller = Distiller(student, teacher, [LogitsMSE()], example=(x, y))
    loss = distiller(x, y)["logits_mse"]
    assert loss.item() == pytest.approx(slow_logits_mse(student(x), teacher(x)), rel=1e-5)
    assert torch.equal(loss, distiller(x, torch.full_like(y, -100))["logits_mse"])
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_other_classes_are_refused_with_both_counts() -> None:
    student, _, example = pair(4)
    with pytest.raises(Refused, match=r"'logits_mse'.*4 classes.*7"):
        Distiller(student, nn.Linear(3, 7), [LogitsMSE()], example=example)


class Shaped(nn.Module):
    """Answers in the shape it is given."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.linear = shape, nn.Linear(3, math.prod(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(1, self.shape) if self.shape else self.linear(x).squeeze(1)


@pytest.mark.parametrize(
    ("s", "t"), [(Shaped(4, 2, 2), Shaped(4, 3, 3)), (Shaped(4, 2), Shaped(4)), (Shaped(), Shaped())]
)
def test_answers_of_other_shapes_are_refused_with_both(s: Shaped, t: Shaped) -> None:
    shapes = [str((6, *answer.shape)).replace("(", r"\(").replace(")", r"\)") for answer in (s, t)]
    with pytest.raises(Refused, match=rf"'logits_mse'.*{shapes[0]}.*{shapes[1]}.*expected"):
        Distiller(s, t, [LogitsMSE()], example=(torch.randn(6, 3), None), task=None)


def test_a_student_learns_its_teacher_without_labels() -> None:
    """A linear student to the last digit: in logits it is least squares."""
    student, teacher, (x, _) = pair()
    x = torch.randn(64, 3)
    distiller = Distiller(student, teacher, [LogitsMSE()], example=(x, None), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.5)
    for _ in range(100):
        optimiser.zero_grad()
        distiller(x)["loss"].backward()
        optimiser.step()
    torch.testing.assert_close(student.weight, teacher.weight, rtol=0, atol=1e-5)
