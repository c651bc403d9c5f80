"""Patches: the slow way round, back again, and masks that are drawn without favour."""

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Lesson
from limbeck.core.refused import Refused
from limbeck.pieces.patches import mask, patchify, take, unpatchify, visible


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def slow(x: Tensor, patch: int) -> Tensor:
    """Patch by patch, pixel by pixel, channel by channel."""
    b, c, h, w = x.shape
    rows = [
        [
            [x[n, k, top + i, left + j] for i in range(patch) for j in range(patch) for k in range(c)]
            for top in range(0, h, patch)
            for left in range(0, w, patch)
        ]
        for n in range(b)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize(("shape", "patch"), [((2, 3, 6, 6), 2), ((1, 1, 4, 8), 4), ((3, 2, 5, 5), 5)])
def test_patches_are_the_slow_ones(shape: tuple[int, ...], patch: int) -> None:
    x = images(*shape)
    assert torch.equal(patchify(x, patch), slow(x, patch))


@pytest.mark.parametrize(("channels", "patch"), [(1, 4), (3, 2), (3, 6), (4, 1)])
def test_unpatchify_is_the_way_back(channels: int, patch: int) -> None:
    x = images(2, channels, 12, 12)
    patches = patchify(x, patch)
    assert torch.equal(unpatchify(patches, channels), x)
    assert torch.equal(patchify(unpatchify(2 * patches, channels), patch), 2 * patches)


def test_take_gives_each_row_its_own() -> None:
    tokens, ids = images(2, 4, 3), torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(take(tokens, ids), torch.stack([tokens[0, [3, 0]], tokens[1, [1, 1]]]))


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [
        (196, 0.75, 49),
        (196, 0.95, 10),
        (196, 0.98, 4),
        (49, 0.75, 12),
        (49, 0.9, 5),
        (16, 0.99, 1),
        (2, 0.5, 1),
    ],
)
def test_the_visible_count_is_rounded_and_one_at_least(patches: int, ratio: float, kept: int) -> None:
    """The abstract's ten and four of 196, where the official code has nine and three."""
    assert visible(patches, ratio) == kept


@pytest.mark.parametrize(("patches", "ratio"), [(49, 0.0), (49, -0.1), (49, 1.0), (49, 0.001), (1, 0.75)])
def test_a_mask_that_hides_nothing_or_all_is_refused(patches: int, ratio: float) -> None:
    with pytest.raises(Refused, match=f"the share {ratio} of {patches} patches.*for example 0.75"):
        visible(patches, ratio)


def test_every_patch_is_either_kept_or_hidden() -> None:
    keep, hide = mask(Lesson(seed=3, epoch=1), torch.arange(20) * 7, 49, 0.75)
    assert keep.shape == (20, 12) and hide.shape == (20, 37)
    assert torch.equal(torch.cat([keep, hide], 1).sort(1).values, torch.arange(49).expand(20, 49))


def test_a_row_is_masked_alike_in_any_batch_and_anew_in_every_epoch_seed_and_purpose() -> None:
    index, some = torch.arange(40), torch.tensor([31, 2, 2, 17])
    whole = mask(Lesson(seed=1, epoch=4), index, 16, 0.5)[0]
    assert torch.equal(mask(Lesson(seed=1, epoch=4), index[some], 16, 0.5)[0], whole[some])
    assert not torch.equal(whole[0].sort().values, whole[1].sort().values)
    for other in (Lesson(seed=2, epoch=4), Lesson(seed=1, epoch=5)):
        assert not torch.equal(mask(other, index, 16, 0.5)[0], whole)
    assert not torch.equal(mask(Lesson(seed=1, epoch=4), index, 16, 0.5, "another")[0], whole)


def test_every_patch_is_kept_equally_often() -> None:
    keep, _ = mask(Lesson(), torch.arange(4000), 10, 0.7)
    counts = torch.bincount(keep.flatten(), minlength=10)
    assert float(((counts - 1200) ** 2 / 1200).sum()) < 30  # chi squared of 9 degrees: 99.95 % lie below
