"""Grids are brought together by averaging the larger one; tokens are maps; what shows no map is refused."""

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, expect_maps, on_smaller_grid, shown


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
    ("s", "t"), [((2, 8, 4, 4), (2, 18, 16)), ((2, 18, 16), (2, 8, 4, 4)), ((2, 8), (2, 8))]
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


def test_maps_are_expected_only_where_one_looks_and_tokens_may_make_one() -> None:
    seen = Seen(None, {"stage1": torch.zeros(2, 3, 4, 4), "pooled": torch.zeros(2, 3)})
    for tokens in (16, 17):
        expect_maps("it", ("stage1",), seen, Seen(None, {"stage1": torch.zeros(2, tokens, 3)}))


def test_both_layers_are_named_where_they_are_known() -> None:
    student = nn.ModuleDict({"stages": nn.Sequential(nn.Identity(), nn.Identity())})
    teacher = nn.ModuleDict({"layer2": nn.Identity()})
    s = Seen(None, {"stage2": torch.zeros(8, 64, 192)}, None, student, {"stage2": student["stages"][1]})
    t = Seen(None, {"stage2": torch.zeros(8, 32, 8, 8)}, None, teacher, {"stage2": teacher["layer2"]})
    assert shown("stage2", s, t) == (
        "tap 'stage2' (stages.1) shows (8, 64, 192) in the student and "
        "tap 'stage2' (layer2) (8, 32, 8, 8) in the teacher"
    )
    stored = Seen(None, t.at)
    assert shown("stage2", s, stored).endswith("and tap 'stage2' (8, 32, 8, 8) in the teacher")
    by_path = Seen(None, {"layer2": t.at["stage2"]}, None, teacher, {"layer2": teacher["layer2"]})
    assert shown("layer2", by_path, by_path).count("(layer2)") == 0  # said already


# --- tokens ---


def slow_map(x: Tensor, h: int, w: int) -> Tensor:
    """The last h w tokens, laid out row by row."""
    out = torch.empty(len(x), x.shape[2], h, w, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            out[:, :, i, j] = x[:, x.shape[1] - h * w + i * w + j]
    return out


@pytest.mark.parametrize(
    ("tokens", "grid", "made"),
    [
        (16, None, (4, 4)),
        (17, None, (4, 4)),
        (1, None, (1, 1)),
        (6, (2, 3), (2, 3)),
        (7, (3, 2), (3, 2)),
        (17, (2, 8), (2, 8)),
    ],
    ids=["square", "class token", "one", "wide", "class token, tall", "told so"],
)
def test_tokens_are_laid_out_row_by_row(
    tokens: int, grid: tuple[int, int] | None, made: tuple[int, int]
) -> None:
    x = maps(3, tokens, 5)
    assert torch.equal(as_map(x, grid), slow_map(x, *made))


def test_a_map_is_left_alone() -> None:
    x = maps(2, 3, 5, 4)
    assert as_map(x) is x


@pytest.mark.parametrize(
    ("shape", "grid", "wanted"),
    [
        ((2, 18, 5), None, "square"),
        ((2, 0, 5), None, "square"),
        ((2, 17, 5), (3, 5), "3x5"),
        ((2, 14, 5), (4, 4), "4x4"),
        ((2, 5), None, "square"),
        ((2, 3, 4, 4, 4), None, "square"),
    ],
)
def test_what_makes_no_grid_is_refused(
    shape: tuple[int, ...], grid: tuple[int, int] | None, wanted: str
) -> None:
    with pytest.raises(Refused) as caught:
        as_map(torch.zeros(shape), grid)
    assert f"{wanted} grid" in str(caught.value) and str(shape) in str(caught.value)
