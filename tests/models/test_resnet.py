"""ResNets for small images: the literature's sizes, both shortcuts, grids and widths, taps, fresh tails."""

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.core.distiller import Distiller
from limbeck.core.taps import Tapped
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.resnet import MODELS, ResNet


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def resnet(name: str = "resnet14", classes: int = 5, **knobs: object) -> ResNet:
    torch.manual_seed(0)
    return MODELS[name](classes, **knobs)  # type: ignore[arg-type]


def test_their_sizes_are_the_literature_s() -> None:
    sizes = {name: sum(p.numel() for p in factory(100).parameters()) for name, factory in MODELS.items()}
    assert sizes == {
        "resnet8": 83_892,
        "resnet14": 181_108,
        "resnet20": 278_324,
        "resnet32": 472_756,
        "resnet44": 667_188,
        "resnet56": 861_620,
        "resnet110": 1_736_564,
        "resnet8x4": 1_233_540,
        "resnet32x4": 7_433_860,
    }


def test_the_paper_s_shortcut_has_no_parameters() -> None:
    sizes = {
        name: sum(p.numel() for p in resnet(name, 10, shortcut="A").parameters())
        for name in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
    }
    assert sizes == {  # 0.27, 0.46, 0.66, 0.85 and 1.7 M in the paper
        "resnet20": 269_722,
        "resnet32": 464_154,
        "resnet44": 658_586,
        "resnet56": 853_018,
        "resnet110": 1_727_962,
    }


def test_published_weights_find_their_names() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stem = {"conv1.weight", *(f"bn1.{n}" for n in norm)}
    blocks = {
        f"layer{stage}.0.{part}"
        for stage in (1, 2, 3)
        for k in (1, 2)
        for part in (f"conv{k}.weight", *(f"bn{k}.{n}" for n in norm))
    }
    shortcuts = {
        f"layer{stage}.0.downsample.{part}"
        for stage in (2, 3)
        for part in ("0.weight", *(f"1.{n}" for n in norm))
    }
    linear, fc = {"linear.weight", "linear.bias"}, {"fc.weight", "fc.bias"}
    assert set(resnet("resnet8", shortcut="A").state_dict()) == stem | blocks | linear
    assert set(resnet("resnet8").state_dict()) == stem | blocks | shortcuts | fc


def test_every_knob_can_be_given_by_a_recipe() -> None:
    assert set(registry.knobs(registry.find("model", "resnet8x4"))) == {
        "classes",
        "channels",
        "depth",
        "widths",
        "shortcut",
    }


@pytest.mark.parametrize("knobs", [{"depth": 18}, {"depth": 2}, {"shortcut": "C"}])
def test_what_is_no_such_resnet_is_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"a ResNet's (depth|shortcut) is .*, not"):
        resnet("resnet8", **knobs)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize(
    ("name", "stem", "widths"), [("resnet14", 16, (16, 32, 64)), ("resnet8x4", 32, (64, 128, 256))]
)
def test_every_tap_shows_what_it_is_called(
    name: str, stem: int, widths: tuple[int, ...], shortcut: str
) -> None:
    model = resnet(name, shortcut=shortcut)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(randn(2, 3, 32, 32))
    assert seen.out.shape == (2, 5)
    assert seen.at["stem"].shape == (2, stem, 32, 32) and (seen.at["stem"] >= 0).all()
    for n, width in enumerate(widths, start=1):
        after, before = seen.at[f"stage{n}"], seen.at[f"stage{n}_pre"]
        assert after.shape == (2, width, 64 >> n, 64 >> n)
        assert (before < 0).any() and torch.equal(after, before.relu())
        # the sum is the block's normed residual and its shortcut
        block = model.stages[n - 1][-1]  # type: ignore[index]
        assert seen.modules[f"stage{n}_pre_norm"] is block.bn2
        if name == "resnet14":
            first = model.stages[n - 1][0]  # type: ignore[index]
            beside = first(seen.at["stem"] if n == 1 else seen.at[f"stage{n - 1}"])
            assert torch.allclose(before - seen.at[f"stage{n}_pre_norm"], beside, atol=1e-5)
    assert torch.allclose(seen.at["pooled"], seen.at["stage3"].mean((2, 3)))
    head = model.linear if shortcut == "A" else model.fc
    assert torch.equal(head(seen.at["pooled"]), seen.out)
    assert len(model.TAPS) == 1 + 3 * 3 + 1


def test_the_paper_s_shortcut_skips_rows_and_pads_channels_on_both_sides() -> None:
    x = randn(2, 16, 9, 8)
    y = resnet("resnet8", shortcut="A").layer2[0].downsample(x)
    assert y.shape == (2, 32, 5, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_its_stages_follow_one_another() -> None:
    model = resnet().eval()
    x = model.relu(model.bn1(model.conv1(randn(2, 3, 16, 16))))
    for stage in model.stages:
        x = stage(x)
    assert torch.equal(model.fc(x.mean((2, 3))), model(randn(2, 3, 16, 16)))


@pytest.mark.parametrize("grid", [8, 28])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_grey_images_of_other_sizes_will_do(grid: int, shortcut: str) -> None:
    model = resnet("resnet8", channels=1, shortcut=shortcut)
    assert model(randn(2, 1, grid, grid)).shape == (2, 5)
    assert model.stages[:2][1](model.layer1(randn(2, 16, grid, grid))).shape == (2, 32, grid // 2, grid // 2)


def test_it_answers_alike_twice_and_after_its_state_moved_house() -> None:
    model, x = resnet(), randn(4, 3, 16, 16)
    model(x)  # moves BatchNorm's statistics
    model.eval()
    other = MODELS["resnet14"](5).eval()
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), other(x))


def test_initial_weights_come_from_torch_s_global_generator() -> None:
    one, same, other = resnet().state_dict(), resnet().state_dict(), MODELS["resnet14"](5).state_dict()
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert all(not torch.equal(v, other[k]) for k, v in one.items() if v.ndim == 4)


@pytest.mark.parametrize(("shortcut", "fan"), [("A", 9 * 32), ("B", 9 * 64)])
def test_initial_convolutions_are_normal_by_their_source_s_fan(shortcut: str, fan: int) -> None:
    model = resnet("resnet8", shortcut=shortcut)
    for conv in (model.layer3[0].conv1, model.tail(1)[0][0].conv1):
        weight = conv.weight.detach()
        assert float(weight.std()) == pytest.approx((2 / fan) ** 0.5, rel=0.05)
        assert float((weight.abs() < weight.std()).float().mean()) == pytest.approx(0.683, abs=0.02)
    weight = resnet("resnet8", classes=500, shortcut="A").linear.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["resnet14", "resnet8x4"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_tail_leads_from_its_stage_to_the_final_grid_and_width(name: str, shortcut: str) -> None:
    model = resnet(name, shortcut=shortcut)
    x = model.relu(model.bn1(model.conv1(randn(2, 3, 16, 16))))
    maps = []
    for stage in model.stages:
        x = stage(x)
        maps.append(x.detach())
    for i, shown in enumerate(maps):
        assert model.tail(i)(shown).shape == maps[-1].shape
    assert len(model.tail(0)) == 2 and len(model.tail(1)) == len(model.tail(2)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_tail_is_fresh_and_learns_whatever_the_network_does(i: int) -> None:
    model = resnet()
    model(randn(4, 3, 16, 16))  # moves BatchNorm's statistics
    model.requires_grad_(False).eval().double()
    tail = model.tail(i)
    ours = {name: p for k, stage in enumerate(model.stages[i + 1 :]) for name, p in _named(stage, k)}
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


def _named(stage: nn.Module, k: int) -> list[tuple[str, nn.Parameter]]:
    return [(f"{k}.{name}", p) for name, p in stage.named_parameters()]


def test_a_small_one_learns_from_a_bigger_one() -> None:
    student, teacher = resnet("resnet8"), resnet("resnet14")
    x, y = randn(8, 3, 8, 8), torch.arange(8) % 5
    distiller = Distiller(student, teacher, [KD(temperature=4.0), FitNet()], example=(x, y))
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        given = distiller(x, y)
        optimiser.zero_grad()
        given["loss"].backward()
        assert all(p.grad is not None for p in student.parameters())
        optimiser.step()
        losses.append({name: float(given[name].detach()) for name in ("task", "kd", "fitnet", "loss")})
    assert losses[-1]["loss"] < losses[0]["loss"] and losses[-1]["fitnet"] < losses[0]["fitnet"]
