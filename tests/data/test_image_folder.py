"""Folders of images: what each becomes, which part it goes to, and what is refused by its name."""

import math
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from limbeck import build, checkpoint, recipe, registry
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.data import image_folder
from limbeck.data.image_folder import TRIES, box, load
from limbeck.data.loader import AHEAD, Data, Loader, Splits, Unread
from limbeck.run import Run, resume

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


# --- images that stay on the disk ---


def photos(root: Path, each: int = 20) -> Path:
    """Noise of many sizes and shapes, some on its side."""
    draw = np.random.default_rng(0)
    for of in CLASSES:
        (root / of).mkdir(parents=True, exist_ok=True)
        for n in range(each):
            height, width = draw.integers(6, 24, 2)
            exif = Image.Exif()
            exif[0x0112] = 1 + 5 * (n % 2)
            pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(root / of / f"{n:03}.png", exif=exif)
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that were decoded."""
    names, decode = list[str](), image_folder._image

    def noted(path: Path, *how: Any) -> np.ndarray:
        names.append(path.name)
        return decode(path, *how)

    monkeypatch.setattr(image_folder, "_image", noted)
    return names


def batches(splits: Splits) -> Iterator[tuple[torch.Tensor, ...]]:
    train = Loader(splits.train, 7, seed=5, epochs=2)
    for batch in (*train.epoch(0), *train.epoch(1, 2)):
        yield batch.x, batch.y, batch.index
    for part in (splits.train, splits.valid, splits.test):
        for batch in Loader(part, 4, seed=5).once(9):
            yield batch.x, batch.y, batch.index


def test_decoding_always_shows_what_decoding_once_does(tmp_path: Path) -> None:
    root = str(photos(tmp_path))
    once, always = load(root, size=8), load(root, size=8, decode="always")
    for part in ("train", "valid", "test"):
        a, b = getattr(once, part), getattr(always, part)
        assert isinstance(a.x, torch.Tensor) and isinstance(b.x, Unread)
        assert (a.x.shape, a.x.dtype) == (b.x.shape, b.x.dtype)
        assert (a.scale, a.mean, a.std, a.classes, a.files) == (b.scale, b.mean, b.std, b.classes, b.files)
    pairs = list(zip(batches(once), batches(always), strict=True))
    assert len(pairs) == 10 + 5 + 1 + 2
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_with_statistics_given_nothing_is_decoded_before_it_is_shown(
    tmp_path: Path, decoded: list[str]
) -> None:
    norm = [[0.5, 0.25, 0.125], [0.5, 1.0, 2.0]]
    splits = load(str(fill(tmp_path, 20)), size=2, decode="always", normalise=norm)
    assert not decoded
    batch = next(Loader(splits.train, 4, seed=0).epoch(0))
    assert len(decoded) <= 4 * (1 + AHEAD)
    pixels = torch.tensor([colour(CLASSES[batch.y[0]], int(splits.train.x.paths[batch.index[0]].stem))])
    assert torch.allclose(
        batch.x[0, :, 0, 0], (pixels[0] / 255 - torch.tensor(norm[0])) / torch.tensor(norm[1])
    )
    for part in (splits.train, splits.valid, splits.test):
        assert (part.mean, part.std) == ((0.5, 0.25, 0.125), (0.5, 1.0, 2.0))
    once = load(str(tmp_path), size=2, normalise=norm)
    assert (once.train.mean, once.test.std) == (splits.train.mean, splits.test.std)


def test_the_files_are_told_by_their_names_and_sizes(tmp_path: Path) -> None:
    def told(root: Path) -> str:
        splits = load(str(root), size=2)
        assert splits.train.files == splits.valid.files == splits.test.files
        return splits.train.files

    first = told(fill(tmp_path / "a", 20))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert told(tmp_path / "elsewhere" / "b") == first
    image = tmp_path / "a" / "bee" / "007.png"
    image.rename(image.with_name("x.png"))
    renamed = told(tmp_path / "a")
    image.with_name("x.png").rename(image)
    assert told(tmp_path / "a") == first
    Image.fromarray(np.arange(3000, dtype=np.uint8).reshape(40, 25, 3)).save(image)
    grown = told(tmp_path / "a")
    assert len({first, renamed, grown}) == 3


# --- a part of an image, drawn anew ---


def slow_box(
    width: int, height: int, share: tuple[float, float], uniform: Iterator[float]
) -> tuple[int, int, int, int]:
    """RandomResizedCrop, from its documentation: ten tries at an area between two shares of the image's and a
    ratio whose logarithm is uniform between those of 3/4 and 4/3, then the centre."""
    for _ in range(10):
        area = (share[0] + next(uniform) * (share[1] - share[0])) * width * height
        lowest, highest = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(lowest + next(uniform) * (highest - lowest))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        across, down = next(uniform), next(uniform)
        if 0 < w <= width and 0 < h <= height:
            left = math.floor(across * (width - w + 1))
            top = math.floor(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@pytest.mark.parametrize("share", [(0.2, 1.0), (0.08, 0.08), (0.9, 1.0), (1.0, 1.0), (1e-6, 1e-4)])
def test_a_box_is_that_of_random_resized_crop(share: tuple[float, float]) -> None:
    draw = random.Random(1)
    for _ in range(400):
        width, height = draw.randint(1, 60), draw.randint(1, 60)
        draws = [[draw.random() for _ in range(4)] for _ in range(TRIES)]
        found = box(width, height, share, draws)
        assert found == slow_box(width, height, share, chain.from_iterable(draws))
        left, top, right, bottom = found
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_where_no_part_fits_it_is_the_centre() -> None:
    never = [[1.0, 0.5, 0.0, 0.0]] * TRIES  # square, and as large as the whole image
    assert box(90, 30, (1.0, 1.0), never) == (25, 0, 65, 30)
    assert box(30, 90, (1.0, 1.0), never) == (0, 25, 30, 65)
    assert box(31, 30, (1.0, 1.0), [[1.0, 0.0, 0.0, 0.0]] * TRIES) == (0, 0, 31, 30)


def test_places_and_areas_of_parts_are_spread_evenly() -> None:
    draw = random.Random(0)
    boxes = [box(1000, 1000, (0.2, 0.6), [[draw.random() for _ in range(4)]] * 10) for _ in range(4000)]
    areas = [(r - left) * (b - top) / 1e6 for left, top, r, b in boxes]
    assert sum(areas) / 4000 == pytest.approx(0.4, abs=0.01)
    ratios = [math.log((r - left) / (b - top)) for left, top, r, b in boxes]
    assert sum(ratios) / 4000 == pytest.approx(0, abs=0.02)
    assert max(map(abs, ratios)) == pytest.approx(math.log(4 / 3), abs=0.02)
    centres = [((left + r) / 2, (top + b) / 2) for left, top, r, b in boxes]
    for axis in zip(*centres, strict=True):
        assert sum(axis) / 4000 == pytest.approx(500, abs=10)


CROP = (0.2, 1.0)


def cropped(root: Path) -> Data:
    return load(str(root), size=8, decode="always", crop=list(CROP)).train


def by_row(loader: Loader, epoch: int) -> dict[int, torch.Tensor]:
    return {int(n): x for batch in loader.epoch(epoch) for n, x in zip(batch.index, batch.x, strict=True)}


def test_a_lesson_shows_the_part_that_is_drawn_for_seed_epoch_and_number(tmp_path: Path) -> None:
    train = cropped(photos(tmp_path))
    batch = Loader(train, 10, seed=4, epochs=3).at(2 * 4 + 1)
    assert batch.lesson.epoch == 2
    draws = keyed(batch.lesson, batch.index, "part of an image", 4 * TRIES).tolist()
    for row, (index, numbers) in enumerate(zip(batch.index.tolist(), draws, strict=True)):
        image = Image.open(train.x.paths[index])
        lying = image.getexif().get(0x0112) == 6
        upright = image.transpose(Image.Transpose.ROTATE_270) if lying else image
        part = upright.crop(slow_box(*upright.size, CROP, iter(numbers)))
        x = torch.from_numpy(np.array(part.resize((8, 8), Image.Resampling.BILINEAR))).permute(2, 0, 1)
        assert torch.equal(batch.x[row], train.to_float(x[None])[0])


def test_a_part_does_not_depend_on_batch_order_or_place_in_time(tmp_path: Path) -> None:
    train = cropped(photos(tmp_path))
    first = by_row(Loader(train, 42, seed=4), 1)  # all rows
    few = Loader(train, 5, seed=4)
    again = {**by_row(few, 1), **by_row(Loader(train, 8, seed=4), 1)}
    assert len(first) == 42 and len(again) > 38 and all(torch.equal(first[n], x) for n, x in again.items())
    alone = few.rows(torch.tensor([11]), few.lesson(1, 9), few.augment)
    assert torch.equal(alone.x[0], first[11])
    resumed = list(Loader(train, 5, seed=4).epoch(1, 6))
    assert all(torch.equal(a.x, b.x) for a, b in zip(resumed, list(few.epoch(1))[6:], strict=True))


def test_another_epoch_or_seed_draws_another_part(tmp_path: Path) -> None:
    train = cropped(photos(tmp_path))
    first = by_row(Loader(train, 42, seed=4), 1)
    for other in (by_row(Loader(train, 42, seed=4), 2), by_row(Loader(train, 42, seed=5), 1)):
        assert sum(torch.equal(first[n], other[n]) for n in first) <= 2


def test_what_is_scored_is_the_centre_square_always(tmp_path: Path) -> None:
    root = str(photos(tmp_path))
    drawn, plain = load(root, size=8, decode="always", crop=[0.2, 0.5]), load(root, size=8)
    assert (drawn.train.mean, drawn.train.std) == (plain.train.mean, plain.train.std)
    for part in ("train", "valid", "test"):
        pair = [Loader(getattr(splits, part), 5, seed=0) for splits in (drawn, plain)]
        assert all(torch.equal(a.x, b.x) for a, b in zip(*(one.once(9) for one in pair), strict=True))
        if part != "train":
            assert torch.equal(pair[0].at(3).x, pair[1].at(3).x)
    redrawn = drawn.with_validation(0.5, "name")
    assert torch.equal(
        torch.cat([batch.x for batch in Loader(redrawn.valid, 5, seed=0).once(9)]),
        torch.cat([b.x for b in Loader(plain.with_validation(0.5, "name").valid, 5, seed=0).once(9)]),
    )


# --- a file that goes while it is learned from ---


def plan(root: Path, **changes: Any) -> recipe.Recipe:
    knobs = {"root": str(root), "size": 8, "decode": "always", "crop": [0.3, 1.0], **changes}
    return recipe.parse(
        {
            "data": {"name": "image-folder", **knobs},
            "models": {"student": {"name": "cnn", "widths": [3, 4]}},
            "stages": [{"learner": "student", "epochs": 2, "batch": 20}],
        }
    )


def test_a_run_stops_where_an_image_is_lost_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    root = photos(tmp_path / "images")
    whole = Run(plan(root), tmp_path / "whole")
    list(whole.moments())
    lost = whole.lab.splits.train.x.paths[20]
    safe = shutil.copy(lost, tmp_path / "safe.png")

    run = Run(plan(root), tmp_path / "run", every=0, rehearsed=True)
    moments = run.moments()
    for _ in range(2):  # an epoch
        next(moments)
    lost.unlink()
    with pytest.raises(Refused, match=f"{lost.name} is gone since its folder was read; put it") as refusal:
        list(moments)
    assert str(lost) in str(refusal.value)
    step = checkpoint.load(run.folder, fingerprint=run.fingerprint)["engine"]["step"]
    assert step in (2, 3) and run.result is None and not list(run.folder.glob("*.lock"))

    shutil.copy(safe, lost)
    list(resume(run.folder).moments())
    ends = [load_file(one / "student.safetensors") for one in (run.folder, whole.folder)]
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_an_image_that_is_damaged_later_is_refused_by_its_name(tmp_path: Path) -> None:
    train = cropped(photos(tmp_path))
    damaged = train.x.paths[20]
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(Refused, match=f"{damaged.name} cannot be read as an image .*expected BMP") as refusal:
        list(Loader(train, 10, seed=0).once(10))
    assert str(damaged) in str(refusal.value) and "\n" not in str(refusal.value)


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


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"crop": [0.2, 1.0]}, r"decode = 'once' does so once; set decode = 'always'"),
        ({"decode": "always", "crop": [0.0, 1.0]}, r"`crop` is \[0\.0, 1\.0\], expected the least and the"),
        ({"decode": "always", "crop": [0.6, 0.5]}, r"`crop` is \[0\.6, 0\.5\], expected"),
        ({"decode": "always", "crop": [0.5, 1.5]}, r"`crop` is \[0\.5, 1\.5\], expected"),
        ({"decode": "always", "crop": [0.5]}, r"`crop` is \[0\.5\], expected"),
        ({"normalise": [[0.5] * 3]}, r"`normalise` is \[\[0\.5, 0\.5, 0\.5\]\], expected \[mean, std\]"),
        ({"normalise": [[0.5], [0.5]]}, r"`normalise` is .*each of three channels"),
        ({"normalise": [[0.5] * 3, [0.5, 0.0, 0.5]]}, r"`normalise` is .*std above 0"),
    ],
)
def test_ways_to_show_that_cannot_be_are_refused(
    knobs: dict[str, Any], sentence: str, tmp_path: Path, decoded: list[str]
) -> None:
    with pytest.raises(Refused, match=sentence):
        load(str(fill(tmp_path, 20)), size=2, **knobs)
    assert not decoded


def test_a_bad_image_is_refused_before_the_first_step_when_statistics_are_counted(tmp_path: Path) -> None:
    root = fill(tmp_path / "train", 20).parent
    fill(root / "test", 2)
    cut(root / "train")
    with pytest.raises(Refused, match=r"bee/cut\.jpg cannot be read as an image"):
        load(str(root), size=2, decode="always", valid=0.05)


def test_a_recipe_names_a_way_to_decode(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"decode is 'sometimes': .*'once' or 'always'"):
        plan(tmp_path, decode="sometimes")


def test_a_recipe_finds_it() -> None:
    assert registry.find("data", "image-folder") is load


def test_a_run_does_not_go_on_with_other_images(tmp_path: Path) -> None:
    root = photos(tmp_path / "images")
    run = Run(plan(root, decode="once", crop=None), tmp_path / "run", every=0)
    next(run.moments())
    lost = sorted(root.rglob("*.png"))[0]
    shutil.copy(lost, lost.with_name("another.png"))
    build._ours.cache_clear()  # as in a process of its own
    with pytest.raises(Refused, match="was begun with other files of data than there are now"):
        resume(run.folder)
    lost.with_name("another.png").unlink()
    build._ours.cache_clear()
    assert list(resume(run.folder).moments())
