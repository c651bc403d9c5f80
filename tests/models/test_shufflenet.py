"""ShuffleNet V1 and V2: RepDistiller's sizes, the shuffle, their taps, and fresh tails."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.distiller import Distiller
from limbeck.core.taps import Tapped
from limbeck.knowledge.response.kd import KD
from limbeck.models.shufflenet import MODELS, ShuffleNetV1, ShuffleNetV2, shuffle

Net = ShuffleNetV1 | ShuffleNetV2
NAMES = ("shufflenet_v1", "shufflenet_v2")
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(name: str, classes: int = 100, channels: int = 3) -> Net:
    torch.manual_seed(0)
    return MODELS[name](classes=classes, channels=channels)


def small(name: str, widths: Sequence[int] = (48, 96, 192)) -> Net:
    torch.manual_seed(0)
    return MODELS[name](5, widths=widths, depths=(2, 2, 2))


def conv(kernel: int, inputs: int, outputs: int, groups: int = 1) -> int:
    """Parameters of a convolution and its BatchNorm."""
    return kernel * kernel * inputs * outputs // groups + 2 * outputs


def test_v1_has_the_literatures_parameters() -> None:
    count, inputs = conv(1, 3, 24), 24
    for width, depth in ((240, 4), (480, 8), (960, 4)):
        for block in range(depth):
            outputs = width - inputs if block == 0 else width
            inside = outputs // 4
            count += conv(1, inputs, inside, 1 if inputs == 24 else 3)
            count += conv(3, 1, inside) + conv(1, inside, outputs, 3)
            inputs = width
    count += 960 * 100 + 100
    assert sum(p.numel() for p in make("shufflenet_v1").parameters()) == count == 949_258


def test_v2_has_the_literatures_parameters() -> None:
    count, inputs = conv(1, 3, 24), 24
    for width, depth in ((116, 3), (232, 7), (464, 3)):
        half = width // 2
        count += conv(3, 1, inputs) + conv(1, inputs, half)
        count += conv(1, inputs, half) + conv(3, 1, half) + conv(1, half, half)
        count += depth * (2 * conv(1, half, half) + conv(3, 1, half))
        inputs = width
    count += conv(1, 464, 1024) + 1024 * 100 + 100
    assert sum(p.numel() for p in make("shufflenet_v2").parameters()) == count == 1_355_528


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_a_shuffle_deals_channels_out_and_is_undone(groups: int) -> None:
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(shuffle(x, groups), F.channel_shuffle(x, groups))
    assert torch.equal(shuffle(shuffle(x, groups), 12 // groups), x)


def test_a_shuffle_in_numbers() -> None:
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("name", "widths", "pooled"),
    [("shufflenet_v1", (240, 480, 960), 960), ("shufflenet_v2", (116, 232, 464), 1024)],
)
def test_every_tap_shows_its_stage_and_the_pooled_one_what_the_head_reads(
    name: str, widths: tuple[int, ...], pooled: int
) -> None:
    model = make(name)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(X)
    assert seen.out.shape == (2, 100)
    assert torch.equal(model.head(seen.at["pooled"]), seen.out) and seen.at["pooled"].shape == (2, pooled)
    assert seen.at["stem"].shape == (2, 24, 32, 32) and seen.at["stem"].min() == 0
    for n, (width, grid) in enumerate(zip(widths, (16, 8, 4), strict=True), start=1):
        stage, pre = seen.at[f"stage{n}"], seen.at[f"stage{n}_pre"]
        assert stage.shape == pre.shape == (2, width, grid, grid)
        assert pre.min() < 0 and torch.equal(pre.relu(), stage)
    last = seen.at["stage3"] if name == "shufflenet_v1" else model.neck(seen.at["stage3"])
    assert torch.allclose(seen.at["pooled"], last.mean((2, 3)), atol=1e-6)


def test_v1_names_the_norm_in_front_of_each_last_relu() -> None:
    model = small("shufflenet_v1")
    tapped = Tapped(model)
    tapped.look(["stage1", "stage2", "stage2_pre_norm", "stage2_pre"])
    seen = tapped.check(X)
    norm, block = seen.modules["stage2_pre_norm"], model.stages[1]
    assert isinstance(norm, nn.BatchNorm2d)
    before = block[0](seen.at["stage1"])  # what the last block adds its branch to
    assert torch.allclose(seen.at["stage2_pre"], seen.at["stage2_pre_norm"] + before, atol=1e-5)


def test_v1_groups_every_pointwise_convolution_but_the_first() -> None:
    blocks = [block for stage in make("shufflenet_v1").stages for block in stage]
    assert [block.squeeze[0].groups for block in blocks] == [1, *[3] * 15]
    assert all(block.expand[2].groups == 3 for block in blocks)


def test_v1_mixes_groups() -> None:
    """Without the shuffle an input channel would reach the outputs of its own group alone."""
    torch.manual_seed(0)
    block = small("shufflenet_v1").stages[1][1].eval()
    x = torch.rand(1, 96, 4, 4)
    moved = x.clone()
    moved[:, :32] += 1
    changed = (block(moved) - block(x)).abs().amax((0, 2, 3)) > 0
    assert changed[32:64].any() and changed[64:].any()


def test_v1_sets_the_pooled_input_beside_the_branch_that_widens() -> None:
    block = small("shufflenet_v1").stages[1][0]
    x = torch.rand(2, 48, 8, 8)
    assert torch.equal(block(x)[:, 48:], F.avg_pool2d(x, 3, stride=2, padding=1))


def test_v1_has_a_relu_behind_its_depthwise_convolution() -> None:
    block = small("shufflenet_v1").stages[1][1]
    assert block.expand[1](-torch.ones(3)).tolist() == [0, 0, 0]


def test_v2_shuffles_the_two_branches_that_halve_the_grid() -> None:
    block = small("shufflenet_v2").stages[1][0]
    x = torch.rand(2, 48, 8, 8)
    assert torch.equal(block(x)[:, 0::2], block.left(x).relu())
    assert torch.equal(block(x)[:, 1::2], block.right(x).relu())


def test_v2_passes_half_of_the_channels_by() -> None:
    block = small("shufflenet_v2").stages[1][1]
    x = torch.rand(1, 96, 4, 4)
    assert torch.equal(block(x)[:, 0::2], x[:, :48])  # dealt out in turns
    assert not torch.equal(block(x)[:, 1::2], x[:, 48:])


@pytest.mark.parametrize("name", NAMES)
def test_any_channels_and_any_size(name: str) -> None:
    assert make(name, channels=1)(X[:, :1]).shape == (2, 100)
    assert small(name)(torch.randn(2, 3, 28, 20)).shape == (2, 5)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize(("name", "width"), [("shufflenet_v1", 192), ("shufflenet_v2", 1024)])
def test_a_tail_leads_from_its_stage_to_the_final_grid_and_width(name: str, width: int, i: int) -> None:
    shape = ((48, 16, 16), (96, 8, 8), (192, 4, 4))[i]
    tail = small(name).tail(i)
    assert tail(torch.rand(2, *shape)).shape == (2, width, 4, 4)
    stages = [module for module in tail if len(module) == 2]  # two blocks each; a neck has three layers
    assert len(stages) == max(2 - i, 1)


@pytest.mark.parametrize("i", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_tail_is_fresh_and_learns(name: str, i: int) -> None:
    model = small(name).requires_grad_(False)
    for p in model.parameters():
        p.fill_(3.0)
    model(X)  # moves BatchNorm's statistics
    tail = model.double().tail(i)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in tail.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float64 for p in tail.parameters())
    norms = [m for m in tail.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.weight == 1).all() and (m.running_mean == 0).all() for m in norms)
    assert all(m.weight.std() > 0 for m in tail.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_alike_in_eval_and_after_its_weights_went_elsewhere(name: str) -> None:
    model = small(name)
    model(X)
    torch.manual_seed(1)
    other = type(model)(5, widths=(48, 96, 192), depths=(2, 2, 2)).eval()
    assert not torch.equal(other(X), model.eval()(X))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(X), model(X)) and torch.equal(model(X), model(X))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_from_a_teacher(name: str) -> None:
    student, teacher = small(name), small(name, widths=(96, 192, 384))
    before = copy.deepcopy(teacher.state_dict())
    y = torch.tensor([0, 3])
    distiller = Distiller(student, teacher, [KD()], example=(X, y)).train()
    optimiser = torch.optim.Adam(distiller.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = distiller(X, y)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
