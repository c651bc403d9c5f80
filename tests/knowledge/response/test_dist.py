"""DIST against a slow loop written from the paper's equations, and what the paper says of it."""

import math
import statistics

import pytest
import torch
from torch import Tensor, nn

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.knowledge.response.dist import DIST, dist
from limbeck.knowledge.response.kd import kd


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_dist(s: Tensor, t: Tensor, beta: float, gamma: float, temperature: float) -> float:
    """Equations 7 to 10: one minus Pearson's correlation, mean over rows and mean over classes, times T²."""
    p_s, p_t = [], []
    for z, p in ((s, p_s), (t, p_t)):
        for row in z.tolist():
            above = [math.exp(v / temperature) for v in row]
            p.append([a / sum(above) for a in above])
    inter = [1 - statistics.correlation(a, b) for a, b in zip(p_s, p_t, strict=True)]
    columns = zip(zip(*p_s, strict=True), zip(*p_t, strict=True), strict=True)
    intra = [1 - statistics.correlation(a, b) for a, b in columns]
    return temperature**2 * (beta * statistics.mean(inter) + gamma * statistics.mean(intra))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_equals_the_loop(beta: float, gamma: float, temperature: float) -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    expected = slow_dist(s, t, beta, gamma, temperature)
    assert dist(s, t, beta, gamma, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_the_defaults_are_the_official_codes() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    assert dist(s, t).item() == pytest.approx(slow_dist(s, t, 1.0, 1.0, 1.0), rel=1e-10)


def doubting(p: Tensor, sure: Tensor | float, instead: Tensor) -> Tensor:
    """Logits whose probabilities are `sure` · p + (1 − sure) · instead."""
    return (sure * p + (1 - sure) * instead).log()


def test_a_less_certain_student_is_a_match_where_kd_sees_a_gap() -> None:
    """The paper's point: a stronger teacher's predictions need not be reached, only their relations. Mixed
    with what all rows share, they keep these in both directions."""
    t = logits(6, 5, seed=1)
    p, shared = t.softmax(1), torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1], dtype=t.dtype)
    uniform = torch.full_like(shared, 0.2)
    assert dist(doubting(p, 0.4, uniform), t) < 1e-12
    assert kd(doubting(p, 0.4, uniform), t, 1.0) > 0.1
    assert dist(doubting(p, 0.4, shared), t, beta=0.0) < 1e-12  # a class' correlation forgets its mean
    assert dist(doubting(p, 0.4, shared), t, gamma=0.0) > 1e-3  # a row's does not


def test_rows_may_doubt_each_as_they_like_and_classes_may_not() -> None:
    t = logits(6, 5, seed=1)
    sure = torch.linspace(0.1, 1.0, 6, dtype=t.dtype)[:, None]
    s = doubting(t.softmax(1), sure, torch.full((5,), 0.2, dtype=t.dtype))
    assert dist(s, t, gamma=0.0) < 1e-12
    assert dist(s, t, beta=0.0) > 1e-3


def test_the_contrary_is_as_bad_as_it_gets() -> None:
    t = logits(6, 2, seed=1)
    assert dist(t.flip(1), t).item() == pytest.approx(4.0)  # 1 − ρ = 2, twice
    assert dist(logits(6, 5), logits(6, 5, seed=1)) < 4


def test_zero_with_zero_slope_at_a_match_and_nowhere_below() -> None:
    t = logits(8, 5, seed=1)
    s = t.clone().requires_grad_()
    loss = dist(s, t, temperature=4.0)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0 and not slope.any()
    assert all(dist(logits(8, 5, seed=n), t) > 0.01 for n in range(2, 6))


def test_a_shift_of_a_row_is_not_seen() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    shift = logits(5, 1, seed=2, scale=50.0)
    torch.testing.assert_close(dist(s + shift, t - shift), dist(s, t), rtol=1e-10, atol=0)


def test_order_of_rows_and_of_classes_does_not_matter() -> None:
    s, t = logits(6, 5), logits(6, 5, seed=1)
    rows, classes = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 4, 0, 1, 3])
    torch.testing.assert_close(dist(s[rows], t[rows]), dist(s, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(dist(s[:, classes], t[:, classes]), dist(s, t), rtol=1e-12, atol=0)


def test_dense_logits_are_many_rows() -> None:
    s, t = logits(3, 5, 2, 4), logits(3, 5, 2, 4, seed=1)
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 5) for z in (s, t))
    assert dist(s, t).item() == pytest.approx(slow_dist(rows_s, rows_t, 1.0, 1.0, 1.0), rel=1e-10)


def test_gradcheck_in_both_arguments() -> None:
    s, t = logits(4, 3).requires_grad_(), logits(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: dist(s, t, 0.7, 2.0, 2.0), (s, t))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_does_not_vary_has_no_direction_and_teaches_nothing(dtype: torch.dtype) -> None:
    """A row of equal logits, rows that are all the same, a single row: no gradient, nothing infinite; and at
    a match the loss is still 0, where the official code's is 1."""
    t = logits(6, 5, seed=1).to(dtype)
    flat, same = torch.full_like(t, 0.3), t[:1].expand(6, 5)
    for s in (flat, same, t[:1]):
        assert dist(s, s) == 0
        s = s.clone().requires_grad_()
        loss = dist(s, t[: len(s)].flip(1))
        (slope,) = torch.autograd.grad(loss, s)
        assert loss.isfinite() and slope.isfinite().all()
    s = flat.clone().requires_grad_()
    loss = dist(s, t)
    assert loss.item() == pytest.approx(1.0)  # one half over classes and one over rows
    assert not torch.autograd.grad(loss, s)[0].any()
    s = same.clone().requires_grad_()
    assert not torch.autograd.grad(dist(s, t, beta=0.0), s)[0].any()
    s = t.clone().requires_grad_()
    assert torch.autograd.grad(dist(s, flat), s)[0].abs().max() < 1e-5


@pytest.mark.parametrize("rows", [6, 5000])
def test_rounding_is_no_variation(rows: int) -> None:
    """Softmax of equal rows may differ in the last digit; such noise must not be blown up to a direction."""
    t = logits(rows, 5, seed=1).float()
    s = (1e-7 * logits(rows, 5).float().sign()).requires_grad_()
    (slope,) = torch.autograd.grad(dist(s, t), s)
    assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rarer", [20.0, 60.0, 600.0])
def test_no_class_is_too_rare_to_be_compared(dtype: torch.dtype, rarer: float) -> None:
    """At e^-20 the official code's 1e-8 beside the norms hides a class, at e^-60 its square is 0 in float32,
    and at e^-600 so is the probability. Correlation does not see scale, so neither does this."""
    s, t = (logits(6, 5, seed=n, scale=1.0).to(dtype) for n in (0, 1))
    lower = torch.tensor([0, 0, 0, 0, rarer], dtype=dtype)
    s, t = (s - lower).requires_grad_(), t - lower
    loss = dist(s, t, beta=0.0)
    common = s.double() + lower - lower / lower.max() * 20, t.double() + lower - lower / lower.max() * 20
    assert loss.item() == pytest.approx(slow_dist(*common, 0.0, 1.0, 1.0), rel=1e-4)
    (slope,) = torch.autograd.grad(loss, s)
    assert slope.isfinite().all() and (slope[:, 4].abs() > 1e-4).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_half_precision_loses_nothing_but_its_input(dtype: torch.dtype, scale: float) -> None:
    s, t = (logits(6, 10, seed=n, scale=scale).to(dtype).requires_grad_(n == 0) for n in (0, 1))
    loss = dist(s, t, temperature=4.0)
    (slope,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(
        loss.double(), dist(s.double(), t.double(), temperature=4.0), rtol=1e-4, atol=0
    )
    assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize("temperature", [0.0, -4.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(Refused, match=f"temperature of 'dist' is {temperature}, expected a number above 0"):
        DIST(temperature=temperature)


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_each_knows_its_place_and_its_knobs() -> None:
    """A knob forgotten or swapped would give another number. (Student and teacher swapped would not.)"""
    student, teacher, (x, y) = pair()
    method = DIST(beta=2.0, gamma=0.5, temperature=2.5)
    distiller = Distiller(student, teacher, [method], example=(x, y))
    s, t = (model(x).detach().double() for model in (student, teacher))
    loss = distiller(x, y)["dist"]
    assert loss.item() == pytest.approx(slow_dist(s, t, 2.0, 0.5, 2.5), rel=1e-4)
    for other in ((0.5, 2.0, 2.5), (2.0, 0.5, 1.0)):
        assert abs(loss.item() - slow_dist(s, t, *other)) > 1e-3 * loss.item()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_relates_the_rows_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = logits(6, 5), logits(6, 5, seed=1)
    whole = {z[0, 0].item(): z for z in (s, t)}
    monkeypatch.setattr(across, "gather", lambda x: whole[x[0, 0].item()])
    loss = DIST().loss(Seen(s[:3]), Seen(t[:3]), Batch(s[:3]))
    torch.testing.assert_close(loss, dist(s, t), rtol=1e-12, atol=0)


def test_other_classes_are_refused_with_both_counts() -> None:
    student, _, example = pair(4)
    with pytest.raises(Refused, match=r"'dist'.*4 classes.*7"):
        Distiller(student, nn.Linear(3, 7), [DIST()], example=example)


def test_one_class_would_teach_nothing_and_is_refused() -> None:
    with pytest.raises(Refused, match=r"'dist'.*\(6, 1\).*\(6, 1\).*at least two classes"):
        Distiller(nn.Linear(3, 1), nn.Linear(3, 1), [DIST()], example=(torch.randn(6, 3), None), task=None)


def test_other_grids_are_refused_with_both_shapes() -> None:
    student, teacher = (nn.Sequential(nn.Linear(3, 4 * n), nn.Unflatten(1, (4, n))) for n in (2, 3))
    with pytest.raises(Refused, match=r"'dist'.*\(6, 4, 2\).*\(6, 4, 3\)"):
        Distiller(student, teacher, [DIST()], example=(torch.randn(6, 3), None), task=None)


def test_a_student_learns_its_teachers_relations_without_labels() -> None:
    student, teacher, _ = pair()
    x = torch.randn(64, 3)
    distiller = Distiller(student, teacher, [DIST()], example=(x, None), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=1.0)
    before = distiller(x)["loss"].item()
    for _ in range(200):
        optimiser.zero_grad()
        distiller(x)["loss"].backward()
        optimiser.step()
    assert distiller(x)["loss"].item() < 0.02 * before
