"""Images in folders, one folder for each class: `root/CLASS/IMAGE`, or `root/train/CLASS/IMAGE` and beside
`train` as many of `valid` (or `val`) and `test` as there are.

An image is turned as its EXIF says, made RGB (transparency is dropped), and cut to the square about its
centre, which is brought to `size`. All are decoded once, into memory; or, where they are too many for that,
each whenever a batch asks for it, which then may show any part of it. What the folders do not hold apart is
drawn by the files' names: it stays as it is when the folder is copied, and nearly so when images are added.
Names that begin with a dot are passed over, and so are files beside the folders of classes. Pillow comes with
matplotlib.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from limbeck.core.batch import Lesson
from limbeck.core.keyed import keyed, number
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits, Unread

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not those that start another program
DEEP = ("I", "F")  # Pillow's modes of more than 8 bits; it would cut their values off, not scale them
TRIES = 10  # at a part that lies within its image
WIDEST = 4 / 3  # width to height; the narrowest is the inverse
CPU = torch.device("cpu")

Files = Mapping[str, list[Path]]
"""The images of each class, sorted; classes sorted too."""


def load(
    root: str,
    size: int = 32,
    valid: float = 0.1,
    test: float = 0.2,
    decode: Literal["once", "always"] = "once",
    crop: Sequence[float] | None = None,
    normalise: Sequence[Sequence[float]] | None = None,
) -> Splits:
    """Three parts of uint8 images (n 3 size size), whose mean and std are the training part's.

    test: the share of each class that is for testing, 0 … 1, when `root` has no folder for that. valid: the
    share of the others that choices are made on, likewise. decode: `always` decodes an image whenever it is
    shown, so that memory does not grow with their number; both show the same bit for bit. crop: what lessons
    show of an image that is decoded for them, as `box` draws it: the least and the largest share of its
    area, 0 … 1. normalise: [mean, std] of pixel values in 0 … 1, a number for each channel, in place of the
    training part's own, for which each image has to be decoded once before the first step. Raises `Refused`,
    naming the file or folder.
    """
    if size < 1 or not 0 < valid < 1 or not 0 < test < 1:
        raise Refused(
            f"The images of {root} were asked for with size {size}, valid {valid} and test {test}, expected "
            "a size of 1 or more and shares between 0 and 1; try 32, 0.1 and 0.2."
        )
    _refuse_shown(decode, crop, normalise)
    try:
        above = Path(root).expanduser()
        train, held = _parts(above)
        told = _told([train, *held.values()], above)
    except OSError as error:
        raise Refused(f"{error.filename} cannot be read: {error.strerror}.") from None
    names = tuple(train)
    if "test" not in held:
        train, held["test"] = _drawn(train, test, "test")
    if "validation" not in held:
        train, held["validation"] = _drawn(train, valid, "validation")

    def data(files: Files) -> Data:
        images = Images([path for paths in files.values() for path in paths], size)
        y = torch.tensor([label for label, paths in enumerate(files.values()) for _ in paths])
        return Data(images if decode == "always" else images[:], y, names, 1 / 255, files=told)

    learned = data(train)
    if normalise is None:
        learned = learned.standardised()
    else:
        learned = replace(learned, mean=tuple(normalise[0]), std=tuple(normalise[1]))
    chosen, last = (
        replace(data(held[part]), mean=learned.mean, std=learned.std) for part in ("validation", "test")
    )
    if crop is not None:
        learned = replace(learned, x=replace(learned.x, crop=(crop[0], crop[1])))
    return Splits(learned, chosen, last)


def _refuse_shown(
    decode: str, crop: Sequence[float] | None, normalise: Sequence[Sequence[float]] | None
) -> None:
    if crop is not None and (len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1):
        raise Refused(
            f"`crop` is {list(crop)}, expected the least and the largest share of an image's area, between 0 "
            "and 1; try [0.2, 1.0]."
        )
    if crop is not None and decode == "once":
        raise Refused(
            "`crop` shows another part of an image each time that it is decoded, and decode = 'once' does so "
            "once; set decode = 'always', or leave `crop` out."
        )
    if normalise is not None and not ([*map(len, normalise)] == [3, 3] and min(normalise[1]) > 0):
        raise Refused(
            f"`normalise` is {[*map(list, normalise)]}, expected [mean, std], each of three channels and std "
            "above 0; leave it out to have both counted."
        )


@dataclass(frozen=True, eq=False)
class Images(Unread):
    """Images that stay on the disk until a batch asks for them. With `crop` a lesson shows a part of each."""

    paths: Sequence[Path]
    size: int
    crop: tuple[float, float] | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), 3, self.size, self.size))

    def readers(self, index: Int[Tensor, " b"], lesson: Lesson | None) -> Iterable[Callable[[], np.ndarray]]:
        paths = [self.paths[row] for row in index.tolist()]
        if self.crop is None or lesson is None:
            return [partial(_image, path, self.size) for path in paths]
        draws = keyed(lesson, index, "part of an image", 4 * TRIES).unflatten(1, (TRIES, 4)).tolist()
        return [
            partial(_image, path, self.size, partial(box, share=self.crop, draws=its))
            for path, its in zip(paths, draws, strict=True)
        ]

    def chosen(self, index: Int[Tensor, " b"]) -> "Images":
        return replace(self, paths=[self.paths[row] for row in index.tolist()])

    def on(self, device: torch.device) -> "Images":
        return replace(self, device=device)

    def __add__(self, other: Unread) -> "Images":
        assert isinstance(other, Images), "parts of one data set are held alike"
        return replace(self, paths=[*self.paths, *other.paths])


def box(
    width: int, height: int, share: tuple[float, float], draws: Sequence[Sequence[float]]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of an image: a share of its area between two, and 3/4 to 4/3 as
    wide as high (C. Szegedy et al.; CVPR 2015; arXiv:1409.4842, section 6).

    draws: for each try area, ratio, left and top in [0, 1). The first part that fits is taken, and where none
    does the largest of such ratio about the centre, as torchvision's RandomResizedCrop does.
    """
    least, most = share
    for area, ratio, left, top in draws:
        pixels, stretch = width * height * (least + (most - least) * area), WIDEST ** (2 * ratio - 1)
        w, h = round(math.sqrt(pixels * stretch)), round(math.sqrt(pixels / stretch))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * WIDEST)), min(height, round(width * WIDEST))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _parts(root: Path) -> tuple[Files, dict[str, Files]]:
    """The files of `train`, or of all; and those of the parts that have folders of their own."""
    if not root.is_dir():
        found = "a file" if root.exists() else "not there"
        raise Refused(f"{root} is {found}, expected a folder with a folder of images for each class.")
    top = {folder.name: folder for folder in _folders(root)}
    if "train" not in top or not _folders(top["train"]):  # it may be a class, among buses and cars
        return _classes(root), {}
    if "val" in top and "valid" in top:
        raise Refused(f"{root} has both valid and val, expected one of them; remove the other.")
    train, held = _classes(top["train"]), dict[str, Files]()
    for name, part in (("val", "validation"), ("valid", "validation"), ("test", "test")):
        if name in top:
            held[part] = files = _classes(top[name])
            odd = sorted(files.keys() ^ train.keys())
            if odd:
                has, lacks = (name, "train") if odd[0] in files else ("train", name)
                raise Refused(
                    f"{root} has the class '{odd[0]}' in {has} and not in {lacks}; give it to "
                    "both or to neither."
                )
    return train, held


def _classes(root: Path) -> Files:
    folders = _folders(root)
    if len(folders) < 2:
        found = f"one folder, {folders[0].name}" if folders else "no folder"
        raise Refused(f"{root} holds {found}, expected a folder of images for each of two classes or more.")
    classes = {}
    for folder in folders:
        classes[folder.name] = [path for path in _visible(folder.rglob("*"), folder) if path.is_file()]
        if not classes[folder.name]:
            raise Refused(f"{folder} holds no image; put some there, or remove the folder.")
    return classes


def _folders(root: Path) -> list[Path]:
    return [path for path in _visible(root.iterdir(), root) if path.is_dir()]


def _visible(paths: Iterable[Path], above: Path) -> list[Path]:
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(above).parts))


def _drawn(files: Files, share: float, part: str) -> tuple[Files, Files]:
    """The rest, and `share` of every class: those whose names hash lowest. The rest keeps one of each."""
    rest, drawn = dict[str, list[Path]](), dict[str, list[Path]]()
    for name, paths in files.items():
        order = sorted(paths, key=lambda path: number(part, name, path.name))
        count = min(round(share * len(paths)), len(paths) - 1)
        rest[name], drawn[name] = sorted(order[count:]), sorted(order[:count])
    found, of = (sum(map(len, kind.values())) for kind in (drawn, files))
    if found < len(files):
        raise Refused(
            f"A {part} split of {share} takes {found} of {of:,} images, fewer than the {len(files)} classes; "
            "ask for a larger share, or bring more images."
        )
    return rest, drawn


def _told(parts: Iterable[Files], root: Path) -> str:
    """sha256 of the names and sizes of files; it stays as it is when `root` is copied."""
    found = sha256()
    for path in (path for files in parts for paths in files.values() for path in paths):
        found.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return found.hexdigest()


def _image(
    path: Path, size: int, cut: Callable[[int, int], tuple[int, int, int, int]] | None = None
) -> UInt8[np.ndarray, "3 h h"]:
    """An image: its centre square, or what `cut` makes of its width and height."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise Refused(f"{path} cannot be read without Pillow; get it with: pip install pillow") from None
    try:
        with Image.open(path, formats=FORMATS) as image:
            deep = image.mode.startswith(DEEP)
            whole = ImageOps.exif_transpose(image).convert("RGB")
            if cut is None:
                square = ImageOps.fit(whole, (size, size), Image.Resampling.BILINEAR)
            else:
                square = whole.crop(cut(*whole.size)).resize((size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise Refused(
            f"{path} is gone since its folder was read; put it back, or start without it."
        ) from None
    except Exception as error:  # decoders of damaged files raise what they like
        raise Refused(
            f"{path} cannot be read as an image ({str(error) or type(error).__name__}), expected "
            f"{', '.join(FORMATS)}; mend or remove it."
        ) from None
    if deep:
        raise Refused(f"{path} has more than 8 bits a pixel, expected 8; save it with 8, or remove it.")
    return np.array(square).transpose(2, 0, 1)
