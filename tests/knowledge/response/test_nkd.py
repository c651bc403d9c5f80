"""NKD against a slow loop written from the paper's equation, and what the paper says of it."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.knowledge.response.dkd import nckd
from limbeck.knowledge.response.nkd import NKD, nkd, normalised

TEMPERATURES = [0.5, 1.0, 3.0, 20.0]
LABELS = torch.tensor([3, 0, 1, 1, 2])


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_rows(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> list[float]:
    """−p_t,y log p_s,y at T = 1, and −γ T² Σ_{i≠y} p̂_t,i log p̂_s,i at T, one class at a time."""
    rows = []
    for z_s, z_t, label in zip(s.tolist(), t.tolist(), y.tolist(), strict=True):
        p_s = math.exp(z_s[label]) / sum(map(math.exp, z_s))
        p_t = math.exp(z_t[label]) / sum(map(math.exp, z_t))
        above_s = [math.exp(z / temperature) for i, z in enumerate(z_s) if i != label]
        above_t = [math.exp(z / temperature) for i, z in enumerate(z_t) if i != label]
        among = sum(
            b / sum(above_t) * math.log(a / sum(above_s)) for a, b in zip(above_s, above_t, strict=True)
        )
        rows.append(-p_t * math.log(p_s) - gamma * temperature**2 * among)
    return rows


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [4, 7])
def test_equals_the_loop(temperature: float, k: int) -> None:
    s, t = logits(5, k), logits(5, k, seed=1)
    rows = slow_rows(s, t, LABELS, 3.5, temperature)
    assert normalised(s, t, LABELS, 3.5, temperature).tolist() == pytest.approx(rows, rel=1e-10)
    assert nkd(s, t, LABELS, 3.5, temperature).item() == pytest.approx(sum(rows) / 5, rel=1e-10)


def test_a_value_by_hand() -> None:
    # Teacher ½ ¼ ¼, student ¼ ½ ¼, label 0: ½ ln 4, and γ times the cross-entropy of ½ ½ and ⅔ ⅓.
    t, s = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    expected = 0.5 * math.log(4) + 1.5 * 0.5 * (math.log(3 / 2) + math.log(3))
    assert nkd(s, t, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


def test_the_defaults_are_the_papers() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    rows = slow_rows(s, t, LABELS, gamma=1.5, temperature=1.0)
    assert nkd(s, t, LABELS).item() == pytest.approx(sum(rows) / 5, rel=1e-10)
    assert (NKD().gamma, NKD().temperature) == (1.5, 1.0)


def test_the_temperature_does_not_reach_the_labelled_class() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    cold, hot = (nkd(s, t, LABELS, gamma=0.0, temperature=T) for T in (1.0, 20.0))
    assert cold == hot
    expected = -(t.softmax(1) * s.log_softmax(1))[range(5), LABELS].mean()
    torch.testing.assert_close(cold, expected, rtol=1e-12, atol=0)


def test_among_the_others_only_their_shares_count() -> None:
    """The paper's point: the two sums of the others' probabilities differ, so these must be normalised.
    Raising the labelled logit moves such a sum, and the second term not at all."""
    s, t = logits(5, 7), logits(5, 7, seed=1)
    surer = s.clone()
    surer[range(5), LABELS] += 5.0

    def among(s: Tensor) -> Tensor:
        return nkd(s, t, LABELS, gamma=1.0) - nkd(s, t, LABELS, gamma=0.0)

    torch.testing.assert_close(among(surer), among(s), rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_beside_dkd(temperature: float) -> None:
    """Its second term is DKD's NCKD and the entropy of the teacher's shares, which has no gradient."""
    s, t = logits(5, 7), logits(5, 7, seed=1)
    parts = slow_rows(t, t, LABELS, 1.0, temperature), slow_rows(t, t, LABELS, 0.0, temperature)
    entropy = torch.tensor([a - b for a, b in zip(*parts, strict=True)], dtype=s.dtype)
    one, none = (normalised(s, t, LABELS, gamma, temperature) for gamma in (1.0, 0.0))
    torch.testing.assert_close(one - none - entropy, nckd(s, t, LABELS, temperature))


def test_it_is_a_cross_entropy_and_not_zero_at_a_match() -> None:
    """There the others are at rest, and the labelled class still rises, the faster the surer the teacher."""
    t = logits(5, 7, seed=1)
    s = t.clone().requires_grad_()
    loss = nkd(s, t, LABELS)
    (slope,) = torch.autograd.grad(loss, s)
    assert loss > 0.1
    p = t.softmax(1)
    expected = p.clone()
    expected[range(5), LABELS] -= 1
    expected *= p[range(5), LABELS][:, None] / 5
    torch.testing.assert_close(slope, expected)


def test_of_two_classes_nothing_is_left_but_the_labelled_one() -> None:
    s, t, y = logits(5, 2), logits(5, 2, seed=1), LABELS % 2
    assert nkd(s, t, y, gamma=100.0) == nkd(s, t, y, gamma=0.0)


def test_a_shift_of_a_row_is_not_seen() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    shift = logits(5, 1, seed=2, scale=50.0)
    torch.testing.assert_close(nkd(s + shift, t - shift, LABELS), nkd(s, t, LABELS), rtol=1e-10, atol=0)


def test_rows_without_a_label_are_skipped() -> None:
    s, t = logits(5, 7).requires_grad_(), logits(5, 7, seed=1)
    some = torch.tensor([3, -100, 1, -100, 2])
    known = some != -100
    loss = nkd(s, t, some)
    torch.testing.assert_close(loss, nkd(s[known], t[known], some[known]), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(loss, s)
    assert not slope[~known].any() and slope[known].any()
    nothing = nkd(s, t, torch.full((5,), -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, s)[0].any()


def test_dense_logits_are_many_rows() -> None:
    s, t = logits(3, 5, 2, 4), logits(3, 5, 2, 4, seed=1)
    y = torch.arange(24).reshape(3, 2, 4) % 5
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 5) for z in (s, t))
    expected = slow_rows(rows_s, rows_t, y.flatten(), 1.5, 1.0)
    assert nkd(s, t, y).item() == pytest.approx(sum(expected) / 24, rel=1e-10)


def test_gradcheck_in_both_arguments() -> None:
    s, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    y = torch.tensor([3, -100, 0])
    assert torch.autograd.gradcheck(lambda s, t: nkd(s, t, y, 0.7, 2.0), (s, t))


def test_a_step_of_your_own_may_compile_it() -> None:
    s, t = logits(5, 7), logits(5, 7, seed=1)
    compiled = torch.compile(nkd, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, t, LABELS), nkd(s, t, LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 3000.0])
def test_no_precision_and_no_certainty_breaks_it(dtype: torch.dtype, scale: float) -> None:
    s, t = (logits(5, 10, seed=n, scale=scale).to(dtype).requires_grad_(n == 0) for n in (0, 1))
    loss = nkd(s, t, LABELS, temperature=3.0)
    (slope,) = torch.autograd.grad(loss, s)
    expected = nkd(s.double(), t.double(), LABELS, temperature=3.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize("temperature", [0.0, -4.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(Refused, match=f"temperature of 'nkd' is {temperature}, expected a number above 0"):
        NKD(temperature=temperature)


# --- through the Distiller ---


def pair(classes: int = 4) -> tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.arange(6) % classes
    return nn.Linear(3, classes), nn.Linear(3, classes), (x, y)


def test_each_knows_its_place_and_its_knobs() -> None:
    """Student and teacher swapped, or a knob forgotten, would give another number."""
    student, teacher, (x, y) = pair()
    distiller = Distiller(student, teacher, [NKD(gamma=3.5, temperature=3.0)], example=(x, y))
    s, t = (model(x).detach().double() for model in (student, teacher))
    loss = distiller(x, y)["nkd"]
    assert loss.item() == pytest.approx(sum(slow_rows(s, t, y, 3.5, 3.0)) / 6, rel=1e-4)
    for other in (slow_rows(t, s, y, 3.5, 3.0), slow_rows(s, t, y, 1.5, 3.0), slow_rows(s, t, y, 3.5, 1.0)):
        assert abs(loss.item() - sum(other) / 6) > 1e-3 * loss.item()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


def test_its_mean_is_over_the_labelled_rows_of_the_whole_step() -> None:
    """What the engine says of micro-batches (and processes) reaches it."""
    y = torch.tensor([-100, 1, -100, 3, 0, 1])
    s, t = logits(6, 4), logits(6, 4, seed=1)

    def loss(part: slice) -> Tensor:
        batch = Batch(s[part], y[part], labelled=torch.tensor(4 / 3))
        return NKD().loss(Seen(s[part]), Seen(t[part]), batch)

    thirds = sum(loss(slice(n, n + 2)) for n in (0, 2, 4)) / 3
    torch.testing.assert_close(thirds, normalised(s, t, y, 1.5, 1.0)[y != -100].mean(), rtol=1e-6, atol=0)


def test_without_labels_it_is_refused() -> None:
    student, teacher, (x, _) = pair()
    with pytest.raises(Refused, match=r"'nkd' needs labels"):
        Distiller(student, teacher, [NKD()], example=(x, None), task=None)


def test_other_classes_are_refused_with_both_counts() -> None:
    student, _, example = pair(4)
    with pytest.raises(Refused, match=r"'nkd'.*4 classes.*7"):
        Distiller(student, nn.Linear(3, 7), [NKD()], example=example)


@pytest.mark.parametrize(("outputs", "y"), [(1, torch.zeros(6).long()), (4, torch.zeros(6, 2).long())])
def test_answers_and_labels_that_do_not_fit_are_refused_with_both_shapes(outputs: int, y: Tensor) -> None:
    answers, labels = f"\\(6, {outputs}\\)", str(tuple(y.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(Refused, match=rf"'nkd'.*{answers}.*{answers}.*{labels}.*at least two classes"):
        nets = nn.Linear(3, outputs), nn.Linear(3, outputs)
        Distiller(*nets, [NKD()], example=(torch.randn(6, 3), y), task=None)


def test_a_label_beyond_the_classes_is_refused() -> None:
    student, teacher, (x, y) = pair(4)
    with pytest.raises(Refused, match=r"'nkd'.*label 4.*4 classes"):
        Distiller(student, teacher, [NKD()], example=(x, y + 1), task=None)


def test_a_student_learns_the_shares_of_its_teacher() -> None:
    student, teacher, _ = pair()
    x, y = torch.randn(64, 3), torch.arange(64) % 4
    distiller = Distiller(student, teacher, [NKD()], example=(x, y), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.5)
    before = nckd(student(x), teacher(x), y, 1.0).mean()
    for _ in range(100):
        optimiser.zero_grad()
        distiller(x, y)["loss"].backward()
        optimiser.step()
    assert nckd(student(x), teacher(x), y, 1.0).mean() < 0.2 * before
