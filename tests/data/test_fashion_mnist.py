"""Fashion-MNIST from small files of its own format; their sums are pinned in place of the real ones."""

import gzip
import re
import struct
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.refused import Refused
from limbeck.data import fashion_mnist
from limbeck.data.loader import Splits

RAW = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (600, 28, 28), np.uint8), (RNG.permutation(600) % 10).astype(np.uint8)
X_TEST, Y_TEST = RNG.integers(0, 256, (30, 28, 28), np.uint8), (RNG.permutation(30) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def whole() -> dict[str, bytes]:
    return dict(zip(RAW, map(idx, (X, Y, X_TEST, Y_TEST)), strict=True))


def packed() -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in whole().items()}


def write(folder: Path, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> Path:
    """Files, and their sums pinned as if they had been published."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        patch.setitem(fashion_mnist.SHA256, name, sha256(content).hexdigest())
    return folder


def told(splits: Splits) -> list[list[tuple[bytes, int]]]:
    return [
        [(image.numpy().tobytes(), int(label)) for image, label in zip(part.x, part.y, strict=True)]
        for part in (splits.train, splits.valid, splits.test)
    ]


def rows(x: np.ndarray, y: np.ndarray) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), int(label)) for image, label in zip(x, y, strict=True)]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No data of this machine's own."""
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no-debian")
    return monkeypatch


# --- what is read ---


@pytest.mark.parametrize("files", [whole(), packed()], ids=["raw", "gz"])
def test_every_pixel_and_label_is_read_and_each_once(
    files: dict[str, bytes], tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    splits = fashion_mnist.load(write(tmp_path, files, patch))
    train, valid, test = told(splits)
    assert sorted(train + valid) == sorted(rows(X, Y)) and test == rows(X_TEST, Y_TEST)
    assert splits.train.x.dtype == torch.uint8 and splits.train.x.shape[1:] == (1, 28, 28)


def test_the_validation_part_is_one_in_twelve_of_every_class_and_never_moves(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, packed(), patch)
    torch.manual_seed(1)
    first = fashion_mnist.load(root)
    torch.manual_seed(2)
    assert told(fashion_mnist.load(root)) == told(first)
    assert torch.bincount(first.valid.y).tolist() == [60 // 12] * 10
    assert torch.bincount(first.train.y).tolist() == [55] * 10
    _, valid, _ = told(first)
    chosen = [n for n, row in enumerate(rows(X, Y)) if row in valid]
    assert chosen[:6] == [16, 42, 44, 45, 50, 55]  # scores are compared over years


def test_pixels_come_normalised_by_the_published_statistics(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    x, _ = fashion_mnist.load(write(tmp_path, packed(), patch)).test.rows(torch.arange(30))
    assert torch.allclose(x[:, 0], (torch.from_numpy(X_TEST) / 255 - 0.2860) / 0.3530, atol=1e-6)


def test_the_sums_and_classes_are_the_published_ones() -> None:
    assert list(fashion_mnist.SHA256) == [f"{name}.gz" for name in RAW] + RAW
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in fashion_mnist.SHA256.values())
    assert len(set(fashion_mnist.SHA256.values())) == 8
    assert len(fashion_mnist.CLASSES) == 10 and fashion_mnist.CLASSES[7] == "Sneaker"


# --- where it is looked for ---


def test_places_are_looked_at_in_turn(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """Each place holds another set of labels, so that what was read tells the place."""

    def place(folder: Path, label: int) -> Path:
        return write(folder, whole() | {RAW[3]: idx(np.full(30, label, np.uint8))}, patch)

    def reads() -> int:
        (label,) = set(fashion_mnist.load().test.y.tolist())
        return label

    patch.setattr(fashion_mnist, "DEBIAN", place(tmp_path / "debian", 1))
    assert reads() == 1
    patch.setenv("LIMBECK_DATA", str(tmp_path / "shelf"))
    assert reads() == 1  # nothing on the shelf
    place(tmp_path / "shelf" / "fashion-mnist", 2)
    assert reads() == 2
    own = place(tmp_path / "own", 3)
    assert set(fashion_mnist.load(own).test.y.tolist()) == {3}


def test_a_set_that_is_nowhere_is_refused_with_every_place_and_the_way_to_get_it(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Refused) as refusal:
        fashion_mnist.load()
    for part in (
        "LIMBECK_DATA/fashion-mnist (the environment variable LIMBECK_DATA is not set)",
        f"{tmp_path / 'no-debian'} (no such folder)",
        "dataset-fashion-mnist",
        *(f"{name}.gz" for name in RAW),
    ):
        assert part in str(refusal.value)

    shelf = tmp_path / "shelf" / "fashion-mnist"
    patch.setenv("LIMBECK_DATA", str(tmp_path / "shelf"))
    shelf.mkdir(parents=True)
    with pytest.raises(Refused, match=re.escape(f"looked in {shelf} (none of its files), ")):
        fashion_mnist.load()
    write(shelf, packed(), patch)
    (shelf / f"{RAW[1]}.gz").unlink()
    with pytest.raises(Refused, match=re.escape(f"{shelf} (lacks {RAW[1]}.gz), ../shared")):
        fashion_mnist.load()


def test_a_root_that_is_given_is_the_only_place(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fashion_mnist, "DEBIAN", write(tmp_path / "debian", packed(), patch))
    patch.setenv("LIMBECK_DATA", str(tmp_path))
    with pytest.raises(Refused, match=re.escape(f"looked in {tmp_path / 'own'} (no such folder); install")):
        fashion_mnist.load(tmp_path / "own")


# --- files that are not what they should be ---


@pytest.mark.parametrize("name", [f"{RAW[0]}.gz", f"{RAW[3]}.gz"])
def test_a_file_with_another_sum_is_refused(name: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    write(tmp_path, packed(), patch)
    expected, content = fashion_mnist.SHA256[name], packed()[name][:-1]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused) as refusal:
        fashion_mnist.load(tmp_path)
    for part in (
        f"{tmp_path / name} is not",
        expected,
        sha256(content).hexdigest(),
        f"{len(content):,} bytes",
    ):
        assert part in str(refusal.value)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    write(tmp_path, packed(), patch)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    patch.setattr(Path, "read_bytes", denied)
    with pytest.raises(Refused, match=r"train-images-idx3-ubyte\.gz cannot be read: Permission denied"):
        fashion_mnist.load(tmp_path)


GZ = packed()[f"{RAW[1]}.gz"]
BAD = [
    (f"{RAW[1]}.gz", GZ[:-20], "train-labels.*cannot be unpacked: .*ended before"),
    (
        f"{RAW[1]}.gz",
        b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 40,
        "train-labels.*cannot be unpacked: .*invalid",
    ),
    (f"{RAW[1]}.gz", idx(Y), "train-labels.*cannot be unpacked: Not a gzipped file"),
    (f"{RAW[1]}.gz", GZ[:-8] + b"\0" * 4 + GZ[-4:], "train-labels.*cannot be unpacked: CRC check failed"),
    (RAW[0], idx(X)[:-1], r"train-images.* holds 470,399 bytes .* 600 × 28 × 28; it was cut short"),
    (RAW[0], idx(X) + b"\0", r"train-images.* holds 470,401 bytes .* 600 × 28 × 28"),
    (RAW[0], idx(Y), "train-images.* begins with 00 00 08 01, expected 00 00 08 03 "),
    (RAW[1], idx(X), "train-labels.* begins with 00 00 08 03, expected 00 00 08 01 "),
    (RAW[0], b"\0\0\x0d\3" + idx(X)[4:], "train-images.* begins with 00 00 0d 03, expected 00 00 08 03 "),
    (RAW[0], idx(X)[:9], r"train-images.*, expected 00 00 08 03 and 3 length\(s\)"),
    (RAW[2], b"", "t10k-images.* begins with nothing"),
    (
        RAW[1],
        idx(np.where(np.arange(600) == 7, 10, Y).astype(np.uint8)),
        "train-labels.* label 10 for sample 7",
    ),
    (RAW[3], idx(Y_TEST[:29]), "t10k-images.* has 30 images and t10k-labels-idx1-ubyte 29 labels"),
    (RAW[0], idx(X[:0]), "train-images.* has 0 images and train-labels-idx1-ubyte 600 labels"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD)
def test_a_bad_file_is_refused_by_name(
    name: str, content: bytes, sentence: str, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    files = packed() if name.endswith(".gz") else whole()
    with pytest.raises(Refused, match=sentence) as refusal:
        fashion_mnist.load(write(tmp_path, files | {name: content}, patch))
    assert str(tmp_path) in str(refusal.value)


def test_a_set_without_images_is_refused(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    files = whole() | {RAW[2]: idx(X[:0]), RAW[3]: idx(Y[:0])}
    with pytest.raises(Refused, match=r"t10k-images.* has 0 images and .* 0 labels; .* at least one"):
        fashion_mnist.load(write(tmp_path, files, patch))
