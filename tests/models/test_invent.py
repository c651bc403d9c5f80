"""The generator of images: their shape, their statistics, and that each code is an image of its own."""

import pytest
import torch
from torch import nn

from limbeck.models.invent import Invent


def invent(**knobs: int) -> Invent:
    torch.manual_seed(0)
    return Invent(**{"codes": 6, "width": 8, **knobs})


Z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, 28), (1, 9), (1, 1)])
def test_images_have_the_channels_and_the_size_that_are_asked_for(channels: int, size: int) -> None:
    assert invent(channels=channels, size=size)(Z).shape == (16, channels, size, size)


def test_it_is_the_papers_by_default() -> None:
    """100 codes, 128 channels, colour images of 32x32; its layers' parameters counted by hand."""
    model = Invent()
    assert model.codes == 100
    linear, first = 100 * 8192 + 8192, 2 * 128
    middle = 128 * 128 * 9 + 128 + 2 * 128
    last = (128 * 64 * 9 + 64 + 2 * 64) + (64 * 3 * 9 + 3)
    assert sum(p.numel() for p in model.parameters()) == linear + first + middle + last
    assert [m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]


def test_images_are_spread_as_normalised_data_is() -> None:
    images = invent(channels=3, size=8).train()(Z)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-2)


def test_in_eval_an_image_depends_on_its_code_alone() -> None:
    model = invent(channels=1, size=8)
    model(Z)
    model.eval()
    assert torch.allclose(model(Z)[3:5], model(Z[3:5]), atol=1e-6)
    assert (model(Z)[0] - model(Z)[1]).abs().max() > 1e-3


def test_every_weight_learns() -> None:
    model = invent(channels=1, size=8)
    model(Z).square().mul(torch.randn(16, 1, 8, 8)).sum().backward()
    # What a BatchNorm follows has a bias in vain.
    idle = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-4}
    assert idle <= {"first.bias", "middle.0.bias", "last.0.bias"}
