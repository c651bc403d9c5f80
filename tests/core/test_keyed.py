"""Counted randomness: a draw belongs to its sample, and to nothing else."""

import subprocess
import sys

import pytest
import torch
from scipy import stats

from limbeck.core import keyed as keyeds
from limbeck.core.batch import Lesson
from limbeck.core.keyed import forked, generator, keyed, number

LESSON = Lesson(seed=1, epoch=2)
ROWS = torch.arange(64)


def test_a_draw_does_not_depend_on_the_batch_or_the_order_it_came_in() -> None:
    alone = torch.cat([keyed(LESSON, ROWS[i : i + 1], "flip", 3) for i in range(64)])
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    together = keyed(LESSON, ROWS[shuffled], "flip", 3)
    assert together.shape == (64, 3)
    assert torch.equal(together, alone[shuffled])


def test_a_row_that_comes_twice_gets_the_same_draw_twice() -> None:
    twice = keyed(LESSON, torch.tensor([5, 9, 5]), "flip")
    assert twice[0] == twice[2] != twice[1]


def test_a_draw_does_not_depend_on_where_in_the_epoch_it_is_made() -> None:
    later = Lesson(seed=1, epoch=2, step=77, epochs=9, samples=64, classes=10)
    assert torch.equal(keyed(later, ROWS, "flip"), keyed(LESSON, ROWS, "flip"))


@pytest.mark.parametrize(
    ("lesson", "purpose"), [(Lesson(2, 2), "flip"), (Lesson(1, 3), "flip"), (LESSON, "crop")], ids=str
)
def test_another_seed_epoch_or_purpose_draws_anew(lesson: Lesson, purpose: str) -> None:
    rows = torch.arange(4000)
    here, there = keyed(LESSON, rows, "flip")[:, 0], keyed(lesson, rows, purpose)[:, 0]
    assert (here != there).float().mean() > 0.99
    assert abs(float(torch.corrcoef(torch.stack([here, there]))[0, 1])) < 0.08  # 5 sd


@pytest.mark.parametrize("k", [1, 4])
def test_draws_are_uniform(k: int) -> None:
    draws = keyed(LESSON, torch.arange(64_000), "flip", k)
    assert draws.dtype == torch.float32
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    for column in draws.T:
        assert stats.chisquare(torch.histc(column, 100, 0, 1).numpy()).pvalue > 1e-6
        neighbours = torch.corrcoef(torch.stack([column[:-1], column[1:]]))[0, 1]
        assert abs(float(neighbours)) < 0.02


@pytest.mark.parametrize("k", [0, 1, 3, 70_000])
def test_an_accelerator_draws_the_same(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, begin = torch.tensor([0, 7, 2**31, 2**62 + 5, -3]), number("begin", k)
    whole = keyeds._by_numpy(rows, begin, k)
    assert torch.equal(whole, keyeds._by_torch(rows, begin, k)) and whole.shape == (5, k)
    monkeypatch.setattr(keyeds, "AT_ONCE", 2)
    for draw in (keyeds._by_numpy, keyeds._by_torch):
        assert torch.equal(whole, draw(rows, begin, k))


def test_the_draws_of_one_row_are_not_one_another() -> None:
    correlation = torch.corrcoef(keyed(LESSON, torch.arange(10_000), "crop", 4).T)
    assert float((correlation - torch.eye(4)).abs().max()) < 0.05


def test_a_large_index_is_hashed_like_a_small_one() -> None:
    far = keyed(LESSON, 2**40 + torch.arange(10_000), "flip", 3)
    assert float(far.min()) >= 0 and float(far.max()) < 1
    assert abs(float(far.mean()) - 0.5) < 0.01


# A run that is resumed tomorrow, or on another machine, must draw what it would have drawn today.


def test_three_draws_are_pinned() -> None:
    draws = keyed(Lesson(seed=7, epoch=3), torch.tensor([0, 41, 2**33]), "flip", 1)[:, 0] * 2**24
    assert draws.tolist() == [15491698.0, 16049922.0, 12363436.0]


def test_numbers_are_pinned_and_fit_a_seed() -> None:
    assert number("a") == 99183506424991868
    assert number(0, "step", 1, 2) == 3864902479875389900
    assert all(0 <= number(n) < 2**63 for n in range(200))
    assert len({number(n) for n in range(200)}) == 200


def test_another_process_draws_the_same() -> None:
    code = "from limbeck.core.keyed import number; print(number(0, 'step', 1, 2))"
    env = {"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout
    assert int(out) == number(0, "step", 1, 2)


def test_parts_are_kept_apart() -> None:
    assert len({number("ab", "c"), number("a", "bc"), number("abc"), number("a", "b", "c")}) == 4


def test_a_generator_is_seeded_by_its_parts() -> None:
    def draw(*parts: int | str) -> list[int]:
        return torch.randperm(20, generator=generator(*parts)).tolist()

    assert draw(0, "order", 1) == draw(0, "order", 1)
    assert draw(0, "order", 1) != draw(0, "order", 2)


def test_forked_seeds_the_inside_and_leaves_the_outside_alone() -> None:
    before = torch.get_rng_state()
    with forked(0, "build", "kd"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    with forked(0, "build", "kd"):
        again = torch.rand(3)
    with forked(1, "build", "kd"):
        other = torch.rand(3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_forked_gives_the_outside_back_when_the_inside_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), forked(0):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_the_same_when_compiled_and_is_traced_once_for_all_epochs() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    drawn = torch.compile(keyed, backend="aot_eager", fullgraph=True)
    index = torch.arange(5)
    for epoch in range(4):
        lesson = Lesson(seed=3, epoch=epoch, step=2 * epoch)
        assert torch.equal(drawn(lesson, index, "crop", 2), keyed(lesson, index, "crop", 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the second with a clock that moves
