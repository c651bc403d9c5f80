"""FitNet against slow loops written from the paper's equation, and what the paper says of its first stage."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature.fitnet import FitNet, hint


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(x: Tensor, tap: str = "stage2") -> Seen:
    return Seen(None, {tap: x})


def built(s: Tensor, t: Tensor, **knobs: str) -> FitNet:
    torch.manual_seed(0)
    method = FitNet(**knobs)
    tap = method.looks()[0]
    method.build(seen(s, tap), seen(t, tap), Batch(s))
    return method.double()


def slow_hint(s: Tensor, t: Tensor) -> float:
    """½ (r(s) − t)², averaged one element at a time."""
    total, count = 0.0, 0
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True):
        total, count = total + 0.5 * (a - b) ** 2, count + 1
    return total / count


def slow_projection(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution: at each position, the same matrix on the channels."""
    out = torch.zeros(len(x), len(weight), *x.shape[2:], dtype=x.dtype)
    for b in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                out[b, :, i, j] = weight[:, :, 0, 0] @ x[b, :, i, j] + bias
    return out


def slow_resize(x: Tensor, h: int, w: int) -> Tensor:
    """Bilinear: pixels are squares, a new one's centre is looked up among the four old centres around it."""

    def around(i: int, new: int, old: int) -> tuple[int, int, float]:
        centre = min(max((i + 0.5) * old / new - 0.5, 0.0), old - 1)
        low = math.floor(centre)
        return low, min(low + 1, old - 1), centre - low

    out = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    for i in range(h):
        top, bottom, down = around(i, h, x.shape[2])
        for j in range(w):
            left, right, across = around(j, w, x.shape[3])
            above = (1 - across) * x[..., top, left] + across * x[..., top, right]
            below = (1 - across) * x[..., bottom, left] + across * x[..., bottom, right]
            out[..., i, j] = (1 - down) * above + down * below
    return out


# --- the equation ---


def test_hint_equals_the_loop() -> None:
    s, t = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    assert hint(s, t).item() == pytest.approx(slow_hint(s, t), rel=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (7, 6), (3, 2)], ids=["same", "finer", "coarser"])
@pytest.mark.parametrize("channels", [2, 5])
def test_loss_equals_the_loop(grid: tuple[int, int], channels: int) -> None:
    s, t = maps(3, 3, 4, 4), maps(3, channels, *grid, seed=1)
    method = built(s, t)
    projected = slow_projection(s, method.project.weight.detach(), method.project.bias.detach())
    loss = method.loss(seen(s), seen(t), Batch(s)).item()
    assert loss == pytest.approx(slow_hint(slow_resize(projected, *grid), t), rel=1e-10)


def test_tokens_are_the_map_that_they_make() -> None:
    s, t = maps(3, 3, 4, 4), maps(3, 5, 2, 2, seed=1)
    tokens_s = torch.cat([maps(3, 1, 3, seed=2), s.flatten(2).mT], 1)
    expected = built(s, t).loss(seen(s), seen(t), Batch(s))
    for here, there in ((tokens_s, t), (s, t.flatten(2).mT), (tokens_s, t.flatten(2).mT)):
        method = built(here, there)
        torch.testing.assert_close(method.loss(seen(here), seen(there), Batch(s)), expected)


def test_gradcheck() -> None:
    s, t = maps(2, 2, 3, 2).requires_grad_(), maps(2, 2, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(hint, (s, t))


def test_the_weight_does_not_grow_with_the_layer() -> None:
    s, t = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    larger_s, larger_t = (x.repeat(1, 2, 2, 3) for x in (s, t))
    torch.testing.assert_close(hint(larger_s, larger_t), hint(s, t))


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    s, t = maps(5, 3, 4, 4), maps(5, 4, 6, 6, seed=1) * torch.arange(1.0, 6).view(5, 1, 1, 1)
    method = built(s, t)
    rows = [method.loss(seen(s[i : i + 1]), seen(t[i : i + 1]), Batch(s[i : i + 1])) for i in range(5)]
    single = torch.stack(rows)
    torch.testing.assert_close(method.loss(seen(s), seen(t), Batch(s)), single.mean())
    assert single.std() > 0.1 * single.mean(), "rows alike would hide a wrong mean"


def test_zero_when_the_teacher_is_a_projection_of_the_student() -> None:
    """The student need not copy the hint, only hold it: here a wider teacher says nothing new."""
    s, lift = maps(3, 4, 5, 5), maps(6, 4, seed=1)
    t = torch.einsum("dc,bchw->bdhw", lift, s)
    method = built(s, t)
    assert method.loss(seen(s), seen(t), Batch(s)) > 0.1
    with torch.no_grad():
        method.project.weight.copy_(lift[:, :, None, None])
        method.project.bias.zero_()
    assert method.loss(seen(s), seen(t), Batch(s)) < 1e-28


def test_the_same_map_is_no_match_until_the_projector_says_so() -> None:
    """Why the card does not promise 0 at a match."""
    s = maps(3, 4, 5, 5)
    method = built(s, s)
    assert not method.card.zero_at_match
    assert method.loss(seen(s), seen(s), Batch(s)) > 0.1
    with torch.no_grad():
        nn.init.dirac_(method.project.weight)
        method.project.bias.zero_()
    assert method.loss(seen(s), seen(s), Batch(s)) == 0


def test_resizing_leaves_a_flat_map_flat() -> None:
    """So an even map can match its teacher's on any grid; zeros beyond the border would not allow it."""
    s = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    for grid in [(9, 7), (2, 3)]:
        t = torch.full((2, 3, *grid), 2.0, dtype=torch.float64)
        method = built(s, t)
        with torch.no_grad():
            nn.init.dirac_(method.project.weight)
            method.project.bias.fill_(1.0)
        assert method.loss(seen(s), seen(t), Batch(s)) < 1e-28


@pytest.mark.parametrize("grid", [4, 8, 2])
def test_finite_in_bfloat16(grid: int) -> None:
    s, t = maps(2, 3, 4, 4).bfloat16().requires_grad_(), maps(2, 5, grid, grid, seed=1).bfloat16()
    method = built(s, t).bfloat16()
    loss = method.loss(seen(s), seen(t), Batch(s))
    loss.backward()
    exact = method.double().loss(seen(s.detach().double()), seen(t.double()), Batch(s))
    torch.testing.assert_close(loss.double(), exact, rtol=0.02, atol=0)
    assert s.grad.isfinite().all() and s.grad.any()


def test_two_vectors_are_compared_through_a_linear_projector() -> None:
    s, t = torch.randn(5, 3).double(), torch.randn(5, 7).double()
    method = built(s, t)
    project = method.project.weight[:, :, 0, 0], method.project.bias
    expected = 0.5 * (s @ project[0].T + project[1] - t).square().mean()
    torch.testing.assert_close(method.loss(seen(s), seen(t), Batch(s)), expected)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("s", "t"),
    [((2, 8, 4, 4), (2, 18, 16)), ((2, 18, 16), (2, 8, 4, 4)), ((2, 8), (2, 8, 4, 4))],
)
def test_what_is_no_map_is_refused_with_both_shapes(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    with pytest.raises(Refused) as caught:
        built(torch.zeros(s), torch.zeros(t), tap="block3")
    parts = "'fitnet'", "'block3'", f"{s} in the student", f"{t} in the teacher", "tap a layer that shows"
    for part in parts:
        assert part in str(caught.value)


# --- through the Distiller ---


class Plain(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stage1 = nn.Conv2d(1, width, 3, padding=1)
        self.stage2 = nn.Conv2d(width, width, 3, padding=1, stride=stride)
        self.stage3 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(x).relu())
        return self.head(self.stage3(x.relu()).mean((2, 3)))


def lesson(task: bool) -> tuple[Distiller, Plain, Plain, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    student, teacher = Plain(3, stride=2), Plain(6)
    example = torch.randn(8, 1, 6, 6), torch.arange(8) % 4
    options = {} if task else {"task": None}
    return Distiller(student, teacher, [FitNet()], example=example, **options), student, teacher, example


def test_stage_one_trains_the_student_up_to_its_guided_layer_and_the_projector() -> None:
    distiller, student, teacher, example = lesson(task=False)
    distiller(*example)["loss"].backward()
    learns = {name for name, p in distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {
        f"{module}.{leaf}"
        for module in ("student.stage1", "student.stage2", "methods.fitnet.project")
        for leaf in ("weight", "bias")
    }
    assert all(p.grad is None for p in teacher.parameters())
    before = [p.detach().clone() for p in student.head.parameters()]
    optimiser = torch.optim.Adam(distiller.parameters(), lr=0.02)
    first = distiller(*example)["loss"].item()
    for _ in range(60):
        optimiser.zero_grad()
        distiller(*example)["loss"].backward()
        optimiser.step()
    assert distiller(*example)["loss"].item() < 0.5 * first
    assert all(torch.equal(a, b) for a, b in zip(before, student.head.parameters(), strict=True))


def test_beside_the_task_it_adds_its_loss_and_nothing_to_the_student() -> None:
    distiller, student, teacher, (x, y) = lesson(task=True)
    losses = distiller(x, y)
    project = distiller.methods["fitnet"].project
    s, t = student.stage2(student.stage1(x).relu()), teacher.stage2(teacher.stage1(x).relu())
    projected = slow_projection(s.detach(), project.weight.detach(), project.bias.detach())
    assert losses["fitnet"].item() == pytest.approx(slow_hint(slow_resize(projected, 6, 6), t), rel=1e-4)
    torch.testing.assert_close(losses["loss"], losses["task"] + losses["fitnet"])
    assert student.state_dict().keys() == Plain(3).state_dict().keys()


def test_hint_and_guided_layer_may_have_other_names() -> None:
    torch.manual_seed(0)
    student, teacher, x = Plain(3), Plain(6), torch.randn(4, 1, 6, 6)
    distiller = Distiller(
        student,
        Frozen(teacher, taps={"hint": "stage3"}),
        [FitNet(tap="hint")],
        example=(x, None),
        task=None,
        taps={"hint": "stage1"},
    )
    distiller(x)["loss"].backward()
    assert student.stage1.weight.grad.any() and student.stage2.weight.grad is None
