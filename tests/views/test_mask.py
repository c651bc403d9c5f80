"""The mask: one for whoever is shown the batch through it, and nothing else of the batch changes."""

import pytest
import torch

from limbeck import Batch, Lesson, Refused, registry
from limbeck.pieces import patches
from limbeck.views.mask import mask


def batch(rows: int = 5, channels: int = 1, size: int = 8, epoch: int = 2) -> Batch:
    x = torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(rows), torch.arange(rows) * 31, Lesson(seed=3, epoch=epoch))


@pytest.mark.parametrize(("ratio", "patch", "kept", "n"), [(0.75, 2, 4, 16), (0.9, 1, 6, 64), (0.5, 4, 2, 4)])
def test_it_is_the_drawn_mask_of_the_grid(ratio: float, patch: int, kept: int, n: int) -> None:
    whole = batch()
    shown = mask(whole, ratio, patch)
    assert set(shown.x) == {"x", "keep", "hide"} and shown.x["x"] is whole.x
    assert shown.x["keep"].shape == (5, kept) and shown.x["hide"].shape == (5, n - kept)
    keep, hide = patches.mask(whole.lesson, whole.index, n, ratio)
    assert torch.equal(shown.x["keep"], keep) and torch.equal(shown.x["hide"], hide)
    assert shown.y is whole.y and shown.index is whole.index and shown.lesson is whole.lesson
    assert shown.rows == 5


def test_teacher_and_student_are_shown_the_same_patches_whatever_their_batches() -> None:
    whole = batch(12)
    first, second = (mask(half).x["keep"] for half in whole.split(2))
    assert torch.equal(mask(whole).x["keep"], torch.cat([first, second]))
    assert torch.equal(mask(whole).x["keep"], mask(whole).x["keep"])
    assert not torch.equal(mask(whole).x["keep"], mask(batch(12, epoch=3)).x["keep"])


@pytest.mark.parametrize(
    ("shown", "knobs", "said"),
    [
        (Batch(torch.zeros(2, 16), index=torch.arange(2)), {}, r"shape \(2, 16\) with an index"),
        (Batch(torch.zeros(2, 1, 8, 8)), {}, "without an index"),
        (Batch(torch.zeros(2, 1, 8, 12), index=torch.arange(2)), {}, "4 pixels a side.* are 8x12; expected"),
        (batch(), {"patch": 3}, "3 pixels a side.* are 8x8; expected"),
        (batch(), {"patch": 0}, "0 pixels a side"),
        (batch(), {"ratio": 0.0}, "the share 0.0 of 4 patches"),
        (batch(), {"ratio": 1.0}, "the share 1.0 of 4 patches"),
        (batch(), {"patch": 8}, "the share 0.75 of 1 patches"),
    ],
)
def test_what_cannot_be_is_refused(shown: Batch, knobs: dict[str, float], said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        mask(shown, **knobs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "mask") is mask
