"""Another library's transform as a view: the same image again in whatever batch, and nothing else drawn."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Lesson
from limbeck.core.refused import Refused
from limbeck.views.transform import transform

NAME = "transforms_of_another_library"


class Brighter(nn.Module):
    """Draws as such libraries do, from torch's global generator."""

    def __init__(self, most: int = 50) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randint(0, self.most, (1,)).to(x.dtype)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(NAME)
    module.Brighter = Brighter  # type: ignore[attr-defined]
    module.flip = lambda x, dim=-1: x.flip(dim)[0]  # type: ignore[attr-defined]
    module.words = lambda x: "words"  # type: ignore[attr-defined]
    module.halved = lambda x: x / 2  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, NAME, module)


def batch(rows: list[int], epoch: int = 0) -> Batch:
    x = torch.arange(12, dtype=torch.uint8).repeat(len(rows), 1).view(-1, 1, 3, 4)
    return Batch(x, torch.zeros(len(rows)).long(), torch.tensor(rows), Lesson(7, epoch, 2, 0, 20, 2))


def test_an_image_is_shown_again_in_whatever_batch() -> None:
    of = f"{NAME}:Brighter"
    whole = transform(batch([3, 9, 4, 8]), of).x
    assert torch.equal(transform(batch([4, 3]), of).x, whole[[2, 0]])
    assert len({int(image[0, 0, 0]) for image in whole}) > 1
    assert not torch.equal(transform(batch([3, 9, 4, 8], epoch=1), of).x, whole)
    assert whole.dtype == torch.uint8


def test_nobody_notices_its_draws() -> None:
    before = torch.random.get_rng_state()
    transform(batch([1]), f"{NAME}:Brighter")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_knobs_reach_classes_and_functions() -> None:
    assert torch.equal(transform(batch([1, 2]), f"{NAME}:Brighter", {"most": 1}).x, batch([1, 2]).x)
    assert torch.equal(transform(batch([1]), f"{NAME}:flip").x, batch([1]).x.flip(-1))
    assert torch.equal(transform(batch([1]), f"{NAME}:flip", {"dim": -2}).x, batch([1]).x.flip(-2))


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ("no_such_library:Thing", "no_such_library:Thing cannot be had .*install its package"),
        (f"{NAME}:Thing", "cannot be had .*Thing"),
        (NAME, "names nothing to call; expected package.module:name"),
        (f"{NAME}:number", "names nothing to call"),
        (f"{NAME}:words", "gives str for an image"),
        (f"{NAME}:halved", r"gives torch.float32 \(1, 1, 3, 4\) for an image torch.uint8"),
    ],
)
def test_what_is_not_a_transform_of_images(of: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        transform(batch([1]), of)
