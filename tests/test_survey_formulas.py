"""The five formulas of the survey article (after Gou et al.; IJCV 2021; arXiv:2006.05525), in our code.

The right-hand sides are written from the article with `exp` and sums only; the left-hand sides are limbeck's.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.scheme import Term
from limbeck.knowledge.response.kd import KD, kd
from limbeck.pieces.softening import kl, log_soften

B, N = 5, 7
TEMPERATURES = [0.5, 1.0, 4.0, 30.0]
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(B, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def s() -> Tensor:
    return logits(0).requires_grad_()


@pytest.fixture
def t() -> Tensor:
    return logits(1)


def p(z: Tensor, temperature: float) -> Tensor:
    above = (z.detach() / temperature).exp()
    return above / above.sum(1, keepdim=True)


def cross_entropy(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Formula 2 with our softening: L_D of each row, without T²."""
    return -(log_soften(t, temperature).exp() * log_soften(s, temperature)).sum(1)


def slope(loss: Tensor, s: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, s)
    return grad


def centred(z: Tensor) -> Tensor:
    return z.detach() - z.detach().mean(1, keepdim=True)


# --- 1: softened probabilities ---


@every_temperature
def test_1_softened_probabilities(t: Tensor, temperature: float) -> None:
    torch.testing.assert_close(log_soften(t, temperature).exp(), p(t, temperature), rtol=1e-12, atol=0)


def test_1_hot_they_are_uniform_and_cold_one_hot(t: Tensor) -> None:
    hot, cold = log_soften(t, 1e9).exp(), log_soften(t, 1e-3).exp()
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / N), rtol=1e-7, atol=0)
    torch.testing.assert_close(cold, nn.functional.one_hot(t.argmax(1), N).double(), rtol=0, atol=1e-9)


def test_1_in_between_they_soften_and_keep_their_order(t: Tensor) -> None:
    entropies = []
    for temperature in (0.1, *TEMPERATURES, 1000.0):
        log_p = log_soften(t, temperature)
        assert torch.equal(log_p.argsort(1), t.argsort(1))
        entropies.append(-(log_p.exp() * log_p).sum(1))
    assert all((later > sooner).all() for sooner, later in itertools.pairwise(entropies))
    assert (entropies[-1] < math.log(N)).all()


# --- 2: the distillation loss is a cross-entropy; KL is it less the teacher's entropy ---


@every_temperature
def test_2_kl_is_cross_entropy_less_the_teachers_entropy(s: Tensor, t: Tensor, temperature: float) -> None:
    p_s, p_t = p(s, temperature), p(t, temperature)
    expected = -(p_t * p_s.log()).sum(1) + (p_t * p_t.log()).sum(1)
    torch.testing.assert_close(kl(log_soften(s, temperature), log_soften(t, temperature)), expected)
    assert (-(p_t * p_t.log()).sum(1) > 1e-3).all(), "an entropy of 0 would hide the difference"


@every_temperature
def test_2_both_have_one_gradient(s: Tensor, t: Tensor, temperature: float) -> None:
    """T² and the mean are the only differences between `kd` and the article's loss."""
    ours = slope(kd(s, t, temperature), s)
    theirs = slope(cross_entropy(s, t, temperature).mean(), s)
    torch.testing.assert_close(ours, temperature**2 * theirs, rtol=1e-10, atol=1e-14)


# --- 3: the exact gradient ---


@every_temperature
def test_3_the_gradient_is_the_gap_of_probabilities(s: Tensor, t: Tensor, temperature: float) -> None:
    gap = p(s, temperature) - p(t, temperature)
    torch.testing.assert_close(slope(cross_entropy(s, t, temperature).sum(), s), gap / temperature)
    torch.testing.assert_close(slope(kd(s, t, temperature), s), temperature * gap / B)


# --- 4: hot, the gradient matches centred logits ---


def test_4_hot_the_gradient_is_the_gap_of_centred_logits(s: Tensor, t: Tensor) -> None:
    """Within 1 % at T = 1000 for logits of some units: the next order is z/T."""

    def error(temperature: float) -> float:
        limit = (centred(s) - centred(t)) / (N * temperature**2)
        found = slope(cross_entropy(s, t, temperature).sum(), s)
        return ((found - limit).norm() / limit.norm()).item()

    assert error(1e3) < 0.01
    assert error(1e4) < error(1e3) / 8


def test_4_so_with_the_square_the_gradient_keeps_its_size(s: Tensor, t: Tensor) -> None:
    """From T = 4 to 1000 it stays within a factor of 2 of its limit; without T² it falls ten thousandfold."""
    limit = (centred(s) - centred(t)).norm() / (B * N)
    sizes = {T: slope(kd(s, t, T), s).norm() for T in (4.0, 20.0, 100.0, 1000.0)}
    assert all(0.5 < size / limit < 2 for size in sizes.values())
    assert sizes[1000.0] / limit == pytest.approx(1, rel=0.01)
    bare = [slope(cross_entropy(s, t, T).mean(), s).norm() for T in (4.0, 1000.0)]
    assert bare[0] / bare[1] > 1e4


def test_4_only_when_both_are_centred(s: Tensor, t: Tensor) -> None:
    """A shift of a row's logits changes the raw gap, and the gradient not at all."""
    shifted = t + torch.arange(B, dtype=t.dtype)[:, None]
    torch.testing.assert_close(slope(kd(s, shifted, 1e3), s), slope(kd(s, t, 1e3), s), rtol=1e-6, atol=1e-12)


# --- 5: joint training ---


@pytest.mark.parametrize(("task_weight", "weight"), [(1.0, 1.0), (0.1, 0.9)])
def test_5_joint_training_is_the_sum_of_both_losses(task_weight: float, weight: float) -> None:
    """CE(y, p(z_s, 1)) at T = 1 and L_D at T, by hand; in value and in the student's gradient."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, N, bias=False).double(), nn.Linear(3, N).double()
    x, y, temperature = torch.randn(B, 3).double(), torch.arange(B) % N, 4.0
    term = Term(KD(temperature=temperature), weight=weight)
    distiller = Distiller(student, teacher, [term], example=(x, y), task_weight=task_weight)
    losses = distiller(x, y)
    losses["loss"].backward()

    s, t = student(x), teacher(x)
    p_s, p_t = p(s, temperature), p(t, temperature)
    ce = -sum(math.log(p(s, 1.0)[row, label]) for row, label in enumerate(y.tolist())) / B
    soft = temperature**2 * (p_t * (p_t.log() - p_s.log())).sum().item() / B
    assert losses["task"].item() == pytest.approx(task_weight * ce, rel=1e-10)
    assert losses["kd"].item() == pytest.approx(weight * soft, rel=1e-10)
    assert losses["loss"].item() == pytest.approx(task_weight * ce + weight * soft, rel=1e-10)

    hard = p(s, 1.0) - nn.functional.one_hot(y, N)
    at_logits = (task_weight * hard + weight * temperature * (p_s - p_t)) / B
    torch.testing.assert_close(student.weight.grad, at_logits.T @ x)
    assert teacher.weight.grad is None
