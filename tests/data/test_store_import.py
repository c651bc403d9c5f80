"""What others stored is read as the spec's target, and brought into a store of ours as it is; files that do
not fit are refused by name."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.refused import Refused
from limbeck.data import store_import
from limbeck.data.loader import Data, Loader
from limbeck.data.store import Store
from limbeck.data.store_import import TinyViT, bring, served
from limbeck.data.store_write import alone
from limbeck.data.stored import Stored

Records = dict[str, tuple[int, list[int], list[float]]]


def saved(root: Path, rank: int, records: Records, top: int = 2, epoch: int = 5, endian: str = "<") -> Path:
    """A package written byte by byte, as the layout says."""
    folder = root / f"logits_top{top}_epoch{epoch}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in records))
    rows = [struct.pack(f"{endian}i{top}h{top}e", seed, *c, *p) for seed, c, p in records.values()]
    (folder / f"rank{rank}-values.bin").write_bytes(b"".join(rows))
    return folder


def test_tinyvits_files_are_its_target(tmp_path: Path) -> None:
    saved(tmp_path, 0, {"a.jpg": (7, [3, 1], [0.5, 0.25]), "b.jpg": (2**31 - 1, [0, 4], [0.875, 0.125])})
    saved(tmp_path, 10, {"a.jpg": (9, [2, 1], [0.5, 0.25]), "c.jpg": (1, [4, 0], [0.5, 0.5])})
    found = TinyViT(tmp_path, 5, 5)
    seeds, logs = found.read(["c.jpg", "a.jpg", "b.jpg"])
    assert seeds.tolist() == [1, 7, 2**31 - 1] and len(found) == 3
    rest = 0.25 / 3
    expected = [[0.5, 0, 0, 0, 0.5], [rest, 0.25, rest, 0.5, rest], [0.875, 0, 0, 0, 0.125]]
    torch.testing.assert_close(logs.exp(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_tinyvits_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 0, {"a": (7, [3, -1], [0.5, 0.25])})
    with pytest.raises(Refused, match="has class -1, expected 0 to 4"):
        TinyViT(tmp_path, 5, 5).read(["a"])
    with pytest.raises(Refused, match="has no key 'b'"):
        TinyViT(tmp_path, 5, 5).read(["b"])
    with pytest.raises(Refused, match="keeps 2 of 1 classes"):
        TinyViT(tmp_path, 5, 1)
    with pytest.raises(Refused, match="has 0 folders logits_top"):
        TinyViT(tmp_path, 6, 5)
    (folder / "rank0-values.bin").write_bytes(b"123")
    with pytest.raises(Refused, match=r"rank0-values.bin has 3 bytes, expected 12 for the 1 keys"):
        TinyViT(tmp_path, 5, 5)
    (folder / "rank0-values.bin").unlink()
    with pytest.raises(Refused, match=r"rank0-keys.txt is there without rank0-values.bin"):
        TinyViT(tmp_path, 5, 5)
    (folder / "rank0-keys.txt").rename(folder / "rank1-values.bin")
    with pytest.raises(Refused, match=r"rank1-values.bin is there without rank1-keys.txt"):
        TinyViT(tmp_path, 5, 5)
    (folder / "rank1-values.bin").unlink()
    with pytest.raises(Refused, match=r"has no rank0-keys.txt"):
        TinyViT(tmp_path, 5, 5)


def test_a_key_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 0, {"a": (7, [3, 1], [0.5, 0.25]), "b": (7, [3, 1], [0.5, 0.25])})
    (folder / "rank0-keys.txt").write_text("a\na\n")
    with pytest.raises(Refused, match=r"rank0-keys.txt has key 'a' in lines 1 and 2"):
        TinyViT(tmp_path, 5, 5)


def test_what_a_machine_of_the_other_endianness_saved_is_told(tmp_path: Path) -> None:
    saved(tmp_path, 0, {"a": (7, [3, 1], [0.5, 0.25]), "b": (1, [4, 0], [0.75, 0.125])}, endian=">")
    with pytest.raises(Refused, match=r"is big-endian, as the machine that saved it, and expected little"):
        TinyViT(tmp_path, 5, 5).read(["a", "b"])


@pytest.mark.parametrize(
    ("classes", "p"),
    [
        ([3, 3], [0.5, 0.25]),
        ([3, 1], [0.25, 0.5]),
        ([3, 1], [0.5, -0.25]),
        ([3, 1], [0.75, 0.5]),
        ([3, 1], [float("nan"), 0.5]),
    ],
)
def test_records_that_are_none_are_refused(tmp_path: Path, classes: list[int], p: list[float]) -> None:
    saved(tmp_path, 0, {"a": (7, classes, p)})
    with pytest.raises(Refused, match="has records that are no 2 classes with falling probabilities"):
        TinyViT(tmp_path, 5, 5).read(["a"])


def test_served_lines_are_the_target_of_each_position(tmp_path: Path) -> None:
    half, quarter = -0.6931472, -1.3862944
    lines = [
        {"index": 4, "top_logprobs": [{"2": quarter, "0": half}, {"3": {"logprob": 0.0, "rank": 1}}]},
        {"index": 1, "top_logprobs": [{"1": half, "2": half}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (first, p), (second, q) = ((i, logs.exp()) for i, logs in served(tmp_path / "a.jsonl", 4))
    assert (first, second) == (4, 1)
    torch.testing.assert_close(
        p, torch.tensor([[0.5, 0.125, 0.25, 0.125], [0, 0, 0, 1.0]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(q, torch.tensor([[0, 0.5, 0.5, 0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        '{"index": 1}',
        '{"index": 1, "top_logprobs": [{}]}',
        '{"index": 1, "top_logprobs": []}',
        '{"index": 1, "top_logprobs": [{"4": -1}]}',
        '{"index": 1, "top_logprobs": [{"1": 0.5}]}',
        '{"index": 1, "top_logprobs": [{"1": NaN}]}',
    ],
)
def test_a_line_that_is_none_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    good = json.dumps({"index": 0, "top_logprobs": [{"1": -0.5}]})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(Refused, match="Line 2 of"):
        list(served(tmp_path / "a.jsonl", 4))


# --- into a store of ours ---


def lesson(rows: int = 5, classes: int = 5, first: float = 0) -> Loader:
    names = tuple("abcdefgh"[:classes])
    x = torch.arange(rows * 3).view(rows, 3) + first
    return Loader(Data(x, torch.zeros(rows, dtype=torch.long), names), 2, seed=0, epochs=4)


def two_epochs(root: Path, rows: int = 5, epochs: tuple[int, ...] = (0, 1)) -> Path:
    """Each row's answers by its number, another in each epoch, from two ranks."""
    for epoch in epochs:
        ranks: list[Records] = [{}, {}]
        for row in range(rows):
            p = [0.5 + row / 32, 0.25 - epoch / 16]
            ranks[row % 2][str(row)] = (row, [(row + epoch) % 5, (row + 2) % 5], p)
        for rank, records in enumerate(ranks):
            saved(root, rank, records, epoch=epoch)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_tinyvits_files_become_a_store_that_says_the_same(tmp_path: Path) -> None:
    steps = list(bring(two_epochs(tmp_path / "theirs"), tmp_path / "ours", lesson()))
    assert (steps[-1].done, steps[-1].rows) == (10, 10)
    store = Store(tmp_path / "ours")
    assert store.epochs() == [0, 1] and store.header.record.itemsize == 2 * (1 + 2)
    rows = torch.tensor([4, 0, 3])
    for epoch in (0, 1):
        _, theirs = TinyViT(tmp_path / "theirs", epoch, 5).read([str(int(row)) for row in rows])
        torch.testing.assert_close(store.read(epoch, rows)["out"].exp(), theirs.exp(), atol=1e-6, rtol=0)
    teacher, lessons = Stored(store, epochs="cycle"), lesson()
    batch = lessons.at(2 * lessons.steps + 1)  # epoch 2 of 4 is epoch 0's again
    assert torch.equal(teacher(batch).out, store.read(0, batch.index)["out"])  # type: ignore[arg-type]


def test_keys_say_which_answer_is_whose(tmp_path: Path) -> None:
    records: Records = {name: (0, [n, (n + 1) % 5], [0.5, 0.25]) for n, name in enumerate("xyz")}
    saved(tmp_path / "theirs", 0, records, epoch=7)
    list(bring(tmp_path / "theirs", tmp_path / "ours", lesson(2), ["z", "x"]))
    assert Store(tmp_path / "ours").read(7, torch.arange(2))["out"].argmax(1).tolist() == [2, 0]
    for keys, count, different in ((["z"], 1, 1), (["z", "z"], 2, 1)):
        with pytest.raises(Refused, match=f"There are {count} keys, {different} of them different, and 2"):
            bring(tmp_path / "theirs", tmp_path / "two", lesson(2), keys)


def test_what_was_brought_is_not_brought_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = two_epochs(tmp_path / "theirs")
    list(bring(theirs, tmp_path / "whole", lesson()))
    monkeypatch.setattr(store_import, "TOGETHER", 2)
    begun = bring(theirs, tmp_path / "cut", lesson())
    for _ in range(5):  # three pieces and an end, and one piece more
        next(begun)
    begun.close()
    assert Store(tmp_path / "cut").epochs() == [0]
    opened: list[int] = []
    monkeypatch.setattr(store_import._Epochs, "rows", noted(store_import._Epochs.rows, opened))
    list(bring(theirs, tmp_path / "cut", lesson()))  # looks at epoch 0 to see whether it fits
    assert opened == [0, 1] and files(tmp_path / "cut") == files(tmp_path / "whole")


def noted(rows: object, opened: list[int]) -> object:
    def listening(self: object, epoch: int) -> object:
        opened.append(epoch)
        return rows(self, epoch)  # type: ignore[operator]

    return listening


def test_a_store_of_something_else_is_left_alone(tmp_path: Path) -> None:
    theirs, ours = two_epochs(tmp_path / "theirs"), tmp_path / "ours"
    list(bring(theirs, ours, lesson()))
    before = files(ours)
    other = two_epochs(tmp_path / "other", epochs=(1,))
    with pytest.raises(Refused, match="is the store of another run: its answers are others"):
        bring(other, ours, lesson())
    with pytest.raises(Refused, match="its samples are others"):
        bring(theirs, ours, lesson(first=1))
    with pytest.raises(Refused, match="its answers are others"):  # of as many classes
        bring(theirs, ours, lesson(classes=6))
    assert files(ours) == before


def test_what_does_not_fit_the_data_is_refused_and_no_epoch_written(tmp_path: Path) -> None:
    theirs, ours = two_epochs(tmp_path / "theirs"), tmp_path / "ours"
    with pytest.raises(Refused, match=r"has key '\d', and the data has samples 0 to 2"):
        bring(theirs, ours, lesson(3))
    with pytest.raises(Refused, match=r"has no answer for 2 of 7 samples, first for '5'"):
        bring(theirs, ours, lesson(7))
    with pytest.raises(Refused, match="keeps 2 of 1 classes"):
        bring(theirs, ours, lesson(classes=1))
    with pytest.raises(Refused, match="has no folder logits_top"):
        bring(tmp_path, ours, lesson())
    with pytest.raises(Refused, match="is not there; give TinyViT's folder, or a file"):
        bring(tmp_path / "nothing", ours, lesson())
    swapped: Records = {str(n): (0, [n, n + 1], [0.5, 0.25]) for n in range(3)}
    saved(tmp_path / "swapped", 0, swapped, endian=">")
    with pytest.raises(Refused, match="is big-endian"):
        bring(tmp_path / "swapped", ours, lesson(3))
    assert not ours.exists()


def test_an_epoch_that_was_cut_short_costs_that_epoch(tmp_path: Path) -> None:
    theirs, ours = two_epochs(tmp_path / "theirs"), tmp_path / "ours"
    values = theirs / "logits_top2_epoch1" / "rank1-values.bin"
    whole = values.read_bytes()
    values.write_bytes(whole[:-1])
    with pytest.raises(Refused, match=r"rank1-values.bin has 23 bytes, expected 24 for the 2 keys"):
        list(bring(theirs, ours, lesson()))
    assert Store(ours).epochs() == [0]
    values.write_bytes(whole)
    list(bring(theirs, ours, lesson()))
    assert Store(ours).epochs() == [0, 1]


def test_a_disk_that_this_would_fill_is_met_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(Refused, match="more than half"):
        bring(two_epochs(tmp_path / "theirs"), tmp_path / "ours", lesson())
    assert not (tmp_path / "ours").exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    theirs, ours = two_epochs(tmp_path / "theirs"), tmp_path / "ours"
    begun = bring(theirs, ours, lesson())
    next(begun)
    with pytest.raises(Refused, match="Another process is writing epoch 0"):
        list(bring(theirs, ours, lesson()))
    list(begun)
    with alone(ours / "000001.part-0-of-1", "it"):
        assert Store(ours).epochs() == [0, 1]


def test_such_a_store_is_for_no_exact_lesson(tmp_path: Path) -> None:
    """Nobody knows what was shown."""
    list(bring(two_epochs(tmp_path / "theirs"), tmp_path / "ours", lesson()))
    with pytest.raises(Refused, match="was imported, and nobody knows what its teacher was shown"):
        Store(tmp_path / "ours").check(lesson())


def spoken(path: Path, said: dict[int, list[dict[str, float]]]) -> Path:
    path.write_text("\n".join(json.dumps({"index": i, "top_logprobs": p}) for i, p in said.items()))
    return path


def test_served_lines_become_a_store_of_every_position(tmp_path: Path) -> None:
    said = {1: [{"1": -0.1}, {"3": -0.7, "0": -1.2}], 0: [{"2": -0.5, "4": -2.0, "0": -3.0}, {"1": -0.2}]}
    path = spoken(tmp_path / "a.jsonl", said)
    list(bring(path, tmp_path / "ours", lesson(2)))
    found = Store(tmp_path / "ours").read(0, torch.arange(2))["out"].exp()
    assert found.shape == (2, 5, 2) and Store(tmp_path / "ours").header.fields[0].top == 3
    for index, logs in served(path, 5):
        torch.testing.assert_close(found[index].T, logs.exp(), atol=1e-3, rtol=0)
    list(bring(spoken(path, {0: [{"2": -0.5}], 1: [{"1": 0.0}]}), tmp_path / "one", lesson(2)))
    alone = Store(tmp_path / "one").read(0, torch.arange(2))["out"].exp()
    p = np.exp(-0.5)
    expected = torch.full((2, 5), float(1 - p) / 4)
    expected[0, 2], expected[1] = float(p), torch.tensor([0, 1.0, 0, 0, 0])
    torch.testing.assert_close(alone, expected, atol=1e-3, rtol=0)


def test_served_lines_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path, ours, one = tmp_path / "a.jsonl", tmp_path / "ours", [{"1": -0.5}]
    with pytest.raises(Refused, match=r"Line 2 of .* is of sample 2, and the data has samples 0 to 1"):
        bring(spoken(path, {0: one, 2: one}), ours, lesson(2))
    with pytest.raises(Refused, match=r"Line 2 of .* has 2 positions and line 1 has 1"):
        bring(spoken(path, {0: one, 1: one * 2}), ours, lesson(2))
    with pytest.raises(Refused, match=r"has no answer for 1 of 2 samples, first for '0'"):
        bring(spoken(path, {1: one}), ours, lesson(2))
    path.write_text('{"index": 0, "top_logprobs": [{"1": -0.5}]}\n' * 2)
    with pytest.raises(Refused, match=r"Lines 1 and 2 of .* are both of sample 0"):
        bring(path, ours, lesson(2))
    with pytest.raises(Refused, match="tells samples by their numbers, so keys say nothing"):
        bring(path, ours, lesson(2), ["a", "b"])
    assert not ours.exists()
