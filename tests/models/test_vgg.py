"""VGGs for small images: the literature's sizes, grids and widths, taps, fresh tails."""

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.core.distiller import Distiller
from limbeck.core.taps import Tapped
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.vgg import MODELS, VGG


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def vgg(name: str = "vgg8", classes: int = 5, channels: int = 3) -> VGG:
    torch.manual_seed(0)
    return MODELS[name](classes, channels)


def test_their_sizes_are_the_literature_s() -> None:
    with torch.device("meta"):
        models = {name: factory(100) for name, factory in MODELS.items()}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == {
        "vgg8": 3_965_028,
        "vgg11": 9_277_284,
        "vgg13": 9_462_180,
        "vgg16": 14_774_436,
        "vgg19": 20_086_692,
    }
    # a network's name counts its layers; here one linear layer stands for the paper's three
    layers = {name: sum(isinstance(m, nn.Conv2d) for m in model.modules()) for name, model in models.items()}
    assert layers == {"vgg8": 5, "vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16}


def test_published_weights_find_their_names() -> None:
    with torch.device("meta"):
        names = {name for name in MODELS["vgg13"](100).state_dict() if name.endswith((".weight", ".bias"))}
    assert names == {
        f"{layer}.{part}"
        for layer in (*(f"block{k}.{n}" for k in range(5) for n in (0, 1, 3, 4)), "classifier")
        for part in ("weight", "bias")
    }


def test_every_knob_can_be_given_by_a_recipe() -> None:
    assert set(registry.knobs(registry.find("model", "vgg13"))) == {"classes", "channels", "convolutions"}


def test_depths_of_any_five_blocks_will_do_and_of_fewer_will_not() -> None:
    model = VGG(5, convolutions=[1, 2, 1, 1, 1])
    assert model.TAPS["stage1_pre"] == "block1.4" and model(randn(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="expected 5"):
        VGG(5, convolutions=[1, 1])


@pytest.mark.parametrize("name", ["vgg8", "vgg11"])
def test_every_tap_shows_what_it_is_called(name: str) -> None:
    model = vgg(name)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(randn(2, 3, 32, 32))
    assert seen.out.shape == (2, 5)
    assert seen.at["stem"].shape == (2, 64, 32, 32) and float(seen.at["stem"].detach().min()) == 0
    shapes = {1: (128, 16), 2: (256, 8), 3: (512, 4), 4: (512, 4)}
    for n, (width, grid) in shapes.items():
        after, before = seen.at[f"stage{n}"], seen.at[f"stage{n}_pre"]
        assert after.shape == (2, width, grid, grid)
        assert isinstance(seen.modules[f"stage{n}_pre"], nn.BatchNorm2d)
        assert (before < 0).any() and torch.equal(after, before.relu())
    assert torch.allclose(seen.at["pooled"], seen.at["stage4"].mean((2, 3)))
    assert torch.equal(model.classifier(seen.at["pooled"]), seen.out)
    assert len(model.TAPS) == 1 + 2 * 4 + 1


def test_a_stage_keeps_the_greatest_of_four_before_it_convolves() -> None:
    model = vgg().eval()
    x = randn(2, 64, 8, 8)
    greatest = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1))
    conv, norm, _ = model.block1
    assert torch.equal(model.stages[0](x), norm(conv(greatest)).relu())


@pytest.mark.parametrize(("grid", "last"), [(8, 1), (28, 3)])
def test_grey_images_of_other_sizes_will_do(grid: int, last: int) -> None:
    model = vgg(channels=1)
    tapped = Tapped(model)
    tapped.look(("stage4",))
    seen = tapped(randn(2, 1, grid, grid))
    assert seen.out.shape == (2, 5) and seen.at["stage4"].shape == (2, 512, last, last)


def test_it_answers_alike_twice_and_after_its_state_moved_house() -> None:
    model, x = vgg(), randn(4, 3, 16, 16)
    model(x)  # moves BatchNorm's statistics
    model.eval()
    other = MODELS["vgg8"](5).eval()
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), other(x))


def test_initial_weights_are_normal_by_fan_out_and_biases_zero() -> None:
    model = vgg()
    for conv in (model.block2[0], model.tail(0)[0][0]):  # type: ignore[index]
        weight = conv.weight.detach()
        assert float(weight.std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
        assert float((weight.abs() < weight.std()).float().mean()) == pytest.approx(0.683, abs=0.02)
        assert not conv.bias.any()
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not model.classifier.bias.any()
    assert torch.equal(model.block0[0].weight, vgg().block0[0].weight)  # torch's global generator
    assert not torch.equal(model.block0[0].weight, MODELS["vgg8"](5).block0[0].weight)


def test_a_tail_leads_from_its_stage_to_the_final_grid_and_width() -> None:
    model = vgg("vgg11")
    x = model.block0(randn(2, 3, 32, 32))
    maps = []
    for stage in model.stages:
        x = stage(x)
        maps.append(x.detach())
    assert torch.equal(model.classifier(x.mean((2, 3))), model(randn(2, 3, 32, 32)))
    for i, shown in enumerate(maps):
        assert model.tail(i)(shown).shape == maps[-1].shape
    assert [len(model.tail(i)) for i in range(4)] == [3, 2, 1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("i", [0, 1, 2, 3])
def test_a_tail_is_fresh_and_learns_whatever_the_network_does(i: int) -> None:
    model = vgg()
    model(randn(4, 3, 16, 16))  # moves BatchNorm's statistics
    model.requires_grad_(False).eval().double()
    tail = model.tail(i)
    ours = dict(nn.Sequential(*model.stages[i + 1 :]).named_parameters())
    convolutions = [(name, p) for name, p in tail.named_parameters() if p.ndim == 4]
    assert {p.dtype for p in tail.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in tail.parameters()) and tail.training
    assert i == 3 or set(ours) == {name for name, _ in tail.named_parameters()}
    assert convolutions and all(p.std() > 0 for _, p in convolutions)
    assert not any(name in ours and torch.equal(p, ours[name]) for name, p in convolutions)
    norms = [m for m in tail.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.running_mean.any() for m in norms)
    again = dict(model.tail(i).named_parameters())
    assert not any(torch.equal(p, again[name]) for name, p in convolutions)


def test_it_learns_from_another_of_its_kind() -> None:
    student, teacher = vgg(), MODELS["vgg8"](5)
    x, y = randn(8, 3, 8, 8), torch.arange(8) % 5
    distiller = Distiller(student, teacher, [KD(temperature=4.0), FitNet()], example=(x, y))
    optimiser = torch.optim.SGD(distiller.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = distiller(x, y)["loss"]
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in student.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
