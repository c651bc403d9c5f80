"""mixup: the slow way round, pair by pair; labels that are right on average; the same in any batch."""

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.batch import IGNORE
from limbeck.core.keyed import keyed
from limbeck.data.loader import Data, Loader
from limbeck.views.mixup import mixup


def batch(n: int = 8, dtype: torch.dtype = torch.uint8, shape: tuple[int, ...] = (3, 5, 4)) -> Batch:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, *shape), generator=draw).to(dtype)
    return Batch(x, torch.arange(n), torch.randperm(n, generator=draw) * 7, Lesson(seed=2, epoch=3))


def slow(given: Batch) -> tuple[Tensor, list[int]]:
    """Row by row, at alpha 1, where a share is the draw itself."""
    rows, labels = [], []
    for n in range(given.rows):
        other = n + 1 if n % 2 == 0 else n - 1
        key = min(given.index[n], given.index[other])[None]
        share, label = keyed(given.lesson, key, "mixup", 2)[0]
        mixed = given.x[n].float() * share + given.x[other].float() * (1 - share)
        rows.append(mixed if given.x.is_floating_point() else mixed.round().byte())
        labels.append(int(given.y[n] if label < share else given.y[other]))
    return torch.stack(rows), labels


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 4), (6,)])
def test_it_is_the_slow_way(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = batch(dtype=dtype, shape=shape)
    x, y = slow(given)
    shown = mixup(given)
    assert shown.x.dtype == dtype and torch.equal(shown.x, x) and shown.y.tolist() == y
    assert shown.y.tolist() != given.y.tolist() and shown.index is given.index


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_pair_mixes_alike_in_any_batch_either_way_round(alpha: float) -> None:
    given = batch(40, torch.float32)
    whole = mixup(given, alpha)
    some = torch.tensor([12, 13, 5, 4, 38, 39])  # a pair is turned round
    shown = mixup(given.map(lambda v: v[some]), alpha)
    assert torch.equal(shown.x, whole.x[some]) and torch.equal(shown.y, whole.y[some])
    for lesson in (Lesson(seed=1, epoch=3), Lesson(seed=2, epoch=4)):
        assert not torch.equal(mixup(given.replace(lesson=lesson), alpha).x, whole.x)
    assert not torch.equal(mixup(given, alpha, purpose="another").x, whole.x)


def test_processes_mix_as_one_does() -> None:
    data = Data(batch(24).x, torch.arange(24), tuple("abcdefghijklmnopqrstuvwx"))
    one = Loader(data, 8, seed=1, augment=[mixup])
    two = [Loader(data, 8, seed=1, rank=rank, ranks=2, augment=[mixup]) for rank in (0, 1)]
    for step in range(one.steps):
        whole, parts = one.at(step), [loader.at(step) for loader in two]
        assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
        assert torch.equal(torch.cat([part.y for part in parts]), whole.y)


def test_a_label_is_right_as_often_as_its_share() -> None:
    n = 40_000
    x = torch.arange(n)[:, None] % 2 * 1.0  # rows 2i are 0, rows 2i + 1 are 1: the mix is its share of ones
    shown = mixup(Batch(x, torch.arange(n) % 2, torch.arange(n)))
    share = shown.x[:, 0]
    for low in range(10):
        within = (share >= low / 10) & (share < (low + 1) / 10)
        assert within.sum().item() == pytest.approx(4000, abs=300)  # uniform, at alpha 1
        assert shown.y[within].float().mean().item() == pytest.approx(low / 10 + 0.05, abs=0.035)
    assert bool((shown.y.view(-1, 2).sum(1) == 1).all())  # a pair exchanges its labels or keeps them


def test_alpha_says_how_much_is_mixed_and_zero_mixes_nothing() -> None:
    given = Batch(torch.arange(4000)[:, None] % 2 * 1.0, index=torch.arange(4000))
    spread = [(mixup(given, alpha).x - 0.5).abs().mean().item() for alpha in (0.1, 1.0, 10.0)]
    assert spread[0] > 0.4 > spread[1] > 0.2 > spread[2]
    assert mixup(given, alpha=0.0) is given and mixup(given).y is None


def test_unlabelled_rows_stay_unlabelled() -> None:
    given = batch(400).replace(y=torch.tensor([3, IGNORE, IGNORE, IGNORE]).repeat(100))
    y = mixup(given).y.view(-1, 4)
    assert bool((y[:, 1:] == IGNORE).all())
    assert set(y[:, 0].tolist()) == {3, IGNORE}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (Batch({"x": torch.zeros(2, 3)}, index=torch.arange(2)), "x is a dict"),
        (Batch(torch.zeros(2, 3).long(), index=torch.arange(2)), "x is torch.int64"),
        (Batch(torch.zeros(3, 3), index=torch.arange(3)), "3 rows with an index"),
    ],
)
def test_what_cannot_be_mixed_is_refused(given: Batch, found: str) -> None:
    with pytest.raises(Refused, match=f"Mixup .*{found}.*expected") as caught:
        mixup(given)
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "mixup") is mixup
