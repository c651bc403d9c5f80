"""Data from outside: any map-style Dataset, any iterable of (x, y), arrays. Here they become splits of ours.

All of it is read once, in its own order, into memory, where uint8 stays uint8; a Dataset too large for that
needs a loader that reads while it trains, as `image-folder` has. A random transform would be drawn this once
and never again: leave it out, and let the recipe `augment`. Which rows come when is limbeck's own, fixed by
(seed, epoch), so what shuffles is refused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from limbeck.core.batch import IGNORE
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits

Rows = tuple[Tensor, Tensor]
"""x (n …), uint8 or float32, and y (n), long."""

VALID, TEST = 0.1, 0.2
"""The share of every class that is drawn for a part nobody brought."""


def as_splits(found: Any) -> Splits:
    """What a recipe's `package.module:function` gave, as splits: `Splits`; a tuple (train, test) or (train,
    valid, test); a dict of `train` and any of `valid`, `test` and `classes`; or the training part alone. What
    a part may be, `splits` says. Raises `Refused`."""
    if isinstance(found, Splits):
        return found
    if isinstance(found, Mapping):
        if "train" not in found or not found.keys() <= {"train", "valid", "test", "classes"}:
            raise Refused(
                f"The data is a dict of {', '.join(map(str, found)) or 'nothing'}, expected `train` and any "
                "of `valid`, `test` and `classes`."
            )
        return splits(**found)
    if not isinstance(found, tuple) or _arrays(found):
        return splits(found)
    if len(found) not in (2, 3):
        raise Refused(f"The data is a tuple of {len(found)}, expected (train, test) or (train, valid, test).")
    return splits(found[0], found[1] if len(found) == 3 else None, found[-1])


def splits(train: Any, valid: Any = None, test: Any = None, classes: Sequence[str] | None = None) -> Splits:
    """Splits from parts, each of them a `Data`; a Dataset (`len` and `[i]` → (x, y)); an iterable of samples
    (x, y) or of batches of them, such as a DataLoader; or a pair of arrays (x, y).

    x: tensor, array (c h w, or any shape that the models take) or PIL image, all of one shape. uint8 is
        normalised by the training part's own mean and std; other numbers become float32 and stay as they are.
    y: a class number; None or -100 where there is none. A row of numbers makes its (x, y) a batch.
    test: without it a fifth of every class of `train`, always the same one. valid: likewise, then, a tenth.
    classes: their names; without them those of `train.classes`, or else the numbers.

    Raises `Refused`, naming the sample.
    """
    if train is None:
        raise Refused("There is no training data; bring a Dataset, an iterable of (x, y) or arrays.")
    if isinstance(train, Data) and classes is not None:
        raise Refused("The training data is a Data, which names its classes; leave `classes` out.")
    own = _read(train, "training")
    chosen = None if valid is None else _read(valid, "validation")
    last = None if test is None else _read(test, "test")
    if isinstance(own, Data):
        learned = own
    else:
        names = _classes(classes or _told(train), [own, chosen, last])
        learned = Data(*own, names, scale=1 / 255 if own[0].dtype == torch.uint8 else 1.0)
    if last is None:
        learned, drawn = learned.split(TEST, "outside, test")
        last = drawn.x, drawn.y
    if chosen is None:
        learned, drawn = learned.split(VALID, "outside")
        chosen = drawn.x, drawn.y
    if not isinstance(own, Data) and learned.x.dtype == torch.uint8:
        learned = learned.standardised()
    return Splits(learned, _alike(chosen, learned, "validation"), _alike(last, learned, "test"))


def _alike(part: Data | Rows, train: Data, called: str) -> Data:
    """A part kept as the training part is, so that a model is shown the same thing."""
    if isinstance(part, Data):
        return part
    if part[0].dtype != train.x.dtype:
        found, expected = (str(dtype).removeprefix("torch.") for dtype in (part[0].dtype, train.x.dtype))
        raise Refused(f"The {called} data is {found} and the training data {expected}; bring both as one.")
    return replace(train, x=part[0], y=part[1])


def _told(train: Any) -> Any:
    """The names that torchvision's Datasets have, or those within a DataLoader or Subset."""
    names = getattr(train, "classes", getattr(getattr(train, "dataset", None), "classes", None))
    return names if isinstance(names, list | tuple) else None


def _classes(names: Any, parts: Iterable[Data | Rows | None]) -> tuple[str, ...]:
    if names is not None:
        return tuple(map(str, names))
    highest = max(int(rows[1].max()) for rows in parts if isinstance(rows, tuple))
    if highest < 0:
        raise Refused("No sample has a label, so the classes are not known; name them: `classes`.")
    return tuple(map(str, range(highest + 1)))


def _read(part: Any, called: str) -> Data | Rows:
    if isinstance(part, Data):
        return part
    if isinstance(getattr(part, "sampler", None), RandomSampler):
        raise Refused(
            f"The {called} data shuffles, and the order of rows is limbeck's own, fixed by (seed, epoch); "
            "bring its `dataset`, or say shuffle=False."
        )
    xs, ys = list[Tensor](), list[Tensor]()
    for number, (item, alone) in enumerate(_items(part, called)):
        where = f"Item {number} of the {called} data"
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise Refused(f"{where} is {_described(item)}, expected a pair (x, y).")
        x, y = _x(item[0], where), _y(item[1], where)
        if alone and y.numel() != 1:
            raise Refused(f"{where} has {len(y)} labels, expected one class number, or None for no label.")
        if alone or y.ndim == 0:
            x, y = x[None], y.reshape(1)
        if x.ndim < 2 or len(x) != len(y):
            raise Refused(
                f"{where} has x of shape {tuple(x.shape)} and {len(y)} label(s), expected one label, or one "
                "for each row of x."
            )
        _check_image(x, where)
        if xs and (x.shape[1:], x.dtype) != (xs[0].shape[1:], xs[0].dtype):
            raise Refused(
                f"{where} has x of {_described(x[0])}, and item 0 {_described(xs[0][0])}; bring all to one "
                "shape and type."
            )
        xs.append(x)
        ys.append(y)
    if sum(map(len, ys)) == 0:
        raise Refused(f"The {called} data is empty, expected at least one sample.")
    return torch.cat(xs), torch.cat(ys)


def _items(part: Any, called: str) -> Iterator[tuple[Any, bool]]:
    """Every (x, y) in order, and whether it is for sure one sample: a Dataset's label may be an array of
    one."""
    if _arrays(part):
        yield part, False
        return
    alone = hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, list | tuple)
    if isinstance(part, Mapping | str) or not (alone or isinstance(part, Iterable)):
        raise Refused(
            f"The {called} data is {_described(part)}, expected a Dataset, an iterable of (x, y) or a pair "
            "of arrays."
        )
    items, number = iter(part[n] for n in range(len(part))) if alone else iter(part), 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:  # theirs
            why = (str(error).splitlines() or [""])[-1]  # a DataLoader's worker tells its whole traceback
            raise Refused(
                f"Item {number} of the {called} data cannot be read: {type(error).__name__}: {why}"
            ) from error
        yield item, alone
        number += 1


def _x(x: Any, where: str) -> Tensor:
    if hasattr(x, "getbands"):  # a PIL image
        pixels = np.asarray(x if x.mode in ("L", "RGB") else x.convert("RGB"))
        x = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if not isinstance(x, Tensor) and hasattr(x, "__array__"):
        array = np.asarray(x)
        if array.dtype.kind in "buif":
            x = torch.from_numpy(np.array(array, np.uint8 if array.dtype == np.uint8 else np.float32))
    if not isinstance(x, Tensor) or x.is_complex() or x.is_sparse:
        raise Refused(f"{where} has x of {_described(x)}, expected a tensor or array of real numbers.")
    x = x.detach().cpu()
    return x if x.dtype == torch.uint8 else x.float()


def _y(y: Any, where: str) -> Tensor:
    if isinstance(y, list | tuple):
        y = [IGNORE if label is None else label for label in y]
    found = np.asarray(IGNORE if y is None else y.detach().cpu() if isinstance(y, Tensor) else y)
    if found.dtype.kind not in "biu" or found.ndim > 1:
        shown = f"the label {found.item()!r}" if found.size == 1 else f"labels of {_described(found)}"
        raise Refused(f"{where} has {shown}, expected a class number, or None for no label.")
    return torch.from_numpy(found.astype(np.int64))


def _check_image(x: Tensor, where: str) -> None:
    """uint8 is pixels, and a picture that does not begin with its channels would be learned from sideways."""
    last = x.ndim == 4 and x.shape[1] > 4 and x.shape[3] in (1, 3, 4)
    if x.dtype == torch.uint8 and (x.ndim == 3 or last):
        raise Refused(
            f"{where} has an image of shape {tuple(x.shape[1:])}, expected (channels, height, width); "
            f"{'give it its one channel, x[None]' if not last else 'permute it, (2, 0, 1)'}."
        )


def _arrays(part: Any) -> bool:
    """A pair of arrays: a whole part at once."""
    pair = isinstance(part, tuple) and len(part) == 2
    return pair and all(isinstance(array, Tensor | np.ndarray) for array in part)


def _described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
