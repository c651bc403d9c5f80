"""OFD against slow loops written from the paper's equations, and what the paper says of its parts."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen, Tapped
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature.ofd import OFD, margins, partial_l2
from limbeck.models.cnn import CNN

BATCH = Batch(torch.zeros(3, 1))
PRE = "stages.0.1", "stages.1.1", "stages.2.1"


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the paper's equations, one element at a time ---


def slow_margin(beta: float, gamma: float) -> float:
    """The mean of the density's negative part, by the trapezoid rule."""
    sigma, steps = abs(gamma), 20_000
    low = min(beta - 12 * sigma, 0.0)
    xs = [low + (0 - low) * i / steps for i in range(steps + 1)]
    density = [math.exp(-0.5 * ((x - beta) / sigma) ** 2) for x in xs]
    density[0], density[-1] = density[0] / 2, density[-1] / 2
    return sum(x * p for x, p in zip(xs, density, strict=True)) / sum(density)


def slow_distance(s: Tensor, t: Tensor, margin: Tensor) -> float:
    total = 0.0
    for b in range(len(s)):
        for c in range(s.shape[1]):
            for here, there in zip(s[b, c].flatten().tolist(), t[b, c].flatten().tolist(), strict=True):
                target = max(there, margin[c].item())
                if not here <= target <= 0:
                    total += (here - target) ** 2
    return total / len(s)


def slow_connector(x: Tensor, project: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """The same matrix at each position, then every channel of the batch to its mean and deviation."""
    out = torch.zeros(len(x), project.out_channels, *x.shape[2:], dtype=x.dtype)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            out[:, :, i, j] = x[:, :, i, j] @ project.weight.detach()[:, :, 0, 0].T
    for c in range(out.shape[1]):
        gap = out[:, c] - out[:, c].mean()
        scale = norm.weight[c].item() / math.sqrt(gap.square().mean() + norm.eps)
        out[:, c] = gap * scale + norm.bias[c].item()
    return out


def slow_average(x: Tensor, h: int, w: int) -> Tensor:
    out = torch.zeros(*x.shape[:2], h, w, dtype=x.dtype)
    for i in range(h):
        rows = slice(i * x.shape[2] // h, math.ceil((i + 1) * x.shape[2] / h))
        for j in range(w):
            columns = slice(j * x.shape[3] // w, math.ceil((j + 1) * x.shape[3] / w))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


# --- the margins ---


def test_a_margin_is_the_mean_of_what_the_relu_would_cut() -> None:
    beta = torch.tensor([0.0, -1.0, 0.5, 1.5, -0.3, 3.0, -4.0], dtype=torch.float64)
    gamma = torch.tensor([1.0, 0.5, -0.8, 1.2, -0.2, 1.0, 0.1], dtype=torch.float64)
    slow = [slow_margin(b, g) for b, g in zip(beta.tolist(), gamma.tolist(), strict=True)]
    assert margins(beta, gamma).tolist() == pytest.approx(slow, rel=1e-5)
    single = margins(beta.float(), gamma.float())
    torch.testing.assert_close(single.double(), margins(beta, gamma), rtol=1e-4, atol=0)
    assert margins(beta.bfloat16(), gamma.bfloat16()).dtype == torch.float32


def test_a_channel_hardly_ever_below_0_has_three_deviations() -> None:
    """Less than 0.001 of it: from 3.09 deviations on."""
    beta = torch.tensor([3.08, 3.10, 50.0, 6.2], dtype=torch.float64)
    gamma = torch.tensor([1.0, 1.0, 1.0, -2.0], dtype=torch.float64)
    margin = margins(beta, gamma)
    assert margin[0] > -0.3
    assert margin[1:].tolist() == pytest.approx([-3, -3, -6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dead_channel_has_its_constant_for_a_margin(dtype: torch.dtype) -> None:
    """gamma = 0 is what weight decay makes of a channel; then x = beta for certain."""
    margin = margins(
        torch.tensor([-2.0, 0.0, 3.0, -1e4], dtype=dtype), torch.tensor([0.0, 0, 0, 1e-4]).to(dtype)
    )
    torch.testing.assert_close(margin.float(), torch.tensor([-2.0, 0.0, 0.0, -1e4]), rtol=0.01, atol=1e-30)


# --- the distance ---


def test_the_distance_equals_the_loop() -> None:
    s, t, margin = maps(3, 4, 5, 2), maps(3, 4, 5, 2, seed=1), torch.tensor([-0.1, -0.5, -1.0, -9.0])
    assert partial_l2(s, t, margin).item() == pytest.approx(slow_distance(s, t, margin), rel=1e-12)


@pytest.mark.parametrize(
    ("s", "t", "expected"),
    [
        (1.0, 3.0, 4.0),  # the teacher is above 0: equal it
        (-1.0, 3.0, 16.0),
        (4.0, 3.0, 1.0),
        (-0.25, -0.5, 0.0625),  # between the margin and 0: be as low
        (1.0, -0.5, 2.25),
        (-0.75, -0.5, 0.0),  # lower will do
        (-0.75, -4.0, 0.0625),  # below the margin: the margin will do
        (-1.5, -4.0, 0.0),
        (2.0, -4.0, 9.0),
        (-5.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_what_the_relu_cuts_need_only_be_low_enough(s: float, t: float, expected: float) -> None:
    here, there = (torch.full((1, 1, 1, 1), x, dtype=torch.float64).requires_grad_() for x in (s, t))
    distance = partial_l2(here, there, torch.tensor([-1.0]))
    assert distance.item() == expected
    distance.backward()
    assert here.grad.item() == 2 * (s - max(t, -1.0)) * (expected > 0)


def test_each_channel_has_its_own_margin() -> None:
    s, t = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), -10.0)
    assert partial_l2(s, t, torch.tensor([-1.0, -2.0, -3.0])) == 4 * (1 + 4 + 9)


def test_gradcheck() -> None:
    s, t = maps(2, 3, 3, 2).requires_grad_(), maps(2, 3, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(partial_l2, (s, t, torch.tensor([-0.2, -0.5, -2.0]).double()))


# --- the layers together ---


class Tower(nn.Module):
    """Three maps, each in front of a ReLU; `grid` positions a side in the first."""

    def __init__(self, widths: tuple[int, int, int], grid: int = 4) -> None:
        super().__init__()
        inputs = (1, *widths[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(inputs, widths, strict=True))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
        self.TAPS = {f"stage{n + 1}_pre": f"norms.{n}" for n in range(3)}
        self.grid = grid
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for n, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nn.functional.adaptive_avg_pool2d(x, self.grid // 2**n)
            x = norm(conv(x)).relu()
        return x.mean((2, 3))


def look(model: nn.Module, method: OFD, x: Tensor) -> Seen:
    tapped = Tapped(model.double())
    tapped.look(method.looks())
    return tapped(x).detach()


def built(student: nn.Module, teacher: nn.Module, **knobs: object) -> tuple[OFD, Seen, Seen]:
    torch.manual_seed(0)
    method, x = OFD(**knobs), maps(3, 1, 8, 8)
    s, t = look(student, method, x), look(teacher.eval(), method, x)
    method.build(s, t, BATCH)
    for connector in method.connectors:
        nn.init.normal_(connector.norm.weight)
        nn.init.normal_(connector.norm.bias)
    return method.double(), s, t


@pytest.mark.parametrize("grid", [4, 8, 2])
def test_the_loss_equals_the_loop(grid: int) -> None:
    torch.manual_seed(1)
    method, s, t = built(Tower((2, 3, 4)), Tower((4, 3, 5), max(grid, 4)))
    if grid == 2:  # a teacher coarser than the student
        t = Seen(None, {tap: v[:, :, ::2, ::2] for tap, v in t.at.items()})
    total = 0.0
    for layer, (tap, connector) in enumerate(zip(method.taps, method.connectors, strict=True), start=1):
        here = slow_connector(s.at[tap], connector.project, connector.norm)
        there = slow_average(t.at[tap], *here.shape[2:])
        total += 2.0 ** (layer - 3) * slow_distance(here, there, connector.margin)
    assert method.loss(s, t, BATCH).item() == pytest.approx(1e-3 * total, rel=1e-10)


def test_a_students_tokens_are_the_map_that_they_make() -> None:
    torch.manual_seed(1)
    method, s, t = built(Tower((2, 3, 4), 8), Tower((4, 3, 5)))
    front = torch.ones(3, 1, 1, dtype=torch.float64)
    tokens = {
        tap: torch.cat([front.expand(-1, -1, v.shape[1]), v.flatten(2).mT], 1) for tap, v in s.at.items()
    }
    again = OFD()
    again.build(Seen(None, tokens), t, BATCH)
    again.double().load_state_dict(method.state_dict())
    torch.testing.assert_close(again.loss(Seen(None, tokens), t, BATCH), method.loss(s, t, BATCH))


def test_a_teacher_of_tokens_has_no_batchnorm_and_both_layers_are_named() -> None:
    layer = nn.Linear(5, 5)
    teacher = nn.Sequential(layer)
    t = Seen(None, {"stage1": -torch.ones(2, 16, 5)}, None, teacher, {"stage1": layer})
    s = Seen(None, {"stage1": torch.ones(2, 3, 4, 4)}, None, teacher, {"stage1": layer})
    with pytest.raises(Refused, match="with 0 BatchNorms of 5 channels") as caught:
        OFD(taps=("stage1",)).build(s, t, BATCH)
    for part in (
        "tap 'stage1' (0) shows (2, 3, 4, 4) in the student",
        "'stage1' (0) (2, 16, 5) in the teacher",
    ):
        assert part in str(caught.value)


def test_the_margins_are_those_of_the_teachers_batchnorms() -> None:
    torch.manual_seed(1)
    teacher = Tower((4, 3, 5))
    method, _, _ = built(Tower((2, 3, 4)), teacher)
    for connector, norm in zip(method.connectors, teacher.norms, strict=True):
        torch.testing.assert_close(connector.margin, margins(norm.bias.detach(), norm.weight.detach()))
    assert {"connectors.0.margin", "connectors.2.margin"} <= method.state_dict().keys()
    assert not any("margin" in name for name, _ in method.named_parameters())


def test_projectors_begin_as_in_the_official_code() -> None:
    """Normal, with variance 2 / outputs."""
    torch.manual_seed(1)
    method, _, _ = built(Tower((40, 3, 4)), Tower((60, 3, 5)))
    assert method.connectors[0].project.weight.std().item() == pytest.approx(math.sqrt(2 / 60), rel=0.1)
    assert method.connectors[0].project.bias is None


def test_scale_is_times_the_sum() -> None:
    torch.manual_seed(1)
    student, teacher = Tower((2, 3, 4)), Tower((4, 3, 5))
    (method, s, t), (other, _, _) = built(student, teacher), built(student, teacher, scale=1.0)
    torch.testing.assert_close(1000 * method.loss(s, t, BATCH), other.loss(s, t, BATCH))


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    torch.manual_seed(1)
    method, s, t = built(Tower((2, 3, 4)), Tower((4, 3, 5)))
    method.eval()  # BatchNorm aside
    single = [
        method.loss(*(Seen(None, {k: v[i : i + 1] for k, v in x.at.items()}) for x in (s, t)), BATCH)
        for i in range(3)
    ]
    torch.testing.assert_close(method.loss(s, t, BATCH), torch.stack(single).mean())
    assert torch.stack(single).std() > 0.01 * torch.stack(single).mean(), "rows alike would hide a wrong mean"


def test_a_teacher_without_scales_of_its_own_is_normal() -> None:
    torch.manual_seed(1)
    teacher = Tower((4, 3, 5))
    teacher.norms[0] = nn.BatchNorm2d(4, affine=False)
    method, _, _ = built(Tower((2, 3, 4)), teacher)
    torch.testing.assert_close(
        method.connectors[0].margin, torch.full((4,), -math.sqrt(2 / math.pi), dtype=torch.float64)
    )


def test_finite_in_bfloat16_and_near_the_exact_loss() -> None:
    torch.manual_seed(1)
    method, s, t = built(Tower((2, 3, 4)), Tower((4, 3, 5)))
    exact = method.loss(s, t, BATCH)
    half = [Seen(None, {tap: v.bfloat16() for tap, v in x.at.items()}) for x in (s, t)]
    shown = [x.requires_grad_() for x in half[0].at.values()]
    loss = method.bfloat16().loss(*half, BATCH)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=0)
    assert all(grad.isfinite().all() and grad.any() for grad in torch.autograd.grad(loss, shown))


def test_the_distance_is_computed_in_float32() -> None:
    s, t, margin = (
        maps(2, 3, 8, 8).bfloat16(),
        maps(2, 3, 8, 8, seed=1).bfloat16(),
        torch.tensor([-1.0, -0.3, -2]),
    )
    exact = partial_l2(s.double(), t.double(), margin.double())
    torch.testing.assert_close(partial_l2(s, t, margin).double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(partial_l2(s, t.float(), margin).double(), exact, rtol=1e-6, atol=0)


def test_finite_for_constant_maps() -> None:
    torch.manual_seed(1)
    method, s, t = built(Tower((2, 3, 4)), Tower((4, 3, 5)))
    for here in s.at.values():
        here.fill_(2.0).requires_grad_()
    loss = method.loss(s, t, BATCH)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(s.at.values())))


# --- which BatchNorm ---


class Residual(nn.Module):
    """A block whose ReLU is given a sum: no module of it shows a BatchNorm's output and the sum at once."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential(nn.Conv2d(1, width, 1), nn.BatchNorm2d(width))
        self.relu = nn.ReLU()
        for norm in (self.bn, self.shortcut[1]):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + self.shortcut(x)).mean((2, 3))


def test_a_sum_is_told_its_batchnorm_by_path_or_by_the_teachers_table() -> None:
    torch.manual_seed(1)
    student, teacher = Residual(), Residual()
    for model in (student, teacher):
        model.TAPS = {"stage1_pre": "relu:in", "last": "shortcut.1"}
    branch = margins(teacher.bn.bias.detach().double(), teacher.bn.weight.detach().double())
    short = margins(teacher.shortcut[1].bias.detach().double(), teacher.shortcut[1].weight.detach().double())
    for norms, expected in [(("bn",), branch), (("shortcut",), short), (("last",), short)]:
        method, _, _ = built(student, teacher, taps=("stage1_pre",), norms=norms)
        torch.testing.assert_close(method.connectors[0].margin, expected)
    teacher.TAPS["stage1_pre_norm"] = "bn"
    method, _, _ = built(student, teacher, taps=("stage1_pre",))
    torch.testing.assert_close(method.connectors[0].margin, branch)
    method, _, _ = built(student, teacher, taps=("stage1_pre",), norms=("last",))
    torch.testing.assert_close(method.connectors[0].margin, short)


def test_a_tap_that_holds_one_batchnorm_is_enough() -> None:
    torch.manual_seed(1)
    teacher = Residual()
    method, _, _ = built(Residual(), teacher, taps=("shortcut",))
    norm = teacher.shortcut[1]
    torch.testing.assert_close(method.connectors[0].margin, margins(norm.bias.detach(), norm.weight.detach()))


def test_of_two_batchnorms_only_one_may_be_as_wide_as_the_tap() -> None:
    torch.manual_seed(1)
    student, teacher = (
        nn.Sequential(
            nn.Sequential(
                nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
            ),
            nn.Flatten(),
        )
        for _ in range(2)
    )
    nn.init.normal_(teacher[0][4].bias)
    method, _, _ = built(student, teacher, taps=("0",))
    norm = teacher[0][4]
    torch.testing.assert_close(method.connectors[0].margin, margins(norm.bias.detach(), norm.weight.detach()))


@pytest.mark.parametrize(
    ("tap", "found"),
    [
        ("relu:in", "'relu:in' of the teacher is a ReLU with 0 BatchNorms of 3 channels"),
        ("conv", "'conv' of the teacher is a Conv2d with 0 BatchNorms of 3 channels"),
    ],
)
def test_a_tap_without_a_batchnorm_is_refused(tap: str, found: str) -> None:
    with pytest.raises(Refused, match=found):
        built(Residual(), Residual(), taps=(tap,))


def test_of_several_batchnorms_none_is_guessed() -> None:
    torch.manual_seed(1)
    student, teacher = (nn.Sequential(Sum(), nn.Flatten()) for _ in range(2))
    with pytest.raises(
        Refused, match="'0' of the teacher is a Sum with 2 BatchNorms of 3 channels, expected one"
    ):
        built(student, teacher, taps=("0",))
    assert len(built(student, teacher, taps=("0",), norms=("0.shortcut",))[0].connectors) == 1


class Sum(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.shortcut(x)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("s", "t"),
    [((2, 8, 4, 4), (2, 18, 16)), ((2, 18, 16), (2, 8, 4, 4)), ((2, 18, 16), (2, 18, 16)), ((2, 8), (2, 8))],
)
def test_what_is_no_map_is_refused_with_both_shapes(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    with pytest.raises(Refused) as caught:
        OFD(taps=("mlp",)).build(
            Seen(None, {"mlp": torch.zeros(s)}), Seen(None, {"mlp": torch.zeros(t)}), BATCH
        )
    for part in ("'ofd' compares maps", "'mlp'", f"{s} in the student", f"{t} in the teacher"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("taps", "norms"), [((), ()), (("a", "b"), ("c",))])
def test_a_norm_for_each_tap_or_none_at_all(taps: tuple[str, ...], norms: tuple[str, ...]) -> None:
    with pytest.raises(Refused, match=f"given {len(taps)} taps and {len(norms)} norms"):
        OFD(taps=taps, norms=norms)


# --- through the Distiller ---


@pytest.fixture
def pair() -> tuple[CNN, CNN, Tensor]:
    torch.manual_seed(0)
    return CNN(4, widths=(4, 6, 8)), CNN(4, widths=(5, 7, 9)), torch.randn(8, 1, 8, 8)


def test_a_tap_behind_the_relu_is_refused(pair: tuple[CNN, CNN, Tensor]) -> None:
    """It holds the right BatchNorm, and shows what is left of its output."""
    student, teacher, x = pair
    with pytest.raises(
        Refused, match=r"'stage1' \(stages.0\) shows \(8, 4, 8, 8\) in the student .*nothing is"
    ):
        Distiller(student, teacher, OFD(taps=("stage1",)), example=(x, None), task=None)


def test_our_cnn_is_tapped_at_its_batchnorms(pair: tuple[CNN, CNN, Tensor]) -> None:
    """By path; and by any name of the student's and the teacher's tables."""
    student, teacher, x = pair
    by_path = Distiller(student, teacher, OFD(taps=PRE), example=(x, None), task=None)
    table = {f"pre{n}": path for n, path in enumerate(PRE)}
    named = OFD(taps=tuple(table))
    by_name = Distiller(student, Frozen(teacher, taps=table), named, example=(x, None), task=None, taps=table)
    torch.testing.assert_close(by_path(x)["ofd"], by_name(x)["ofd"], rtol=0, atol=0)


def test_a_student_learns_to_hold_what_its_teacher_lets_through(pair: tuple[CNN, CNN, Tensor]) -> None:
    student, teacher, x = pair
    distiller = Distiller(student, teacher, OFD(taps=PRE), example=(x, None), task=None)
    before = [connector.margin.clone() for connector in distiller.methods["ofd"].connectors]
    first, adam = distiller(x)["loss"].item(), torch.optim.Adam(distiller.parameters(), lr=0.02)
    for _ in range(60):
        adam.zero_grad()
        distiller(x)["loss"].backward()
        adam.step()
    assert distiller(x)["loss"].item() < 0.3 * first
    assert all(p.grad is None for p in teacher.parameters())
    after = [connector.margin for connector in distiller.methods["ofd"].connectors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert student.state_dict().keys() == CNN(4, widths=(4, 6, 8)).state_dict().keys()
