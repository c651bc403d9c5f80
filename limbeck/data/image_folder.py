"""Images in folders, one folder for each class: `root/CLASS/IMAGE`, or `root/train/CLASS/IMAGE` and beside
`train` as many of `valid` (or `val`) and `test` as there are.

Every image is decoded once, turned as its EXIF says, made RGB (transparency is dropped), and cut to the
square about its centre, which is brought to `size`. What the folders do not hold apart is drawn by the files'
names: it stays as it is when the folder is copied, and nearly so when images are added. Names that begin with
a dot are passed over, and so are files beside the folders of classes. Pillow comes with matplotlib.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.keyed import number
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not those that start another program
DEEP = ("I", "F")  # Pillow's modes of more than 8 bits; it would cut their values off, not scale them

Files = Mapping[str, list[Path]]
"""The images of each class, sorted; classes sorted too."""


def load(root: str, size: int = 32, valid: float = 0.1, test: float = 0.2) -> Splits:
    """Three parts of uint8 images (n 3 size size), whose mean and std are the training part's.

    test: the share of each class that is for testing, 0 … 1, when `root` has no folder for that. valid: the
    share of the others that choices are made on, likewise. Raises `Refused`, naming the file or folder.
    """
    if size < 1 or not 0 < valid < 1 or not 0 < test < 1:
        raise Refused(
            f"The images of {root} were asked for with size {size}, valid {valid} and test {test}, expected "
            "a size of 1 or more and shares between 0 and 1; try 32, 0.1 and 0.2."
        )
    try:
        train, held = _parts(Path(root).expanduser())
    except OSError as error:
        raise Refused(f"{error.filename} cannot be read: {error.strerror}.") from None
    names = tuple(train)
    if "test" not in held:
        train, held["test"] = _drawn(train, test, "test")
    if "validation" not in held:
        train, held["validation"] = _drawn(train, valid, "validation")
    x, y = _decoded(train, size)
    learned = Data(x, y, names, 1 / 255).standardised()
    rest = {
        part: Data(*_decoded(files, size), names, learned.scale, learned.mean, learned.std)
        for part, files in held.items()
    }
    return Splits(learned, rest["validation"], rest["test"])


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


def _decoded(files: Files, size: int) -> tuple[Tensor, Tensor]:
    paths = [path for some in files.values() for path in some]
    y = torch.tensor([label for label, some in enumerate(files.values()) for _ in some])
    x = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as readers:  # Pillow decodes without Python's lock
        for place, image in zip(x, readers.map(lambda path: _image(path, size), paths), strict=True):
            place.copy_(torch.from_numpy(image).permute(2, 0, 1))
    return x, y


def _image(path: Path, size: int) -> np.ndarray:
    """An image, uint8 (size size 3)."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise Refused(f"{path} cannot be read without Pillow; get it with: pip install pillow") from None
    try:
        with Image.open(path, formats=FORMATS) as image:
            deep = image.mode.startswith(DEEP)
            turned = ImageOps.exif_transpose(image)
            square = ImageOps.fit(turned.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders of damaged files raise what they like
        raise Refused(
            f"{path} cannot be read as an image ({str(error) or type(error).__name__}), expected "
            f"{', '.join(FORMATS)}; mend or remove it."
        ) from None
    if deep:
        raise Refused(f"{path} has more than 8 bits a pixel, expected 8; save it with 8, or remove it.")
    return np.array(square)
