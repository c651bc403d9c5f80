"""Crop: the slow way round, one draw for each sample wherever it lies, every place equally often."""

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.batch import IGNORE
from limbeck.core.keyed import keyed
from limbeck.views.crop import crop


def slow(batch: Batch, pad: int = 4, purpose: str = "crop") -> Tensor:
    """Image by image, pixel by pixel."""
    shown = torch.zeros_like(batch.x)
    for n, (down, right) in enumerate(keyed(batch.lesson, batch.index, purpose, 2).tolist()):
        dy, dx = (int(draw * (2 * pad + 1)) - pad for draw in (down, right))
        _, h, w = batch.x[n].shape
        for i in range(max(0, -dy), min(h, h - dy)):
            for j in range(max(0, -dx), min(w, w - dx)):
                shown[n, :, i, j] = batch.x[n, :, i + dy, j + dx]
    return shown


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((7, 3, 8, 8), torch.uint8), ((5, 1, 6, 11), torch.float32), ((3, 2, 3, 2), torch.uint8)],
)
def test_it_is_the_slow_way_for_every_size_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = Batch(x, index=torch.arange(len(x)) * 31 + 5, lesson=Lesson(seed=3, epoch=2))
    shown = crop(batch).x
    assert shown.dtype == dtype and torch.equal(shown, slow(batch))
    assert not torch.equal(shown, x)


@pytest.mark.parametrize("pad", [0, 1, 3, 7])
def test_it_shifts_by_as_much_as_is_said_and_under_another_purpose_otherwise(pad: int) -> None:
    x = torch.randint(1, 256, (30, 2, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch(x, index=torch.arange(30), lesson=Lesson(seed=3))
    shown, other = crop(batch, pad).x, crop(batch, pad, purpose="another").x
    assert torch.equal(shown, slow(batch, pad)) and torch.equal(other, slow(batch, pad, "another"))
    assert torch.equal(shown, other) == (pad == 0)


def test_a_pad_below_0_is_refused() -> None:
    with pytest.raises(Refused, match=r"Crop .*`pad` pixels, and it is -1; expected 0 or more"):
        crop(Batch(torch.zeros(2, 1, 4, 4), index=torch.arange(2)), pad=-1)


def test_it_does_not_matter_how_numbers_lie_in_memory() -> None:
    x = torch.arange(2 * 3 * 8 * 6, dtype=torch.float32).view(2, 3, 8, 6)
    plain = crop(Batch(x, index=torch.arange(2))).x
    for lying in (x.to(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., :6]):
        assert torch.equal(crop(Batch(lying, index=torch.arange(2))).x, plain)


def test_a_sample_is_cut_alike_in_any_batch_and_anew_in_every_epoch_and_seed() -> None:
    x = torch.randint(1, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    index, lesson = torch.arange(40), Lesson(seed=1, epoch=4)
    whole = crop(Batch(x, index=index, lesson=lesson)).x
    some = torch.tensor([31, 2, 2, 17])
    assert torch.equal(crop(Batch(x[some], index=index[some], lesson=lesson)).x, whole[some])
    for other in (Lesson(seed=2, epoch=4), Lesson(seed=1, epoch=5)):
        assert not torch.equal(crop(Batch(x, index=index, lesson=other)).x, whole)
    later = Lesson(seed=1, epoch=4, epochs=9, step=77, samples=3)
    assert torch.equal(crop(Batch(x, index=index, lesson=later)).x, whole)


def test_all_81_places_come_equally_often() -> None:
    n = 16_200
    x = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    x[:, 0, 4, 4] = 1  # the one pixel that is still there after any shift, and tells where it went
    at = crop(Batch(x, index=torch.arange(n))).x.flatten(1).long().argmax(1)
    counts = torch.bincount(at, minlength=81).double()
    assert len(counts) == 81
    assert float(((counts - 200) ** 2 / 200).sum()) < 130  # chi squared of 80 degrees: 99.95 % lie below


def test_only_x_changes() -> None:
    y, index, lesson = torch.tensor([2, IGNORE]), torch.tensor([5, 8]), Lesson(classes=3)
    x = torch.ones(2, 1, 4, 4, dtype=torch.uint8)
    batch = Batch(x, y, index, lesson, labelled=torch.tensor(1.0))
    shown = crop(batch)
    assert shown.y is y and shown.index is index and shown.lesson is lesson
    assert shown.labelled is batch.labelled and bool((x == 1).all())


@pytest.mark.parametrize(
    ("x", "index", "found"),
    [
        (torch.zeros(2, 16), torch.arange(2), r"shape \(2, 16\) with an index"),
        ({"pixels": torch.zeros(2, 1, 4, 4)}, torch.arange(2), "a dict"),
        (torch.zeros(2, 1, 4, 4), None, "without an index"),
    ],
)
def test_what_is_no_numbered_image_is_refused(x: object, index: Tensor | None, found: str) -> None:
    with pytest.raises(Refused, match=f"Crop .*{found}.*expected") as caught:
        crop(Batch(x, index=index))
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "crop") is crop
