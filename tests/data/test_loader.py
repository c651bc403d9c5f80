"""Which rows come when is a function of (seed, epoch); what cannot be learned from is refused at the door."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch, Lesson, View
from limbeck.core.refused import Refused
from limbeck.data.loader import AHEAD, Data, Loader, Splits, Streams, Unread

CLASSES = ("cat", "dog", "eel")
CPU = torch.device("cpu")


def data(rows: int = 23) -> Data:
    """Row n holds n; its class is n modulo 3."""
    return Data(torch.arange(rows * 4).reshape(rows, 1, 2, 2) // 4, torch.arange(rows) % 3, CLASSES)


def order(loader: Loader, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch, start)]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


# --- order ---


def test_the_order_is_fixed_by_seed_and_epoch_and_by_nothing_else() -> None:
    first = order(Loader(data(), 5, seed=1, epochs=3), 2)
    busy = Loader(data(), 5, seed=1, epochs=9)
    torch.rand(3)
    order(busy, 0)
    assert order(busy, 2) == first
    assert order(busy, 1) != first
    assert order(Loader(data(), 5, seed=2), 2) != first


def test_the_batch_size_cuts_the_same_permutation() -> None:
    fours, twos = Loader(data(), 4, seed=0), Loader(data(), 2, seed=0)
    assert flat(order(fours, 0)) == flat(order(twos, 0))[:20]


def test_an_epoch_is_full_batches_with_every_row_at_most_once() -> None:
    loader = Loader(data(23), 5, seed=0)
    rows = order(loader, 0)
    assert loader.steps == 4 and [len(b) for b in rows] == [5] * 4
    assert len(set(flat(rows))) == 20


def test_what_is_left_over_comes_in_another_epoch() -> None:
    loader = Loader(data(23), 5, seed=0)
    assert {row for epoch in range(6) for row in flat(order(loader, epoch))} == set(range(23))


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_goes_on_from_any_step(start: int) -> None:
    whole, fresh = Loader(data(), 5, seed=3), Loader(data(), 5, seed=3)
    assert order(fresh, 1, start) == order(whole, 1)[start:]


def test_a_step_counted_over_all_epochs_finds_its_batch() -> None:
    loader = Loader(data(), 5, seed=3)
    assert [loader.at(n).index.tolist() for n in range(12)] == [b for e in range(3) for b in order(loader, e)]


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    loader = Loader(data(6), 64, seed=0)
    assert loader.steps == 1
    assert sorted(order(loader, 0)[0]) == list(range(6))


def test_once_is_every_row_in_order_the_last_batch_short() -> None:
    batches = list(Loader(data(23), 5, seed=0).once(10))
    assert [b.rows for b in batches] == [10, 10, 3]
    assert torch.cat([b.index for b in batches]).tolist() == list(range(23))
    assert torch.cat([b.y for b in batches]).tolist() == data(23).y.tolist()


# --- what a batch holds ---


def test_x_y_and_index_are_of_the_same_rows() -> None:
    for batch in Loader(data(), 5, seed=0).epoch(0):
        assert torch.equal(batch.x[:, 0, 0, 0], batch.index.float())
        assert torch.equal(batch.y, batch.index % 3)


def test_the_lesson_tells_the_time_and_the_facts() -> None:
    loader = Loader(data(), 5, seed=8, epochs=6)
    lessons = [batch.lesson for batch in loader.epoch(2)]
    assert [(n.seed, n.epoch, n.epochs, n.step) for n in lessons] == [
        (8, 2, 6, step) for step in (8, 9, 10, 11)
    ]
    assert (lessons[0].samples, lessons[0].classes) == (23, 3)
    assert torch.equal(lessons[0].labels, data().y)


def test_x_stays_small_until_its_batch_and_is_normalised_there() -> None:
    x = torch.tensor([[[[0, 16]], [[8, 4]]]] * 3, dtype=torch.uint8)
    small = Data(x, torch.arange(3), CLASSES, scale=1 / 16, mean=(0.5, 0.25), std=(0.5, 2.0))
    assert small.x.dtype == torch.uint8
    batch: Batch = Loader(small, 3, seed=0).at(0)
    assert batch.x.dtype == torch.float32
    assert batch.x[0].tolist() == [[[-1.0, 1.0]], [[0.125, 0.0]]]


# --- augmentation ---


def noted(seen: list[Batch]) -> View:
    """A view that turns 3 into 4 and keeps what it was shown."""

    def view(batch: Batch) -> Batch:
        seen.append(batch)
        return batch.replace(x=torch.where(batch.x == 3, 4, batch.x).to(batch.x.dtype))

    return view


def test_samples_kept_as_floats_stay_as_they_are() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    data = Data(x, torch.tensor([0, 1]), ("a", "b"), scale=2.0, mean=1.0, std=4.0)
    assert torch.equal(data.to_float(x), torch.tensor([[0.25, 0.75], [1.25, 1.75]]))
    assert torch.equal(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_views_come_in_order_while_x_is_as_small_as_it_is_kept() -> None:
    x = torch.full((6, 1, 2, 2), 3, dtype=torch.uint8)
    small, seen, later = Data(x, torch.arange(6) % 3, CLASSES, 0.5, 1.0, 2.0), list[Batch](), list[Batch]()
    loader = Loader(small, 3, seed=7, epochs=2, augment=(noted(seen), noted(later)))
    batch = loader.at(3)
    assert seen[0].x.dtype == torch.uint8 and bool((seen[0].x == 3).all()) and bool((later[0].x == 4).all())
    assert batch.x.dtype == torch.float32 and bool((batch.x == 0.5).all())  # (4 / 2 - 1) / 2
    assert seen[0].lesson is batch.lesson and (batch.lesson.seed, batch.lesson.epoch) == (7, 1)
    assert torch.equal(batch.index, Loader(small, 3, seed=7).at(3).index) and torch.equal(seen[0].y, batch.y)
    assert bool((x == 3).all())


def test_evaluation_is_never_augmented() -> None:
    seen = list[Batch]()
    loader = Loader(data(), 5, seed=0, augment=(noted(seen),))
    shown = torch.cat([batch.x for batch in loader.once(10)])
    assert torch.equal(shown, data().x.float()) and not seen


def test_a_view_may_change_the_rows() -> None:
    def twice(batch: Batch) -> Batch:
        return batch.map(lambda v: torch.cat([v, v]))

    batch = Loader(data(), 5, seed=0, augment=(twice,)).at(0)
    assert batch.rows == 10 and torch.equal(batch.x[:, 0, 0, 0], batch.index.float())


def test_streams_over_the_same_samples_draw_each_their_own() -> None:
    seen = {name: list[Batch]() for name in ("weak", "strong")}
    both = Streams({name: Loader(data(), 5, seed=1, augment=(noted(its),)) for name, its in seen.items()})
    both.at(0)
    assert seen["weak"][0].lesson.seed != seen["strong"][0].lesson.seed


# --- several processes ---


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_part_the_batch_that_one_process_would_see(ranks: int) -> None:
    alone = order(Loader(data(40), 12, seed=4), 1)
    shares = [order(Loader(data(40), 12, seed=4, rank=rank, ranks=ranks), 1) for rank in range(ranks)]
    for step, batch in enumerate(alone):
        dealt = [share[step] for share in shares]
        assert [len(rows) for rows in dealt] == [12 // ranks] * ranks
        assert flat(dealt) == batch


def test_pairs_of_the_permutation_stay_on_one_rank() -> None:
    permutation = flat(order(Loader(data(40), 40, seed=4), 0))
    partner = {permutation[n]: permutation[n ^ 1] for n in range(40)}
    for rank in range(2):
        for rows in order(Loader(data(40), 12, seed=4, rank=rank, ranks=2), 0):
            assert all(partner[row] in rows for row in rows)


@pytest.mark.parametrize(("batch", "ranks"), [(0, 1), (-4, 1), (6, 2), (7, 2), (16, 3)])
def test_a_batch_that_cannot_be_dealt_is_refused(batch: int, ranks: int) -> None:
    with pytest.raises(Refused, match=f"batch of {batch} rows cannot be dealt to {ranks}.*multiple of"):
        Loader(data(40), batch, seed=0, ranks=ranks)


def test_a_set_too_small_to_be_dealt_is_refused() -> None:
    with pytest.raises(Refused, match=r"3 .*2 process"):
        Loader(data(3), 4, seed=0, ranks=2)


# --- so many rows of each class ---


def uneven(*rows: int) -> Data:
    """Class n has `rows[n]` rows; a quarter as many as all of these nobody labelled."""
    y = torch.cat([torch.full((many,), n) for n, many in enumerate(rows)])
    y = torch.cat([y, torch.full((len(y) // 4,), IGNORE)])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    return Data(torch.arange(len(y)).reshape(-1, 1, 1, 1), y, tuple(f"class {n}" for n in range(len(rows))))


def test_a_batch_is_so_many_rows_of_each_of_some_classes() -> None:
    part = uneven(30, 12, 4, 50)
    loader = Loader(part, 12, seed=3, per_class=4)
    assert loader.steps == Loader(part, 12, seed=3).steps == 120 // 12
    left_out = set()
    for batch in loader.epoch(0):
        groups = batch.y.reshape(3, 4)
        assert (groups == groups[:, :1]).all() and (groups >= 0).all()
        assert len(set(groups[:, 0].tolist())) == 3
        assert len(set(batch.index.tolist())) == 12
        left_out |= set(range(4)) - set(groups[:, 0].tolist())
    assert left_out == set(range(4))


def test_a_class_gives_all_its_rows_before_it_gives_one_again() -> None:
    part = uneven(30, 12, 9)
    rows = flat(order(Loader(part, 12, seed=0, per_class=4), 0))
    groups = [rows[n : n + 4] for n in range(0, len(rows), 4) if part.y[rows[n]] == 1]
    assert len(groups) >= 3
    assert len(set(flat(groups[:3]))) == 12
    assert {row for e in range(9) for row in flat(order(Loader(part, 12, seed=0, per_class=4), e))} == set(
        (part.y != IGNORE).nonzero()[:, 0].tolist()
    )


@pytest.mark.parametrize("start", [0, 1, 4])
def test_batches_by_class_are_fixed_by_seed_and_epoch_and_go_on_from_any_step(start: int) -> None:
    whole, fresh = (Loader(uneven(30, 12, 9), 12, seed=3, per_class=4) for _ in range(2))
    order(whole, 0)
    torch.rand(3)
    assert order(fresh, 1, start) == order(whole, 1)[start:]
    assert order(whole, 0) != order(whole, 1)
    assert order(Loader(uneven(30, 12, 9), 12, seed=4, per_class=4), 1) != order(whole, 1)


def test_ranks_part_a_batch_between_groups() -> None:
    alone = order(Loader(uneven(30, 12, 9, 20), 16, seed=4, per_class=4), 1)
    shares = [Loader(uneven(30, 12, 9, 20), 16, seed=4, per_class=4, rank=rank, ranks=2) for rank in range(2)]
    assert [a + b for a, b in zip(*(order(share, 1) for share in shares), strict=True)] == alone
    assert all(len(set(batch.y[:4].tolist())) == 1 for share in shares for batch in share.epoch(1))


@pytest.mark.parametrize(
    ("batch", "per_class", "ranks", "words"),
    [
        (12, 5, 1, "12 rows cannot be cut into groups of 5 rows of a class for each of 1 .*multiple of 5"),
        (12, 4, 2, "12 rows cannot be cut into groups of 4 rows of a class for each of 2 .*multiple of 8"),
        (12, 0, 1, "groups of 0 rows"),
        (16, 4, 1, "takes 4 classes, and the data has labelled rows of 3"),
        (20, 10, 1, "Class 'class 2' has 9 labelled rows, and per_class asks for 10"),
    ],
)
def test_groups_that_cannot_be_drawn_are_refused(batch: int, per_class: int, ranks: int, words: str) -> None:
    with pytest.raises(Refused, match=words):
        Loader(uneven(30, 12, 9, 0), batch, seed=0, per_class=per_class, ranks=ranks)


# --- samples that are read when they are asked for ---


@dataclass
class Log:
    """What was asked for, batch by batch; how many samples were read; how many of them are and were held."""

    asked: list[list[int]] = field(default_factory=list)
    read: int = 0
    held: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def taken(self) -> None:
        with self.lock:
            self.read, self.held = self.read + 1, self.held + 1
            self.most = max(self.most, self.held)

    def dropped(self) -> None:
        with self.lock:
            self.held -= 1


@dataclass(eq=False)
class Kept(Unread):
    """A tensor on a disk that is slow by `delay` seconds a sample and has lost some. A lesson shows
    `number + epoch`."""

    x: Tensor
    lost: frozenset[int] = frozenset()
    delay: float = 0.0
    device: torch.device = CPU
    log: Log = field(default_factory=Log)

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.x.dtype

    def readers(self, index: Tensor, lesson: Lesson | None) -> list[Callable[[], np.ndarray]]:
        self.log.asked.append(index.tolist())

        def reader(row: int) -> Callable[[], np.ndarray]:
            return lambda: self.sample(row, 0 if lesson is None else lesson.epoch)

        return [reader(row) for row in index.tolist()]

    def sample(self, row: int, epoch: int) -> np.ndarray:
        time.sleep(self.delay)
        if row in self.lost:
            raise Refused(f"sample {row} is lost")
        found = self.x[row].numpy() + np.asarray(epoch, self.x.numpy().dtype)
        self.log.taken()
        weakref.finalize(found, self.log.dropped)
        return found

    def chosen(self, index: Tensor) -> "Kept":
        return replace(self, x=self.x[index])

    def on(self, device: torch.device) -> "Kept":
        return replace(self, device=device)

    def __add__(self, other: Unread) -> "Kept":
        assert isinstance(other, Kept)
        return replace(self, x=torch.cat([self.x, other.x]))


def unread(rows: int = 23, **how: object) -> tuple[Data, Log]:
    there = data(rows)
    return replace(there, x=(kept := Kept(there.x, **how))), kept.log  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("x", "y", "index"))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_what_is_read_when_asked_for_is_what_memory_holds(start: int) -> None:
    memory, disk = (Loader(part, 5, seed=3, epochs=2) for part in (data(), unread()[0]))
    for a, b in zip(memory.epoch(0, start), disk.epoch(0, start), strict=True):
        assert same(a, b) and replace(a.lesson, labels=None) == replace(b.lesson, labels=None)
    assert all(same(a, b) for a, b in zip(memory.once(10), disk.once(10), strict=True))
    assert same(memory.at(1), disk.at(1))


def test_a_lesson_may_show_another_part_and_what_scores_shows_it_as_it_is() -> None:
    disk = Loader(unread()[0], 5, seed=3, epochs=3)
    learned = [disk.at(2 * disk.steps), *disk.epoch(2)]
    learned.append(disk.rows(torch.tensor([7, 1]), disk.lesson(2, 8), disk.augment))
    assert all(torch.equal(batch.x[:, 0, 0, 0], batch.index.float() + 2) for batch in learned)
    scored = [*disk.once(10), disk.rows(torch.tensor([7, 1]), disk.lesson(2, 8))]
    assert all(torch.equal(batch.x[:, 0, 0, 0], batch.index.float()) for batch in scored)


def test_so_many_batches_are_asked_for_ahead_and_no_more() -> None:
    part, log = unread(50)
    for done, batch in enumerate(Loader(part, 5, seed=0).epoch(0), 1):
        assert len(log.asked) == min(done + AHEAD, 10)
        assert log.asked[done - 1] == batch.index.tolist()


def test_the_next_batches_are_read_while_nobody_asks() -> None:
    part, log = unread(50)
    drawn = Loader(part, 5, seed=0).epoch(0)
    next(drawn)
    until = time.monotonic() + 20
    while log.read < 5 * (1 + AHEAD) and time.monotonic() < until:
        time.sleep(0.005)
    assert log.read == 5 * (1 + AHEAD)


@pytest.mark.parametrize("rows", [400, 1200])
def test_samples_on_their_way_do_not_grow_with_their_number(rows: int) -> None:
    part, log = unread(rows)
    for _ in Loader(part, 100, seed=0).epoch(0):
        pass
    threads = min(32, (os.cpu_count() or 1) + 4)
    assert log.read == rows and log.most <= threads < 100 and log.held == 0


def test_a_reader_stops_when_nobody_wants_more() -> None:
    part, log = unread(2000, delay=0.002)
    before = threading.active_count()
    drawn = Loader(part, 500, seed=0).epoch(0)
    next(drawn)
    assert threading.active_count() > before
    del drawn
    read = log.read
    assert threading.active_count() == before and read < 500 * (1 + AHEAD)
    time.sleep(0.02)
    assert log.read == read


def test_what_cannot_be_read_is_refused_when_its_batch_is_due() -> None:
    order = Loader(data(50), 5, seed=0)._order(0, 0).tolist()
    part, _ = unread(50, lost=frozenset({order[17], order[16], order[19]}))
    before, drawn = threading.active_count(), Loader(part, 5, seed=0).epoch(0)
    for _ in range(3):
        next(drawn)
    with pytest.raises(Refused, match=f"sample {order[16]} is lost"):  # the first of its batch, always
        next(drawn)
    assert threading.active_count() == before


def test_a_number_and_a_slice_are_read_and_a_choice_is_not() -> None:
    whole, (part, log) = data(30), unread(30)
    rows, mask = torch.tensor([7, 2, 2]), torch.arange(30) % 7 == 3
    for chosen in (rows, mask):
        fewer = part.x[chosen]
        assert isinstance(fewer, Unread) and len(fewer) == len(whole.x[chosen]) and not log.asked
        assert torch.equal(fewer[:], whole.x[chosen])
        log.asked.clear()
    assert torch.equal(part.x[-1], whole.x[-1]) and torch.equal(part.x[4:9:2], whole.x[4:9:2])
    assert log.asked == [[29], [4, 6, 8]]


def test_parts_are_drawn_and_joined_without_reading() -> None:
    whole, (part, log) = data(60), unread(60)
    parts = [Splits(*one.split(0.2, "a"), one).with_validation(0.3, "b") for one in (whole, part)]
    assert not log.asked and isinstance(parts[1].train.x, Unread)
    for a, b in ((parts[0].train, parts[1].train), (parts[0].valid, parts[1].valid)):
        assert torch.equal(a.x, b.x[:]) and torch.equal(a.y, b.y)
    with pytest.raises(Refused, match="bring them alike"):
        Splits(part, whole, whole).with_validation(0.3)


def test_statistics_are_counted_piece_by_piece_and_exactly() -> None:
    x = torch.randint(0, 256, (600, 3, 2, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    log = Log()
    a, b = (Data(x, torch.zeros(600).long(), ("a",), 1 / 255) for _ in range(2))
    a, b = a.standardised(), replace(b, x=Kept(x, log=log)).standardised()
    pixels = (x.double() / 255).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(a.mean).double(), pixels.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(a.std).double(), pixels.std(1, correction=0), atol=1e-6)
    assert (a.mean, a.std) == (b.mean, b.std)
    assert flat(log.asked) == list(range(600)) and max(map(len, log.asked)) < 300


def test_what_is_unread_goes_to_an_accelerator_batch_by_batch() -> None:
    part, log = unread(20)
    assert part.on(CPU) is part
    there = part.on(torch.device("cuda"))
    assert there.x.device.type == "cuda" and len(there) == 20 and not log.asked
    far = replace(part, x=part.x.on(torch.device("meta")))
    for batch in Loader(far, 5, seed=0).epoch(0):
        assert {batch.x.device.type, batch.y.device.type, batch.index.device.type} == {"meta"}


# --- a budget of labels ---


def kept(part: Data) -> set[int]:
    return set((part.y != IGNORE).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("budget", [0, 1, 7, 30, 31, 90])
def test_a_label_budget_is_exact_and_as_even_over_the_classes_as_can_be(budget: int) -> None:
    whole = data(90)
    part = whole.with_labels(budget, seed=0)
    rows = kept(part)
    assert len(rows) == budget
    counts = torch.bincount(part.y[sorted(rows)], minlength=3)
    assert int(counts.max() - counts.min()) <= 1
    assert all(part.y[row] == whole.y[row] for row in rows)
    assert part.x is whole.x


def test_when_a_class_runs_out_the_others_fill_the_budget() -> None:
    y = torch.tensor([0] * 20 + [1] * 20 + [2] * 2)
    part = Data(torch.zeros(42, 1, 1, 1), y, CLASSES).with_labels(22, seed=0)
    assert torch.bincount(part.y[part.y != IGNORE]).tolist() == [10, 10, 2]


def test_a_smaller_budget_is_part_of_a_larger_one() -> None:
    budgets = [kept(data(300).with_labels(n, seed=5)) for n in (10, 100, 200, 300)]
    assert all(small < large for small, large in pairwise(budgets))


def test_the_budget_is_drawn_by_the_seed() -> None:
    assert kept(data(90).with_labels(30, seed=0)) == kept(data(90).with_labels(30, seed=0))
    assert kept(data(90).with_labels(30, seed=0)) != kept(data(90).with_labels(30, seed=1))


def test_rows_nobody_labelled_are_never_in_the_budget() -> None:
    y = torch.arange(30) % 3
    y[::2] = IGNORE
    part = Data(torch.zeros(30, 1, 1, 1), y, CLASSES).with_labels(15, seed=0)
    assert kept(part) == set(range(1, 30, 2))


@pytest.mark.parametrize("budget", [-1, 24])
def test_a_budget_that_is_not_there_is_refused(budget: int) -> None:
    with pytest.raises(Refused, match=f"budget of {budget} .*has 23 labelled samples; ask for 0 to 23"):
        data(23).with_labels(budget, seed=0)


# --- data that cannot be learned from ---


def x(rows: int = 4) -> Tensor:
    return torch.zeros(rows, 1, 2, 2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused_with_its_sample(poison: float) -> None:
    bad = x()
    bad[1, 0, 1, 1] = bad[3, 0, 0, 0] = poison
    with pytest.raises(Refused, match="NaN or infinite values in 2 of 4 samples, first in sample 1"):
        Data(bad, torch.zeros(4, dtype=torch.long), CLASSES)


@pytest.mark.parametrize("label", [3, -1, -99])
def test_a_label_outside_the_classes_is_refused_with_its_sample(label: int) -> None:
    with pytest.raises(
        Refused, match=rf"Label {label} of sample 2 is outside the 3 classes .*\(0 to 2\).*-100"
    ):
        Data(x(), torch.tensor([0, IGNORE, label, 7]), CLASSES)


@pytest.mark.parametrize(("inputs", "labels"), [(0, 0), (4, 3), (3, 4)])
def test_data_that_is_empty_or_uneven_is_refused(inputs: int, labels: int) -> None:
    with pytest.raises(Refused, match=f"{inputs} inputs and {labels} labels"):
        Data(x(inputs), torch.zeros(labels, dtype=torch.long), CLASSES)


def test_streams_over_the_same_samples_do_not_walk_in_step() -> None:
    both = Streams({"weak": Loader(data(40), 8, seed=1), "strong": Loader(data(40), 8, seed=1)})
    drawn = list(both.epoch(0))
    assert [b["weak"].index.tolist() for b in drawn] != [b["strong"].index.tolist() for b in drawn]
    assert torch.equal(both.at(2)["weak"].index, drawn[2]["weak"].index)


def test_data_goes_to_an_accelerator_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.zeros(10).long(), ("a",))
    assert data.on(torch.device("cpu")) is data
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2 * data.x.nbytes - 1, 10**9))
    assert data.on(torch.device("cuda")) is data
