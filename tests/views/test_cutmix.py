"""CutMix: the slow way round, box by box; labels by the share that stays; the same in any batch."""

import math

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.batch import IGNORE
from limbeck.core.keyed import keyed
from limbeck.views.cutmix import cutmix


def batch(n: int = 8, dtype: torch.dtype = torch.uint8, size: tuple[int, int] = (7, 5)) -> Batch:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 2, *size), generator=draw).to(dtype)
    return Batch(x, torch.arange(n), torch.randperm(n, generator=draw) * 7, Lesson(seed=2, epoch=3))


def slow(given: Batch) -> tuple[Tensor, list[int]]:
    """Row by row, at alpha 1, where a share is the draw itself."""
    shown, labels = given.x.clone(), []
    h, w = given.x.shape[2:]
    for n in range(given.rows):
        other = n + 1 if n % 2 == 0 else n - 1
        key = min(given.index[n], given.index[other])[None]
        share, down, right, label, _ = keyed(given.lesson, key, "cutmix", 5)[0].tolist()
        high, wide = int(math.sqrt(1 - share) * h), int(math.sqrt(1 - share) * w)
        top, left = int(down * h) - high // 2, int(right * w) - wide // 2
        taken = 0
        for i in range(max(0, top), min(h, top + high)):
            for j in range(max(0, left), min(w, left + wide)):
                shown[n, :, i, j] = given.x[other, :, i, j]
                taken += 1
        labels.append(int(given.y[n] if label < 1 - taken / (h * w) else given.y[other]))
    return shown, labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(7, 5), (3, 9), (16, 16)])
def test_it_is_the_slow_way(dtype: torch.dtype, size: tuple[int, int]) -> None:
    given = batch(20, dtype, size)
    x, y = slow(given)
    shown = cutmix(given)
    assert shown.x.dtype == dtype and torch.equal(shown.x, x) and shown.y.tolist() == y
    assert shown.y.tolist() != given.y.tolist() and shown.index is given.index


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_pair_mixes_alike_in_any_batch_either_way_round(alpha: float) -> None:
    given = batch(40)
    whole = cutmix(given, alpha)
    some = torch.tensor([12, 13, 5, 4, 38, 39])  # a pair is turned round
    shown = cutmix(given.map(lambda v: v[some]), alpha)
    assert torch.equal(shown.x, whole.x[some]) and torch.equal(shown.y, whole.y[some])
    for lesson in (Lesson(seed=1, epoch=3), Lesson(seed=2, epoch=4)):
        assert not torch.equal(cutmix(given.replace(lesson=lesson), alpha).x, whole.x)
    assert not torch.equal(cutmix(given, alpha, purpose="another").x, whole.x)


def test_a_label_is_right_as_often_as_its_share() -> None:
    n = 20_000
    x = (torch.arange(n)[:, None, None, None] % 2).expand(n, 1, 8, 8).byte()
    shown = cutmix(Batch(x, torch.arange(n) % 2, torch.arange(n)))
    share = shown.x.float().mean((1, 2, 3))
    for low in range(4):
        within = (share >= low / 4) & (share <= (low + 1) / 4)
        assert shown.y[within].float().mean().item() == pytest.approx(share[within].mean().item(), abs=0.04)
    assert bool((shown.y.view(-1, 2).sum(1) == 1).all())  # a pair exchanges its labels or keeps them


def test_a_share_of_the_pairs_is_mixed() -> None:
    n = 8000
    x = (torch.arange(n)[:, None, None, None] % 2).expand(n, 1, 9, 9).byte()
    given = Batch(x, torch.arange(n), torch.arange(n))
    mixed = [(cutmix(given, chance=c).x != x).any(3).any(2).any(1).float().mean().item() for c in (0, 0.3, 1)]
    assert mixed[0] == 0 and mixed[1] == pytest.approx(0.3 * mixed[2], abs=0.03) and mixed[2] > 0.95
    assert cutmix(given, chance=0).y.tolist() == given.y.tolist()


def test_unlabelled_rows_stay_unlabelled() -> None:
    given = batch(400).replace(y=torch.tensor([3, IGNORE, IGNORE, IGNORE]).repeat(100))
    y = cutmix(given).y.view(-1, 4)
    assert bool((y[:, 1:] == IGNORE).all())
    assert set(y[:, 0].tolist()) == {3, IGNORE}
    assert cutmix(given.replace(y=None)).y is None


@pytest.mark.parametrize(
    ("given", "chance", "found"),
    [
        (Batch(torch.zeros(2, 3), index=torch.arange(2)), 1.0, r"shape \(2, 3\) with an index"),
        (Batch(torch.zeros(3, 1, 4, 4), index=torch.arange(3)), 1.0, "3 rows with an index"),
        (Batch(torch.zeros(2, 1, 4, 4), index=torch.arange(2)), 1.5, "it is 1.5"),
    ],
)
def test_what_cannot_be_mixed_is_refused(given: Batch, chance: float, found: str) -> None:
    with pytest.raises(Refused, match=f"CutMix .*{found}.*expected") as caught:
        cutmix(given, chance=chance)
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "cutmix") is cutmix
