"""Wide ResNets: the literature's sizes, grids and widths, where a stage ends, fresh tails."""

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.core.distiller import Distiller
from limbeck.core.taps import Tapped
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.wrn import MODELS, WideResNet


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def wrn(name: str = "wrn_16_2", classes: int = 5, channels: int = 3) -> WideResNet:
    torch.manual_seed(0)
    return MODELS[name](classes, channels)


def test_their_sizes_are_the_literature_s() -> None:
    sizes = {name: sum(p.numel() for p in factory(100).parameters()) for name, factory in MODELS.items()}
    assert sizes == {"wrn_16_1": 180_916, "wrn_16_2": 703_284, "wrn_40_1": 569_780, "wrn_40_2": 2_255_156}


def test_published_weights_find_their_names() -> None:
    names = {name for name in wrn("wrn_16_1").state_dict() if name.endswith("weight")}
    block = {f"layer.{n}.{part}.weight" for n in (0, 1) for part in ("bn1", "conv1", "bn2", "conv2")}
    assert names == {
        "conv1.weight",
        *(f"block{k}.{part}" for k in (1, 2, 3) for part in block),
        "block2.layer.0.convShortcut.weight",
        "block3.layer.0.convShortcut.weight",
        "bn1.weight",
        "fc.weight",
    }
    assert set(wrn().state_dict()) - names >= {"block1.layer.0.convShortcut.weight", "fc.bias"}


def test_every_knob_can_be_given_by_a_recipe() -> None:
    knobs = registry.knobs(registry.find("model", "wrn_40_2"))
    assert set(knobs) == {"classes", "channels", "depth", "widen"}


@pytest.mark.parametrize("depth", [4, 14])
def test_a_depth_that_does_not_divide_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is 10, 16, 22 .* not {depth}"):
        WideResNet(5, depth=depth)


@pytest.mark.parametrize(("name", "widths"), [("wrn_16_1", (16, 32, 64)), ("wrn_16_2", (32, 64, 128))])
def test_every_tap_shows_what_it_is_called(name: str, widths: tuple[int, ...]) -> None:
    model = wrn(name)
    x = randn(2, 3, 32, 32)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(x)
    assert seen.out.shape == (2, 5)
    assert torch.equal(seen.at["stem"], model.conv1(x))
    norms = (model.block2[0][0].bn1, model.block3[0][0].bn1, model.bn1)  # type: ignore[index]
    for n, (width, norm) in enumerate(zip(widths, norms, strict=True), start=1):
        after, normed = seen.at[f"stage{n}"], seen.at[f"stage{n}_pre"]
        assert after.shape == normed.shape == (2, width, 64 >> n, 64 >> n)
        assert seen.modules[f"stage{n}_pre"] is norm
        assert torch.equal(normed, norm(after)) and (normed < 0).any()
    assert torch.allclose(seen.at["pooled"], seen.at["stage3_pre"].relu().mean((2, 3)))
    assert torch.equal(model.fc(seen.at["pooled"]), seen.out)
    assert len(model.TAPS) == 1 + 2 * 3 + 1


def test_a_block_that_changes_width_activates_before_its_shortcut() -> None:
    block = wrn("wrn_16_1").block2[0][0]  # type: ignore[index]
    x = randn(2, 16, 8, 8)
    active = block.bn1(x).relu()
    residual = block.conv2(block.bn2(block.conv1(active)).relu())
    assert torch.allclose(block(x), residual + block.convShortcut(active), atol=1e-6)
    same = wrn("wrn_16_1").block2[0][1]  # type: ignore[index]
    x = randn(2, 32, 8, 8)
    residual = same.conv2(same.bn2(same.conv1(same.bn1(x).relu())).relu())
    assert torch.allclose(same(x), residual + x, atol=1e-6)


@pytest.mark.parametrize("grid", [8, 28])
def test_grey_images_of_other_sizes_will_do(grid: int) -> None:
    model = wrn("wrn_16_1", channels=1)
    tapped = Tapped(model)
    tapped.look(("stage3",))
    seen = tapped(randn(2, 1, grid, grid))
    assert seen.out.shape == (2, 5) and seen.at["stage3"].shape == (2, 64, grid // 4, grid // 4)


def test_it_answers_alike_twice_and_after_its_state_moved_house() -> None:
    model, x = wrn(), randn(4, 3, 16, 16)
    model(x)  # moves BatchNorm's statistics
    model.eval()
    other = MODELS["wrn_16_2"](5).eval()
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), other(x))


def test_initial_weights_are_normal_by_fan_out_and_the_head_starts_without_bias() -> None:
    model = wrn()
    for conv in (model.block3[0][0].conv1, model.tail(1)[0][0][0].conv1):  # type: ignore[index]
        weight = conv.weight.detach()
        assert float(weight.std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.05)
        assert float((weight.abs() < weight.std()).float().mean()) == pytest.approx(0.683, abs=0.02)
    assert not model.fc.bias.any()
    assert torch.equal(model.conv1.weight, wrn().conv1.weight)  # drawn from torch's global generator
    assert not torch.equal(model.conv1.weight, MODELS["wrn_16_2"](5).conv1.weight)


def test_a_tail_leads_from_its_stage_to_what_is_pooled() -> None:
    model = wrn()
    x = model.conv1(randn(2, 3, 16, 16))
    maps = []
    for stage in model.stages:
        x = stage(x)
        maps.append(x.detach())
    assert torch.equal(model.fc(model.bn1(x).relu().mean((2, 3))), model(randn(2, 3, 16, 16)))
    for i, shown in enumerate(maps):
        given = model.tail(i)(shown)
        assert given.shape == maps[-1].shape and float(given.detach().min()) == 0  # after the last ReLU
    assert [len(model.tail(i)) for i in range(3)] == [4, 3, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_tail_is_fresh_and_learns_whatever_the_network_does(i: int) -> None:
    model = wrn()
    model(randn(4, 3, 16, 16))  # moves BatchNorm's statistics
    model.requires_grad_(False).eval().double()
    tail = model.tail(i)
    follows = nn.Sequential(*model.stages[i + 1 :], model.bn1)
    ours = {name: p for name, p in follows.named_parameters() if i < 2}
    convolutions = [(name, p) for name, p in tail.named_parameters() if p.ndim == 4]
    assert {p.dtype for p in tail.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in tail.parameters()) and tail.training
    assert i == 2 or set(ours) == {name for name, _ in tail.named_parameters()}
    assert convolutions and all(p.std() > 0 for _, p in convolutions)
    assert not any(name in ours and torch.equal(p, ours[name]) for name, p in convolutions)
    norms = [m for m in tail.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.running_mean.any() for m in norms)
    again = dict(model.tail(i).named_parameters())
    assert not any(torch.equal(p, again[name]) for name, p in convolutions)


def test_a_narrow_one_learns_from_a_wide_one() -> None:
    student, teacher = wrn("wrn_16_1"), wrn("wrn_16_2")
    x, y = randn(8, 3, 8, 8), torch.arange(8) % 5
    distiller = Distiller(student, teacher, [KD(temperature=4.0), FitNet()], example=(x, y))
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = distiller(x, y)["loss"]
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in student.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
