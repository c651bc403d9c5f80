"""Flip: the slow way round, one draw for each sample wherever it lies, half of them mirrored."""

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.batch import IGNORE
from limbeck.core.keyed import keyed
from limbeck.views.crop import crop
from limbeck.views.flip import flip


def slow(batch: Batch) -> Tensor:
    """Image by image, column by column."""
    shown = batch.x.clone()
    for n, (draw,) in enumerate(keyed(batch.lesson, batch.index, "flip").tolist()):
        if draw < 0.5:
            for j in range(batch.x.shape[3]):
                shown[n, :, :, j] = batch.x[n, :, :, -1 - j]
    return shown


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((12, 3, 8, 8), torch.uint8), ((9, 1, 6, 11), torch.float32), ((6, 2, 3, 2), torch.uint8)],
)
def test_it_is_the_slow_way_for_every_size_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = Batch(x, index=torch.arange(len(x)) * 31 + 5, lesson=Lesson(seed=3, epoch=2))
    shown = flip(batch).x
    assert shown.dtype == dtype and torch.equal(shown, slow(batch))
    assert not torch.equal(shown, x) and not torch.equal(shown, x.flip(3))


def test_it_does_not_matter_how_numbers_lie_in_memory() -> None:
    x = torch.arange(2 * 3 * 8 * 6, dtype=torch.float32).view(2, 3, 8, 6)
    plain = flip(Batch(x, index=torch.arange(2))).x
    for lying in (x.to(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., :6]):
        assert torch.equal(flip(Batch(lying, index=torch.arange(2))).x, plain)


def test_a_sample_is_mirrored_alike_in_any_batch_and_anew_in_every_epoch_and_seed() -> None:
    x = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    index, lesson = torch.arange(40), Lesson(seed=1, epoch=4)
    whole = flip(Batch(x, index=index, lesson=lesson)).x
    some = torch.tensor([31, 2, 2, 17])
    assert torch.equal(flip(Batch(x[some], index=index[some], lesson=lesson)).x, whole[some])
    for other in (Lesson(seed=2, epoch=4), Lesson(seed=1, epoch=5)):
        assert not torch.equal(flip(Batch(x, index=index, lesson=other)).x, whole)


def mirrored(n: int) -> Tensor:
    x = torch.zeros(n, 1, 1, 2, dtype=torch.uint8)
    x[:, 0, 0, 0] = 1
    return flip(Batch(x, index=torch.arange(n))).x[:, 0, 0, 1].bool()


def test_half_are_mirrored() -> None:
    assert abs(int(mirrored(40_000).sum()) - 20_000) < 400  # four standard deviations


def test_whether_is_independent_of_where_crop_cuts() -> None:
    n = 40_000
    x = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    x[:, 0, 4, 4] = 1
    column = crop(Batch(x, index=torch.arange(n))).x.flatten(1).long().argmax(1) % 9
    share = torch.stack([mirrored(n)[column == c].float().mean() for c in range(9)])
    assert bool(((share - 0.5).abs() < 0.03).all())  # four standard deviations


def test_only_x_changes() -> None:
    y, index, lesson = torch.tensor([2, IGNORE]), torch.tensor([5, 8]), Lesson(classes=3)
    x = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4)
    kept = x.clone()
    batch = Batch(x, y, index, lesson, labelled=torch.tensor(1.0))
    shown = flip(batch)
    assert shown.y is y and shown.index is index and shown.lesson is lesson
    assert shown.labelled is batch.labelled and torch.equal(x, kept)


@pytest.mark.parametrize(
    ("x", "index", "found"),
    [
        (torch.zeros(2, 16), torch.arange(2), r"shape \(2, 16\) with an index"),
        ({"pixels": torch.zeros(2, 1, 4, 4)}, torch.arange(2), "a dict"),
        (torch.zeros(2, 1, 4, 4), None, "without an index"),
    ],
)
def test_what_is_no_numbered_image_is_refused(x: object, index: Tensor | None, found: str) -> None:
    with pytest.raises(Refused, match=f"Flip .*{found}.*expected") as caught:
        flip(Batch(x, index=index))
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "flip") is flip
