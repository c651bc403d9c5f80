"""Attentions of two networks against slow loops, on any grids; what an attention over layers did is kept."""

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.attention_maps import (
    AttentionWatch,
    LayerVectors,
    attention,
    attention_gaps,
    energy,
    expect_layers,
    expect_rows,
    similarity,
)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_energy(x: Tensor) -> Tensor:
    """b h w: the sum of squares, one channel at a time."""
    return sum(x[:, c] ** 2 for c in range(x.shape[1]))


def slow_pool(e: Tensor, h: int, w: int) -> Tensor:
    """Each new cell is the mean of all old cells that it touches; it may touch but one."""

    def touched(i: int, new: int, old: int) -> slice:
        return slice(i * old // new, math.ceil((i + 1) * old / new))

    cells = [
        e[:, touched(i, h, e.shape[1]), touched(j, w, e.shape[2])].mean((1, 2))
        for i in range(h)
        for j in range(w)
    ]
    return torch.stack(cells, 1)


def slow_unit(x: Tensor) -> Tensor:
    return torch.stack([row / math.sqrt(sum(v * v for v in row.tolist())) for row in x])


S = [maps(3, 2, 6, 6), maps(3, 4, 4, 6, seed=1), maps(3, 5, 2, 2, seed=2)]
T = [maps(3, 3, 4, 4, seed=3), maps(3, 7, 3, 2, seed=4), maps(3, 2, 4, 4, seed=5), maps(3, 2, 8, 8, seed=6)]


def test_every_two_maps_are_compared_on_the_teachers_grid() -> None:
    cosine, gap = attention_gaps(S, T)
    assert cosine.shape == gap.shape == (3, 3, 4)
    for i, s in enumerate(S):
        for j, t in enumerate(T):
            here = slow_unit(slow_pool(slow_energy(s), *t.shape[2:]))
            there = slow_unit(slow_energy(t).flatten(1))
            torch.testing.assert_close(gap[:, i, j], (here - there).square().sum(1))
            torch.testing.assert_close(cosine[:, i, j], (here * there).sum(1))


def test_attention_is_the_units_of_energy() -> None:
    torch.testing.assert_close(attention(S[0]), slow_unit(slow_energy(S[0]).flatten(1)))
    torch.testing.assert_close(energy(S[0]).amax((1, 2)), torch.ones(3).double())


def test_strength_does_not_matter_nor_that_it_is_faint() -> None:
    single = [x.float() for x in S], [x.float() for x in T]
    _, gap = attention_gaps(*single)
    for strength in (1e-6, 1e6):
        _, other = attention_gaps([strength * x for x in single[0]], [x / strength for x in single[1]])
        torch.testing.assert_close(other, gap)


def test_a_map_of_zeros_attends_nowhere() -> None:
    blank = [torch.zeros_like(T[0])]
    (cosine, gap), (_, none) = attention_gaps([T[0]], blank), attention_gaps(blank, blank)
    torch.testing.assert_close((cosine, gap), (torch.zeros(3, 1, 1).double(), torch.ones(3, 1, 1).double()))
    assert not none.any()


def test_gaps_are_never_negative_and_autocast_does_not_blur_them() -> None:
    x = [torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(0))]
    _, gap = attention_gaps(x, x)
    assert gap.min() >= 0 and gap.max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        _, blurred = attention_gaps(x, x)
    assert torch.equal(blurred, gap)


def test_gradcheck() -> None:
    few = [x[:2, :2].clone().requires_grad_() for x in (S[0], S[2])]
    there = [T[0][:2], T[1][:2]]
    assert torch.autograd.gradcheck(lambda *s: attention_gaps(s, there), few)


# --- layers as vectors ---


def test_layer_vectors_are_normalised_linear_maps_of_means() -> None:
    torch.manual_seed(0)
    vectors = LayerVectors(S, 5).double()
    shown = vectors(S)
    for n, x in enumerate(S):
        linear, norm = vectors.embed[n]
        v = torch.stack([x.flatten(2)[:, :, i] for i in range(x[0, 0].numel())]).mean(0) @ linear.weight.T
        expected = (v - v.mean(0)) / (v.var(0, unbiased=False) + norm.eps).sqrt()
        torch.testing.assert_close(shown[:, n], expected)
    assert vectors.position.shape == (3, 5)
    first = LayerVectors([S[0]] * 50, 50).position / math.sqrt(2 / 100)
    assert 0.9 < first.std() < 1.1 and first.abs().max() > 2.5, "Xavier, normal"


def test_similarities_are_scaled() -> None:
    products, q, k = maps(2, 3, 4), maps(3, 9, seed=1), maps(4, 9, seed=2)
    found = similarity(products, q, k)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                expected = (products[b, i, j] + sum(q[i] * k[j])) / 3
                assert found[b, i, j].item() == pytest.approx(expected.item())


def test_what_an_attention_did_is_kept_of_training_only() -> None:
    watch = AttentionWatch(2, 3)
    alpha = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0]], [[1.0, 0, 0], [0, 0.25, 0.75]]])
    watch(alpha)
    torch.testing.assert_close(watch.share, torch.tensor([[1, 0, 0], [0.25, 0.375, 0.375]]))
    torch.testing.assert_close(watch.chosen, torch.tensor([0.75, 0.5, 0.25]))
    entropy = (math.log(2) + 0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / 4
    assert watch.figures() == pytest.approx({"entropy": entropy, "top_pair": 0.5})
    watch.eval()(torch.full((2, 2, 3), 1 / 3))
    assert watch.figures() == pytest.approx({"entropy": entropy, "top_pair": 0.5})


# --- what is refused ---


@pytest.mark.parametrize("shape", [(3, 5), (3, 18, 5), (3, 5, 1, 1), (3, 1, 5)])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_what_shows_no_place_is_refused_with_all_shapes(who: str, shape: tuple[int, ...]) -> None:
    good = Seen(None, {"a": torch.zeros(3, 2, 4, 4), "b": torch.zeros(3, 17, 6)})
    bad = Seen(None, {"a": torch.zeros(3, 7, 2, 2), "b": torch.zeros(shape)})
    s, t = (bad, good) if who == "student" else (good, bad)
    with pytest.raises(Refused) as caught:
        expect_layers("it", ("a", "b"), s, ("a", "b"), t)
    for part in (f"the {who} shows 'b' {shape}", "'it'", "(3, 2, 4, 4)", "(3, 17, 6)", "(3, 7, 2, 2)"):
        assert part in str(caught.value)
    expect_layers("it", ("a",), s, ("a",), t)


def test_one_row_is_refused() -> None:
    with pytest.raises(Refused, match=r"'it' normalises over the rows.* has 1.*at least 2"):
        expect_rows("it", 1)
    expect_rows("it", 2)
