"""A teacher that stores its answers while it gives them: asked once, read after, and the same for all."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, View
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.data import keeping
from limbeck.data.keeping import Keeping
from limbeck.data.loader import Data, Loader
from limbeck.data.store import Store


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        return self.head(self.body(x))


def loader(
    seed: int = 1, rows: int = 25, augment: tuple[View, ...] = (), per_class: int | None = None
) -> Loader:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=draw)
    data = Data(x, torch.arange(rows) % 4, ("a", "b", "c", "d"))
    return Loader(data, 8, seed=seed, epochs=2, augment=augment, per_class=per_class)


def made(
    place: Path | None, seed: int = 1, taps: tuple[str, ...] = (), lesson: Loader | None = None
) -> tuple[Keeping, Net, Loader]:
    net, lesson = Net().eval(), lesson or loader(seed)
    teacher = Keeping(Frozen(net), lesson, place)
    teacher.look(taps)
    teacher.check(lesson.at(0))
    net.asked = 0
    return teacher, net, lesson


def answers(teacher: Keeping, lesson: Loader) -> list[Seen]:
    return [teacher(batch) for epoch in range(lesson.epochs) for batch in lesson.epoch(epoch)]


def test_the_first_asks_and_the_next_reads_the_same(tmp_path: Path) -> None:
    first, asked, lesson = made(tmp_path, taps=("body",))
    told = answers(first, lesson)
    assert asked.asked == 2 * 24 and first.folder is not None
    assert Store(first.folder).epochs() == [0, 1] and Store(first.folder).taps == ("body",)
    second, unasked, _ = made(tmp_path, taps=("body",))
    again = answers(second, lesson)
    assert second.folder == first.folder
    for a, b in zip(told, again, strict=True):
        assert torch.equal(a.out, b.out) and torch.equal(a.at["body"], b.at["body"])
    assert unasked.asked == 0
    live = Net().eval()
    gaps = [
        (a.out - live(batch.x).detach()).abs().max()
        for a, batch in zip(told, (b for e in (0, 1) for b in lesson.epoch(e)), strict=True)
    ]
    assert 0 < max(map(float, gaps)) < 2e-3  # half precision


def test_without_a_place_it_says_what_a_store_would(tmp_path: Path) -> None:
    nowhere, asked, lesson = made(None)
    somewhere, _, _ = made(tmp_path)
    for a, b in zip(answers(nowhere, lesson), answers(somewhere, lesson), strict=True):
        assert torch.equal(a.out, b.out)
    assert asked.asked == 2 * 24 and nowhere.folder is None


def test_another_lesson_has_another_store(tmp_path: Path) -> None:
    folders = {made(tmp_path, **how)[0].folder for how in ({}, {"seed": 2}, {"taps": ("body",)})}
    assert len(folders) == 3
    assert not any(folder.exists() for folder in folders if folder), "nothing is written before it is asked"


def test_what_was_stored_before_a_stop_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "NOTED", 0.0)
    first, _, lesson = made(tmp_path)
    told = [first(lesson.at(step)) for step in range(2)]
    del first
    second, again, _ = made(tmp_path)
    assert all(torch.equal(second(lesson.at(n)).out, told[n].out) for n in range(2)) and again.asked == 0
    second(lesson.at(2))
    assert again.asked == 8 and Store(second.folder or "").epochs() == [0]


def test_micro_batches_seal_an_epoch_too(tmp_path: Path) -> None:
    teacher, asked, lesson = made(tmp_path)
    for batch in lesson.epoch(0):
        for part in batch.split(3):
            teacher(part)
    assert asked.asked == 24 and Store(teacher.folder or "").epochs() == [0]


def test_while_another_process_writes_it_only_answers(tmp_path: Path) -> None:
    first, asked, lesson = made(tmp_path)
    second, also, _ = made(tmp_path)
    told = first(lesson.at(0)).out
    assert torch.equal(second(lesson.at(0)).out, told)
    assert (asked.asked, also.asked) == (8, 8)
    for step in (1, 2):
        first(lesson.at(step))
    assert Store(first.folder or "").epochs() == [0]


def test_rows_that_are_turned_are_refused(tmp_path: Path) -> None:
    teacher, _, lesson = made(tmp_path)
    batch = lesson.at(0)
    assert batch.index is not None
    twice = batch.replace(x=batch.x.repeat(2, 1), y=None, index=batch.index.repeat(2))
    with pytest.raises(Refused, match=r"shown 16 rows of 8 samples at once"):
        teacher.check(twice)
    with pytest.raises(Refused, match="no gradient passes"):
        teacher.through(batch.x)


def test_a_full_disk_is_met_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(Refused, match="more than half"):
        made(tmp_path)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import test_keeping as here
from limbeck.data import keeping
keeping.NOTED = 0.0
teacher, _, lesson = here.made(Path(sys.argv[1]))
for step in range(6):
    teacher(lesson.at(step))
    print(step, flush=True)
"""


def test_killed_in_the_middle_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(Path(__file__).parent)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "1":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    ends: dict[str, Any] = {}
    for name in ("killed", "whole"):
        teacher, _, lesson = made(tmp_path / name)
        answers(teacher, lesson)
        assert teacher.folder is not None
        ends[name] = {p.name: p.read_bytes() for p in teacher.folder.glob("*.bin")}
        assert not list(teacher.folder.glob("*part*"))
    assert ends["killed"] == ends["whole"] and len(ends["whole"]) == 2


def test_a_batch_is_a_batch(tmp_path: Path) -> None:
    """Labels, index and lesson of what is shown are none of its business."""
    teacher, _, lesson = made(tmp_path)
    batch: Batch = lesson.at(0)
    assert torch.equal(teacher(batch.replace(y=None)).out, teacher(batch).out)


# --- whose answers, of what ---


def test_a_row_that_comes_twice_has_one_answer_for_all(tmp_path: Path) -> None:
    """In another batch the same row may be answered with other last bits; here with quite other ones."""
    lesson = loader(per_class=4)
    twice = torch.cat([b.index for b in lesson.epoch(0)]).bincount()  # type: ignore[misc]
    assert twice.max() > 1

    class Moody(Frozen):
        def __call__(self, batch: Batch) -> Seen:
            seen = super().__call__(batch)
            return Seen(seen.out + batch.lesson.step)

    first, second = (Keeping(Moody(Net().eval()), lesson, tmp_path) for _ in range(2))
    for teacher in (first, second):
        teacher.check(lesson.at(0))
    told, read = answers(first, lesson), answers(second, lesson)
    assert all(torch.equal(a.out, b.out) for a, b in zip(told, read, strict=True))


def mixed(batch: Batch) -> Batch:
    return batch.replace(x=batch.x + batch.x.view(-1, 2, 6).flip(1).view(-1, 6))


def test_a_row_that_comes_twice_is_refused_where_others_are_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"`per_class` a sample may come twice .* leave its `store` out"):
        made(tmp_path, lesson=loader(augment=(mixed,), per_class=4))
    twice = loader(per_class=4)
    seen = Keeping(Frozen(Net().eval(), view=mixed), twice, tmp_path)
    with pytest.raises(Refused, match="`per_class` a sample may come twice"):
        seen.check(twice.at(0))
    made(tmp_path, lesson=loader(augment=(mixed,)))  # each row comes once
    assert not list(tmp_path.iterdir())


def test_it_does_not_matter_what_the_lesson_computes_in(tmp_path: Path) -> None:
    half, _, lesson = made(tmp_path / "half")
    with torch.autocast("cpu", torch.bfloat16):
        told = answers(half, lesson)
    whole = answers(made(tmp_path / "whole")[0], lesson)
    assert all(torch.equal(a.out, b.out) for a, b in zip(told, whole, strict=True))


def test_who_was_not_checked_writes_nothing(tmp_path: Path) -> None:
    """An ensemble's dry run asks its members as a lesson would."""
    lesson = loader()
    teacher = Keeping(Frozen(Net().eval()), lesson, tmp_path)
    told = teacher(lesson.at(0)).out
    assert not list(tmp_path.iterdir())
    teacher.check(lesson.at(0))
    assert torch.equal(teacher(lesson.at(0)).out, told)
    assert [folder.name.partition("-")[0] for folder in tmp_path.iterdir()] == ["teacher"]


def shifted(batch: Batch, by: tuple[float, ...]) -> Batch:
    """A view that changes with the epoch, and not with the sample."""
    return batch.replace(x=batch.x + by[batch.lesson.epoch])


def test_views_that_differ_in_the_second_epoch_are_of_two_lessons(tmp_path: Path) -> None:
    """As those of old draws do, which the first epoch does not tell."""
    views = (partial(shifted, by=(0.0, by)) for by in (1.0, 2.0))
    one, other = (made(tmp_path, lesson=loader(augment=(view,)))[0] for view in views)
    assert one.folder != other.folder


def test_views_that_differ_later_still_are_asked_about(tmp_path: Path) -> None:
    lessons = [loader(augment=(partial(shifted, by=(0.0, 0.0, by)),)) for by in (1.0, 2.0)]
    (first, _, _), (then, asked, _) = (made(tmp_path, lesson=lesson) for lesson in lessons)
    for batch in lessons[0].epoch(2):
        first(batch)
    batch = lessons[1].at(2 * lessons[1].steps)
    told = then(batch).out
    assert then.folder == first.folder and asked.asked == 8
    torch.testing.assert_close(told, Net().eval()(batch.x).detach(), atol=5e-3, rtol=0)


def test_a_batch_without_numbers_is_refused(tmp_path: Path) -> None:
    teacher, _, lesson = made(tmp_path)
    with pytest.raises(Refused, match="kept by the samples' numbers, and the batch has no `index`"):
        teacher(lesson.at(0).replace(index=None))


def test_its_name_is_no_way_out_of_its_place(tmp_path: Path) -> None:
    lesson = loader()
    teacher = Keeping(Frozen(Net().eval()), lesson, tmp_path / "stores", "../a/b")
    assert teacher.folder is not None and teacher.folder.parent == tmp_path / "stores"


# --- epochs that are left and come back to ---


def test_who_dies_after_the_last_batch_only_seals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "NOTED", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(keeping, "seal", lambda *arguments: 1 / 0)
        first, _, lesson = made(tmp_path)
        with pytest.raises(ZeroDivisionError):
            answers(first, lesson)
        del first
    second, asked, _ = made(tmp_path)
    for batch in lesson.epoch(0):
        second(batch)
    assert asked.asked == 0 and Store(second.folder or "").epochs() == [0]


def test_an_epoch_that_was_left_is_another_s_to_end(tmp_path: Path) -> None:
    first, _, lesson = made(tmp_path)
    first(lesson.at(0))
    first(lesson.at(lesson.steps))  # of the next epoch
    second, asked, _ = made(tmp_path)
    for batch in lesson.epoch(0):
        second(batch)
    assert asked.asked == 16 and Store(second.folder or "").epochs() == [0]
