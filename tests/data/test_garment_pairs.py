"""Two garments side by side, of small images in place of the real ones."""

import numpy as np
import pytest
import torch

from limbeck import registry
from limbeck.core.refused import Refused
from limbeck.data import fashion_mnist, garment_pairs
from limbeck.data.loader import Data, Splits


def part(count: int, seed: int) -> Data:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 1, 28, 28), generator=draw, dtype=torch.uint8)
    return Data(x, torch.arange(count) % 10, fashion_mnist.CLASSES, 1 / 255, 0.2, 0.3)


WHOLE = Splits(part(300, 0), part(40, 1), part(50, 2))


@pytest.fixture(autouse=True)
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "load", lambda root: WHOLE)


def small(image: torch.Tensor) -> np.ndarray:
    """The mean of each block of four, a half rounded up."""
    found = np.zeros((14, 14), np.uint8)
    for i in range(14):
        for j in range(14):
            four = [int(image[0, 2 * i + a, 2 * j + b]) for a in (0, 1) for b in (0, 1)]
            found[i, j] = int(np.floor(sum(four) / 4 + 0.5))
    return found


def test_each_is_two_of_its_own_parts_images_halved_and_classed_by_both() -> None:
    splits = garment_pairs.load(train=120, validation=100, test=110)
    parts = ((splits.train, WHOLE.train), (splits.valid, WHOLE.valid), (splits.test, WHOLE.test))
    for (pairs, singles), count in zip(parts, (120, 100, 110), strict=True):
        assert pairs.x.shape == (count, 1, 14, 28) and pairs.x.dtype == torch.uint8
        known = {small(x).tobytes(): int(y) for x, y in zip(singles.x, singles.y, strict=True)}
        for image, label in zip(pairs.x, pairs.y.tolist(), strict=True):
            left, right = (np.ascontiguousarray(half).tobytes() for half in np.split(image[0].numpy(), 2, 1))
            assert label == 10 * known[left] + known[right]


def test_a_class_is_called_by_both_garments() -> None:
    classes = garment_pairs.load(train=100, validation=100, test=100).train.classes
    assert len(classes) == len(set(classes)) == 100
    assert (classes[7], classes[70]) == ("T-shirt/top + Sneaker", "Sneaker + T-shirt/top")


def test_more_pairs_begin_as_fewer_and_parts_differ() -> None:
    few, many = (garment_pairs.load(train=n, validation=100, test=n) for n in (100, 400))
    assert torch.equal(many.train.x[:100], few.train.x) and torch.equal(many.test.y[:100], few.test.y)
    assert not torch.equal(few.train.y, few.test.y)
    assert len({bytes(x.numpy().tobytes()) for x in many.train.x}) > 395  # hardly a pair comes twice


def test_parts_of_the_same_images_are_paired_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "load", lambda root: Splits(WHOLE.train, WHOLE.train, WHOLE.train))
    splits = garment_pairs.load(train=100, validation=100, test=100)
    parts = [part.y for part in (splits.train, splits.valid, splits.test)]
    assert all(int((a == b).sum()) < 20 for n, a in enumerate(parts) for b in parts[:n])


def test_models_are_shown_pixels_from_0_to_1() -> None:
    train = garment_pairs.load(train=100, validation=100, test=100).train
    shown, _ = train.rows(torch.arange(100))
    torch.testing.assert_close(shown, train.x / 255)


def test_fewer_than_a_pair_a_class_is_refused() -> None:
    with pytest.raises(Refused, match=r"validation part is to have 99 pairs .*fewer than the 100 classes"):
        garment_pairs.load(validation=99)


def test_a_recipe_finds_it() -> None:
    assert registry.find("data", "garment-pairs") is garment_pairs.load
