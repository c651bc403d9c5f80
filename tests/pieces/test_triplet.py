"""The triplet loss and its triplets, against loops over all rows of a small batch."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import IGNORE
from limbeck.pieces.distances import distances
from limbeck.pieces.triplet import all_triplets, distance_weighted, semi_hard, triplet

Y = torch.tensor([0, 1, 0, IGNORE, 2, 1, 0, IGNORE, 2, 3])


def rows(b: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sphere(b: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(rows(b, d, seed))


def numbers(b: int, seed: int = 0) -> Tensor:
    return torch.rand(b, 2, generator=torch.Generator().manual_seed(seed))


def pairs(y: Tensor) -> list[tuple[int, int]]:
    labels = y.tolist()
    return [(a, p) for a, p in itertools.permutations(range(len(y)), 2) if labels[a] == labels[p] != IGNORE]


def negatives(y: Tensor, anchor: int) -> list[int]:
    return [n for n, label in enumerate(y.tolist()) if label not in (IGNORE, int(y[anchor]))]


def test_the_cost_is_the_margin_kept_short_of() -> None:
    x = rows(10, 3)
    triplets = all_triplets(Y)
    costs = [max(0.0, float((x[a] - x[p]).norm() - (x[a] - x[n]).norm()) + 0.3) for a, p, n in triplets]
    assert 0 < sum(c > 0 for c in costs) < len(costs)
    ours = triplet(distances(x), triplets, 0.3)
    assert ours.item() == pytest.approx(sum(costs) / len(costs), rel=1e-12)
    theirs = F.triplet_margin_loss(*(x[i] for i in triplets.unbind(1)), margin=0.3, eps=0)
    torch.testing.assert_close(ours, theirs)


def test_without_triplets_the_cost_is_0_and_so_is_its_gradient() -> None:
    for y in ([0, 0, 0], [0, 1, 2], [IGNORE] * 3, [0, 0, IGNORE]):
        x = rows(3, 2).requires_grad_()
        labels = torch.tensor(y)
        far = distances(x)
        for chosen in (
            all_triplets(labels),
            semi_hard(far, labels),
            distance_weighted(far, labels, 2, numbers(3)),
        ):
            assert chosen.shape == (0, 3)
            loss = triplet(far, chosen)
            (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
            assert loss == 0 and (grad == 0).all()


def test_all_triplets_are_all() -> None:
    expected = {(a, p, n) for a, p in pairs(Y) for n in negatives(Y, a)}
    found = all_triplets(Y).tolist()
    assert len(found) == len(expected) and set(map(tuple, found)) == expected


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_semi_hard_is_the_nearest_beyond_the_positive_or_else_the_farthest(spread: float) -> None:
    """Wide classes have no negative beyond their positives, narrow ones many."""
    far = distances(rows(10, 3) * spread + 3 * F.one_hot(Y.clamp(min=0), 3 + 1)[:, :3])
    farthest = {a: max(negatives(Y, a), key=far[a].tolist().__getitem__) for a, _ in pairs(Y)}
    found = {(a, p): n for a, p, n in semi_hard(far, Y).tolist()}
    assert found.keys() == set(pairs(Y))
    for (a, p), n in found.items():
        beyond = [m for m in negatives(Y, a) if far[a, m] > far[a, p]]
        assert n == (min(beyond, key=far[a].tolist().__getitem__) if beyond else farthest[a])


def test_where_all_negatives_are_nearer_than_the_positive_the_farthest_is_taken() -> None:
    x = torch.tensor([[-10.0], [10.0], [1.0], [2.0], [-3.0]])
    chosen = semi_hard(distances(x), torch.tensor([0, 0, 1, 2, 3])).tolist()
    assert chosen == [[0, 1, 3], [1, 0, 4]]


def test_a_weighted_negative_is_a_negative_for_every_number_that_may_be_drawn() -> None:
    far = distances(sphere(10, 6))
    least, most = torch.zeros(10, 2), torch.full((10, 2), 1 - 2.0**-24)
    for draw in (least, most, torch.cat([least[:, :1], most[:, :1]], 1), numbers(10)):
        chosen = distance_weighted(far, Y, 6, draw).tolist()
        assert [(a, p) for a, p, _ in chosen] == pairs(Y)
        assert all(n in negatives(Y, a) for a, _, n in chosen)


def test_negatives_are_drawn_as_often_as_the_paper_says() -> None:
    """One anchor and its positive, a thousand even numbers; six negatives at chosen distances."""
    lengths, width = [0.1, 0.3, 0.7, 1.0, 1.39, 1.41], 5
    y = torch.tensor([0, 0, *[1] * 6])
    far = torch.full((8, 8), 1.2, dtype=torch.float64)
    far[0, 2:] = torch.tensor(lengths)

    def rarity(r: float) -> float:
        r = max(r, 0.5)
        return 0.0 if r > 1.4 else 1 / (r ** (width - 2) * (1 - r**2 / 4) ** ((width - 3) / 2))

    weights = torch.tensor([rarity(r) for r in lengths])
    counts = torch.zeros(6)
    for number in range(1000):
        draw = torch.tensor([[number / 1000, 0.5], [0.5, 0.0]]).repeat(4, 1)
        counts[distance_weighted(far, y, width, draw)[0, 2] - 2] += 1
    expected = 1000 * weights / weights.sum()
    assert counts[5] == 0 and weights[0] == weights[1]
    assert (counts - expected).abs().max() <= 1


def test_a_pair_takes_a_number_from_each_of_its_rows() -> None:
    """So that the negatives of an anchor differ from positive to positive."""
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    draw = torch.tensor([[0.1, 0.3], [0.5, 0.9], [0.8, 0.6], *[[0.0, 0.0]] * 4])
    chosen = distance_weighted(torch.full((7, 7), 1.9), y, 3, draw)[:6].tolist()  # all far: drawn alike
    expected = [(draw[a, 0] + draw[p, 1]) % 1 for a, p, _ in chosen]
    assert [n for _, _, n in chosen] == [3 + int(4 * number) for number in expected]
    assert len({int(4 * number) for number in expected}) > 2


def test_negatives_that_are_all_too_far_are_drawn_alike() -> None:
    y = torch.tensor([0, 0, *[1] * 4])
    far = torch.full((6, 6), 1.9, dtype=torch.float64)
    far[0, 1] = far[1, 0] = 0.3
    chosen = {int(distance_weighted(far, y, 32, torch.full((6, 2), step / 16))[0, 2]) for step in range(8)}
    assert chosen == {2, 3, 4, 5}


@pytest.mark.parametrize("width", [1, 2, 3, 64, 2048])
def test_the_weights_hold_at_any_width(width: int) -> None:
    far = distances(sphere(12, width)) if width > 1 else distances(rows(12, 1).sign())
    y = torch.arange(12) % 3
    assert len(distance_weighted(far, y, width, numbers(12))) == len(pairs(y))


def test_choosing_passes_no_gradient() -> None:
    x = sphere(10, 4).requires_grad_()
    far = distances(x)
    chosen = semi_hard(far, Y)
    assert not chosen.requires_grad
    assert torch.autograd.gradcheck(lambda x: triplet(distances(x), chosen, 0.3), x)
