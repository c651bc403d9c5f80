"""Folders of images: what each becomes, which part it goes to, and what is refused by its name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck import registry
from limbeck.core.refused import Refused
from limbeck.data.image_folder import load
from limbeck.data.loader import Data, Splits

CLASSES = ("ant", "bee", "cow")


def colour(of: str, n: int) -> tuple[int, int, int]:
    """Each image of one colour, so that it is known again."""
    return CLASSES.index(of) * 60, 2 * n, 200


def draw(path: Path, of: str, n: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), colour(of, n)).save(path)


def fill(root: Path, images: int, first: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    for of in classes:
        for n in range(first, first + images):
            draw(root / of / f"{n:03}.png", of, n)
    return root


def told(data: Data) -> set[tuple[int, ...]]:
    """(colour, label) of each image."""
    return {(*image[:, 0, 0].tolist(), int(label)) for image, label in zip(data.x, data.y, strict=True)}


def expected(images: range) -> set[tuple[int, ...]]:
    return {(*colour(of, n), CLASSES.index(of)) for of in CLASSES for n in images}


def parts(splits: Splits) -> list[set[tuple[int, ...]]]:
    return [told(part) for part in (splits.train, splits.valid, splits.test)]


# --- which image goes where ---


def test_folders_of_classes_are_drawn_apart_by_name(tmp_path: Path) -> None:
    splits = load(str(fill(tmp_path, 50)), size=2)
    train, valid, test = parts(splits)
    assert train | valid | test == expected(range(50))
    for part, each in ((splits.train, 36), (splits.valid, 4), (splits.test, 10)):
        assert torch.bincount(part.y).tolist() == [each] * 3 and len(told(part)) == 3 * each
        assert part.classes == CLASSES and part.x.dtype == torch.uint8
    drawn = sorted(green // 2 for _, green, _, label in test if label == 0)
    assert drawn != list(range(10)) and drawn != list(range(40, 50))  # not the first, not the last
    assert {g for _, g, _, label in test if label == 0} != {g for _, g, _, label in test if label == 1}


def test_the_draw_follows_the_names_and_nothing_else(tmp_path: Path) -> None:
    first = load(str(fill(tmp_path / "a", 50)), size=2)
    copy = tmp_path / "elsewhere" / "b"
    for of in reversed(CLASSES):
        for n in reversed(range(50)):
            draw(copy / of / f"{n:03}.png", of, n)
    torch.manual_seed(7)
    again = load(str(copy), size=2)
    assert parts(again) == parts(first)
    assert torch.equal(again.train.x, first.train.x)  # order too
    assert again.train.y.tolist() == sorted(again.train.y.tolist())


def test_images_that_are_added_move_few(tmp_path: Path) -> None:
    before = parts(load(str(fill(tmp_path, 50)), size=2))
    after = parts(load(str(fill(tmp_path, 5, first=50)), size=2))
    assert sum(len(b - a) for b, a in zip(before, after, strict=True)) <= 12  # of 150


def test_the_shares_may_be_chosen(tmp_path: Path) -> None:
    splits = load(str(fill(tmp_path, 20)), size=2, valid=0.5, test=0.1)
    assert [len(part) // 3 for part in (splits.train, splits.valid, splits.test)] == [9, 9, 2]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_parts_with_folders_of_their_own_are_kept(name: str, tmp_path: Path) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / name, 2, first=10)
    fill(tmp_path / "test", 3, first=20)
    splits = load(str(tmp_path), size=2)
    assert parts(splits) == [expected(range(4)), expected(range(10, 12)), expected(range(20, 23))]


def test_a_part_without_a_folder_is_drawn_from_train(tmp_path: Path) -> None:
    fill(tmp_path / "train", 20)
    fill(tmp_path / "test", 3, first=50)
    train, valid, test = parts(load(str(tmp_path), size=2))
    assert train | valid == expected(range(20)) and len(valid) == 6 and test == expected(range(50, 53))
    fill(tmp_path / "val", 2, first=60)
    (tmp_path / "test").rename(tmp_path / ".test")
    train, valid, test = parts(load(str(tmp_path), size=2))
    assert train | test == expected(range(20)) and len(test) == 12 and valid == expected(range(60, 62))


def test_train_may_be_a_class(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    (tmp_path / "cow").rename(tmp_path / "train")
    assert load(str(tmp_path), size=2).train.classes == ("ant", "bee", "train")


def test_hidden_files_and_files_beside_the_classes_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    for name in ("README.md", ".DS_Store", "ant/.DS_Store", ".cache/x/y.png", "ant/.thumbs/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no image")
    draw(tmp_path / "ant" / "deeper" / "x.png", "ant", 99)
    assert expected(range(20)) | {(*colour("ant", 99), 0)} == set().union(*parts(load(str(tmp_path), size=2)))


# --- what an image becomes ---


def seen(tmp_path: Path, image: Image.Image, size: int, name: str = "x.png", **save: object) -> torch.Tensor:
    """What one image becomes."""
    root = fill(tmp_path, 20)
    image.save(root / "ant" / name, **save)
    for path in (root / "ant").glob("0*.png"):
        Image.new("RGB", (5, 4), (1, 2, 3)).save(path)
    splits = load(str(root), size=size)
    odd = [
        image
        for part in (splits.train, splits.valid, splits.test)
        for image, label in zip(part.x, part.y, strict=True)
        if label == 0 and image[:, 0, 0].tolist() != [1, 2, 3]
    ]
    assert len(odd) == 1
    return odd[0]


def stripes(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    right, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([right * 4, down * 4, right * 0 + 9], 2).astype(np.uint8))


def test_a_square_of_the_right_size_is_kept_bit_for_bit(tmp_path: Path) -> None:
    x = seen(tmp_path, stripes(8, 8), 8)
    assert torch.equal(x, torch.from_numpy(np.array(stripes(8, 8))).permute(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24)])
def test_a_long_image_is_cut_about_its_centre(width: int, height: int, tmp_path: Path) -> None:
    whole = torch.from_numpy(np.array(stripes(width, height))).permute(2, 0, 1)
    left, top = (width - 8) // 2, (height - 8) // 2
    assert torch.equal(seen(tmp_path, stripes(width, height), 8), whole[:, top : top + 8, left : left + 8])


def test_the_short_side_is_brought_to_size(tmp_path: Path) -> None:
    x = seen(tmp_path, stripes(60, 40), 4).float()
    centres = torch.tensor([5.0, 15.0, 25.0, 35.0]) - 0.5
    assert torch.allclose(x[0, 0], 4 * (centres + 10), atol=6) and torch.allclose(
        x[1, :, 0], 4 * centres, atol=6
    )


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    grey = seen(tmp_path / "a", Image.new("L", (3, 3), 77), 2)
    assert grey.flatten(1).unique(dim=1).tolist() == [[77], [77], [77]]
    palette = seen(tmp_path / "b", Image.new("RGB", (3, 3), (9, 8, 7)).convert("P", colors=2, palette=1), 2)
    assert palette[:, 0, 0].tolist() == [9, 8, 7]
    assert seen(tmp_path / "c", Image.new("RGBA", (3, 3), (5, 6, 7, 0)), 2)[:, 0, 0].tolist() == [5, 6, 7]


def test_a_photo_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is the image's right side
    x = seen(tmp_path, stripes(8, 8), 8, exif=exif)
    assert torch.equal(x, torch.from_numpy(np.array(stripes(8, 8))).permute(2, 0, 1).rot90(-1, (1, 2)))


def test_the_statistics_are_the_training_parts(tmp_path: Path) -> None:
    splits = load(str(fill(tmp_path, 50)), size=2)
    x, _ = splits.train.rows(torch.arange(len(splits.train)))
    x = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(x.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(
        x.std(1, correction=0), torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-5
    )  # blue is 200
    for part in (splits.valid, splits.test):
        assert (part.scale, part.mean, part.std) == (splits.train.scale, splits.train.mean, splits.train.std)
    assert splits.train.scale == 1 / 255


# --- what is refused ---


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


def cut(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "bee" / "cut.jpg")
    content = (root / "bee" / "cut.jpg").read_bytes()
    (root / "bee" / "cut.jpg").write_bytes(content[: len(content) // 2])


def emptied(root: Path) -> None:
    for path in (root / "bee").iterdir():
        path.unlink()


def deep(root: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(root / "cow" / "deep.png")


def icon(root: Path) -> None:
    Image.new("RGB", (16, 16)).save(root / "ant" / "x.ico")


def in_test_only(root: Path) -> None:
    fill(root / "train", 5)
    fill(root / "test", 5, classes=("ant", "bee", "cow"))
    (root / "test" / "cow").rename(root / "test" / "dog")


def both(root: Path) -> None:
    for part in ("train", "val", "valid"):
        fill(root / part, 2)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a corrupt file": (cut, r"bee/cut\.jpg cannot be read as an image \(.*truncated"),
    "a broken png": (
        spoil("ant/x.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        r"ant/x\.png cannot be read as an",
    ),
    "no image": (
        spoil("ant/notes.txt", b"notes"),
        r"ant/notes\.txt cannot be read as an image .* expected BMP, ",
    ),
    "an empty file": (spoil("cow/x.png", b""), r"cow/x\.png cannot be read as an image"),
    "a format that is not listed": (icon, r"ant/x\.ico cannot be read as an image .* expected BMP, GIF, "),
    "more than 8 bits": (deep, r"cow/deep\.png has more than 8 bits a pixel"),
    "an empty class": (emptied, r"bee holds no image; put some there"),
    "classes that differ": (in_test_only, r"the class 'cow' in train and not in test; "),
    "two validation parts": (both, "has both valid and val, expected one"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_learned_from_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, sentence = BAD[case]
    change(fill(tmp_path, 20))
    with pytest.raises(Refused, match=sentence) as refusal:
        load(str(tmp_path), size=2)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "one", 3, classes=("ant",))
    for name, found in (
        ("nowhere", "nowhere is not there, expected a folder"),
        ("file", "file is a file, expected a folder"),
        ("empty", "empty holds no folder, expected a folder of images for each"),
        ("one", "one holds one folder, ant, expected a folder of images for each of two"),
    ):
        with pytest.raises(Refused, match=found):
            load(str(tmp_path / name))

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(Refused, match=r"one cannot be read: Permission denied\."):
        load(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (2, "A test split of 0.2 takes 0 of 6 images, fewer than the 3"),
        (4, "A validation split of 0.1 takes 0 of 9"),
    ],
)
def test_a_split_smaller_than_the_classes_is_refused(images: int, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=sentence):
        load(str(fill(tmp_path, images)), size=2)


def test_a_split_of_one_class_alone_is_refused(tmp_path: Path) -> None:
    fill(fill(tmp_path, 2), 8, first=2, classes=("ant",))
    with pytest.raises(Refused, match=r"A test split of 0\.2 takes 2 of 14 images, fewer than the 3 classes"):
        load(str(tmp_path), size=2)


def test_a_class_keeps_an_image_to_learn_from(tmp_path: Path) -> None:
    fill(tmp_path / "train", 2)
    fill(tmp_path / "test", 1)
    splits = load(str(tmp_path), size=2, valid=0.9)
    assert torch.bincount(splits.train.y).tolist() == [1, 1, 1] == torch.bincount(splits.valid.y).tolist()


@pytest.mark.parametrize(
    "knobs", [{"size": 0}, {"valid": 0.0}, {"valid": 1.0}, {"test": -0.1}, {"test": 1.5}]
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match=f"{next(iter(knobs))} {next(iter(knobs.values()))}.*shares between 0 and 1"
    ):
        load(str(fill(tmp_path, 5)), **knobs)  # type: ignore[arg-type]


def test_a_recipe_finds_it() -> None:
    assert registry.find("data", "image-folder") is load
