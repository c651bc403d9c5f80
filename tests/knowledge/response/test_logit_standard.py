"""Logit standardisation against a slow loop written from the paper, and what the paper says of it."""

import math
import statistics

import pytest
import torch
from torch import Tensor, nn

from limbeck import recipe, registry
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.knowledge.response.kd import KD, kd
from limbeck.knowledge.response.logit_standard import logit_standard, standard


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_standard(z: Tensor) -> list[list[float]]:
    """(z − mean) / (std + 1e-7) of each row, one class at a time; std over k − 1."""
    rows = []
    for row in z.tolist():
        mean, spread = statistics.mean(row), statistics.stdev(row)
        rows.append([(v - mean) / (spread + 1e-7) for v in row])
    return rows


@pytest.mark.parametrize("k", [2, 7])
def test_equals_the_loop(k: int) -> None:
    for found, row in zip(standard(z := logits(5, k)).tolist(), slow_standard(z), strict=True):
        assert found == pytest.approx(row, rel=1e-10)


def test_the_four_properties_of_the_paper() -> None:
    """Zero mean, a deviation of 1, the order of the logits, and bounds that depend on k alone."""
    z = standard(logits(50, 7, scale=100.0))
    assert z.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(z.std(1), torch.ones(50, dtype=z.dtype), rtol=1e-6, atol=0)
    assert torch.equal(z.argsort(1), logits(50, 7).argsort(1))
    assert z.abs().max() < math.sqrt(6)
    peak = standard(1e6 * torch.eye(7, dtype=torch.float64))
    assert peak.max().item() == pytest.approx(6 / math.sqrt(7), rel=1e-6)


def test_dense_logits_are_many_rows() -> None:
    z = logits(3, 5, 2, 4)
    rows = standard(z).movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(rows, standard(z.movedim(1, -1).reshape(-1, 5)), rtol=1e-12, atol=0)


def test_both_are_standardised_and_nothing_else_is_touched() -> None:
    model, taps, mask = nn.Identity(), {"pooled": logits(4, 2)}, torch.ones(4, 3, dtype=torch.bool)
    s, t = Seen(logits(4, 5), taps, mask, model), Seen(logits(4, 5, seed=1), taps, mask, model)
    s_seen, t_seen, factor = logit_standard(s, t)
    for seen, before in ((s_seen, s), (t_seen, t)):
        assert torch.equal(seen.out, standard(before.out))
        assert (seen.at, seen.mask, seen.model) == (taps, mask, model)
    assert factor == 1.0


def through_kd(s: Tensor, t: Tensor) -> float:
    s_seen, t_seen, factor = logit_standard(Seen(s), Seen(t))
    return factor * kd(s_seen.out, t_seen.out, 2.0).item()


def test_the_papers_toy_case() -> None:
    """Without standardisation a student that picks the wrong class may be the nearer; with it, one that
    thinks as the teacher does, on a smaller scale, is at a match."""
    t = torch.tensor([[2.0, 1.0, -3.0]], dtype=torch.float64)
    small, wrong = t / 10, torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float64)
    assert kd(wrong, t, 2.0) < kd(small, t, 2.0)
    assert through_kd(small, t) < 1e-10 < 0.01 < through_kd(wrong, t)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_shift_and_positive_scale_are_forgotten_and_a_negative_one_is_not(scale: float) -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    assert through_kd(scale * s + 7, t - 5) == pytest.approx(through_kd(s, t), rel=1e-4)
    assert abs(through_kd(-s, t) - through_kd(s, t)) > 0.1


def test_the_slope_passes_through_mean_and_deviation() -> None:
    """As in the official code, which detaches neither: it is at right angles to shift and to scale."""
    s = logits(5, 7).requires_grad_()
    (slope,) = torch.autograd.grad((standard(s) * logits(5, 7, seed=1)).sum(), s)
    assert slope.any()
    assert slope.sum(1).abs().max() < 1e-12
    assert (slope * s).sum(1).abs().max() < 1e-6
    assert torch.autograd.gradcheck(standard, (s,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.7, -1e4])
def test_a_row_of_equal_logits_stays_flat_and_passes_no_gradient(dtype: torch.dtype, value: float) -> None:
    """A head that begins at zero. The official code multiplies its gradient and rounding errors by 1e7."""
    s = torch.full((3, 10), value, dtype=dtype)
    s[1] = logits(10).to(dtype)
    s.requires_grad_()
    z = standard(s)
    (slope,) = torch.autograd.grad((z * logits(3, 10, seed=1)).sum(), s)
    assert not z[0].any() and not z[2].any()
    assert not slope[0].any() and not slope[2].any()
    assert slope[1].isfinite().all() and slope[1].any()


def test_rounding_is_no_deviation_and_a_small_one_is() -> None:
    base = torch.full((1, 10), 7.3)
    alternate = torch.tensor([1.0, -1.0]).repeat(5)
    assert not standard(base + 4e-7 * alternate).any()
    torch.testing.assert_close(standard(base + 1e-3 * alternate).std(1), torch.ones(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_half_precision_loses_nothing_but_its_input(dtype: torch.dtype, shift: float) -> None:
    z = (logits(4, 10, scale=6.0) + shift).to(dtype).requires_grad_()
    seen = standard(z)
    torch.testing.assert_close(seen.double(), standard(z.double()), rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(seen.square()[:, 0].sum(), z)
    assert slope.isfinite().all() and slope.any()


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_a_term_looks_through_it_and_t_squared_is_the_base_temperatures() -> None:
    """weight · T² · KL of softmax(standard(z) / T), by hand; not (T · std)²."""
    student, teacher, (x, y) = pair()
    term = Term(KD(temperature=2.0), weight=9.0, through=(logit_standard,))
    distiller = Distiller(student, teacher, [term], example=(x, y))
    loss = distiller(x, y)["kd"]
    expected = 0.0
    for row_s, row_t in zip(slow_standard(student(x)), slow_standard(teacher(x)), strict=True):
        above_s, above_t = ([math.exp(v / 2) for v in row] for row in (row_s, row_t))
        for a_s, a_t in zip(above_s, above_t, strict=True):
            p_s, p_t = a_s / sum(above_s), a_t / sum(above_t)
            expected += 9.0 * 2.0**2 * p_t * math.log(p_t / p_s) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_a_recipe_names_it() -> None:
    assert registry.find("lens", "logit_standard") is logit_standard
    term = {"method": "kd", "temperature": 2.0, "weight": 9.0, "through": ["logit_standard"]}
    stage = {"learner": "student", "epochs": 1, "task_weight": 0.1, "terms": [term]}
    models = {"teacher": "cnn", "student": "cnn"}
    assert recipe.parse({"data": "digits", "models": models, "stages": [stage]}).stages[0].terms[0].through


def test_one_class_has_no_deviation_and_is_refused_with_both_shapes() -> None:
    nets, term = (nn.Linear(3, 1), nn.Linear(3, 1)), Term(KD(), through=(logit_standard,))
    with pytest.raises(Refused, match=r"'logit_standard'.*\(6, 1\).*\(6, 1\).*at least two classes"):
        Distiller(*nets, [term], example=(torch.randn(6, 3), None), task=None)
