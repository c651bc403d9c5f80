"""Rotations: where each turn of each image lies, and what is written beside it."""

import pytest
import torch

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.batch import IGNORE
from limbeck.views.rotations import rotations


def test_a_small_image_is_turned_counter_clockwise() -> None:
    image = torch.tensor([[1, 2], [3, 4]])
    turns = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    assert torch.equal(rotations(Batch(image[None, None])).x, torch.tensor(turns)[:, None])


def test_the_turns_of_an_image_lie_together() -> None:
    x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    shown = rotations(Batch(x)).x
    assert shown.shape == (12, 2, 5, 5)
    for r in range(4):
        back = shown[r::4].rot90(-r, (2, 3))
        assert torch.equal(back, x)


def test_labels_are_joint_and_the_index_repeats() -> None:
    lesson = Lesson(classes=3, labels=torch.tensor([0, 0, 0, 0, 0, 2, 1, 0, IGNORE]))
    y, index = torch.tensor([2, IGNORE, 1]), torch.tensor([5, 8, 6])
    shown = rotations(Batch(torch.zeros(3, 1, 2, 2), y, index, lesson))
    assert shown.y is not None and shown.index is not None
    assert shown.y.tolist() == [8, 9, 10, 11, IGNORE, IGNORE, IGNORE, IGNORE, 4, 5, 6, 7]
    assert shown.index.tolist() == [5] * 4 + [8] * 4 + [6] * 4
    assert shown.lesson is lesson


def test_a_micro_batch_counts_four_times_the_labelled_rows() -> None:
    batch = Batch(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), labelled=torch.tensor(3.5))
    assert rotations(batch).labelled == torch.tensor(14.0)


def test_what_is_not_there_stays_away() -> None:
    shown = rotations(Batch(torch.zeros(2, 1, 2, 2)))
    assert shown.y is None and shown.index is None and shown.labelled is None


@pytest.mark.parametrize(
    ("x", "y", "found"),
    [
        (torch.zeros(2, 1, 4, 6), None, r"shape \(2, 1, 4, 6\)"),
        (torch.zeros(2, 4, 4), None, r"shape \(2, 4, 4\)"),
        ({"pixels": torch.zeros(2, 1, 4, 4)}, None, "a dict"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), r"y has shape \(2, 4, 4\)"),
    ],
)
def test_what_cannot_be_turned_is_refused(x: object, y: torch.Tensor | None, found: str) -> None:
    with pytest.raises(Refused, match=found) as caught:
        rotations(Batch(x, y))
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "rotations") is rotations
