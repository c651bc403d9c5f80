"""ShuffleNet (Zhang, Zhou, Lin, Sun; CVPR 2018; arXiv:1707.01083) and ShuffleNet V2 (Ma, Zhang, Zheng, Sun;
ECCV 2018; arXiv:1807.11164), for small images.

The layouts are RepDistiller's (HobbitLong/RepDistiller, `models/ShuffleNetv1.py` and `ShuffleNetv2.py`), as
in most papers on distillation with CIFAR. At 100 classes and 3 channels `shufflenet_v1`, with 3 groups, has
949,258 parameters and `shufflenet_v2`, of size 1, has 1,355,528.

Departures from the papers, all RepDistiller's: the stem is a 1x1 convolution that keeps the grid and no pool
follows it, so that 32x32 ends at 4x4; in V1 a ReLU also follows the depthwise convolution.
Departures from RepDistiller: the pool averages the whole grid, whatever its size; in V2 `stage1_pre` … are
shuffled like the stage's output, so that the stage is the ReLU of it, channel by channel.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

STEM = 24


def shuffle(x: Float[Tensor, "b c h w"], groups: int) -> Float[Tensor, "b c h w"]:
    """Deal channels out, so that the next layer's groups each get some of every group. `c // groups` groups
    undo it."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleNetV1(nn.Module):
    """Args: classes and channels of the data; widths and depths (blocks), one per stage; groups of the 1x1
    convolutions.

    Taps: `stem`, `stage1` … `stage3` (b c h w); `stage1_pre` …, in front of their last ReLU, and
    `stage1_pre_norm` …, the BatchNorm that ends the last block's branch; `pooled` (b c), what the head reads.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        widths: Sequence[int] = (240, 480, 960),
        depths: Sequence[int] = (4, 8, 4),
        groups: int = 3,
    ) -> None:
        super().__init__()
        self._widths, self._depths, self._groups = tuple(widths), tuple(depths), groups
        self.stem = _conv(channels, STEM)
        self.stages = nn.ModuleList(
            self._stage(n, inputs) for n, inputs in enumerate((STEM, *self._widths[:-1]))
        )
        self.head = nn.Linear(self._widths[-1], classes)
        self.TAPS = _taps(self._depths)
        for n, depth in enumerate(self._depths):
            self.TAPS[f"stage{n + 1}_pre_norm"] = f"stages.{n}.{depth - 1}.norm"

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """What follows stage i (counted from 0), made anew, up to what is pooled; after the last stage, one
        more of its kind that keeps the grid."""
        last = len(self.stages) - 1
        follows = [self._stage(n, self._widths[n - 1]) for n in range(i + 1, last + 1)]
        tail = nn.Sequential(*(follows or [self._stage(last, self._widths[last], stride=1)]))
        return tail.to(self.head.weight)

    def _stage(self, n: int, inputs: int, stride: int = 2) -> nn.Sequential:
        width, depth = self._widths[n], self._depths[n]
        first = _V1Block(inputs, width, self._groups, stride)
        return nn.Sequential(first, *(_V1Block(width, width, self._groups) for _ in range(depth - 1)))


class ShuffleNetV2(nn.Module):
    """Args: classes and channels of the data; widths and depths (blocks), one per stage; neck, the width of
    the 1x1 convolution that follows them.

    Taps: `stem`, `stage1` … `stage3` (b c h w); `stage1_pre` …, in front of their last ReLU (the half of the
    channels that passes the block by has been through an earlier one); `pooled` (b c), what the head reads.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        widths: Sequence[int] = (116, 232, 464),
        depths: Sequence[int] = (4, 8, 4),
        neck: int = 1024,
    ) -> None:
        super().__init__()
        self._widths, self._depths = tuple(widths), tuple(depths)
        self.stem = _conv(channels, STEM)
        self.stages = nn.ModuleList(
            self._stage(n, inputs) for n, inputs in enumerate((STEM, *self._widths[:-1]))
        )
        self.neck = _conv(self._widths[-1], neck)
        self.head = nn.Linear(neck, classes)
        self.TAPS = _taps(self._depths)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.neck(x).mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """What follows stage i (counted from 0), made anew, up to what is pooled; after the last stage, one
        more of its kind that keeps the grid."""
        last = len(self.stages) - 1
        follows = [self._stage(n, self._widths[n - 1]) for n in range(i + 1, last + 1)]
        tail = nn.Sequential(
            *(follows or [nn.Sequential(*(_V2Block(self._widths[last]) for _ in range(self._depths[last])))]),
            _conv(self._widths[last], self.head.in_features),
        )
        return tail.to(self.head.weight)

    def _stage(self, n: int, inputs: int) -> nn.Sequential:
        width, depth = self._widths[n], self._depths[n]
        return nn.Sequential(_V2Down(inputs, width), *(_V2Block(width) for _ in range(depth - 1)))


class _V1Block(nn.Module):
    """Narrow inside, with a shuffle between the grouped 1x1 convolutions. At stride 2 the pooled input is set
    beside the branch instead of added."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.widens = stride == 2
        grown = outputs - inputs if self.widens else outputs
        inside = grown // 4
        self.groups = 1 if inputs == STEM else groups  # so few channels are not cut into groups
        self.squeeze = _conv(inputs, inside, self.groups)
        self.expand = nn.Sequential(
            _depthwise(inside, stride), nn.ReLU(), nn.Conv2d(inside, grown, 1, groups=groups, bias=False)
        )
        self.norm = nn.BatchNorm2d(grown)
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if self.widens else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.norm(self.expand(shuffle(self.squeeze(x), self.groups)))
        x = self.shortcut(x)
        return self.relu(torch.cat([y, x], 1) if self.widens else y + x)


class _V2Block(nn.Module):
    """Half of the channels pass by, the other half are worked on, then both are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(_conv(half, half), _depthwise(half), *_linear(half, half))
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        passing, worked = x.chunk(2, 1)
        # What passes by has been through a ReLU, so another one leaves it as it is.
        return self.relu(shuffle(torch.cat([passing, self.branch(worked)], 1), 2))


class _V2Down(nn.Module):
    """Halves the grid; all channels go through both branches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(_depthwise(inputs, 2), *_linear(inputs, half))
        self.right = nn.Sequential(_conv(inputs, half), _depthwise(half, 2), *_linear(half, half))
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.relu(shuffle(torch.cat([self.left(x), self.right(x)], 1), 2))


def _taps(depths: Sequence[int]) -> dict[str, str]:
    taps = {"stem": "stem", "pooled": "head:in"}
    for n, depth in enumerate(depths):
        taps |= {f"stage{n + 1}": f"stages.{n}", f"stage{n + 1}_pre": f"stages.{n}.{depth - 1}.relu:in"}
    return taps


def _linear(inputs: int, outputs: int, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs)


def _conv(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(*_linear(inputs, outputs, groups), nn.ReLU())


def _depthwise(width: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


MODELS = {"shufflenet_v1": ShuffleNetV1, "shufflenet_v2": ShuffleNetV2}
