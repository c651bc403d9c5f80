"""Cutout: the slow way round, a square around every pixel equally often, one draw for each sample."""

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.keyed import keyed
from limbeck.views.cutout import cutout


def images(*shape: int) -> Tensor:
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def slow(batch: Batch, size: int) -> Tensor:
    """Image by image, pixel by pixel."""
    shown = batch.x.clone()
    for n, (down, right) in enumerate(keyed(batch.lesson, batch.index, "cutout", 2).tolist()):
        h, w = batch.x.shape[2:]
        top, left = int(down * h) - size // 2, int(right * w) - size // 2
        for i in range(max(0, top), min(h, top + size)):
            for j in range(max(0, left), min(w, left + size)):
                shown[n, :, i, j] = 0
    return shown


@pytest.mark.parametrize(("shape", "size"), [((7, 3, 8, 8), 4), ((5, 1, 6, 11), 3), ((6, 2, 3, 2), 16)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_it_is_the_slow_way_for_every_size_and_dtype(
    shape: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    batch = Batch(images(*shape).to(dtype), index=torch.arange(shape[0]) * 31, lesson=Lesson(seed=3, epoch=2))
    shown = cutout(batch, size).x
    assert shown.dtype == dtype and torch.equal(shown, slow(batch, size))
    assert not torch.equal(shown, batch.x)


def test_a_sample_is_cut_alike_in_any_batch_and_anew_in_every_epoch_seed_and_purpose() -> None:
    x, index, lesson = images(40, 1, 8, 8), torch.arange(40), Lesson(seed=1, epoch=4)
    whole = cutout(Batch(x, index=index, lesson=lesson), 4).x
    some = torch.tensor([31, 2, 2, 17])
    assert torch.equal(cutout(Batch(x[some], index=index[some], lesson=lesson), 4).x, whole[some])
    for other in (Lesson(seed=2, epoch=4), Lesson(seed=1, epoch=5)):
        assert not torch.equal(cutout(Batch(x, index=index, lesson=other), 4).x, whole)
    assert not torch.equal(cutout(Batch(x, index=index, lesson=lesson), 4, purpose="another").x, whole)


def test_its_middle_is_every_pixel_equally_often() -> None:
    n = 7000
    shown = cutout(Batch(torch.ones(n, 1, 5, 7), index=torch.arange(n)), size=1).x
    assert bool(((1 - shown).sum((1, 2, 3)) == 1).all())
    counts = (1 - shown).sum(0).flatten()
    assert float(((counts - 200) ** 2 / 200).sum()) < 72  # chi squared of 34 degrees: 99.98 % lie below


def test_at_another_resolution_it_is_the_same_square() -> None:
    """So a teacher of larger images misses what its student misses, to within a pixel of its own."""
    index, lesson = torch.arange(60), Lesson(seed=3, epoch=2)
    small = cutout(Batch(torch.ones(60, 1, 8, 10), index=index, lesson=lesson), size=4).x
    large = cutout(Batch(torch.ones(60, 1, 16, 20), index=index, lesson=lesson), size=8).x
    for few, many in zip(small, large, strict=True):
        for axis in (1, 2):
            first, begun = ((x == 0).any(3 - axis)[0].long().argmax() for x in (few, many))
            assert 0 <= int(begun) - 2 * int(first) <= 1
    assert len(small.unique(dim=0)) > 30


def test_without_size_it_is_the_batch_and_only_x_changes() -> None:
    batch = Batch(images(2, 1, 4, 4), torch.tensor([2, -100]), torch.tensor([5, 8]), Lesson(classes=3))
    kept = batch.x.clone()
    assert torch.equal(cutout(batch, size=0).x, kept)
    shown = cutout(batch)
    assert shown.y is batch.y and shown.index is batch.index and shown.lesson is batch.lesson
    assert torch.equal(batch.x, kept)


@pytest.mark.parametrize(
    ("batch", "size", "found"),
    [
        (Batch(torch.zeros(2, 16), index=torch.arange(2)), 4, r"shape \(2, 16\) with an index.*expected"),
        (Batch(torch.zeros(2, 1, 4, 4)), 4, "without an index.*expected"),
        (Batch(torch.zeros(2, 1, 4, 4), index=torch.arange(2)), -1, "it is -1; expected 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(batch: Batch, size: int, found: str) -> None:
    with pytest.raises(Refused, match=f"Cutout .*{found}") as caught:
        cutout(batch, size)
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "cutout") is cutout
