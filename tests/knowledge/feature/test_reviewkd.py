"""ReviewKD against slow loops written from the paper's equations, and what the paper says of its parts."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature.reviewkd import ABF, ReviewKD, hcl
from limbeck.models.cnn import CNN

TAPS = "stage1", "stage2", "stage3", "pooled"
S = (3, 4, 6, 6), (3, 5, 4, 4), (3, 6, 2, 2), (3, 6)
T = (3, 3, 9, 9), (3, 5, 4, 4), (3, 7, 3, 2), (3, 8)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> Seen:
    return Seen(None, {TAPS[n]: maps(*shape, seed=seed + n) for n, shape in enumerate(shapes)})


def built(s: Seen, t: Seen, **knobs: object) -> ReviewKD:
    torch.manual_seed(0)
    method = ReviewKD(**{"taps": tuple(s.at), **knobs})
    method.build(s, t, Batch(torch.zeros(3, 1)))
    for parameter in method.parameters():
        if parameter.ndim == 1:  # BatchNorms that do more than nothing
            nn.init.normal_(parameter)
    return method.double()


BATCH = Batch(torch.zeros(3, 1))


# --- the paper's equations, one position at a time ---


def slow_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    weight, reach = conv.weight.detach(), conv.kernel_size[0] // 2
    b, _, h, w = x.shape
    out = torch.zeros(b, len(weight), h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            for di in range(-reach, reach + 1):
                for dj in range(-reach, reach + 1):
                    if 0 <= i + di < h and 0 <= j + dj < w:
                        out[:, :, i, j] += x[:, :, i + di, j + dj] @ weight[:, :, di + reach, dj + reach].T
    return out if conv.bias is None else out + conv.bias.detach()[:, None, None]


def slow_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        mean = x[:, c].mean()
        spread = math.sqrt((x[:, c] - mean).square().mean() + norm.eps)
        out[:, c] = (x[:, c] - mean) / spread * norm.weight[c].item() + norm.bias[c].item()
    return out


def slow_resize(x: Tensor, h: int, w: int) -> Tensor:
    out = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            out[:, :, i, j] = x[:, :, i * x.shape[2] // h, j * x.shape[3] // w]
    return out


def slow_hcl(s: Tensor, t: Tensor, levels: tuple[int, ...] = (4, 2, 1)) -> float:
    """Both maps are averaged, cell by cell, and compared."""
    h, w = s.shape[2:]
    sums, weights, weight = ((s - t) ** 2).mean().item(), 1.0, 1.0
    for level in levels:
        if level >= min(h, w):
            continue
        weight /= 2
        squares = []
        for i in range(level):
            for j in range(level):
                rows = slice(i * h // level, math.ceil((i + 1) * h / level))
                columns = slice(j * w // level, math.ceil((j + 1) * w / level))
                here, there = (x[:, :, rows, columns].mean((2, 3)) for x in (s, t))
                squares.append((here - there) ** 2)
        sums, weights = sums + weight * torch.stack(squares).mean().item(), weights + weight
    return sums / weights


def slow_review(method: ReviewKD, s: Seen, t: Seen) -> float:
    """From the last tap to the first; the attention looks at a concatenation of two maps of one grid."""
    above, total = None, 0.0
    for tap, review in zip(reversed(method.taps), method.reviews, strict=True):
        here, there = (x[..., None, None] if x.ndim == 2 else x for x in (s.at[tap], t.at[tap]))
        fused = slow_norm(slow_conv(here, review.own[0]), review.own[1])
        if above is not None:
            above = slow_resize(above, *fused.shape[2:])
            share = 1 / (1 + torch.exp(-slow_conv(torch.cat([fused, above], 1), review.attend)))
            fused = fused * share[:, 0:1] + above * share[:, 1:2]
        above = slow_resize(fused, *there.shape[2:])
        total += slow_hcl(slow_norm(slow_conv(above, review.give[0]), review.give[1]), there)
    return total


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (5, 9), (4, 4), (3, 3), (2, 2), (1, 1)])
def test_hcl_equals_the_loop(grid: tuple[int, int]) -> None:
    s, t = maps(2, 3, *grid) + 1, maps(2, 3, *grid, seed=1)
    assert hcl(s, t).item() == pytest.approx(slow_hcl(s, t), rel=1e-12)
    assert hcl(s, t, (3, 1)).item() == pytest.approx(slow_hcl(s, t, (3, 1)), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_loss_equals_the_loop(count: int) -> None:
    s, t = seen(S[-count:]), seen(T[-count:], seed=9)
    method = built(s, t)
    assert method.loss(s, t, BATCH).item() == pytest.approx(slow_review(method, s, t), rel=1e-10)


def test_the_same_grids_and_widths_equal_the_loop() -> None:
    s, t = seen(S), seen(S, seed=9)
    method = built(s, t)
    assert method.loss(s, t, BATCH).item() == pytest.approx(slow_review(method, s, t), rel=1e-10)


# --- the pyramid ---


@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (4, 4), (3, 3), (1, 1)])
def test_its_weights_sum_to_1(grid: tuple[int, int]) -> None:
    s = maps(2, 3, *grid)
    assert hcl(s, s + 3).item() == pytest.approx(9, rel=1e-12)
    assert hcl(s, s) == 0


def test_only_the_map_itself_sees_what_averages_out() -> None:
    """A checkerboard is 1 in the mean square and 0 in every cell: 1 / (1 + 1/2 + 1/4 + 1/8)."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert hcl(board.expand(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)).item() == pytest.approx(1 / 1.875)


def test_levels_below_the_map_are_halved_in_turn_and_those_above_it_left_out() -> None:
    """A half of the map at 1, the other at -1: every level but the last sees all of it."""
    for size, expected in [(8, 1.75 / 1.875), (4, 1.5 / 1.75), (2, 1 / 1.5)]:
        halves = torch.ones(2, 3, size, size)
        halves[..., size // 2 :] = -1
        assert hcl(halves, torch.zeros_like(halves)).item() == pytest.approx(expected)


def test_without_levels_it_is_the_mean_square() -> None:
    s, t = maps(2, 3, 8, 8), maps(2, 3, 8, 8, seed=1)
    torch.testing.assert_close(hcl(s, t, ()), nn.functional.mse_loss(s, t))


def test_the_method_has_the_levels_it_was_given() -> None:
    s, t = seen(S), seen(T, seed=9)
    losses = {levels: built(s, t, levels=levels).loss(s, t, BATCH).item() for levels in [(), (3,), (4, 2, 1)]}
    assert losses[4, 2, 1] == built(s, t).loss(s, t, BATCH).item()
    assert len(set(losses.values())) == 3


def test_gradcheck() -> None:
    s, t = maps(2, 2, 5, 6).requires_grad_(), maps(2, 2, 5, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(hcl, (s, t))


# --- the review ---


def test_a_stage_is_reviewed_with_the_stages_above_it_and_with_none_below() -> None:
    for asked in range(4):
        s, t = seen(S), seen(T, seed=9)
        method = built(s, t).eval()
        for place, review in enumerate(method.reviews):
            if place != asked:
                nn.init.zeros_(review.give[1].weight)  # its answer is its bias
        shown = [x.requires_grad_() for x in s.at.values()]
        grads = torch.autograd.grad(method.loss(s, t, BATCH), shown, allow_unused=True)
        reached = [tap for tap, grad in zip(TAPS, grads, strict=True) if grad is not None and grad.any()]
        assert reached == list(TAPS[3 - asked :])


@pytest.mark.parametrize(("bias", "expected"), [((50.0, -50.0), "own"), ((-50.0, 50.0), "above")])
def test_attention_chooses_between_a_stage_and_what_is_above_it(
    bias: tuple[float, float], expected: str
) -> None:
    review = ABF(4, 5, 3, fuses=True).double().eval()
    assert review.attend is not None
    nn.init.zeros_(review.attend.weight)
    review.attend.bias.data.copy_(torch.tensor(bias))
    x, above = maps(2, 4, 6, 6), maps(2, 5, 3, 3, seed=1)
    _, on = review(x, above, torch.Size((6, 6)))
    torch.testing.assert_close(on, {"own": review.own(x), "above": slow_resize(above, 6, 6)}[expected])


def test_the_way_between_stages_is_as_wide_as_the_deepest_tap_and_at_most_512() -> None:
    wide = (2, 700, 1, 1), (2, 600)
    for shapes, knobs, expected in [(S, {}, 6), (S, {"width": 2}, 2), (wide, {}, 512)]:
        s = seen(shapes)
        method = built(s, s, **knobs)
        assert {review.own[0].out_channels for review in method.reviews} == {expected}
        assert {review.give[0].in_channels for review in method.reviews} == {expected}


def test_convolutions_begin_as_in_the_official_code() -> None:
    """Uniform up to the root of 3 / fan-in, three times the variance that torch would give them."""
    s = Seen(None, {"stage1": torch.zeros(2, 32, 4, 4)})
    (review,) = built(s, s).reviews
    for conv, inputs in [(review.own[0], 32), (review.give[0], 32 * 9)]:
        bound = math.sqrt(3 / inputs)
        assert 0.95 * bound < conv.weight.abs().max() <= bound


def test_it_holds_no_two_maps_in_one() -> None:
    """The largest tensor is one map as wide as the way, or the student's own; never the two it mixes."""
    s, t = seen(((2, 8, 16, 16), (2, 8, 4, 4))), seen(((2, 4, 16, 16), (2, 4, 4, 4)), seed=9)
    method = built(s, t)
    shown = [x.requires_grad_() for x in s.at.values()]
    with Largest() as largest:
        torch.autograd.grad(method.loss(s, t, BATCH), shown)
    assert largest.numel == 2 * 8 * 16 * 16


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    s, t = seen(S), seen(T, seed=9)
    method = built(s, t).eval()  # BatchNorm aside
    rows = torch.stack([method.loss(row(s, i), row(t, i), BATCH) for i in range(3)])
    torch.testing.assert_close(method.loss(s, t, BATCH), rows.mean())
    assert rows.std() > 0.01 * rows.mean(), "rows alike would hide a wrong mean"


def row(x: Seen, i: int) -> Seen:
    return Seen(None, {tap: v[i : i + 1] for tap, v in x.at.items()})


# --- numbers ---


def test_finite_in_bfloat16_and_near_the_exact_loss() -> None:
    s, t = seen(S), seen(T, seed=9)
    method = built(s, t)
    half = [Seen(None, {tap: v.bfloat16() for tap, v in x.at.items()}) for x in (s, t)]
    exact = method.loss(*(Seen(None, {tap: v.double() for tap, v in x.at.items()}) for x in half), BATCH)
    shown = [x.requires_grad_() for x in half[0].at.values()]
    loss = method.bfloat16().loss(*half, BATCH)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, shown))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hcl_is_computed_in_float32(dtype: torch.dtype) -> None:
    s, t = maps(2, 3, 8, 8).to(dtype), maps(2, 3, 8, 8, seed=1)
    for there in (t.to(dtype), t.float()):  # a student under autocast, a teacher that is not
        exact = hcl(s.double(), there.double())
        torch.testing.assert_close(hcl(s, there).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_finite_for_constant_maps(flat: str) -> None:
    s, t = seen(S), seen(T, seed=9)
    for x in (s if flat == "student" else t).at.values():
        x.fill_(2.0)
    shown = [x.requires_grad_() for x in s.at.values()]
    loss = built(s, t).loss(s, t, BATCH)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, shown))


def test_tokens_are_the_map_that_they_make() -> None:
    s, t = seen(S), seen(T, seed=9)
    expected = built(s, t).loss(s, t, BATCH)
    tokens_s = Seen(None, s.at | {"stage2": torch.cat([maps(3, 1, 5), s.at["stage2"].flatten(2).mT], 1)})
    tokens_t = Seen(None, t.at | {"stage1": t.at["stage1"].flatten(2).mT})
    for here, there in ((tokens_s, t), (s, tokens_t), (tokens_s, tokens_t)):
        torch.testing.assert_close(built(here, there).loss(here, there, BATCH), expected)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("s", "t"), [((3, 18, 8), (3, 18, 8)), ((3, 8, 4, 4), (3, 18, 8)), ((3, 18, 8), (3, 8))]
)
def test_tokens_of_no_grid_are_refused_with_both_shapes(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    with pytest.raises(Refused) as caught:
        built(Seen(None, {"block3": torch.zeros(s)}), Seen(None, {"block3": torch.zeros(t)}))
    for part in ("'reviewkd'", "'block3'", f"{s} in the student", f"{t} in the teacher"):
        assert part in str(caught.value)


@pytest.mark.parametrize("knobs", [{"taps": ()}, {"width": 0}, {"levels": (4, 0)}])
def test_knobs_that_mean_nothing_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(Refused, match="expected at least one tap, a width of 1 or more and levels of 1"):
        ReviewKD(**knobs)


# --- through the Distiller ---


@pytest.fixture
def pair() -> tuple[CNN, CNN, Tensor]:
    torch.manual_seed(0)
    return CNN(4, widths=(4, 6, 8)), CNN(4, widths=(5, 7, 9)), torch.randn(8, 1, 8, 8)


def test_the_teacher_may_be_looked_at_before_its_relu(pair: tuple[CNN, CNN, Tensor]) -> None:
    """As in the official code; a table of the teacher's own does it."""
    student, teacher, x = pair
    before = {f"stage{n + 1}": f"stages.{n}.1" for n in range(3)}
    losses = {}
    for name, taps in [("behind", None), ("before", before)]:
        distiller = Distiller(student, Frozen(teacher, taps=taps), ReviewKD(), example=(x, None), task=None)
        losses[name] = distiller(x)["reviewkd"]
        t = distiller.see(Batch(x)).teachers[0].at
        assert all((t[f"stage{n}"] < 0).any() == (name == "before") for n in (1, 2, 3))
    assert losses["behind"] != losses["before"]


def test_a_student_learns_to_hold_what_its_teacher_holds(pair: tuple[CNN, CNN, Tensor]) -> None:
    student, teacher, x = pair
    distiller = Distiller(student, teacher, ReviewKD(), example=(x, None), task=None)
    first, adam = distiller(x)["loss"].item(), torch.optim.Adam(distiller.parameters(), lr=0.01)
    for _ in range(40):
        adam.zero_grad()
        distiller(x)["loss"].backward()
        adam.step()
    assert distiller(x)["loss"].item() < 0.3 * first
    assert all(p.grad is None for p in teacher.parameters())
    assert student.state_dict().keys() == CNN(4, widths=(4, 6, 8)).state_dict().keys()


def test_the_warm_up_is_a_ramp() -> None:
    """mdistiller counts epochs from 1, the official code from 0."""
    for epoch in range(30):
        assert Ramp(20)(Lesson(epoch=epoch)) == pytest.approx(min((epoch + 1) / 20, 1))
        assert Ramp(20, after=1)(Lesson(epoch=epoch)) == pytest.approx(min(epoch / 20, 1))
