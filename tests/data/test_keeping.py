"""A teacher that stores its answers while it gives them: asked once, read after, and the same for all."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
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


def loader(seed: int = 1, rows: int = 25, epochs: int = 2) -> Loader:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=draw)
    y = torch.arange(rows) % 4
    return Loader(Data(x, y, ("a", "b", "c", "d")), 8, seed=seed, epochs=epochs)


def made(place: Path | None, seed: int = 1, taps: tuple[str, ...] = ()) -> tuple[Keeping, Net, Loader]:
    net, lesson = Net().eval(), loader(seed)
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
