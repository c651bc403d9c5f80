"""A Batch keeps its rows together, whatever is done to it."""

import pytest
import torch

from limbeck.core.batch import Batch, Lesson


def batch(rows: int = 7) -> Batch:
    x = torch.arange(rows * 2.0).reshape(rows, 2)
    return Batch(x, torch.arange(rows), 10 + torch.arange(rows), Lesson(seed=3, epoch=4, step=5))


def test_rows_are_counted_on_a_tensor_and_on_a_mapping() -> None:
    assert batch(7).rows == 7
    assert Batch({"ids": torch.zeros(3, 9), "attention_mask": torch.ones(3, 9)}).rows == 3


def test_map_changes_x_y_and_index_and_leaves_the_clock() -> None:
    flipped = batch().map(lambda v: v.flip(0))
    assert torch.equal(flipped.x, batch().x.flip(0))
    assert flipped.y.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert flipped.index.tolist() == [16, 15, 14, 13, 12, 11, 10]
    assert flipped.lesson == batch().lesson


def test_map_reaches_every_entry_of_a_mapping_and_passes_over_what_is_not_there() -> None:
    ids, mask = torch.arange(6).reshape(3, 2), torch.ones(3, 2)
    cut = Batch({"ids": ids, "attention_mask": mask}).map(lambda v: v[:2])
    assert torch.equal(cut.x["ids"], ids[:2])
    assert torch.equal(cut.x["attention_mask"], mask[:2])
    assert cut.y is None and cut.index is None


def test_to_moves_everything_to_the_device() -> None:
    moved = batch().to(torch.device("meta"))
    assert [v.device.type for v in (moved.x, moved.y, moved.index)] == ["meta"] * 3


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_split_cuts_consecutive_pieces_at_most_one_row_apart(parts: int) -> None:
    pieces = list(batch().split(parts))
    assert len(pieces) == parts
    assert max(p.rows for p in pieces) - min(p.rows for p in pieces) <= 1
    assert torch.equal(torch.cat([p.x for p in pieces]), batch().x)
    assert torch.cat([p.y for p in pieces]).tolist() == batch().y.tolist()
    assert torch.cat([p.index for p in pieces]).tolist() == batch().index.tolist()
    assert all(p.lesson == batch().lesson for p in pieces)


def test_replace_scales_the_number_of_labelled_rows_with_the_rows() -> None:
    counted = batch(8).replace(labelled=torch.tensor(6.0))
    four_views = counted.replace(
        x=counted.x.repeat(4, 1), y=counted.y.repeat(4), index=counted.index.repeat(4)
    )
    assert float(four_views.labelled) == 24.0
    half = counted.replace(x=counted.x[:4], y=counted.y[:4], index=counted.index[:4])
    assert float(half.labelled) == 3.0


def test_replace_leaves_the_number_of_labelled_rows_when_the_rows_stay_or_it_is_given() -> None:
    counted = batch(8).replace(labelled=torch.tensor(6.0))
    assert float(counted.replace(y=counted.y.flip(0)).labelled) == 6.0
    assert float(counted.replace(x=counted.x[:4], labelled=torch.tensor(5.0)).labelled) == 5.0
    assert batch(8).replace(x=counted.x[:4]).labelled is None
