"""Images with numbers, or a sentence that says what came instead."""

import pytest
import torch

from limbeck import Batch, Refused
from limbeck.pieces import images


def test_images_and_their_numbers_are_given_as_they_are() -> None:
    batch = Batch(torch.zeros(2, 3, 4, 5), index=torch.tensor([7, 1]))
    x, index = images.numbered(batch, "Blur softens")
    assert x is batch.x and index is batch.index


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (Batch(torch.zeros(2, 3, 4), index=torch.arange(2)), r"shape \(2, 3, 4\) with an index"),
        (Batch([1, 2], index=torch.arange(2)), "a list with an index"),
        (Batch(torch.zeros(2, 3, 4, 5)), r"shape \(2, 3, 4, 5\) without an index"),
    ],
)
def test_what_is_no_numbered_image_is_refused(batch: Batch, found: str) -> None:
    with pytest.raises(
        Refused, match=f"^Blur softens images .*x has {found}, expected .*leave this view out"
    ):
        images.numbered(batch, "Blur softens")


def test_turning_four_times_is_the_image_again() -> None:
    x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    wide = images.turned(x)
    assert torch.equal(wide[0::4], x)
    assert torch.equal(images.turned(wide[1::4])[1::4], wide[2::4])
    assert torch.equal(images.turned(wide[3::4])[1::4], x)


@pytest.mark.parametrize("ways", [1, 4])
def test_joint_labels_are_each_class_in_each_way_once(ways: int) -> None:
    labels = images.joint_labels(torch.arange(7), ways).tolist()
    assert sorted(labels) == list(range(7 * ways))
    for row, label in enumerate(labels):
        assert divmod(label, ways) == divmod(row, ways)  # class, way
    assert images.joint_labels(torch.tensor([-100, 2]), ways)[:ways].tolist() == [-100] * ways
