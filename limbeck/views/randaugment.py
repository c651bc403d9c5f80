r"""RandAugment: Practical Automated Data Augmentation with a Reduced Search Space (Cubuk, Zoph, Shlens, Le;
NeurIPS 2020; arXiv:1909.13719).

Every image goes through N operations, drawn with equal chance from fourteen, all at one magnitude M: two
knobs in place of a learned policy. M = 10 is the full range of AutoAugment (arXiv:1805.09501, table 6), from
which the ranges are:

| operation | at M = 10 | | operation | at M = 10 |
|---|---|---|---|---|
| `shear_x`, `shear_y` | ±0.3 | | `colour`, `contrast`, `brightness`, `sharpness` | factor 1 ± 0.9 |
| `translate_x`, `translate_y` | ±150/331 of the side | | `posterize` | 4 of 8 bits are left |
| `rotate` | ±30 degrees | | `solarize` | every pixel is inverted |
| `identity`, `autocontrast`, `equalize` | have no magnitude | | `invert`, `solarize_add` | not in the paper |

The defaults N = 2, M = 9 are the paper's for ResNet-50 on ImageNet; for a WideResNet-28-10 it has 3 and 4 on
CIFAR-10, 2 and 14 on CIFAR-100. Beyond M = 10 ranges grow on, as far as they mean something.

All is whole-number arithmetic on uint8, after what Pillow computes for one image: nearest pixels by 16.16
fixed point, about the centre for a rotation and the upper left corner for a shear; grey by Pillow's weights;
factors applied as its `Image.blend`. What comes in from outside is grey 128, as in the authors' code.

Departures from the paper and the authors' code: what has a magnitude does nothing at M = 0 and more with more
M ("increasing"), where theirs solarizes and posterizes *less* with more M, and has factors from 0.1 to 1.9.
`sd` and `chance` come from later recipes: a magnitude drawn about M, and a chance that a drawn operation is
applied (TinyViT: `magnitude = 9, sd = 0.5, chance = 0.5`).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed, keyed_normal
from limbeck.core.refused import Refused
from limbeck.pieces import images

PAPER = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "colour", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
OUTSIDE = 128


def randaugment(
    batch: Batch,
    n: int = 2,
    magnitude: float = 9.0,
    ops: Sequence[str] = PAPER,
    sd: float = 0.0,
    chance: float = 1.0,
    purpose: str = "randaugment",
) -> Batch:
    """x (b 3 h w) or (b 1 h w), uint8, each image changed by `n` of the `ops`; all else stays.

    magnitude: 0 to 30, 10 being AutoAugment's range; `sd` is its standard deviation. chance: that an
    operation is applied, once drawn. Two models under one `purpose` see the same image. Raises `Refused` for
    other x, operations that are not there and knobs outside their range.
    """
    x, index = images.numbered(batch, "RandAugment changes")
    _refuse(x, n, magnitude, ops, sd, chance)
    if n == 0:
        return batch
    drawn, side, applied = keyed(batch.lesson, index, purpose, 3 * n).to(x.device).view(-1, n, 3).unbind(2)
    level = torch.full_like(side, magnitude, dtype=torch.float64)
    if sd:
        level += sd * keyed_normal(batch.lesson, index, f"{purpose} magnitude", n).to(level)
    level = level.clamp(0, 30) / 10 * torch.where(side < 0.5, -1, 1)
    chosen = torch.where(applied < chance, (drawn * len(ops)).long(), -1)
    x = x.clone(memory_format=torch.contiguous_format)
    for turn in range(n):
        for number, name in enumerate(ops):
            rows = (chosen[:, turn] == number).nonzero()[:, 0]
            if len(rows) and name != "identity":
                x[rows] = OPS[name](x[rows], level[rows, turn])
    return batch.replace(x=x)


def _refuse(x: Tensor, n: int, magnitude: float, ops: Sequence[str], sd: float, chance: float) -> None:
    if x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
        raise Refused(
            f"RandAugment changes uint8 pixels of 1 or 3 channels, and x has {x.shape[1]} of {x.dtype}; use "
            "it in `augment`, where x is as it is kept, and keep uint8."
        )
    unknown = [name for name in ops if name not in OPS]
    if unknown or not ops:
        raise Refused(
            f"RandAugment draws from `ops`, which has {repr(unknown[0]) if unknown else 'nothing'}; "
            f"expected some of {', '.join(OPS)}."
        )
    if n < 0 or not 0 <= magnitude <= 30 or not 0 <= sd < math.inf or not 0 <= chance <= 1:
        raise Refused(
            f"RandAugment has n = {n}, magnitude = {magnitude}, sd = {sd} and chance = {chance}; expected "
            "n >= 0, a magnitude of 0 to 30, sd >= 0 and a chance of 0 to 1."
        )


# An operation takes x (b c h w) and a level for each row: 0 is nothing, 1 the full range, its sign the side.


def _autocontrast(x: Tensor, level: Tensor) -> Tensor:
    """Each channel stretched over all 256 levels."""
    low = x.amin((2, 3), keepdim=True).double()
    high = x.amax((2, 3), keepdim=True).double()
    scale = high.new_tensor(255) / (high - low)  # `255 / x` would be 255 times 1 / x, rounded twice
    stretched = (x * scale - low * scale).clamp(0, 255).byte()
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor, level: Tensor) -> Tensor:
    """Each channel's levels spread so that all come about equally often."""
    flat = x.flatten(2).flatten(0, 1).long()
    count = flat.new_zeros(len(flat), 256).scatter_add_(1, flat, torch.ones_like(flat))
    below = count.cumsum(1) - count
    last = count.gather(1, flat.amax(1, keepdim=True))
    step = (flat.shape[1] - last) // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, flat), flat).view_as(x).byte()


def _invert(x: Tensor, level: Tensor) -> Tensor:
    return 255 - x


def _solarize(x: Tensor, level: Tensor) -> Tensor:
    """What is at or above a threshold is inverted."""
    return torch.where(x >= _rows(256 - (256 * level.abs()).long()), 255 - x, x)


def _solarize_add(x: Tensor, level: Tensor) -> Tensor:
    """What is darker than the middle becomes lighter by up to 110."""
    return torch.where(x < 128, (x + _rows((110 * level.abs()).long())).clamp(max=255).byte(), x)


def _posterize(x: Tensor, level: Tensor) -> Tensor:
    """Only the highest bits are kept."""
    gone = (4 * level.abs()).round().clamp(max=7).long()
    return x >> _rows(gone).byte() << _rows(gone).byte()


def _brightness(x: Tensor, level: Tensor) -> Tensor:
    return _away(x, torch.zeros_like(x), level)


def _contrast(x: Tensor, level: Tensor) -> Tensor:
    grey = _grey(x).long()
    pixels = x.shape[2] * x.shape[3]
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return _away(x, mean, level)


def _colour(x: Tensor, level: Tensor) -> Tensor:
    return _away(x, _grey(x), level)


def _sharpness(x: Tensor, level: Tensor) -> Tensor:
    """Away from, or towards, means of 3 x 3 pixels of which the middle counts five; the rim stays."""
    smooth = x.long()
    if min(x.shape[2:]) > 2:
        whole = smooth.unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5))
        inner = (2 * (whole + 4 * smooth[:, :, 1:-1, 1:-1]) + 13) // 26
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = inner
    return _away(x, smooth, level)


def _rotate(x: Tensor, level: Tensor) -> Tensor:
    cos, sin = (30 * level).deg2rad().cos(), (30 * level).deg2rad().sin()
    h, w = x.shape[2:]
    c, f = (w - cos * w + sin * h) / 2, (h - sin * w - cos * h) / 2
    return _moved(x, a=cos, b=-sin, c=c, d=sin, e=cos, f=f)


def _shear_x(x: Tensor, level: Tensor) -> Tensor:
    return _moved(x, b=0.3 * level)


def _shear_y(x: Tensor, level: Tensor) -> Tensor:
    return _moved(x, d=0.3 * level)


def _translate_x(x: Tensor, level: Tensor) -> Tensor:
    return _moved(x, c=150 / 331 * x.shape[3] * level)


def _translate_y(x: Tensor, level: Tensor) -> Tensor:
    return _moved(x, f=150 / 331 * x.shape[2] * level)


Number = Tensor | float


def _moved(
    x: Tensor,
    a: Number = 1.0,
    b: Number = 0.0,
    c: Number = 0.0,
    d: Number = 0.0,
    e: Number = 1.0,
    f: Number = 0.0,
) -> Tensor:
    """What was at column a i + b j + c of line d i + e j + f comes to column i of line j, both counted from
    the corner to the middle of a pixel."""
    # Rounded to 1/65536 and whole from there on: a cosine's last bit may differ with the place in a batch.
    a, b, c, d, e, f = (_fixed(v, x) for v in (a, b, c + (a + b) / 2, d, e, f + (d + e) / 2))
    h, w = x.shape[2:]
    i = torch.arange(w, device=x.device)
    j = torch.arange(h, device=x.device)[:, None]
    column, line = (a * i + b * j + c) >> 16, (d * i + e * j + f) >> 16
    inside = ((column >= 0) & (column < w) & (line >= 0) & (line < h))[:, None]
    place = (line * w + column)[:, None].where(inside, 0).expand_as(x)
    return x.flatten(2).gather(2, place.flatten(2)).view_as(x).where(inside, OUTSIDE)


def _fixed(value: Number, x: Tensor) -> Tensor:
    """A number for each row, or for all, in 1/65536."""
    exact = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    return (exact * 2**16 + 0.5).floor().long().view(-1, 1, 1)


def _away(x: Tensor, other: Tensor, level: Tensor) -> Tensor:
    """x moved away from `other`, or towards it on the side below 0."""
    factor = (1 + 0.9 * level).clamp(min=0).float()
    return (other + _rows(factor) * (x.long() - other)).clamp(0, 255).byte()


def _grey(x: Tensor) -> Tensor:
    """As one channel."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.long().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 2**15) >> 16)[:, None]


def _rows(level: Tensor) -> Tensor:
    return level.view(-1, 1, 1, 1)


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda x, level: x,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": _solarize,
    "colour": _colour,
    "posterize": _posterize,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "invert": _invert,
    "solarize_add": _solarize_add,
}
