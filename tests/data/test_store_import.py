"""What others stored is read as the spec's target; files that do not fit are refused by name."""

import json
import struct
from pathlib import Path

import pytest
import torch

from limbeck.core.refused import Refused
from limbeck.data.store_import import TinyViT, served


def saved(
    root: Path, rank: int, records: dict[str, tuple[int, list[int], list[float]]], top: int = 2
) -> Path:
    """A package written byte by byte, as the layout says."""
    folder = root / f"logits_top{top}_epoch5"
    folder.mkdir(exist_ok=True)
    (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in records))
    rows = [struct.pack(f"<i{top}h{top}e", seed, *c, *p) for seed, c, p in records.values()]
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
