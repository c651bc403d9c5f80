"""The embedded digits: real images, a split that never changes."""

from hashlib import sha256

import pytest
import torch
from sklearn.datasets import load_digits

from limbeck.data.digits import load
from limbeck.data.loader import Splits


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load()


def test_the_three_parts_are_all_the_images_and_share_none(splits: Splits) -> None:
    images, labels = load_digits(return_X_y=True)
    parts = (splits.train, splits.valid, splits.test)
    assert [len(part) for part in parts] == [1257, 180, 360]

    def told(x: torch.Tensor, y: torch.Tensor) -> list[tuple[bytes, int]]:
        return sorted((image.numpy().tobytes(), int(label)) for image, label in zip(x, y, strict=True))

    x = torch.cat([part.x for part in parts])
    y = torch.cat([part.y for part in parts])
    whole = torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8)
    assert told(x, y) == told(whole, torch.from_numpy(labels))


def test_every_part_has_every_class_in_its_share(splits: Splits) -> None:
    for part in (splits.train, splits.valid, splits.test):
        counts = torch.bincount(part.y, minlength=10)
        assert len(counts) == len(part.classes) == 10
        assert int(counts.max() - counts.min()) <= 0.1 * len(part) / 10 + 1


def test_pixels_are_small_and_come_normalised_by_the_training_part(splits: Splits) -> None:
    assert splits.train.x.dtype == torch.uint8
    assert (int(splits.train.x.min()), int(splits.train.x.max())) == (0, 16)
    x, y = splits.train.rows(torch.arange(1257))
    assert x.shape == (1257, 1, 8, 8) and y.dtype == torch.long
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-4
    assert (splits.test.mean, splits.test.std) == (splits.train.mean, splits.train.std)


def test_the_split_is_pinned(splits: Splits) -> None:
    """Scores are compared over years; they mean nothing once the test part has moved."""
    told = sha256(splits.test.x.numpy().tobytes() + splits.test.y.numpy().tobytes()).hexdigest()
    assert told[:16] == "3ea49a6c5c1f0810"
