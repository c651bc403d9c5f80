"""MobileNetV2: RepDistiller's size, its taps, and fresh tails."""

import copy

import pytest
import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.taps import Tapped
from limbeck.knowledge.response.kd import KD
from limbeck.models.mobilenet import MODELS, MobileNetV2

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
GRIDS = {"stage1": (12, 16, 16), "stage2": (16, 8, 8), "stage3": (48, 4, 4), "stage4": (160, 2, 2)}


def half(classes: int = 100, channels: int = 3) -> MobileNetV2:
    torch.manual_seed(0)
    return MODELS["mobilenetv2_half"](classes=classes, channels=channels)


def narrow() -> MobileNetV2:
    torch.manual_seed(0)
    return MobileNetV2(5, width=0.25, expansion=2)


def test_the_half_width_has_the_literatures_parameters() -> None:
    def conv(kernel: int, inputs: int, outputs: int) -> int:  # with its BatchNorm
        return kernel * kernel * inputs * outputs + 2 * outputs

    count, inputs = conv(3, 3, 16), 16
    widths = [8, *[12] * 2, *[16] * 3, *[32] * 4, *[48] * 3, *[80] * 3, 160]
    for n, outputs in enumerate(widths):
        inside = inputs if n == 0 else 6 * inputs
        count += conv(1, inputs, inside) + conv(3, 1, inside) + conv(1, inside, outputs)
        inputs = outputs
    count += conv(1, 160, 1280) + 1280 * 100 + 100
    assert sum(p.numel() for p in half().parameters()) == count == 812_836


def test_every_tap_shows_its_stage_and_the_pooled_one_what_the_head_reads() -> None:
    model = half()
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(X)
    assert seen.out.shape == (2, 100)
    assert torch.equal(model.head(seen.at["pooled"]), seen.out)
    assert {n: tuple(v.shape[1:]) for n, v in seen.at.items() if n in GRIDS} == GRIDS
    assert seen.at["stem"].shape == (2, 16, 16, 16) and seen.at["stem"].min() == 0
    assert torch.allclose(seen.at["pooled"], model.neck(seen.at["stage4"]).mean((2, 3)), atol=1e-6)
    for stage in GRIDS:
        assert seen.at[stage].min() < 0  # no activation ends a stage
        assert torch.equal(seen.at[f"{stage}_pre"], seen.at[stage])
        assert isinstance(seen.modules[f"{stage}_pre_norm"], nn.BatchNorm2d)
    # The last block of stage 4 adds nothing, that of stage 3 its input.
    assert torch.equal(seen.at["stage4_pre_norm"], seen.at["stage4"])
    assert seen.at["stage3_pre_norm"].shape == seen.at["stage3"].shape
    assert not torch.equal(seen.at["stage3_pre_norm"], seen.at["stage3"])


def test_blocks_that_keep_their_shape_add_their_input() -> None:
    residual = ["".join("x+" if block.residual else "." for block in stage) for stage in half().stages]
    assert residual == ["..x+", ".x+x+", ".x+x+x+.x+x+", ".x+x+."]
    block = half().stages[1][1]
    nn.init.zeros_(block.norm.weight)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x)


def test_the_first_block_of_a_stage_halves_the_grid() -> None:
    assert half().stages[2][0](torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)


def test_its_weights_start_as_repdistillers() -> None:
    model = half()
    neck, depthwise = model.neck[0].weight.detach(), model.stages[3][2].branch[1][0].weight.detach()
    assert float(neck.std()) == pytest.approx((2 / 1280) ** 0.5, rel=0.05)
    assert float(depthwise.std()) == pytest.approx((2 / (9 * 480)) ** 0.5, rel=0.05)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert (model.head.bias == 0).all()


def test_width_and_expansion_are_knobs_and_the_neck_never_shrinks() -> None:
    assert narrow().head.in_features == 1280 and MobileNetV2(5, width=1.5).head.in_features == 1920
    block = narrow().stages[1][1]
    assert block.branch[1][0].groups == block.branch[1][0].out_channels == 2 * 8


def test_any_channels_and_any_size() -> None:
    assert half(channels=1)(X[:, :1]).shape == (2, 100)
    assert half()(torch.randn(2, 3, 48, 40)).shape == (2, 100)


@pytest.mark.parametrize("i", range(4))
def test_a_tail_leads_from_its_stage_to_the_final_grid_and_width(i: int) -> None:
    tail, stages = half().tail(i), list(GRIDS.values())
    assert tail(torch.randn(2, *stages[i])).shape == (2, 1280, 2, 2)
    assert len(tail) == max(3 - i, 1) + 1  # the stages that follow, or one more, and the neck


@pytest.mark.parametrize("i", [1, 3])
def test_a_tail_is_fresh_and_learns(i: int) -> None:
    model = narrow().requires_grad_(False)
    for p in model.parameters():
        p.fill_(3.0)
    model(X)  # moves BatchNorm's statistics
    tail = model.double().tail(i)
    theirs = {id(p) for p in model.parameters()}
    assert not theirs & {id(p) for p in tail.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float64 for p in tail.parameters())
    for module in tail.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.running_mean == 0).all()
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.35)


def test_the_last_tail_can_follow_the_network() -> None:
    model = narrow()
    tapped = Tapped(model)
    tapped.look(["stage4"])
    assert model.tail(3)(tapped(X).at["stage4"]).shape == (2, 1280, 2, 2)


def test_it_answers_alike_in_eval_and_after_its_weights_went_elsewhere() -> None:
    model = narrow()
    model(X)
    other = MobileNetV2(5, width=0.25, expansion=2).eval()
    assert not torch.equal(other(X), model.eval()(X))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(X), model(X)) and torch.equal(model(X), model(X))


def test_it_learns_from_a_teacher() -> None:
    student, teacher = narrow(), half(5)
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
    assert all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())
