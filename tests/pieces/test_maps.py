"""Grids are brought together by averaging the larger one; what shows no map is refused."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import expect_maps, on_smaller_grid


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_pool(x: Tensor, h: int, w: int) -> Tensor:
    """Each new cell is the mean of all old cells that it touches."""

    def touched(i: int, new: int, old: int) -> slice:
        return slice(i * old // new, math.ceil((i + 1) * old / new))

    out = torch.empty(*x.shape[:2], h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            cells = x[:, :, touched(i, h, x.shape[2]), touched(j, w, x.shape[3])]
            out[:, :, i, j] = cells.sum((2, 3)) / (cells.shape[2] * cells.shape[3])
    return out


@pytest.mark.parametrize(
    ("s", "t", "grid"),
    [
        ((8, 8), (4, 4), (4, 4)),
        ((3, 5), (7, 5), (3, 5)),
        ((7, 7), (3, 2), (3, 2)),
        ((8, 3), (4, 6), (4, 3)),
        ((1, 1), (5, 4), (1, 1)),
    ],
    ids=["student", "teacher", "uneven", "each in one axis", "to a point"],
)
def test_the_larger_grid_is_averaged(s: tuple[int, int], t: tuple[int, int], grid: tuple[int, int]) -> None:
    s, t = maps(2, 3, *s), maps(2, 4, *t, seed=1)
    here, there = on_smaller_grid(s, t)
    assert here.shape == (2, 3, *grid) and there.shape == (2, 4, *grid)
    torch.testing.assert_close(here, slow_pool(s, *grid))
    torch.testing.assert_close(there, slow_pool(t, *grid))


def test_equal_grids_are_left_alone() -> None:
    s, t = maps(2, 3, 5, 4), maps(2, 6, 5, 4, seed=1)
    here, there = on_smaller_grid(s, t)
    assert here is s and there is t


@pytest.mark.parametrize(
    ("s", "t"), [((2, 8, 4, 4), (2, 17, 16)), ((2, 17, 16), (2, 8, 4, 4)), ((2, 8), (2, 8))]
)
def test_what_is_no_map_is_refused_with_both_shapes(s: tuple[int, ...], t: tuple[int, ...]) -> None:
    a_map = torch.zeros(2, 3, 4, 4)
    with pytest.raises(Refused) as caught:
        expect_maps(
            "it",
            ("stage1", "block3"),
            Seen(None, {"stage1": a_map, "block3": torch.zeros(s)}),
            Seen(None, {"stage1": a_map, "block3": torch.zeros(t)}),
        )
    for part in ("'it'", "'block3'", f"{s} in the student", f"{t} in the teacher", "tap a layer"):
        assert part in str(caught.value)


def test_maps_are_expected_only_where_one_looks() -> None:
    seen = Seen(None, {"stage1": torch.zeros(2, 3, 4, 4), "pooled": torch.zeros(2, 3)})
    expect_maps("it", ("stage1",), seen, seen)
