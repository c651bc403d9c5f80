"""Classes that nobody learns from: what is seen and what is not, and what cannot be parted."""

import pytest
import torch

from limbeck.core.batch import IGNORE
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits
from limbeck.data.unseen import keep_unseen

NAMES = ("cat", "dog", "eel", "fox")


def part(*y: int, offset: int = 0) -> Data:
    x = torch.arange(len(y)).reshape(-1, 1, 1, 1) + offset
    return Data(x, torch.tensor(y), NAMES, scale=0.5, mean=1.0, std=2.0)


WHOLE = Splits(
    train=part(0, 3, 1, IGNORE, 2, 1),
    valid=part(2, 0, 1, 3, offset=10),
    test=part(3, 0, 2, 1, 3, IGNORE, offset=20),
)


def test_nobody_learns_chooses_or_is_tested_on_an_unseen_class() -> None:
    parted = keep_unseen(WHOLE, 2)
    assert [p.y.tolist() for p in (parted.train, parted.valid, parted.test)] == [[0, 1, 1], [0, 1], [0, 1]]
    assert [p.x.flatten().tolist() for p in (parted.train, parted.valid, parted.test)] == [
        [0, 2, 5],
        [11, 12],
        [21, 23],
    ]
    assert parted.train.classes == parted.valid.classes == parted.test.classes == ("cat", "dog")


def test_the_unseen_keep_their_labels_and_names_and_are_the_tests_own() -> None:
    unseen = keep_unseen(WHOLE, 2).unseen
    assert unseen is not None
    assert (unseen.y.tolist(), unseen.x.flatten().tolist()) == ([3, 2, 3], [20, 22, 24])
    assert [unseen.classes[y] for y in unseen.y] == ["fox", "eel", "fox"]


def test_pixels_are_read_as_before() -> None:
    parted = keep_unseen(WHOLE, 3)
    assert parted.unseen is not None
    assert {(p.scale, p.mean, p.std) for p in (parted.train, parted.unseen)} == {(0.5, 1.0, 2.0)}


def test_a_whole_data_set_has_nothing_unseen() -> None:
    assert WHOLE.unseen is None


@pytest.mark.parametrize("seen", [0, 4, -1])
def test_a_side_without_classes_is_refused(seen: int) -> None:
    with pytest.raises(Refused, match=f"first {seen} of 4 classes.*ask for 1 to 3"):
        keep_unseen(WHOLE, seen)


def test_a_part_without_rows_is_refused() -> None:
    with pytest.raises(Refused, match="0 inputs and 0 labels"):
        keep_unseen(Splits(WHOLE.train, WHOLE.valid, part(0, 1)), 2)
