"""Two garments side by side: a hundred classes of small pictures (1x14x28), made of Fashion-MNIST (H. Xiao,
K. Rasul, R. Vollgraf 2017; arXiv:1708.07747; MIT licence, Zalando SE) for experiments that need many classes.

Each image is the mean over its 2x2 blocks of pixels, and two of them stand beside each other. With a to the
left and b to the right, of classes 0 to 9 there, the class is 10 a + b. Pairs are drawn with replacement,
each of the three parts from its own of Fashion-MNIST's; a pair depends on its number alone, so that a larger
part begins as a smaller one.

Models are shown pixels of 0 ... 1 as they are, so that views of colour may be a model's own.
"""

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from limbeck.core.batch import Lesson
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.data import fashion_mnist
from limbeck.data.loader import Data, Splits

CLASSES = tuple(f"{left} + {right}" for left in fashion_mnist.CLASSES for right in fashion_mnist.CLASSES)


def load(root: Path | None = None, train: int = 5000, validation: int = 2000, test: int = 5000) -> Splits:
    """As many pairs in each part as is said. The images are looked for as those of `fashion-mnist` are."""
    counts = {"train": train, "validation": validation, "test": test}
    few = min(counts, key=lambda name: counts[name])
    if counts[few] < len(CLASSES):
        raise Refused(
            f"The {few} part is to have {counts[few]} pairs of garments, fewer than the {len(CLASSES)} "
            "classes; ask for one of each at least."
        )
    whole = fashion_mnist.load(root)
    parts = zip((whole.train, whole.valid, whole.test), counts.items(), strict=True)
    return Splits(*(_paired(images, count, name) for images, (name, count) in parts))


def _paired(images: Data, count: int, part: str) -> Data:
    draw = keyed(Lesson(), torch.arange(count), f"garment pairs, {part}", 2)
    left, right = (draw * len(images)).long().unbind(1)
    x = torch.cat([halved(images.x[left]), halved(images.x[right])], 3)
    return Data(x, len(fashion_mnist.CLASSES) * images.y[left] + images.y[right], CLASSES, 1 / 255)


def halved(x: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c _ _"]:
    """The mean over blocks of 2x2 pixels, rounded (a half up)."""
    blocks = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).short().sum((3, 5))
    return ((blocks + 2) // 4).to(torch.uint8)
