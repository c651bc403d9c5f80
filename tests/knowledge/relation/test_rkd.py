"""RKD against slow loops written from the paper's equations, and the invariants its losses must have."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.knowledge.relation.rkd import (
    DENSE,
    RKD,
    _half_squares,
    angle,
    cosines,
    distance,
    relative_distances,
)

LOSSES = [distance, angle, lambda s, t, mask_degenerate=False: angle(s, t, mask_degenerate, chunk=2)]
all_losses = pytest.mark.parametrize("loss", LOSSES, ids=["distance", "angle", "angle-chunked"])
both_averages = pytest.mark.parametrize("mask", [False, True], ids=["official", "paper"])


def rows(b: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(d: int, wider: int) -> Tensor:
    """Maps d dimensions into `wider` ones, keeping lengths and angles."""
    return torch.linalg.qr(rows(wider, wider, seed=7)).Q[:d]


def slope(loss, s: Tensor, t: Tensor, *args) -> Tensor:
    s = s.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(s, t, *args), s)
    return grad


# --- the paper's equations, one pair and one triple at a time ---


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def slow_distance(s: Tensor, t: Tensor, mask: bool) -> float:
    b = len(s)

    def psi(x: Tensor) -> dict[tuple[int, int], float]:
        far = {(i, j): float((x[i] - x[j]).norm()) for i, j in itertools.product(range(b), repeat=2)}
        mean = sum(far[i, j] for i, j in itertools.permutations(range(b), 2)) / (b * (b - 1))
        return {pair: length / mean for pair, length in far.items()}

    here, there = psi(s), psi(t)
    pairs = list(itertools.permutations(range(b), 2) if mask else itertools.product(range(b), repeat=2))
    return sum(huber(here[p], there[p]) for p in pairs) / len(pairs)


def slow_angle(s: Tensor, t: Tensor, mask: bool) -> float:
    def psi(x: Tensor, i: int, j: int, k: int) -> float:
        a, c = x[i] - x[j], x[k] - x[j]
        return 0.0 if a.norm() == 0 or c.norm() == 0 else float(a @ c / (a.norm() * c.norm()))

    b = len(s)
    triples = list(itertools.permutations(range(b), 3) if mask else itertools.product(range(b), repeat=3))
    return sum(huber(psi(s, *v), psi(t, *v)) for v in triples) / len(triples)


def naive_angle(s: Tensor, t: Tensor) -> Tensor:
    """As the official code forms it: through every difference of two rows."""

    def psi(x: Tensor) -> Tensor:
        e = F.normalize(x - x[:, None], dim=2)
        return e @ e.mT

    return F.smooth_l1_loss(psi(s), psi(t))


def naive_distance(s: Tensor, t: Tensor) -> Tensor:
    """Through every difference, with autograd; rows must differ."""
    b = len(s)

    def psi(x: Tensor) -> Tensor:
        far = ((x[:, None] - x).square().sum(2) + torch.eye(b)).sqrt() * (1 - torch.eye(b))  # no sqrt of 0
        return far / (far.sum() / (b * (b - 1)))

    return F.smooth_l1_loss(psi(s), psi(t))


@both_averages
@pytest.mark.parametrize("duplicates", [False, True])
def test_equals_the_papers_equations(mask, duplicates):
    s, t = 2 * rows(7, 3) + 1, rows(7, 5, seed=1)
    if duplicates:
        s[3] = s[2]
        t[5] = t[0]
    assert math.isclose(distance(s, t, mask), slow_distance(s, t, mask), rel_tol=1e-12)
    for chunk in (1, 2, 3, 7, None):
        assert math.isclose(angle(s, t, mask, chunk=chunk), slow_angle(s, t, mask), rel_tol=1e-12)


def test_reaches_the_linear_part_of_huber():
    s = torch.tensor([[0.0], [1.0], [2.0], [30.0]], dtype=torch.float64)
    t = torch.tensor([[0.0, 0], [5, 0], [2, 9], [-3, 4]], dtype=torch.float64)
    assert (relative_distances(s) - relative_distances(t)).abs().max() > 1
    assert (cosines(_half_squares(s)) - cosines(_half_squares(t))).abs().max() > 1
    assert math.isclose(distance(s, t), slow_distance(s, t, False), rel_tol=1e-12)
    assert math.isclose(angle(s, t), slow_angle(s, t, False), rel_tol=1e-12)
    assert math.isclose(angle(s, t, chunk=3), slow_angle(s, t, False), rel_tol=1e-12)
    torch.testing.assert_close(slope(angle, s, t, True, 3), slope(angle, s, t, True), atol=1e-12, rtol=1e-9)


def test_averages_differ_by_a_constant_factor():
    b = 6
    s, t = rows(b, 3), rows(b, 4, seed=1)
    torch.testing.assert_close(distance(s, t), distance(s, t, True) * (b - 1) / b)
    torch.testing.assert_close(angle(s, t), angle(s, t, True) * (b - 1) * (b - 2) / b**2)


# --- the spec's invariants ---


@all_losses
def test_1_ignores_translation_rotation_reflection_and_scale_of_either(loss):
    s, t = rows(8, 4), rows(8, 6, seed=1)
    s_moved = 3.7 * s @ orthogonal(4, 4) + 100
    t_moved = 0.02 * t.flip(1) @ orthogonal(6, 6) - 5
    expected = loss(s, t)
    assert expected > 1e-3
    torch.testing.assert_close(loss(s_moved, t), expected)
    torch.testing.assert_close(loss(s, t_moved), expected)


@all_losses
@both_averages
def test_2_is_zero_for_any_scaled_isometry_into_other_dimensions(loss, mask):
    t = rows(8, 4)
    assert loss(0.3 * t @ orthogonal(4, 9) + 2, t, mask) < 1e-24
    assert loss(F.pad(t, (0, 3)), t, mask) < 1e-24
    assert loss(t.float(), t.float(), mask) == 0
    assert loss(t + 0.5 * rows(8, 4, seed=2), t, mask) > 1e-4


@all_losses
def test_3_ignores_the_order_of_the_batch(loss):
    s, t = rows(9, 4), rows(9, 6, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss(s[order], t[order]), loss(s, t))
    torch.testing.assert_close(slope(loss, s[order], t[order]), slope(loss, s, t)[order])


@pytest.mark.parametrize("d", [1, 2, 5, 300])
def test_4_cosines_are_symmetric_in_their_arms_and_at_most_1(d):
    cosine = cosines(_half_squares(rows(12, d)))
    torch.testing.assert_close(cosine, cosine.mT, rtol=0, atol=1e-14)
    assert cosine.abs().max() <= 1 + 1e-12


def test_5_relative_distances_average_1_off_the_diagonal():
    psi = relative_distances(40 * rows(10, 4, dtype=torch.float32) + 3)
    assert (psi.diagonal() == 0).all()
    assert math.isclose(psi.sum() / 90, 1, rel_tol=1e-14)


@all_losses
def test_6_gradient_neither_moves_nor_scales_the_batch(loss):
    s, t = rows(8, 4), rows(8, 6, seed=1)
    grad = slope(loss, s, t)
    assert grad.norm() > 1e-3
    assert grad.sum(0).abs().max() < 1e-14
    assert (grad * (s - s.mean(0))).sum().abs() < 1e-14


@all_losses
@both_averages
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_7_duplicates_give_finite_gradients(loss, mask, dtype):
    s, t = rows(8, 4, dtype=dtype) * 5 + 100, rows(8, 6, seed=1, dtype=dtype)
    s[1:4] = s[0]
    t[3:6] = t[2]
    grad = slope(loss, s, t, mask)
    assert grad.isfinite().all()
    assert 0 < grad.abs().max() < 100  # the official code passes about 1e10 here
    same = torch.full_like(s, 3.0)  # all rows in one point
    assert loss(same, t, mask).isfinite()
    assert (slope(loss, same, t, mask) == 0).all()
    assert loss(s, torch.zeros_like(t), mask).isfinite()
    assert slope(loss, s, torch.zeros_like(t), mask).isfinite().all()


@both_averages
@pytest.mark.parametrize("b", [DENSE + 1, 100])
def test_8_chunked_equals_dense(b, mask):
    s, t = rows(b, 24, dtype=torch.float32).relu(), rows(b, 40, seed=1, dtype=torch.float32).relu()
    dense, grad = angle(s, t, mask, chunk=b), slope(angle, s, t, mask, b)
    for chunk in (1, 7, b - 1, None):
        torch.testing.assert_close(angle(s, t, mask, chunk), dense, rtol=1e-6, atol=0)
        there = slope(angle, s, t, mask, chunk)
        assert (there - grad).norm() <= 1e-6 * grad.norm()
    torch.testing.assert_close(angle(s, t), naive_angle(s, t), rtol=1e-6, atol=0)
    official = slope(naive_angle, s, t)
    assert (slope(angle, s, t) - official).norm() <= 1e-6 * official.norm()


@both_averages
def test_9_two_rows_have_one_distance_and_no_angle(mask):
    s, t = rows(2, 4).requires_grad_(), rows(2, 6, seed=1)
    assert distance(s, t, mask) < 1e-24
    assert angle(s, t, mask) == 0
    one = s[:1].detach().requires_grad_()
    both = distance(one, t[:1], mask) + angle(one, t[:1], mask)
    both.backward()
    assert both == 0 and (one.grad == 0).all()


# --- numbers ---


@all_losses
@both_averages
def test_gradcheck(loss, mask):
    s, t = rows(5, 3).requires_grad_(), rows(5, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, t, mask), s)


@all_losses
def test_passes_no_gradient_to_the_teacher(loss):
    s, t = rows(5, 3).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    loss(s, t).backward()
    assert t.grad is None and s.grad.abs().max() > 0


def test_float32_is_accurate_where_plain_float32_is_not():
    """Tight clusters far from the origin, as a pooled feature late in training."""
    centres = rows(8, 64, seed=2).relu().repeat_interleave(12, 0)
    s = (centres + 1e-3 * rows(96, 64) + 30).float()
    t = rows(96, 32, seed=1, dtype=torch.float32).relu()
    for ours, slow in [(angle, naive_angle), (distance, naive_distance)]:
        grad, exact = slope(ours, s, t).double(), slope(slow, s.double(), t.double())
        torch.testing.assert_close(ours(s, t).double(), slow(s.double(), t.double()), rtol=1e-6, atol=0)
        assert (grad - exact).norm() <= 1e-4 * exact.norm()


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(loss, dtype):
    s, t = (5 + rows(12, 16)).to(dtype), rows(12, 24, seed=1).to(dtype)
    half, full = loss(s, t), loss(s.float(), t.float())
    assert half.dtype == torch.float32
    assert half == full
    grad = slope(loss, s, t)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, slope(loss, s.float(), t.float()).to(dtype))


@all_losses
def test_autocast_does_not_reach_the_computation(loss):
    s, t = rows(12, 16, dtype=torch.float32), rows(12, 24, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(s, t)
    assert inside == loss(s, t)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):  # its storage: a broadcast view only looks large
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("chunk", [2, 5])
def test_chunked_holds_a_chunk_and_no_more(chunk):
    b, d = 96, 160
    s, t = rows(b, d, dtype=torch.float32).requires_grad_(), rows(b, d, seed=1, dtype=torch.float32)
    with Largest() as largest:
        angle(s, t, chunk=chunk).backward()
    assert largest.numel <= chunk * b * b
    with Largest() as largest:
        distance(s, t).backward()
    assert largest.numel <= 2 * b * b
    with Largest() as largest:
        angle(s, t, chunk=b).backward()
    assert largest.numel == b**3  # the count does see what it is for


# --- the method ---


def seen(x: Tensor, tap: str = "pooled") -> Seen:
    return Seen(x, {tap: x})


def test_weighs_distance_and_angle():
    s, t, batch = rows(6, 4), rows(6, 5, seed=1), Batch(rows(6, 1))
    both = 25 * distance(s, t) + 50 * angle(s, t)
    torch.testing.assert_close(RKD().loss(seen(s), seen(t), batch), both)
    paper = 1 * distance(s, t, True) + 2 * angle(s, t, True)
    method = RKD(distance=1, angle=2, tap="out", mask_degenerate=True)
    torch.testing.assert_close(method.loss(seen(s, "out"), seen(t, "out"), batch), paper)
    torch.testing.assert_close(RKD(angle=0).loss(seen(s), seen(t), batch), 25 * distance(s, t))


def test_the_teacher_is_normalised_when_asked_and_the_student_never():
    s, t, batch = rows(6, 4), rows(6, 5, seed=1), Batch(rows(6, 1))
    lengths = torch.arange(1.0, 7, dtype=torch.float64)[:, None]
    expected = RKD().loss(seen(s), seen(F.normalize(t)), batch)
    asked = RKD(normalise_teacher=True)
    torch.testing.assert_close(asked.loss(seen(s), seen(t), batch), expected)
    torch.testing.assert_close(asked.loss(seen(s), seen(lengths * t), batch), expected)
    assert (RKD().loss(seen(s), seen(lengths * t), batch) - expected).abs() > 0.1
    assert (asked.loss(seen(lengths * s), seen(t), batch) - expected).abs() > 0.1


def test_flattens_maps():
    s, t, batch = rows(6, 24), rows(6, 5, seed=1), Batch(rows(6, 1))
    flat = RKD().loss(seen(s), seen(t), batch)
    torch.testing.assert_close(RKD().loss(seen(s.view(6, 2, 3, 4)), seen(t), batch), flat)


def test_relations_reach_across_processes(monkeypatch):
    s, t, batch = rows(6, 4), rows(6, 5, seed=1), Batch(rows(3, 1))
    elsewhere = {4: s[3:], 5: t[3:]}
    expected = RKD().loss(seen(s), seen(t), batch)
    monkeypatch.setattr(across, "gather", lambda x: torch.cat([x, elsewhere[x.shape[1]]]))
    torch.testing.assert_close(RKD().loss(seen(s[:3]), seen(t[:3]), batch), expected)


def test_teaches_a_student_through_the_distiller():
    """A student without labels comes to lie as its wider teacher does."""
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    teacher = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU())
    x, taps = torch.randn(32, 8), {"pooled": ""}
    distiller = Distiller(student, Frozen(teacher, taps=taps), RKD(), example=(x, None), task=None, taps=taps)
    adam = torch.optim.Adam(distiller.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = distiller(x)["loss"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())


# Dynamo itself makes an autograd.Function's context, and torch warns that nobody should.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("b", [2, 8, 64, 96])
def test_compiles_whole(b):
    batch, method = Batch(rows(b, 1)), RKD()
    s, t = rows(b, 6, dtype=torch.float32).requires_grad_(), rows(b, 4, seed=1, dtype=torch.float32)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return method.loss(seen(s), seen(t), batch)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, t), loss(s, t))
    torch.testing.assert_close(slope(compiled, s, t), slope(loss, s, t))
