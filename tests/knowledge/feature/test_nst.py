"""NST against slow loops written from the paper's equation, and what a distance of distributions must do."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.knowledge.feature.nst import NST, nst, selectivity

# Student's and teacher's channels, and the grid: few channels on a fine grid, and many on a coarse one.
SIDES = [(3, 4, (4, 5)), (6, 9, (2, 3)), (4, 11, (3, 3))]
both_sides = pytest.mark.parametrize(("c_s", "c_t", "grid"), SIDES, ids=["channels", "positions", "between"])


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(
    c_s: int, c_t: int, grid: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Mostly positive maps, as behind a ReLU: for these the loss is far from what it is for noise."""
    return maps(3, c_s, *grid, dtype=dtype) + 0.3, maps(3, c_t, *grid, seed=1, dtype=dtype).abs()


def slow_nst(s: Tensor, t: Tensor) -> float:
    """MMD² row by row, one pair of channels at a time."""

    def unit(channel: Tensor) -> list[float]:
        values = channel.flatten().tolist()
        length = sum(v * v for v in values) ** 0.5
        return [v / length for v in values]

    def mean_kernel(one: list[list[float]], other: list[list[float]]) -> float:
        pairs = [sum(a * b for a, b in zip(u, v, strict=True)) ** 2 for u in one for v in other]
        return sum(pairs) / len(pairs)

    total = 0.0
    for here, there in zip(s, t, strict=True):
        u, v = [unit(channel) for channel in here], [unit(channel) for channel in there]
        total += mean_kernel(u, u) + mean_kernel(v, v) - 2 * mean_kernel(u, v)
    return total / len(s)


def official(s: Tensor, t: Tensor) -> Tensor:
    """What the official code lowers: the teacher's own term is left out."""
    u, v = (F.normalize(x.flatten(2), dim=2) for x in (s, t))
    return (u @ u.mT).square().mean() - 2 * (u @ v.mT).square().mean()


def slope(loss, s: Tensor, t: Tensor) -> Tensor:
    s = s.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(s, t), s)
    return grad


# --- the equation ---


@both_sides
def test_equals_the_loop(c_s: int, c_t: int, grid: tuple[int, int]) -> None:
    s, t = pair(c_s, c_t, grid)
    expected = slow_nst(s, t)
    assert expected > 0.01
    assert nst(s, t).item() == pytest.approx(expected, rel=1e-12)


@both_sides
def test_gradcheck(c_s: int, c_t: int, grid: tuple[int, int]) -> None:
    s, t = (x[:2].requires_grad_() for x in pair(c_s, c_t, grid))
    assert torch.autograd.gradcheck(nst, (s, t))


@both_sides
def test_the_official_code_has_the_same_gradient(c_s: int, c_t: int, grid: tuple[int, int]) -> None:
    s, t = pair(c_s, c_t, grid)
    torch.testing.assert_close(slope(nst, s, t), slope(official, s, t))
    assert official(s, t) < nst(s, t) - 0.01


def test_by_hand() -> None:
    """All of the student's neurons like one place and the teacher's another: k is 1 within, 0 between."""
    s, t = torch.zeros(2, 3, 2, 2), torch.zeros(2, 5, 2, 2)
    s[:, :, 0, 0], t[:, :, 1, 1] = 0.3, 7.0
    assert nst(s, t).item() == pytest.approx(2.0)
    t[:, :2], t[:, :2, 0, 0] = 0, 1  # now two of five like the student's
    assert nst(s, t).item() == pytest.approx(1 + (4 + 9) / 25 - 2 * 2 / 5)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    s, t = pair(6, 9, (2, 3))
    s[1] = s[1].abs()
    single = torch.stack([nst(s[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(nst(s, t), single.mean())
    assert single.std() > 0.1 * single.mean(), "rows alike would hide a wrong mean"


class Largest(TorchDispatchMode):
    """Notices the size of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):  # its storage: a broadcast view only looks large
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize(("c", "side"), [(8, 20), (64, 3)], ids=["channels", "positions"])
def test_holds_nothing_larger_than_the_maps(c: int, side: int) -> None:
    s, t = maps(2, c, side, side).requires_grad_(), maps(2, c, side, side, seed=1)
    with Largest() as largest:
        nst(s, t).backward()
    assert largest.numel <= s.numel()
    assert s.numel() < 2 * max(c * c, side**4), "the other side would be seen"


# --- what a distance of distributions is ---


@both_sides
def test_only_what_is_liked_matters_not_by_which_channel_nor_how_much(
    c_s: int, c_t: int, grid: tuple[int, int]
) -> None:
    s, t = pair(c_s, c_t, grid)
    expected = nst(s, t)
    strength = torch.linspace(-2, 30, c_s).double().view(-1, 1, 1)
    torch.testing.assert_close(nst(strength * s.flip(1), t), expected)
    torch.testing.assert_close(nst(s, 0.01 * t.roll(1, 1)), expected)
    torch.testing.assert_close(nst(s.repeat(1, 3, 1, 1), t.repeat(1, 2, 1, 1)), expected)


@both_sides
def test_places_may_be_renamed_for_both_but_not_for_one(c_s: int, c_t: int, grid: tuple[int, int]) -> None:
    s, t = pair(c_s, c_t, grid)
    torch.testing.assert_close(nst(s.flip(2, 3), t.flip(2, 3)), nst(s, t))
    assert abs(nst(s.flip(2, 3), t) - nst(s, t)) > 1e-4


@both_sides
def test_never_negative_and_zero_for_the_same_distribution(c_s: int, c_t: int, grid: tuple[int, int]) -> None:
    t = pair(c_s, c_t, grid)[1]
    for s in (t, t.repeat(1, 2, 1, 1), 5 * t[:, torch.randperm(c_t)]):
        assert nst(s, t).abs() < 1e-15
        assert slope(nst, s, t).abs().max() < 1e-15
    for seed in range(20):
        assert nst(t + 0.01 * maps(*t.shape, seed=seed), t) > 0


@both_sides
def test_gradient_does_not_change_a_channels_strength(c_s: int, c_t: int, grid: tuple[int, int]) -> None:
    s, t = pair(c_s, c_t, grid)
    grad = slope(nst, s, t)
    assert grad.norm() > 1e-3
    assert (grad * s).sum((2, 3)).abs().max() < 1e-15


# --- numbers ---


def test_a_dead_channel_counts_and_gets_no_gradient() -> None:
    s = torch.ones(1, 2, 2, 2)
    s[0, 1] = 0
    assert nst(s, s[:, :1]).item() == pytest.approx(1 / 4 + 1 - 2 / 2)
    assert not slope(nst, s, s[:, :1])[0, 1].any()


@both_sides
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dead_flat_and_equal_channels_are_finite(
    c_s: int, c_t: int, grid: tuple[int, int], dtype: torch.dtype
) -> None:
    s, t = pair(c_s, c_t, grid, dtype)
    s[0], t[1], s[2, 0], t[2, 1], s[2, 1], s[2, 2] = 0, 0, 0, 0, 3, 3
    assert nst(s, t).isfinite()
    grad = slope(nst, s, t)
    assert grad.isfinite().all() and grad[2].any()
    assert not grad[0].any() and not grad[2, 0].any()
    assert nst(torch.zeros_like(s), torch.zeros_like(t)) == 0


@both_sides
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_inside_autocast_too(
    c_s: int, c_t: int, grid: tuple[int, int], dtype: torch.dtype
) -> None:
    s, t = pair(c_s, c_t, grid, dtype)
    exact = nst(s.float(), t.float())
    assert exact.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert nst(s, t) == exact
        assert nst(s.float(), t.float()) == exact
    assert slope(nst, s, t).dtype == dtype


def test_samples_are_unit_vectors_over_positions() -> None:
    u = selectivity(maps(3, 4, 2, 5))
    assert u.shape == (3, 4, 10)
    torch.testing.assert_close(u.square().sum(2), torch.ones(3, 4).double())


# --- the method ---


def halved(x: Tensor) -> Tensor:
    """The mean of every 2 x 2 cells."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def test_looks_at_the_last_map_or_adds_up_its_taps() -> None:
    s = {"stage1": maps(3, 2, 8, 8), "stage3": maps(3, 6, 2, 2, seed=2).abs()}
    t = {"stage1": maps(3, 3, 4, 4, seed=3), "stage3": maps(3, 7, 4, 4, seed=5)}
    here, there, batch = Seen(None, s), Seen(None, t), Batch(s["stage1"])
    first, last = slow_nst(halved(s["stage1"]), t["stage1"]), slow_nst(s["stage3"], halved(t["stage3"]))
    for method, expected in ((NST(), last), (NST(["stage1", "stage3"]), first + last)):
        method.build(here, there, batch)
        assert method.loss(here, there, batch).item() == pytest.approx(expected, rel=1e-12)


def test_tokens_are_the_map_that_they_make() -> None:
    s, t = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    tokens = Seen(None, {"stage3": torch.cat([maps(2, 1, 3, seed=2), s.flatten(2).mT], 1)})
    there, batch = Seen(None, {"stage3": t}), Batch(s)
    for here, other in ((tokens, there), (there, tokens)):
        NST().build(here, other, batch)
        assert NST().loss(here, other, batch).item() == pytest.approx(slow_nst(s, t), rel=1e-12)


def test_tokens_of_no_grid_are_refused_with_both_shapes() -> None:
    s, t = Seen(None, {"stage3": maps(2, 18, 3)}), Seen(None, {"stage3": maps(2, 3, 4, 4)})
    with pytest.raises(Refused, match=r"'nst'.*'stage3'.*\(2, 18, 3\).*\(2, 3, 4, 4\)"):
        NST().build(s, t, Batch(s.at["stage3"]))


class Net(nn.Module):
    TAPS = {"stage3": "body.3"}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


def test_a_students_neurons_come_to_like_what_the_teachers_like() -> None:
    torch.manual_seed(0)
    student, teacher, x = Net(4), Net(8), torch.randn(8, 1, 6, 6)
    distiller = Distiller(student, teacher, Term(NST(), weight=50), example=(x, None), task=None)
    assert [name for name, _ in distiller.methods.named_parameters()] == []
    adam = torch.optim.Adam(distiller.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        adam.zero_grad()
        loss = distiller(x)["nst"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())
