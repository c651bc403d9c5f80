"""Another library's transform as a view: the same image again in whatever batch, and nothing else drawn."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from limbeck import recipe, registry
from limbeck.core.batch import Batch, Lesson
from limbeck.core.refused import Refused

NAME = "transforms_of_another_library"


class Brighter(nn.Module):
    """Draws as such libraries do, from torch's global generator."""

    def __init__(self, most: int = 50) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randint(0, self.most, (1,)).to(x.dtype)


class Words:
    def __call__(self, x: Tensor) -> str:
        return "words"


class Halved:
    def __call__(self, x: Tensor) -> Tensor:
        return (x / 2)[0]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(NAME)
    for one in (Brighter, Words, Halved):
        setattr(module, one.__name__, one)
    monkeypatch.setitem(sys.modules, NAME, module)


def batch(rows: list[int], epoch: int = 0) -> Batch:
    x = torch.arange(12, dtype=torch.uint8).repeat(len(rows), 1).view(-1, 1, 3, 4)
    return Batch(x, torch.zeros(len(rows)).long(), torch.tensor(rows), Lesson(7, epoch, 2, 0, 20, 2))


def test_an_image_is_shown_again_in_whatever_batch() -> None:
    brighter = registry.find("view", f"{NAME}:Brighter")
    whole = brighter(batch([3, 9, 4, 8])).x
    assert torch.equal(brighter(batch([4, 3])).x, whole[[2, 0]])
    assert len({int(image[0, 0, 0]) for image in whole}) > 1
    assert not torch.equal(brighter(batch([3, 9, 4, 8], epoch=1)).x, whole)
    assert whole.dtype == torch.uint8


def test_nobody_notices_its_draws() -> None:
    before = torch.random.get_rng_state()
    registry.find("view", f"{NAME}:Brighter")(batch([1]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_its_knobs_are_those_of_its_class() -> None:
    brighter = registry.find("view", f"{NAME}:Brighter")
    assert torch.equal(brighter(batch([1, 2]), most=1).x, batch([1, 2]).x)
    stage = {"learner": "net", "epochs": 1, "augment": [{"name": f"{NAME}:Brighter", "most": 3}]}
    plan = {"data": "digits", "models": {"net": "cnn"}, "stages": [stage]}
    assert recipe.parse(plan).stages[0].augment[0].knobs == {"most": 3}
    stage["augment"] = [{"name": f"{NAME}:Brighter", "least": 3}]
    with pytest.raises(Refused, match=r"unknown key `least` .*its knobs are most"):
        recipe.parse(plan)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Words", "gives str for an image"),
        ("Halved", r"gives torch.float32 \(1, 3, 4\) for an image torch.uint8 \(1, 1, 3, 4\)"),
    ],
)
def test_what_gives_no_such_image_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        registry.find("view", f"{NAME}:{name}")(batch([1]))
