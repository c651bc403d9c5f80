"""Decoupled KD against a slow loop written from the paper's equations, and what the paper says of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Term
from limbeck.core.taps import Seen
from limbeck.knowledge.response.dkd import DKD, decoupled, dkd, nckd, tckd
from limbeck.knowledge.response.kd import kd

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
LABELS = torch.tensor([3, 0, 1, 1, 2])


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_parts(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> tuple[list[float], list[float]]:
    """Equations 1, 2, 4 and 5: TCKD and NCKD of each row, one class at a time, times T²."""
    parts: tuple[list[float], list[float]] = ([], [])
    for z_s, z_t, label in zip(s.tolist(), t.tolist(), y.tolist(), strict=True):
        above_s = [math.exp(z / temperature) for z in z_s]
        above_t = [math.exp(z / temperature) for z in z_t]
        p_s, p_t = above_s[label] / sum(above_s), above_t[label] / sum(above_t)
        binary = p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
        rest_s, rest_t = (sum(above[:label] + above[label + 1 :]) for above in (above_s, above_t))
        among = 0.0
        for i in range(len(z_s)):
            if i != label:
                q_s, q_t = above_s[i] / rest_s, above_t[i] / rest_t
                among += q_t * math.log(q_t / q_s)
        parts[0].append(temperature**2 * binary)
        parts[1].append(temperature**2 * among)
    return parts


def slow_dkd(s: Tensor, t: Tensor, y: Tensor, alpha: float, beta: float, temperature: float) -> float:
    tc, nc = slow_parts(s, t, y, temperature)
    return sum(alpha * a + beta * b for a, b in zip(tc, nc, strict=True)) / len(s)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [4, 7])
def test_equals_the_loop(temperature: float, k: int) -> None:
    s, t = logits(5, k), logits(5, k, seed=1)
    tc, nc = slow_parts(s, t, LABELS, temperature)
    assert tckd(s, t, LABELS, temperature).tolist() == pytest.approx(tc, rel=1e-10)
    assert nckd(s, t, LABELS, temperature).tolist() == pytest.approx(nc, rel=1e-10)
    for alpha, beta in ((1.0, 8.0), (0.3, 2.0)):
        expected = slow_dkd(s, t, LABELS, alpha, beta, temperature)
        assert dkd(s, t, LABELS, alpha, beta, temperature).item() == pytest.approx(expected, rel=1e-10)


def test_a_value_by_hand() -> None:
    # Teacher ½ ¼ ¼, student ¼ ½ ¼, label 0. TCKD = ½ ln 2 + ½ ln (2/3); the others are ½ ½ and ⅔ ⅓.
    t, s = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    y = torch.tensor([0])
    assert tckd(s, t, y, 1.0).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert nckd(s, t, y, 1.0).item() == pytest.approx(0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2), rel=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kd_is_tckd_and_what_the_teacher_doubts_of_nckd(temperature: float) -> None:
    """The paper's reformulation (equation 6): KD = TCKD + (1 − p_y) · NCKD with the teacher's p_y at T."""
    s, t = logits(5, 7), logits(5, 7, seed=1)
    doubt = 1 - (t / temperature).softmax(1)[range(5), LABELS]
    coupled = tckd(s, t, LABELS, temperature) + doubt * nckd(s, t, LABELS, temperature)
    each = [kd(s[i : i + 1], t[i : i + 1], temperature).item() for i in range(5)]
    assert coupled.tolist() == pytest.approx(each, rel=1e-10)
    torch.testing.assert_close(coupled.mean(), kd(s, t, temperature), rtol=1e-10, atol=0)


def test_how_sure_the_teacher_is_no_longer_quiets_what_it_says_of_the_others() -> None:
    """The paper's point: the surer the teacher, the less KD passes on; NCKD does not notice."""
    s, t = logits(5, 7), logits(5, 7, seed=1)
    sure = t.clone()
    sure[range(5), LABELS] += 50.0
    torch.testing.assert_close(nckd(s, sure, LABELS, 4.0), nckd(s, t, LABELS, 4.0), rtol=1e-12, atol=0)
    assert (nckd(s, sure, LABELS, 4.0) > 0.1).all()


def test_tckd_sees_no_difference_among_the_others() -> None:
    s, t = logits(4, 5), logits(4, 5, seed=1)
    y = torch.zeros(4, dtype=torch.long)
    turned = s[:, [0, 3, 1, 4, 2]]
    torch.testing.assert_close(tckd(turned, t, y, 4.0), tckd(s, t, y, 4.0), rtol=1e-12, atol=0)
    assert (nckd(turned, t, y, 4.0) - nckd(s, t, y, 4.0)).abs().min() > 1e-3


def test_of_two_classes_nothing_is_left_but_tckd() -> None:
    s, t, y = logits(5, 2), logits(5, 2, seed=1), LABELS % 2
    assert (nckd(s, t, y, 4.0) == 0).all()
    torch.testing.assert_close(dkd(s, t, y, 1.0, 8.0, 4.0), kd(s, t, 4.0), rtol=1e-10, atol=0)


def test_a_shift_of_a_row_is_not_seen() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    shift = logits(5, 1, seed=2, scale=50.0)
    torch.testing.assert_close(dkd(s + shift, t - shift, LABELS), dkd(s, t, LABELS), rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_with_zero_slope_at_a_match_and_nowhere_below(temperature: float) -> None:
    t, y = logits(8, 5, seed=1), torch.arange(8) % 5
    s = t.clone().requires_grad_()
    loss = dkd(s, t, y, temperature=temperature)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss.item() == 0
    assert slope.abs().max() < 1e-13 * temperature
    for n in range(2, 6):
        for part in (tckd, nckd):
            assert (part(logits(8, 5, seed=n), t, y, temperature) > 0).all()


def test_the_defaults_are_mdistillers() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    expected = slow_dkd(s, t, LABELS, alpha=1.0, beta=8.0, temperature=4.0)
    assert dkd(s, t, LABELS).item() == pytest.approx(expected, rel=1e-10)


def test_rows_without_a_label_are_skipped() -> None:
    s, t = logits(5, 7).requires_grad_(), logits(5, 7, seed=1)
    some = torch.tensor([3, -100, 1, -100, 2])
    known = some != -100
    loss = dkd(s, t, some)
    torch.testing.assert_close(loss, dkd(s[known], t[known], some[known]), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(loss, s)
    assert not slope[~known].any() and slope[known].any()
    nothing = dkd(s, t, torch.full((5,), -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, s)[0].any()


def test_dense_logits_are_many_rows() -> None:
    s, t = logits(3, 5, 2, 4), logits(3, 5, 2, 4, seed=1)
    y = torch.arange(24).reshape(3, 2, 4) % 5
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 5) for z in (s, t))
    y[0, 1, 2] = -100
    expected = dkd(rows_s, rows_t, y.flatten())
    torch.testing.assert_close(dkd(s, t, y), expected, rtol=1e-12, atol=0)


def test_gradcheck_in_both_arguments() -> None:
    s, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    y = torch.tensor([3, -100, 0])
    assert torch.autograd.gradcheck(lambda s, t: dkd(s, t, y, 0.7, 2.0, 2.0), (s, t))


def test_a_step_of_your_own_may_compile_it() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    compiled = torch.compile(dkd, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, t, LABELS), dkd(s, t, LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 3000.0])
def test_no_precision_and_no_certainty_breaks_it(dtype: torch.dtype, scale: float) -> None:
    """Where p_y rounds to 0 or 1 the official code takes the logarithm of 0; its mask of -1000 does not even
    hide a logit of 3000."""
    s, t = (logits(5, 10, seed=n, scale=scale).to(dtype).requires_grad_(n == 0) for n in (0, 1))
    loss = dkd(s, t, LABELS)
    (slope,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(loss.double(), dkd(s.double(), t.double(), LABELS), rtol=1e-4, atol=0)
    assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize("temperature", [0.0, -4.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(Refused, match=f"temperature of 'dkd' is {temperature}, expected a number above 0"):
        DKD(temperature=temperature)


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_each_knows_its_place_and_its_knobs() -> None:
    """Student and teacher swapped, or a knob forgotten, would give another number."""
    student, teacher, (x, y) = pair()
    distiller = Distiller(student, teacher, [DKD(alpha=3.0, beta=2.0, temperature=2.5)], example=(x, y))
    s, t = (model(x).detach().double() for model in (student, teacher))
    loss = distiller(x, y)["dkd"]
    assert loss.item() == pytest.approx(slow_dkd(s, t, y, 3.0, 2.0, 2.5), rel=1e-4)
    others = [slow_dkd(t, s, y, 3.0, 2.0, 2.5), slow_dkd(s, t, y, 2.0, 3.0, 2.5)]
    for other in (*others, slow_dkd(s, t, y, 3.0, 2.0, 4.0)):
        assert abs(loss.item() - other) > 1e-3 * loss.item()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_its_mean_is_over_the_labelled_rows_of_the_whole_step() -> None:
    """What the engine says of micro-batches (and processes) reaches it."""
    y = torch.tensor([-100, 1, -100, 3, 0, 1])
    s, t = logits(6, 4), logits(6, 4, seed=1)

    def loss(part: slice) -> Tensor:
        batch = Batch(s[part], y[part], labelled=torch.tensor(4 / 3))
        return DKD().loss(Seen(s[part]), Seen(t[part]), batch)

    thirds = sum(loss(slice(n, n + 2)) for n in (0, 2, 4)) / 3
    rows = decoupled(s, t, y, 1.0, 8.0, 4.0)
    torch.testing.assert_close(thirds, rows[y != -100].mean(), rtol=1e-6, atol=0)


def test_the_warm_up_is_a_ramp_of_20_epochs() -> None:
    """mdistiller counts epochs from 1 and multiplies by min(epoch / 20, 1)."""
    student, teacher, (x, y) = pair()
    terms = [Term(DKD(), ramp=Ramp(20)), Term(DKD(), name="full")]
    distiller = Distiller(student, teacher, terms, example=(x, y))
    for epoch, share in ((1, 0.05), (10, 0.5), (20, 1.0), (240, 1.0)):
        losses = distiller(Batch(x, y, lesson=Lesson(epoch=epoch - 1, epochs=240)))
        assert losses["dkd"].item() == pytest.approx(share * losses["full"].item(), rel=1e-6)


def test_without_labels_it_is_refused() -> None:
    student, teacher, (x, _) = pair()
    with pytest.raises(Refused, match=r"'dkd' needs labels"):
        Distiller(student, teacher, [DKD()], example=(x, None), task=None)


def test_other_classes_are_refused_with_both_counts() -> None:
    student, _, example = pair(4)
    with pytest.raises(Refused, match=r"'dkd'.*4 classes.*7"):
        Distiller(student, nn.Linear(3, 7), [DKD()], example=example)


@pytest.mark.parametrize(("outputs", "y"), [(1, torch.zeros(6).long()), (4, torch.zeros(6, 2).long())])
def test_answers_and_labels_that_do_not_fit_are_refused_with_both_shapes(outputs: int, y: Tensor) -> None:
    answers, labels = f"\\(6, {outputs}\\)", str(tuple(y.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(Refused, match=rf"'dkd'.*{answers}.*{answers}.*{labels}.*at least two classes"):
        nets = nn.Linear(3, outputs), nn.Linear(3, outputs)
        Distiller(*nets, [DKD()], example=(torch.randn(6, 3), y), task=None)


def test_a_label_beyond_the_classes_is_refused() -> None:
    student, teacher, (x, y) = pair(4)
    with pytest.raises(Refused, match=r"'dkd'.*label 4.*4 classes"):
        Distiller(student, teacher, [DKD()], example=(x, y + 1), task=None)


def test_a_student_learns_its_teacher_from_labelled_rows() -> None:
    student, teacher, _ = pair()
    x, y = torch.randn(64, 3), torch.arange(64) % 4
    y[::3] = -100
    distiller = Distiller(student, teacher, [DKD()], example=(x, y), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.3)
    before = kd(student(x), teacher(x), 4.0).item()
    for _ in range(200):
        optimiser.zero_grad()
        distiller(x, y)["loss"].backward()
        optimiser.step()
    assert kd(student(x), teacher(x), 4.0).item() < 1e-3 * before
