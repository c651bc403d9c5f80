r"""Colours changed by chance, each image on its own: the colour distortion of SimCLR (Chen, Kornblith,
Norouzi, Hinton; ICML 2020; arXiv:2002.05709, appendix A), at the strength 0.5 of its CIFAR-10 (appendix B.9).

Of values in 0 ... 1, and with $g$ the grey $0.299 R + 0.587 G + 0.114 B$, in an order drawn anew:

$$f x, \qquad \bar g + f (x - \bar g), \qquad g + f (x - g), \qquad H \mapsto H + \delta \pmod 1$$

brightness, contrast ($\bar g$ is the mean grey of the image), saturation and hue (in hue, saturation, value:
A. R. Smith; SIGGRAPH 1978; doi:10.1145/800248.807361), with $f$ uniform in $1 \pm$ strength, not below 0, and
$\delta$ in $\pm$ hue turns. What leaves 0 ... 1 is cut off each time. This befalls a share `chance` of the
images; then a share `grey` of all loses its colours.

Departures from the paper: none known. uint8 is rounded once, at the end; pipelines in Pillow round to 256
levels after each change.
"""

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.pieces import images

LUMA = (0.299, 0.587, 0.114)


def colour(
    batch: Batch,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    chance: float = 0.8,
    grey: float = 0.2,
    purpose: str = "colour",
) -> Batch:
    """x (b 3 h w) or (b 1 h w), which has no saturation or hue to change, in uint8 or in floats of 0 to 1;
    all else stays. Two models under one `purpose` see the same colours. Raises `Refused` for other x, for
    negative strengths, a hue above half a turn and chances outside 0 to 1."""
    x, index = images.numbered(batch, "Colour changes")
    strength = (brightness, contrast, saturation, hue)
    _refuse(x, strength, (chance, grey))
    draw = keyed(batch.lesson, index, purpose, 10).to(x.device)
    order = draw[:, :4].argsort(dim=1, stable=True)
    swing = (2 * draw[:, 4:8] - 1) * torch.tensor(strength, device=x.device)
    amount = torch.cat([(1 + swing[:, :3]).clamp(min=0), swing[:, 3:]], 1)
    jittered = draw[:, 8] < chance

    shown = x.float() / 255 if x.dtype == torch.uint8 else x.clone()
    for place in range(4):
        for number, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            if strength[number]:
                rows = ((order[:, place] == number) & jittered).nonzero()[:, 0]
                shown[rows] = change(shown[rows], amount[rows, number].to(shown)[:, None, None, None])
    shown = torch.where((draw[:, 9] < grey)[:, None, None, None], _grey(shown), shown)
    return batch.replace(x=(shown * 255).round().to(x.dtype) if x.dtype == torch.uint8 else shown)


def _refuse(x: Tensor, strength: tuple[float, ...], chances: tuple[float, ...]) -> None:
    # A compiler cannot branch on values; the dry batch before it can.
    whole = torch.compiler.is_compiling() or x.dtype == torch.uint8 or x.numel() == 0
    fits = x.dtype == torch.uint8 or x.is_floating_point()
    if x.shape[1] not in (1, 3) or not fits or not (whole or (x.min() >= 0 and x.max() <= 1)):
        raise Refused(
            f"Colour changes pixels of 1 or 3 channels, uint8 or 0 to 1, and x has {x.shape[1]} channels of "
            f"{x.dtype} from {float(x.min()):.3g} to {float(x.max()):.3g}; use it in `augment`, where x is "
            "not normalised yet."
        )
    if min(strength) < 0 or strength[3] > 0.5 or min(chances) < 0 or max(chances) > 1:
        raise Refused(
            f"Colour's strengths are {', '.join(map(str, strength))} and its chances "
            f"{', '.join(map(str, chances))}; expected strengths from 0, a hue to 0.5, and chances of 0 to 1."
        )


def _brightness(x: Tensor, f: Tensor) -> Tensor:
    return (x * f).clamp(0, 1)


def _contrast(x: Tensor, f: Tensor) -> Tensor:
    # A sum of whole numbers is the same in any order, hence whatever batch the row is in.
    mean = (_grey(x)[:, :1].double() * 2**24).round().mean((1, 2, 3), keepdim=True) / 2**24
    return _away(x, mean.to(x), f)


def _saturation(x: Tensor, f: Tensor) -> Tensor:
    return _away(x, _grey(x), f)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    value, least = x.amax(1), x.amin(1)
    spread = value - least
    r, g, b = (x / torch.where(spread == 0, 1, spread)[:, None]).unbind(1)
    sixths = torch.where(x[:, 1] == value, 2 + b - r, 4 + r - g)
    sixths = torch.where(x[:, 0] == value, g - b, sixths) + 6 * turn[:, 0]
    # How far a channel lies below the value, by how far round the circle its own hue is.
    place = torch.stack([n + sixths for n in (5, 3, 1)], 1)
    place = place - (place / 6).floor() * 6
    return value[:, None] - spread[:, None] * torch.minimum(place, 4 - place).clamp(0, 1)


def _away(x: Tensor, grey: Tensor, f: Tensor) -> Tensor:
    return (grey + f * (x - grey)).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    """As many channels as x, all alike."""
    if x.shape[1] == 1:
        return x
    r, g, b = (share * channel for share, channel in zip(LUMA, x.unbind(1), strict=True))
    return (r + g + b)[:, None].expand_as(x)
