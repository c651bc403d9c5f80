"""Fashion-MNIST: 70,000 grey 28x28 images of clothes in ten classes (H. Xiao, K. Rasul, R. Vollgraf 2017;
arXiv:1708.07747; MIT licence, Zalando SE).

Read from the four IDX files as they were published, or from the same unpacked. The test part is the published
one; the validation part is ours and fixed: 500 of the 6,000 training images of every class.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits
from limbeck.data.published import Online, find, read, within

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, in 0 … 1

# The same bytes come packed in two ways: Debian packs them anew, without the time and name in gzip's header.
SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
ONLINE = Online(
    [
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ],
    {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    30.9,
)
FORMS = [list(SHA256)[:4], list(SHA256)[4:]]  # packed, or unpacked
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GET = (
    f"install Debian's package dataset-fashion-mnist, or put {', '.join(FORMS[0])} (or the same unpacked) "
    "in a folder fashion-mnist and set LIMBECK_DATA to the folder above it"
)


def load(root: Path | None = None) -> Splits:
    """55,000 training, 5,000 validation and 10,000 test images. Looks in `root`; without it in fashion-mnist/
    under LIMBECK_DATA, where Debian puts it, and in the user's cache, or else fetches the set."""
    files = find("Fashion-MNIST", "fashion-mnist", FORMS, GET, ONLINE, root, [DEBIAN])
    train, test = (_data(images, labels) for images, labels in (files[:2], files[2:]))
    return Splits(*train.split(1 / 12, "fashion-mnist"), test)


def _data(images: Path, labels: Path) -> Data:
    x, y = _idx(images, axes=3), _idx(labels, axes=1)
    if len(x) == 0 or len(x) != len(y):
        raise Refused(
            f"{images} has {len(x)} images and {labels.name} {len(y)} labels; expected as many of one as of "
            "the other, and at least one."
        )
    return Data(torch.from_numpy(x)[:, None], within(y, len(CLASSES), labels), CLASSES, 1 / 255, MEAN, STD)


def _idx(path: Path, axes: int) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, 8 for bytes, the number of axes; each axis' length as a
    big-endian 32-bit number; then the bytes."""
    content = read(path, SHA256, ONLINE.sha256)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise Refused(f"{path} cannot be unpacked: {error}; it is damaged, so get it again.") from None
    magic, first = bytes([0, 0, 8, axes]), 4 + 4 * axes
    if content[:4] != magic or len(content) < first:
        raise Refused(
            f"{path} begins with {content[:4].hex(' ') or 'nothing'}, expected {magic.hex(' ')} and {axes} "
            f"length(s): an IDX file of bytes with {axes} axes."
        )
    shape = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
    if len(content) - first != shape.prod():
        raise Refused(
            f"{path} holds {len(content) - first:,} bytes where its header tells of "
            f"{' × '.join(map(str, shape))}; it was cut short or damaged, so get it again."
        )
    return np.frombuffer(content, np.uint8, offset=first).reshape(shape).copy()  # torch wants to own it
