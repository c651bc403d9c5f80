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
