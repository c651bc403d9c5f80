"""KD against a slow loop written from the paper's equation, and what the paper says of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.knowledge.response.kd import KD, kd

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_kd(s: Tensor, t: Tensor, temperature: float) -> float:
    """T² · mean over rows of Σ_i p_t,i log(p_t,i / p_s,i), one class at a time."""
    total = 0.0
    for z_s, z_t in zip(s.tolist(), t.tolist(), strict=True):
        above_s = [math.exp(z / temperature) for z in z_s]
        above_t = [math.exp(z / temperature) for z in z_t]
        for a_s, a_t in zip(above_s, above_t, strict=True):
            p_s, p_t = a_s / sum(above_s), a_t / sum(above_t)
            total += p_t * math.log(p_t / p_s)
    return temperature**2 * total / len(s)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [2, 7])
def test_equals_the_loop(temperature: float, k: int) -> None:
    s, t = logits(5, k), logits(5, k, seed=1)
    assert kd(s, t, temperature).item() == pytest.approx(slow_kd(s, t, temperature), rel=1e-10)


def test_a_value_by_hand() -> None:
    # The student says ½ ½ and the teacher ¾ ¼. KL(t ‖ s) = ¾ ln 1.5 − ¼ ln 2; KL(s ‖ t) would be ½ ln (4/3).
    s, t = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert kd(s, t, 1.0).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-6)
    assert kd(t, s, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_a_class_that_nobody_believes_in_changes_nothing() -> None:
    """So the mean is not over classes."""
    s, t = logits(4, 3), logits(4, 3, seed=1)
    s_more, t_more = (torch.cat([z, torch.full((4, 5), -1e4, dtype=z.dtype)], 1) for z in (s, t))
    torch.testing.assert_close(kd(s_more, t_more, 4.0), kd(s, t, 4.0), rtol=1e-12, atol=0)


def test_dense_logits_are_many_rows() -> None:
    s, t = logits(3, 5, 2, 4), logits(3, 5, 2, 4, seed=1)
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 5) for z in (s, t))
    assert kd(s, t, 4.0).item() == pytest.approx(slow_kd(rows_s, rows_t, 4.0), rel=1e-10)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    s, t = logits(6, 4), logits(6, 4, seed=1)
    single = torch.stack([kd(s[i : i + 1], t[i : i + 1], 4.0) for i in range(6)])
    torch.testing.assert_close(kd(s, t, 4.0), single.mean())
    assert single.std() > 0.1 * single.mean(), "rows alike would hide a wrong mean"


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_with_zero_slope_at_a_match_and_nowhere_below(temperature: float) -> None:
    t = logits(8, 5, seed=1)
    s = t.clone().requires_grad_()
    loss = kd(s, t, temperature)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0
    assert slope.abs().max() < 1e-14 * temperature
    assert all(kd(logits(8, 5, seed=n), t, temperature) > 0.01 for n in range(2, 6))


def test_the_same_answer_in_other_logits_is_a_match() -> None:
    """A softmax does not see what is added to a whole row; raw logits would."""
    s, t = logits(4, 5), logits(4, 5, seed=1)
    shift = logits(4, 1, seed=2, scale=50.0)
    torch.testing.assert_close(kd(s + shift, t - 2 * shift, 4.0), kd(s, t, 4.0), rtol=1e-10, atol=0)
    assert kd(t + shift, t, 4.0) < 1e-12


def test_hot_it_matches_centred_logits() -> None:
    """Section 2.1 of the paper: T → ∞ leaves half the mean squared gap of centred logits."""
    s, t = logits(4, 5), logits(4, 5, seed=1)
    gap = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    limit = (gap.square().sum(1) / (2 * 5)).mean()
    errors = [abs(kd(s, t, T) / limit - 1).item() for T in (100.0, 1000.0)]
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 8, "the next order is 1/T"


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)])
def test_gradcheck_in_both_arguments(shape: tuple[int, ...]) -> None:
    """The teacher's too: whoever invents data by a teacher's answer needs it."""
    s, t = logits(*shape).requires_grad_(), logits(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: kd(s, t, 2.0), (s, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_half_precision_loses_nothing_but_its_input(dtype: torch.dtype, scale: float) -> None:
    s, t = (logits(4, 10, seed=n, scale=scale).to(dtype).requires_grad_(n == 0) for n in (0, 1))
    loss = kd(s, t, 4.0)
    (slope,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(loss.double(), kd(s.double(), t.double(), 4.0), rtol=1e-4, atol=0)
    assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize("temperature", [0.0, -4.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(Refused, match=f"temperature of 'kd' is {temperature}, expected a number above 0"):
        KD(temperature=temperature)


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_the_teacher_is_told_nothing() -> None:
    student, teacher, example = pair()
    distiller = Distiller(student, teacher, [KD()], example=example, task=None)
    distiller(*example)["loss"].backward()
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_each_knows_its_place_and_its_temperature() -> None:
    """Student and teacher swapped, or the knob forgotten, would give another number."""
    student, teacher, example = pair()
    distiller = Distiller(student, teacher, [KD(temperature=2.5)], example=example)
    s, t = (model(example[0]).detach().double() for model in (student, teacher))
    loss = distiller(*example)["kd"].item()
    assert loss == pytest.approx(slow_kd(s, t, 2.5), rel=1e-4)
    for other in (slow_kd(t, s, 2.5), slow_kd(s, t, 4.0)):
        assert abs(loss - other) > 1e-3 * loss


def test_labels_are_not_read() -> None:
    student, teacher, (x, y) = pair()
    distiller = Distiller(student, teacher, [KD()], example=(x, y))
    assert torch.equal(distiller(x, y)["kd"], distiller(x, torch.full_like(y, -100))["kd"])


def test_other_classes_are_refused_with_both_counts() -> None:
    student, _, example = pair(4)
    with pytest.raises(Refused, match=r"'kd'.*4 classes.*7"):
        Distiller(student, nn.Linear(3, 7), [KD()], example=example)


def test_one_class_would_teach_nothing_and_is_refused() -> None:
    with pytest.raises(Refused, match=r"'kd'.*\(6, 1\).*at least two classes"):
        Distiller(nn.Linear(3, 1), nn.Linear(3, 1), [KD()], example=(torch.randn(6, 3), None), task=None)


def test_a_student_learns_its_teacher_without_labels() -> None:
    student, teacher, (x, _) = pair()
    x = torch.randn(64, 3)
    distiller = Distiller(student, teacher, [KD()], example=(x, None), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=1.0)
    before = distiller(x)["loss"].item()
    for _ in range(100):
        optimiser.zero_grad()
        distiller(x)["loss"].backward()
        optimiser.step()
    assert distiller(x)["loss"].item() < 1e-3 * before
