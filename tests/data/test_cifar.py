"""CIFAR-10 and CIFAR-100 from small files of their own formats; their sums are pinned in place of the real
ones."""

import io
import re
import tarfile
import warnings
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from limbeck import registry
from limbeck.core.refused import Refused
from limbeck.data import cifar10, cifar100
from limbeck.data.loader import Data, Splits

Part = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Set:
    """One of the two sets, small: as many files as the real one, training files first."""

    module: ModuleType
    binary: list[str]
    arrays: list[str]
    each: int  # training images of a class over all files

    @property
    def classes(self) -> int:
        return len(self.module.CLASSES)

    def parts(self, files: list[str]) -> list[Part]:
        """Random images, the training labels dealt over the training files."""
        rng = np.random.default_rng(len(files))
        train = rng.permutation(np.repeat(np.arange(self.classes), self.each)).astype(np.uint8)
        labels = [*np.array_split(train, len(files) - 1), np.arange(self.classes, dtype=np.uint8)[::-1]]
        return [(rng.integers(0, 256, (len(y), 3, 32, 32), np.uint8), y) for y in labels]


TEN = Set(
    cifar10,
    [*(f"data_batch_{n}.bin" for n in (1, 2, 3, 4, 5)), "test_batch.bin"],
    ["train_10k.npz", "test_5k.npz"],
    20,
)
HUNDRED = Set(cifar100, ["train.bin", "test.bin"], [*(f"train_{n}.npz" for n in range(5)), "test.npz"], 10)
SETS = pytest.mark.parametrize("small", [TEN, HUNDRED], ids=["cifar10", "cifar100"])


def records(small: Set, part: Part) -> bytes:
    """Label and image, label and image; CIFAR-100 has a coarse label first, which nobody must read."""
    coarse = bytes([77]) if small is HUNDRED else b""
    return b"".join(coarse + bytes([label]) + image.tobytes() for image, label in zip(*part, strict=True))


def differences(part: Part) -> bytes:
    """Written the slow way round, with integers."""
    x = part[0].astype(int)
    x[:, 0] -= x[:, 1]
    x[:, 2] -= x[:, 1]
    for axis in (3, 2):
        x = np.diff(x, axis=axis, prepend=0)
    return npz(delta=(x % 256).astype(np.uint8), labels=part[1])


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def binary(small: Set) -> dict[str, bytes]:
    return {n: records(small, p) for n, p in zip(small.binary, small.parts(small.binary), strict=True)}


def arrays(small: Set) -> dict[str, bytes]:
    return {n: differences(p) for n, p in zip(small.arrays, small.parts(small.arrays), strict=True)}


def official(small: Set) -> tuple[str, str]:
    return (
        ("cifar-10-binary.tar.gz", "cifar-10-batches-bin")
        if small is TEN
        else ("cifar-100-binary.tar.gz", "cifar-100-binary")
    )


def form(small: Set, called: str) -> dict[str, bytes]:
    """The files of one form of the set, by path."""
    archive, folder = official(small)
    inside = {f"{folder}/{name}": content for name, content in binary(small).items()}
    return {
        "inside": lambda: binary(small),
        "folder": lambda: inside,
        "archive": lambda: {
            archive: tar({f"{folder}/readme.html": b"<html>"} | dict(reversed(inside.items())))
        },
        "npz": lambda: arrays(small),
    }[called]()


def write(root: Path, small: Set, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> Path:
    """Files, and their sums pinned as if they had been published."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        patch.setitem(small.module.SHA256, (root / name).name, sha256(content).hexdigest())
    return root


def load(small: Set, root: Path | None) -> Splits:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*a part of CIFAR-10")  # has a test of its own
        return small.module.load(root)


def rows(x: np.ndarray, y: np.ndarray) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), int(label)) for image, label in zip(x, y, strict=True)]


def told(data: Data) -> list[tuple[bytes, int]]:
    return rows(data.x.numpy(), data.y.numpy())


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    return monkeypatch


# --- what is read ---


@SETS
@pytest.mark.parametrize("called", ["inside", "folder", "archive", "npz"])
def test_every_pixel_and_label_is_read_and_each_once(
    small: Set, called: str, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    files = form(small, called)
    splits = load(small, write(tmp_path, small, files, patch))
    *train, test = small.parts(small.arrays if called == "npz" else small.binary)
    assert sorted(told(splits.train) + told(splits.valid)) == sorted(
        row for part in train for row in rows(*part)
    )
    assert told(splits.test) == rows(*test)
    assert splits.train.x.dtype == torch.uint8
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == set(files)


@SETS
def test_the_validation_part_is_one_in_ten_of_every_class_and_never_moves(
    small: Set, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    archive, unpacked = (write(tmp_path / f, small, form(small, f), patch) for f in ("archive", "folder"))
    torch.manual_seed(1)
    first = load(small, archive)
    torch.manual_seed(2)
    again = load(small, unpacked)
    assert told(first.valid) == told(again.valid) and told(first.train) == told(again.train)
    assert torch.bincount(first.valid.y).tolist() == [small.each // 10] * small.classes
    assert torch.bincount(first.train.y).tolist() == [small.each - small.each // 10] * small.classes
    *train, _ = small.parts(small.binary)
    valid = told(first.valid)
    chosen = [n for n, row in enumerate(row for p in train for row in rows(*p)) if row in valid]
    assert chosen[:5] == {10: [10, 24, 26, 32, 46], 100: [53, 70, 73, 82, 92]}[small.classes]  # for years


@SETS
def test_pixels_come_normalised_by_the_published_statistics(
    small: Set, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    mean, std = {
        10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }[small.classes]
    test = load(small, write(tmp_path, small, form(small, "inside"), patch)).test
    x, _ = test.rows(torch.arange(3))
    for channel in range(3):
        expected = (test.x[:3, channel] / 255 - mean[channel]) / std[channel]
        assert torch.allclose(x[:, channel], expected, atol=1e-5)


def test_the_whole_set_is_read_before_a_part_of_it(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TEN, form(TEN, "npz") | form(TEN, "folder"), patch)
    assert told(cifar10.load(tmp_path).test) == rows(*TEN.parts(TEN.binary)[-1])


def test_a_part_of_the_set_is_said_to_be_one(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    write(tmp_path, TEN, form(TEN, "npz"), patch)
    with pytest.warns(UserWarning, match="a part of CIFAR-10, 200 training and 10 test images"):
        cifar10.load(tmp_path)


@SETS
def test_the_sums_and_classes_are_the_published_ones(small: Set) -> None:
    assert set(small.module.SHA256) == {*small.binary, *small.arrays, official(small)[0]}
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in small.module.SHA256.values())
    assert len(set(small.module.SHA256.values())) == len(small.module.SHA256)
    names = small.module.CLASSES
    assert len(set(names)) == {"airplane": 10, "apple": 100}[names[0]] and list(names) == sorted(names)


def test_the_sets_are_found_by_name_and_their_readers_are_no_sets() -> None:
    assert registry.find("data", "cifar10") is cifar10.load
    assert registry.find("data", "cifar100") is cifar100.load
    assert not {"cifar_files", "published"} & set(registry.names("data"))


# --- where it is looked for ---


@SETS
def test_it_is_looked_for_under_the_environments_folder(
    small: Set, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    name = small.module.__name__.rpartition(".")[2]
    with pytest.raises(
        Refused, match=re.escape(f"LIMBECK_DATA/{name} (the environment variable LIMBECK_DATA is")
    ):
        small.module.load()
    patch.setenv("LIMBECK_DATA", str(tmp_path))
    with pytest.raises(Refused) as refusal:
        small.module.load()
    for part in (f"looked in {tmp_path / name} (no such folder)", *official(small), *small.arrays):
        assert part in str(refusal.value)
    write(tmp_path / name, small, form(small, "folder"), patch)
    assert len(small.module.load().test) == small.classes
    missing = f"{official(small)[1]}/{small.binary[0]}"
    (tmp_path / name / missing).unlink()
    with pytest.raises(Refused, match=re.escape(f"{tmp_path / name} (lacks {missing})")):
        small.module.load()


# --- files that are not what they should be ---


@SETS
@pytest.mark.parametrize("called", ["inside", "archive", "npz"])
def test_a_file_with_another_sum_is_refused(
    small: Set, called: str, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    files = form(small, called)
    write(tmp_path, small, files, patch)
    name, content = list(files.items())[-1]
    expected = small.module.SHA256[name]
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(
        Refused, match=rf"{name} is not the published file: its {len(content) - 1:,} .*{expected}"
    ):
        load(small, tmp_path)


def test_an_official_file_that_is_bad_is_refused_by_name(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    good = binary(HUNDRED)
    record = 2 + 3072
    wild = bytearray(good["train.bin"])
    wild[7 * record + 1] = 100
    for content, sentence in (
        (good["train.bin"][:-1], r"train\.bin has 3,073,999 bytes, expected a multiple of 3,074"),
        (b"", r"train\.bin holds no images"),
        (bytes(wild), r"train\.bin has label 100 for sample 7, expected 0 to 99"),
    ):
        write(tmp_path, HUNDRED, good | {"train.bin": content}, patch)
        with pytest.raises(Refused, match=sentence):
            cifar100.load(tmp_path)


def test_a_bad_archive_is_refused(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    archive, folder = official(TEN)
    inside = {f"{folder}/{name}": content for name, content in binary(TEN).items()}
    last = f"{folder}/test_batch.bin"
    for content, sentence in (
        (tar(inside)[:100_000], "cannot be unpacked: "),
        (b"no archive", "cannot be unpacked: not a gzip file"),
        (tar({name: inside[name] for name in inside if name != last}), f"lacks {last}; "),
        (tar(inside | {last: b"short"}), rf"{last} has 5 bytes, expected a multiple of 3,073"),
    ):
        write(tmp_path, TEN, {archive: content}, patch)
        with pytest.raises(Refused, match=rf"{archive}.*{sentence}"):
            cifar10.load(tmp_path)


def test_a_bad_file_of_differences_is_refused_by_name(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    good = arrays(TEN)
    x, y = np.zeros((4, 3, 32, 32), np.uint8), np.arange(4, dtype=np.uint8)
    array = io.BytesIO()
    np.save(array, x)
    for content, sentence in (
        (good["test_5k.npz"][:-30], "cannot be read as .npz: "),
        (b"", "cannot be read as .npz: "),
        (array.getvalue(), "cannot be read as .npz: "),
        (npz(delta=x), "cannot be read as .npz: .*labels"),
        (npz(delta=x, labels=np.array([0, 1, 2, None])), "cannot be read as .npz: .*allow_pickle=False"),
        (
            npz(delta=x[:3], labels=y),
            r"\(3, 3, 32, 32\) of uint8 and `labels` \(4,\).* expected \(n, 3, 32, 32\)",
        ),
        (npz(delta=x[:, :, :28], labels=y), r"`delta` \(4, 3, 28, 32\)"),
        (npz(delta=x, labels=y[:, None]), r"`labels` \(4, 1\)"),
        (npz(delta=x.astype(np.int16), labels=y), "of int16"),
        (npz(delta=x, labels=y.astype(np.int64)), "of int64"),
        (npz(delta=x[:0], labels=y[:0]), "holds no images"),
        (npz(delta=x, labels=y + np.uint8(8)), "has label 10 for sample 2, expected 0 to 9"),
    ):
        write(tmp_path, TEN, good | {"test_5k.npz": content}, patch)
        with pytest.raises(Refused, match=rf"test_5k\.npz.*{sentence}"):
            load(TEN, tmp_path)
