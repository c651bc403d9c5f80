"""AT against slow loops written from the paper's equation, and what an attention must not depend on."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.knowledge.feature.at import AT, at, attention

all_powers = pytest.mark.parametrize("power", [1, 2, 3, 4])


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_attention(x: Tensor, power: float) -> list[list[float]]:
    """For each row the energy of its positions, one channel at a time, divided by its length."""
    rows = []
    for row in x:
        energy = [
            sum(abs(float(row[c, i, j])) ** power for c in range(x.shape[1]))
            for i in range(x.shape[2])
            for j in range(x.shape[3])
        ]
        rows.append([e / math.hypot(*energy) for e in energy])
    return rows


def slow_at(s: Tensor, t: Tensor, power: float = 2) -> float:
    here, there = slow_attention(s, power), slow_attention(t, power)
    gaps = [(a - b) ** 2 for p, q in zip(here, there, strict=True) for a, b in zip(p, q, strict=True)]
    return sum(gaps) / len(gaps)


def halved(x: Tensor) -> Tensor:
    """The mean of every 2 x 2 cells."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def slope(s: Tensor, t: Tensor, power: float = 2) -> Tensor:
    s = s.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(at(s, t, power), s)
    return grad


# --- the equation ---


@all_powers
def test_equals_the_loop(power: int) -> None:
    s, t = maps(3, 4, 3, 5), maps(3, 6, 3, 5, seed=1)
    torch.testing.assert_close(attention(s, power), torch.tensor(slow_attention(s, power)).double())
    assert at(s, t, power).item() == pytest.approx(slow_at(s, t, power), rel=1e-12)


def test_the_paper_squares() -> None:
    s, t = maps(3, 4, 3, 5), maps(3, 6, 3, 5, seed=1)
    assert at(s, t) == at(s, t, 2)
    assert abs(at(s, t) - at(s, t, 1)) > 1e-4
    assert AT().power == 2


@all_powers
def test_gradcheck(power: int) -> None:
    s, t = maps(2, 3, 2, 3).requires_grad_(), maps(2, 2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: at(s, t, power), (s, t))


def test_looking_elsewhere_is_the_worst_and_costs_2_over_n() -> None:
    """So a weight of 1000 is no large weight."""
    s, t = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)
    s[:, 1, 0, 0], t[:, :, 3, 2] = 0.3, 7.0
    assert at(s, t).item() == pytest.approx(2 / 16)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    s, t = maps(5, 3, 4, 4), maps(5, 4, 4, 4, seed=1) * torch.arange(1.0, 6).view(5, 1, 1, 1)
    single = torch.stack([at(s[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(at(s, t), single.mean())
    assert single.std() > 0.1 * single.mean(), "rows alike would hide a wrong mean"


# --- what an attention is ---


@all_powers
def test_only_where_matters_not_which_channel_nor_how_strong_nor_the_sign(power: int) -> None:
    s, t = maps(3, 4, 3, 5), maps(3, 6, 3, 5, seed=1)
    expected = at(s, t, power)
    strength = torch.tensor([0.01, 1.0, 30.0]).double().view(3, 1, 1, 1)
    torch.testing.assert_close(at(-strength * s[:, [2, 0, 3, 1]], t, power), expected)
    torch.testing.assert_close(at(s.repeat(1, 3, 1, 1), strength * t.abs(), power), expected)


@all_powers
@pytest.mark.parametrize("strength", [1e-6, 1e6])
def test_faint_and_strong_maps_are_seen_alike(power: int, strength: float) -> None:
    """In float32, where 1e-24 is less than a norm's usual epsilon."""
    s, t = maps(3, 4, 3, 5, dtype=torch.float32), maps(3, 6, 3, 5, seed=1, dtype=torch.float32)
    torch.testing.assert_close(at(strength * s, t, power), at(s, t, power))
    torch.testing.assert_close(strength * slope(strength * s, t, power), slope(s, t, power))


@all_powers
def test_gradient_does_not_change_a_rows_strength(power: int) -> None:
    s, t = maps(3, 4, 3, 5), maps(3, 6, 3, 5, seed=1)
    grad = slope(s, t, power)
    assert grad.norm() > 1e-3
    assert (grad * s).sum((1, 2, 3)).abs().max() < 1e-14


def test_zero_for_a_teacher_turned_within_its_channels() -> None:
    """A rotation at each position keeps energies of power 2, and no others."""
    t = maps(3, 4, 3, 5)
    turn = torch.linalg.qr(maps(7, 7, seed=2)).Q[:, :4]
    s = torch.einsum("dc,bchw->bdhw", 3 * turn, t)
    assert at(s, t) < 1e-28
    assert at(s, t, 4) > 1e-4


# --- numbers ---


@all_powers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dead_and_flat_maps_are_finite(power: int, dtype: torch.dtype) -> None:
    """Rows: dead student, dead teacher, both, a dead channel, flat maps."""
    s, t = maps(6, 3, 4, 4, dtype=dtype), maps(6, 5, 4, 4, seed=1, dtype=dtype)
    s[[0, 2]], t[[1, 2]], s[3, 1], s[4], t[4] = 0, 0, 0, 3, 0.5
    assert at(s, t, power).isfinite()
    grad = slope(s, t, power)
    assert grad.isfinite().all() and grad[5].any()
    assert not grad[[0, 2]].any(), "a dead map has no direction in which to wake"
    assert at(s[2:3], t[2:3], power) == 0
    assert at(s[4:5], t[4:5], power) < 1e-12, "flat maps look everywhere alike"
    assert at(s[:1], t[:1], power).item() == pytest.approx(1 / 16), "a dead map looks nowhere"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    s, t = maps(3, 4, 3, 5, dtype=dtype), maps(3, 6, 3, 5, seed=1, dtype=dtype)
    assert at(s, t).dtype == torch.float32
    assert at(s, t) == at(s.float(), t.float())
    grad = slope(s, t)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, slope(s.float(), t.float()).to(dtype))


# --- the method ---


def test_adds_up_its_taps_and_averages_the_larger_grid() -> None:
    s = {"stage1": maps(3, 2, 8, 8), "stage2": maps(3, 4, 4, 4, seed=1), "stage3": maps(3, 6, 2, 2, seed=2)}
    t = {"stage1": maps(3, 3, 4, 4, seed=3), "stage2": maps(3, 5, 4, 4, seed=4)}
    t["stage3"] = maps(3, 7, 4, 4, seed=5)
    here, there, batch = Seen(None, s), Seen(None, t), Batch(s["stage1"])
    each = [
        slow_at(halved(s["stage1"]), t["stage1"]),
        slow_at(s["stage2"], t["stage2"]),
        slow_at(s["stage3"], halved(t["stage3"])),
    ]
    for method, expected in ((AT(), sum(each)), (AT(taps=["stage3"]), each[2])):
        method.build(here, there, batch)
        assert method.loss(here, there, batch).item() == pytest.approx(expected, rel=1e-12)
    cubed = slow_at(s["stage2"], t["stage2"], 3)
    assert AT(3, ["stage2"]).loss(here, there, batch).item() == pytest.approx(cubed, rel=1e-12)


def test_tokens_are_the_map_that_they_make() -> None:
    s, t = maps(2, 3, 4, 4), maps(2, 5, 4, 4, seed=1)
    tokens = Seen(None, {"stage2": torch.cat([maps(2, 1, 3, seed=2), s.flatten(2).mT], 1)})
    there, batch, method = Seen(None, {"stage2": t}), Batch(s), AT(taps=["stage2"])
    for here, other in ((tokens, there), (there, tokens)):
        method.build(here, other, batch)
        assert method.loss(here, other, batch).item() == pytest.approx(slow_at(s, t), rel=1e-12)


def test_tokens_of_no_grid_are_refused_with_both_shapes() -> None:
    s, t = Seen(None, {"stage2": maps(2, 3, 4, 4)}), Seen(None, {"stage2": maps(2, 18, 3)})
    with pytest.raises(Refused, match=r"'at'.*'stage2'.*\(2, 3, 4, 4\).*\(2, 18, 3\)"):
        AT(taps=("stage2",)).build(s, t, Batch(s.at["stage2"]))


@pytest.mark.parametrize("power", [0.5, 0.0, -2.0, math.inf, math.nan])
def test_a_power_that_is_none_is_refused(power: float) -> None:
    with pytest.raises(Refused, match=r"power of 'at' is .*at least 1; try 2"):
        AT(power)


class Net(nn.Module):
    TAPS = {"stage1": "body.1", "stage2": "body.3", "stage3": "body.5"}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((1, width), (width, width), (width, width)):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.Tanh()]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


def test_a_student_comes_to_look_where_its_teacher_looks() -> None:
    torch.manual_seed(0)
    student, teacher, x = Net(3), Net(6), torch.randn(8, 1, 6, 6)
    distiller = Distiller(student, teacher, Term(AT(), weight=1000), example=(x, None), task=None)
    assert [name for name, _ in distiller.methods.named_parameters()] == []
    adam = torch.optim.Adam(distiller.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        adam.zero_grad()
        loss = distiller(x)["at"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())
