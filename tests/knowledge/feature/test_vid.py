"""VID against slow loops written from the paper's equation, and what its variances come to mean."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.knowledge.feature.vid import EPSILON, VID, Gaussian, vid

VARIANCE = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slow_vid(mean: Tensor, t: Tensor, variance: Tensor) -> float:
    """½ ((t − μ)² / σ² + log σ²), averaged one element at a time."""
    total = 0.0
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, t.shape)).tolist():
        v = float(variance[c])
        total += 0.5 * (float(t[b, c, i, j] - mean[b, c, i, j]) ** 2 / v + math.log(v))
    return total / t.numel()


def slow_mean(x: Tensor, gaussian: Gaussian) -> Tensor:
    """At each position three matrices on the channels, with a ReLU after the first two."""
    first, second, third = (m.weight.detach()[:, :, 0, 0] for m in gaussian.mean if isinstance(m, nn.Conv2d))
    out = torch.empty(len(x), len(third), *x.shape[2:], dtype=x.dtype)
    for b in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                out[b, :, i, j] = third @ (second @ (first @ x[b, :, i, j]).relu()).relu()
    return out


def halved(x: Tensor) -> Tensor:
    """The mean of every 2 x 2 cells."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def variance(gaussian: nn.Module) -> Tensor:
    weight = gaussian.mean[0].weight
    return gaussian(torch.zeros(1, weight.shape[1], 1, 1, dtype=weight.dtype))[1].detach()


def built(s: dict[str, Tensor], t: dict[str, Tensor], **knobs: float) -> VID:
    torch.manual_seed(0)
    method = VID(taps=list(s), **knobs)
    method.build(Seen(None, s), Seen(None, t), Batch(next(iter(s.values()))))
    return method.double()


# --- the equation ---


def test_equals_the_loop() -> None:
    mean, t = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    assert vid(mean, t, VARIANCE).item() == pytest.approx(slow_vid(mean, t, VARIANCE), rel=1e-12)


def test_gradcheck() -> None:
    inputs = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1), VARIANCE.clone()
    assert torch.autograd.gradcheck(vid, [x.requires_grad_() for x in inputs])


def test_at_variance_1_it_is_half_the_squared_gap() -> None:
    mean, t = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    torch.testing.assert_close(vid(mean, t, torch.ones(3).double()), 0.5 * (mean - t).square().mean())


def test_it_is_a_likelihood() -> None:
    mean, t = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1)
    gaussian = torch.distributions.Normal(mean, VARIANCE.sqrt().view(3, 1, 1))
    expected = -gaussian.log_prob(t).mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(vid(mean, t, VARIANCE), expected)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    s, t = maps(5, 2, 4, 4), maps(5, 3, 4, 4, seed=1) * torch.arange(1.0, 6).view(5, 1, 1, 1)
    method = built({"a": s}, {"a": t})
    single = torch.stack(
        [method.loss(Seen(None, {"a": s[[i]]}), Seen(None, {"a": t[[i]]}), Batch(s)) for i in range(5)]
    )
    torch.testing.assert_close(
        method.loss(Seen(None, {"a": s}), Seen(None, {"a": t}), Batch(s)), single.mean()
    )
    assert single.std() > 0.1 * single.mean(), "rows alike would hide a wrong mean"


# --- variances ---


def test_lowest_where_a_variance_is_its_channels_mean_squared_gap() -> None:
    mean, t = maps(2, 3, 4, 5), maps(2, 3, 4, 5, seed=1) * torch.tensor([0.1, 1, 4]).double().view(3, 1, 1)
    gap = (mean - t).square().mean((0, 2, 3)).requires_grad_()
    lowest = vid(mean, t, gap)
    (grad,) = torch.autograd.grad(lowest, gap)
    assert grad.abs().max() < 1e-15
    torch.testing.assert_close(lowest, 0.5 * (1 + gap.log().mean()))
    for c in range(3):
        for factor in (0.8, 1.25):
            other = gap.detach().clone()
            other[c] *= factor
            assert vid(mean, t, other) > lowest + 1e-3


def test_may_be_negative_and_no_lower_than_half_the_log_of_epsilon() -> None:
    t = maps(2, 3, 4, 5)
    gaussian = Gaussian(2, 3, 5.0)
    with torch.no_grad():
        gaussian.alpha.fill_(-1e4)
    assert vid(t, t, variance(gaussian).double()).item() == pytest.approx(0.5 * math.log(EPSILON), rel=1e-6)
    assert not VID.card.zero_at_match


@pytest.mark.parametrize("first", [5.0, 2e-5, 0.3, 1, 1000.0])
def test_variances_begin_as_asked(first: float) -> None:
    found = variance(Gaussian(2, 3, first))
    torch.testing.assert_close(found, torch.full((3,), float(first)), rtol=1e-4, atol=0)


def test_variances_begin_at_5() -> None:
    """RepDistiller's."""
    method = built({"a": maps(2, 2, 3, 3)}, {"a": maps(2, 4, 3, 3)})
    torch.testing.assert_close(
        variance(method.gaussians[0]), torch.full((4,), 5.0).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("alpha", "expected"), [(1000.0, 1000.0), (-1000.0, EPSILON), (0.0, math.log(2))])
def test_variances_are_positive_and_finite_with_their_gradient(alpha: float, expected: float) -> None:
    """log(1 + e^α) as it stands overflows at 89."""
    gaussian = Gaussian(2, 3, 5.0)
    with torch.no_grad():
        gaussian.alpha.fill_(alpha)
    mean, found = gaussian(maps(2, 2, 2, 2, dtype=torch.float32))
    assert found.tolist() == pytest.approx([expected] * 3, rel=1e-4)
    vid(mean, torch.ones(2, 3, 2, 2), found).backward()
    assert gaussian.alpha.grad.isfinite().all()


@pytest.mark.parametrize("first", [0.0, -1.0, EPSILON, math.inf, math.nan])
def test_a_variance_that_is_none_is_refused(first: float) -> None:
    with pytest.raises(Refused, match=r"first variance of 'vid' is .*try 5"):
        VID(first)


# --- the method ---


def test_the_mean_is_three_convolutions_as_wide_as_the_teacher() -> None:
    s, t = maps(2, 2, 3, 4), maps(2, 5, 3, 4, seed=1)
    method = built({"a": s}, {"a": t})
    shapes = {name: tuple(p.shape) for name, p in method.named_parameters()}
    assert sorted(shapes.values()) == [(5,), (5, 2, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1)]
    gaussian = method.gaussians[0]
    torch.testing.assert_close(gaussian(s)[0], slow_mean(s, gaussian))


def test_adds_up_its_taps_and_averages_the_larger_grid() -> None:
    s = {"stage1": maps(3, 2, 8, 8), "stage2": maps(3, 4, 4, 4, seed=1), "stage3": maps(3, 6, 2, 2, seed=2)}
    t = {"stage1": maps(3, 3, 4, 4, seed=3), "stage2": maps(3, 5, 4, 4, seed=4)}
    t["stage3"] = maps(3, 7, 4, 4, seed=5)
    assert list(s) == list(VID().taps)
    method = built(s, t, variance=2.0)
    aligned = [
        (halved(s["stage1"]), t["stage1"]),
        (s["stage2"], t["stage2"]),
        (s["stage3"], halved(t["stage3"])),
    ]
    expected = sum(
        slow_vid(slow_mean(here, gaussian), there, torch.full(there.shape[1:2], 2.0))
        for (here, there), gaussian in zip(aligned, method.gaussians, strict=True)
    )
    loss = method.loss(Seen(None, s), Seen(None, t), Batch(s["stage1"]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_same_map_is_no_match() -> None:
    """Why the card does not promise 0 at a match."""
    s = {"a": maps(2, 3, 4, 4)}
    assert built(s, s).loss(Seen(None, s), Seen(None, s), Batch(s["a"])) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dead_and_flat_maps_are_finite(dtype: torch.dtype) -> None:
    s, t = maps(4, 3, 4, 4, dtype=dtype), maps(4, 5, 4, 4, seed=1, dtype=dtype)
    s[0], s[1], t[1], t[2], t[:, 4] = 0, 3, 0, 100, 0
    s.requires_grad_()
    method = built({"a": s}, {"a": t}).to(dtype)
    loss = method.loss(Seen(None, {"a": s}), Seen(None, {"a": t}), Batch(s))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in method.parameters())
    assert s.grad.isfinite().all()


def test_gaps_of_half_precision_maps_are_taken_in_float32() -> None:
    mean, t = maps(2, 3, 4, 5, dtype=torch.bfloat16), maps(2, 3, 4, 5, seed=1, dtype=torch.bfloat16)
    variance = VARIANCE.float()
    assert vid(mean, t, variance) == vid(mean.float(), t.float(), variance)


def test_tokens_are_the_map_that_they_make() -> None:
    s, t = maps(3, 2, 4, 4), maps(3, 5, 2, 2, seed=1)
    tokens_s = torch.cat([maps(3, 1, 2, seed=2), s.flatten(2).mT], 1)
    expected = built({"a": s}, {"a": t}).loss(Seen(None, {"a": s}), Seen(None, {"a": t}), Batch(s))
    for here, there in ((tokens_s, t), (s, t.flatten(2).mT)):
        method = built({"a": here}, {"a": there})
        loss = method.loss(Seen(None, {"a": here}), Seen(None, {"a": there}), Batch(s))
        torch.testing.assert_close(loss, expected)


def test_tokens_of_no_grid_are_refused_with_both_shapes() -> None:
    with pytest.raises(Refused, match=r"'vid'.*'a'.*\(2, 3, 4, 4\).*\(2, 18, 3\)"):
        built({"a": maps(2, 3, 4, 4)}, {"a": maps(2, 18, 3)})


class Net(nn.Module):
    """Shows its input's two channels, the second of them drowned in noise by the teacher."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.stage = nn.Conv2d(2, 2, 1, bias=False)
        self.noise = noise
        nn.init.dirac_(self.stage.weight)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.zeros_like(x)
        noise[:, 1] = self.noise * torch.randn_like(x[:, 1])
        return self.stage(x + noise).mean((2, 3))


def test_channels_that_cannot_be_told_get_a_large_variance() -> None:
    torch.manual_seed(0)
    student, teacher, x = Net(0.0), Net(3.0), torch.randn(16, 2, 6, 6)
    distiller = Distiller(student, teacher, VID(taps=["stage"]), example=(x, None), task=None)
    gaussian = distiller.methods["vid"].gaussians[0]
    told = {f"methods.vid.gaussians.0.{name}" for name, _ in gaussian.named_parameters()}
    assert distiller.players()["student"].keys() == told | {"student.stage.weight"}
    adam = torch.optim.Adam(distiller.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        adam.zero_grad()
        loss = distiller(x)["vid"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plain, noisy = variance(gaussian).tolist()
    assert plain < 0.5, "this one is there to be seen"
    assert 6 < noisy < 12, "this one has a variance of 9"
    assert student.state_dict().keys() == {"stage.weight"}
    assert all(p.grad is None for p in teacher.parameters())
