"""AFD against slow loops written from its equation, and what its attention must and must not depend on."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.knowledge.feature.afd import AFD, afd
from limbeck.knowledge.feature.at import at
from limbeck.models.cnn import CNN

B = 4
BATCH = Batch(torch.zeros(B, 1))


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(**at: Tensor) -> Seen:
    return Seen(None, at)


S = seen(a=maps(B, 2, 6, 6), b=maps(B, 4, 3, 3, seed=1))
T = seen(x=maps(B, 3, 4, 4, seed=3), y=maps(B, 5, 2, 2, seed=4).relu(), z=maps(B, 2, 4, 4, seed=5))


def made(s: Seen = S, t: Seen = T, width: int = 5) -> AFD:
    torch.manual_seed(0)
    method = AFD(width, tuple(s.at), tuple(t.at))
    method.build(s, t, BATCH)
    for p in method.parameters():  # scales and biases that are neither 1 nor 0
        if p.requires_grad:
            nn.init.normal_(p)
    return method.double()


# --- the equation, one number at a time ---


def slow_norm(rows: list[Tensor], norm: nn.BatchNorm1d) -> list[Tensor]:
    mean = sum(rows) / len(rows)
    variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias for row in rows]


def slow_mean(x: Tensor) -> Tensor:
    return torch.stack([channel.sum() / channel.numel() for channel in x])


def slow_attention(x: Tensor, h: int, w: int) -> Tensor:
    """A row's energy, averaged or repeated to a grid that divides or is divided by its own."""
    e = (x**2).sum(0)
    rows = [
        [
            e[
                i * e.shape[0] // h : math.ceil((i + 1) * e.shape[0] / h),
                j * e.shape[1] // w : math.ceil((j + 1) * e.shape[1] / w),
            ].mean()
            for j in range(w)
        ]
        for i in range(h)
    ]
    flat = torch.stack([v for row in rows for v in row])
    return flat / flat.square().sum().sqrt()


def slow_alpha(method: AFD, s: list[Tensor], t: list[Tensor]) -> Tensor:
    """b t s."""
    queries = []
    for place, x in enumerate(t):
        linear, norm = method.teacher.embed[place]
        queries.append(slow_norm([linear.weight @ slow_mean(row) for row in x], norm))
    keys = []
    for place, x in enumerate(s):
        linear, norm = method.student.embed[place]
        keys.append(slow_norm([linear.weight @ slow_mean(row) for row in x], norm))
    _, linear, norm = method.answer
    order = [(b, i) for b in range(len(s[0])) for i in range(len(s))]
    each = slow_norm([linear.weight @ keys[i][b].clamp(min=0) for b, i in order], norm)
    answers = dict(zip(order, each, strict=True))
    d, alpha = method.width, torch.zeros(len(s[0]), len(t), len(s)).double()
    for b in range(len(s[0])):
        for j in range(len(t)):
            logits = []
            for i in range(len(s)):
                product = queries[j][b] @ answers[b, i][j * d : (j + 1) * d]
                logits.append((product + method.teacher.position[j] @ method.student.position[i]) / d**0.5)
            total = sum(logit.exp() for logit in logits)
            for i, logit in enumerate(logits):
                alpha[b, j, i] = logit.exp() / total
    return alpha


def test_it_is_the_equation() -> None:
    method, s, t = made(), list(S.at.values()), list(T.at.values())
    alpha = slow_alpha(method, s, t)
    torch.testing.assert_close(method.attend(s, t), alpha)
    expected = 0.0
    for j, there in enumerate(t):
        h, w = there.shape[2:]
        for b in range(B):
            for i, here in enumerate(s):
                gap = slow_attention(here[b], h, w) - slow_attention(there[b], h, w)
                expected = expected + alpha[b, j, i] * (gap**2).sum() / (h * w) / B
    assert method.loss(S, T, BATCH).item() == pytest.approx(expected.item(), rel=1e-12)
    assert alpha.std() > 0.05, "even weights would hide a wrong attention"


def test_one_map_of_each_is_plain_attention_transfer() -> None:
    s, t = seen(a=maps(B, 2, 4, 4)), seen(x=maps(B, 3, 4, 4, seed=3))
    method = made(s, t)
    assert torch.equal(method.attend([s.at["a"]], [t.at["x"]]), torch.ones(B, 1, 1).double())
    torch.testing.assert_close(method.loss(s, t, BATCH), at(s.at["a"], t.at["x"]))


def test_weights_are_over_students_and_a_fine_grid_counts_for_less() -> None:
    alpha = made().attend(list(S.at.values()), list(T.at.values()))
    torch.testing.assert_close(alpha.sum(2), torch.ones(B, 3).double())
    worst = torch.full((B, 3, 2), 2.0)
    bound = afd(alpha.float(), worst, torch.tensor([16.0, 4, 16]))
    torch.testing.assert_close(bound, torch.tensor(2 / 16 + 2 / 4 + 2 / 16))


def test_the_bias_that_does_not_learn_would_change_nothing() -> None:
    method, maps_ = made(), (list(S.at.values()), list(T.at.values()))
    alpha, bias = method.attend(*maps_), method.answer[2].bias
    assert not bias.requires_grad and not bias.any()
    nn.init.normal_(bias)
    torch.testing.assert_close(method.attend(*maps_), alpha)


def test_the_order_of_taps_does_not_matter() -> None:
    method, loss = made(), made().loss(S, T, BATCH)
    for s, t in ((("b", "a"), ("x", "y", "z")), (("a", "b"), ("z", "x", "y"))):
        other = AFD(method.width, s, t)
        other.build(S, T, BATCH)
        other = other.double()
        state = dict(other.state_dict())
        for name, value in method.state_dict().items():
            for mine, taps, theirs in (("student", s, ("a", "b")), ("teacher", t, ("x", "y", "z"))):
                if name.startswith(f"{mine}.embed."):
                    place, rest = name.removeprefix(f"{mine}.embed.").split(".", 1)
                    name = f"{mine}.embed.{taps.index(theirs[int(place)])}.{rest}"
                elif name == f"{mine}.position":
                    value = value[[theirs.index(tap) for tap in taps]]
            if name.startswith("answer.") and value.ndim:
                blocks = value.unflatten(0, (3, method.width))
                value = blocks[[("x", "y", "z").index(tap) for tap in t]].flatten(0, 1)
            state[name] = value
        state = {name: value for name, value in state.items() if not name.startswith("watch.")}
        other.load_state_dict(state, strict=False)
        torch.testing.assert_close(other.loss(S, T, BATCH), loss)


def test_strength_does_not_matter() -> None:
    """A map's own factor leaves by the attention's norm, and by BatchNorm but for its epsilon."""
    method = made()
    stronger = seen(a=100 * S.at["a"], b=S.at["b"]), seen(**T.at | {"y": 30 * T.at["y"]})
    for n, module in enumerate([*method.student.embed, *method.teacher.embed]):
        module[1].eps = 1e-12 * (1 + n)
    loss = method.loss(S, T, BATCH)
    torch.testing.assert_close(method.loss(*stronger, BATCH), loss)


def test_gradcheck() -> None:
    alpha, gap = maps(2, 3, 2).softmax(2).requires_grad_(), maps(2, 3, 2, seed=1).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, g: afd(a, g, torch.tensor([4.0, 9, 16])), (alpha, gap))


# --- in use ---


def pair() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = CNN(3, widths=(4, 6)), CNN(3, widths=(5, 7, 9), depth=2)
    return student, teacher, torch.randn(8, 1, 8, 8), torch.arange(8) % 3


def test_networks_of_unlike_depth_and_every_block() -> None:
    student, teacher, x, y = pair()
    method = AFD(16, ("stage1", "stage2"), ("stages.0.2", "stage1", "stages.1.2", "stage2", "stage3"))
    distiller = Distiller(student, teacher, Term(method, weight=200), example=(x, y))
    loss = distiller(x, y)["afd"]
    loss.backward()
    assert loss > 0 and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in method.parameters() if p.requires_grad)
    assert student.stages[0][0].weight.grad.any()
    figures = method.figures()
    assert set(figures) == {"entropy", "top_pair", "share.stage1", "share.stage2"}
    assert figures["share.stage1"] + figures["share.stage2"] == pytest.approx(1)
    assert 0 < figures["entropy"] <= math.log(2) and 1 / 10 <= figures["top_pair"] <= 1 / 5


def test_a_students_layers_come_to_look_like_the_teachers() -> None:
    student, teacher, x, _ = pair()
    taps = ("stage1", "stage2")
    distiller = Distiller(
        student, teacher, Term(AFD(16, taps, taps), weight=200), example=(x, None), task=None
    )
    adam = torch.optim.Adam(student.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        loss = distiller(x)["afd"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_one_row_is_enough_in_eval_and_refused_in_training() -> None:
    method = made()
    one = [Seen(None, {name: x[:1] for name, x in shown.at.items()}) for shown in (S, T)]
    with pytest.raises(Refused, match="'afd' normalises over the rows"):
        method.loss(*one, BATCH)
    with pytest.raises(Refused, match="'afd' normalises over the rows"):
        made(*one)
    assert torch.isfinite(method.eval().loss(*one, BATCH))


@pytest.mark.parametrize("knobs", [{"width": 0}, {"taps": ()}, {"teacher_taps": ()}])
def test_knobs_that_are_none_are_refused(knobs: dict) -> None:
    with pytest.raises(Refused, match="'afd' was given"):
        AFD(**knobs)
