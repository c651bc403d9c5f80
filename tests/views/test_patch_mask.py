"""Masked patches: as many as said, whole ones, fixed by (seed, epoch, index, purpose)."""

import pytest
import torch

from limbeck import Batch, Lesson, Refused, registry
from limbeck.views.patch_mask import patch_mask


def batch(index: list[int], shape: tuple[int, ...] = (2, 8, 12), epoch: int = 0) -> Batch:
    rows = torch.tensor(index)
    return Batch(torch.ones(len(rows), *shape), rows % 2, rows, Lesson(epoch=epoch))


def blanked(shown: Batch, patch: int) -> torch.Tensor:
    """Which patches (b down across) are zero; every patch is all zero or all one."""
    cells = shown.x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).transpose(3, 4).flatten(4)
    assert torch.equal(cells, cells[:, :1, :, :, :1].expand_as(cells))
    return cells[:, 0, :, :, 0] == 0


def test_the_share_of_whole_patches_is_blank_and_each_is_as_likely() -> None:
    gone = blanked(patch_mask(batch(list(range(600))), ratio=1 / 3, patch=4), 4)
    assert gone.shape == (600, 2, 3) and (gone.sum((1, 2)) == 2).all()
    assert (gone.double().mean(0) - 1 / 3).abs().max() < 0.06
    assert len({tuple(row) for row in gone.flatten(1).tolist()}) == 15  # every pair of six comes up


def test_what_stays_is_untouched_whatever_it_is() -> None:
    x = torch.randint(1, 255, (3, 1, 8, 8), dtype=torch.uint8)
    shown = patch_mask(Batch(x, None, torch.arange(3)), ratio=0.5, patch=2)
    assert shown.x.dtype == torch.uint8 and ((shown.x == x) | (shown.x == 0)).all()
    assert ((shown.x == 0).sum((1, 2, 3)) == 32).all()


def test_a_sample_has_its_own_draw_wherever_it_stands() -> None:
    a, b = patch_mask(batch([5, 8, 6], (1, 32, 32))), patch_mask(batch([6, 5], (1, 32, 32)))
    assert torch.equal(a.x[0], b.x[1]) and torch.equal(a.x[2], b.x[0])
    for other in (
        patch_mask(batch([5, 8, 6], (1, 32, 32), epoch=1)),
        patch_mask(batch([5, 8, 6], (1, 32, 32)), purpose="teacher"),
    ):
        assert not any(torch.equal(x, y) for x, y in zip(a.x, other.x, strict=True))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"patch": 5}, "5 pixels a.*8x12"), ({"patch": 0}, "0 pixels"), ({"ratio": 1.0}, "the share 1.0")],
)
def test_what_cannot_be_is_refused_in_a_sentence(knobs: dict[str, float], words: str) -> None:
    with pytest.raises(Refused, match=words):
        patch_mask(batch([0, 1]), **knobs)  # type: ignore[arg-type]


def test_rows_that_are_no_images_are_refused() -> None:
    with pytest.raises(Refused, match="A patch mask blanks patches of images"):
        patch_mask(Batch(torch.zeros(2, 3), None, torch.arange(2)))


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "patch_mask") is patch_mask
