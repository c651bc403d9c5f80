"""Parts of a data set: drawn by name, of every class its share, and never smaller than the classes."""

from dataclasses import replace

import pytest
import torch

from limbeck.core.batch import IGNORE
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits

CLASSES = ("cat", "dog", "eel")


def part(first: int, stop: int) -> Data:
    """Row n holds n; its class is n modulo 3."""
    x = torch.arange(first, stop)
    return Data(x.view(-1, 1, 1, 1), x % 3, CLASSES, 0.5, 1.0, 2.0)


def rows(data: Data) -> list[int]:
    return data.x.flatten().tolist()


def whole() -> Splits:
    return Splits(part(0, 80), part(80, 120), part(120, 180))


# --- drawing ---


def test_every_class_gives_its_share_and_each_row_lies_in_one_part() -> None:
    rest, drawn = part(0, 300).split(0.2, "set")
    assert torch.bincount(drawn.y).tolist() == [20] * 3 and torch.bincount(rest.y).tolist() == [80] * 3
    assert sorted(rows(rest) + rows(drawn)) == list(range(300))
    assert rows(drawn) == sorted(rows(drawn)) and all(
        n % 3 == y for n, y in zip(rows(drawn), drawn.y, strict=True)
    )
    assert (drawn.classes, drawn.scale, drawn.mean, drawn.std) == (CLASSES, 0.5, 1.0, 2.0)


def test_the_name_draws_and_nothing_else() -> None:
    first = part(0, 300).split(0.2, "set")[1]
    torch.manual_seed(9)
    assert rows(part(0, 300).split(0.2, "set")[1]) == rows(first)
    assert rows(part(0, 300).split(0.2, "other")[1]) != rows(first)
    assert rows(first)[:6] == [6, 7, 16, 17, 21, 25]  # scores are compared over years


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    shares = [set(rows(part(0, 300).split(share, "set")[1])) for share in (0.1, 0.3, 0.7)]
    assert shares[0] < shares[1] < shares[2]


def test_a_class_keeps_a_row_to_learn_from_and_rows_without_a_label_stay() -> None:
    y = torch.tensor([0] * 10 + [1] * 2 + [2] * 20 + [IGNORE] * 30)
    rest, drawn = Data(torch.zeros(62, 1), y, CLASSES).split(0.9, "set")
    assert torch.bincount(drawn.y).tolist() == [9, 1, 18]
    assert torch.bincount(rest.y[rest.y != IGNORE]).tolist() == [1, 1, 2] and len(rest) == 34


def test_a_validation_split_smaller_than_the_classes_is_refused() -> None:
    with pytest.raises(Refused, match=r"split of 0\.02 takes 0 of 60 samples, fewer than the 3 classes"):
        part(0, 60).split(0.02, "set")
    y = torch.tensor([0] * 40 + [1] * 10 + [2] * 10)
    with pytest.raises(Refused, match=r"split of 0\.04 takes 2 of 60 samples, fewer than the 3 classes"):
        Data(torch.zeros(60, 1), y, CLASSES).split(0.04, "set")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(Refused, match=f"validation split of {share} .*between 0 and 1"):
        part(0, 60).split(share, "set")


# --- three parts ---


def test_another_validation_part_is_drawn_from_all_but_the_test_part() -> None:
    before = whole()
    splits = before.with_validation(0.25, "set")
    assert sorted(rows(splits.train) + rows(splits.valid)) == list(range(120))
    assert torch.bincount(splits.valid.y).tolist() == [10] * 3
    assert splits.test is before.test and splits.train.scale == 0.5
    assert (
        rows(before.with_validation(0.25, "set").valid)
        == rows(splits.valid)
        != rows(before.with_validation(0.25).valid)
    )
    unseen = replace(before, unseen=part(200, 230))
    assert unseen.with_validation(0.1).unseen is unseen.unseen


@pytest.mark.parametrize("change", [{"scale": 1.0}, {"mean": 0.0}, {"std": 1.0}, {"classes": tuple("abc")}])
def test_parts_that_are_kept_differently_are_not_mixed(change: dict[str, object]) -> None:
    odd = replace(whole(), valid=replace(part(80, 120), **change))  # type: ignore[arg-type]
    with pytest.raises(Refused, match="differ in classes, dtype, scale, mean or std"):
        odd.with_validation(0.1)
    small = replace(part(80, 120), x=part(80, 120).x.to(torch.uint8))
    with pytest.raises(Refused, match="differ in classes, dtype"):
        replace(whole(), valid=small).with_validation(0.1)


def test_a_validation_part_smaller_than_its_classes_is_refused() -> None:
    assert len(replace(whole(), valid=part(0, 3)).valid) == 3
    with pytest.raises(Refused, match="validation data has 2 samples, fewer than its 3 classes"):
        replace(whole(), valid=part(0, 2))


@pytest.mark.parametrize(
    ("field", "called"), [("valid", "validation"), ("test", "test"), ("unseen", "unseen")]
)
def test_a_part_of_another_shape_is_refused_before_anybody_learns(field: str, called: str) -> None:
    odd = Data(torch.zeros(6, 3, 1, 1), torch.arange(6) % 3, CLASSES)
    with pytest.raises(Refused, match=rf"{called} data has shape \(3, 1, 1\), expected \(1, 1, 1\)"):
        replace(whole(), **{field: odd})  # type: ignore[arg-type]


# --- statistics ---


@pytest.mark.parametrize("shape", [(50, 3, 6, 5), (50, 4), (50, 2, 7)])
def test_standardised_is_what_it_says(shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Data(x, torch.zeros(50, dtype=torch.long), ("one",), 1 / 16).standardised()
    assert data.x is x and data.scale == 1 / 16
    each = (x.double() / 16).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(data.mean).double(), each.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(data.std).double(), each.std(1, correction=0), rtol=1e-6, atol=0)


def test_a_channel_of_one_value_is_only_centred() -> None:
    x = torch.full((4, 2, 3, 3), 7, dtype=torch.uint8)
    x[0, 1] = 9
    shown, _ = Data(x, torch.zeros(4, dtype=torch.long), ("one",)).standardised().rows(torch.arange(4))
    assert (
        bool((shown[:, 0] == 0).all()) and bool(torch.isfinite(shown).all()) and float(shown[0, 1, 0, 0]) > 1
    )
