"""Redraw: the views after it draw as in another epoch or under another purpose, and nothing else changes."""

import pytest
import torch

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.keyed import keyed
from limbeck.views.crop import crop
from limbeck.views.redraw import redraw


def batch(seed: int = 3, epoch: int = 2) -> Batch:
    x = torch.randint(1, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    lesson = Lesson(seed, epoch, epochs=9, step=77, samples=20)
    return Batch(x, torch.arange(20) % 3, torch.arange(20), lesson)


def test_what_follows_is_the_view_of_that_epoch() -> None:
    then = crop(batch(epoch=0)).x
    for epoch in (0, 1, 5):
        assert torch.equal(crop(redraw(batch(epoch=epoch), epoch=0)).x, then)
    assert not torch.equal(crop(redraw(batch(), epoch=1)).x, then)


def test_another_purpose_is_another_draw_in_every_epoch_and_of_every_seed() -> None:
    def draws(some: Batch) -> torch.Tensor:
        return keyed(some.lesson, some.index, "crop")

    clocks = [batch(seed, epoch) for seed in (3, 4) for epoch in (0, 1)]
    others = [redraw(b, purpose=purpose) for b in clocks for purpose in ("other", "third")]
    found = [draws(shown) for shown in (*clocks, *others)]
    for n, one in enumerate(found):
        assert all((one != other).all() for other in found[:n])
    assert torch.equal(draws(redraw(batch(), purpose="other")), draws(redraw(batch(), purpose="other")))


def test_both_together_are_the_other_draw_of_that_epoch() -> None:
    both = redraw(batch(epoch=5), epoch=1, purpose="other")
    assert torch.equal(crop(both).x, crop(redraw(batch(epoch=1), purpose="other")).x)


def test_only_seed_and_epoch_of_the_lesson_change() -> None:
    b = batch()
    shown = redraw(b, epoch=0, purpose="other")
    assert (shown.x, shown.y, shown.index) == (b.x, b.y, b.index)
    assert (shown.lesson.epochs, shown.lesson.step, shown.lesson.samples) == (9, 77, 20)
    assert (b.lesson.seed, b.lesson.epoch) == (3, 2)


@pytest.mark.parametrize(
    ("epoch", "found"), [(None, "neither `epoch` nor `purpose`"), (-1, "epoch -1; expected 0 or more")]
)
def test_what_changes_nothing_or_cannot_be_is_refused(epoch: int | None, found: str) -> None:
    with pytest.raises(Refused, match=f"Redraw .*{found}"):
        redraw(batch(), epoch)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "redraw") is redraw
