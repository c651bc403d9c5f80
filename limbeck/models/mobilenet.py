"""MobileNetV2 (Sandler, Howard, Zhu, Zhmoginov, Chen; CVPR 2018; arXiv:1801.04381), for small images.

The layout is RepDistiller's (HobbitLong/RepDistiller, `models/mobilenetv2.py`), as in most papers on
distillation with CIFAR: `mobilenetv2_half` is its width 0.5 with expansion 6, of 812,836 parameters at 100
classes and 3 channels.

Departures from the paper, all RepDistiller's: only the stem and two groups of blocks halve the grid, so that
32x32 ends at 2x2; the ReLUs have no upper bound of 6; the first block has its expanding convolution although
it expands by 1; no dropout; widths are cut to whole numbers, not rounded to multiples of 8.
Departure from RepDistiller: the pool averages the whole grid, whatever its size.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn

STEM, NECK = 32, 1280
# A stage is what ends at a tap, of groups of blocks: (expands, width, blocks, stride of the first block).
STAGES = (
    ((False, 16, 1, 1), (True, 24, 2, 1)),
    ((True, 32, 3, 2),),
    ((True, 64, 4, 2), (True, 96, 3, 1)),
    ((True, 160, 3, 2), (True, 320, 1, 1)),
)


class MobileNetV2(nn.Module):
    """Args: classes and channels of the data; width, a factor on all widths but the neck's, which never
    shrinks; expansion, how much wider a block is inside.

    Taps: `stem`, `stage1` … `stage4` (b c h w); `stage1_pre` … are the same as the stages, which no
    activation ends, and `stage1_pre_norm` … their last BatchNorm; `pooled` (b c), what the head reads.
    """

    def __init__(self, classes: int, channels: int = 3, width: float = 1.0, expansion: int = 6) -> None:
        super().__init__()
        self._factor, self._expansion = width, expansion
        ends = [self._wide(groups[-1][1]) for groups in STAGES]
        neck = max(NECK, self._wide(NECK))
        self.stem = _conv(channels, self._wide(STEM), 3, stride=2)
        self.stages = nn.ModuleList(
            self._stage(n, inputs) for n, inputs in enumerate((self._wide(STEM), *ends[:-1]))
        )
        self.neck = _conv(ends[-1], neck, 1)
        self.head = nn.Linear(neck, classes)
        self.TAPS = {"stem": "stem", "pooled": "head:in"}
        for n, groups in enumerate(STAGES):
            last = sum(count for _, _, count, _ in groups) - 1
            self.TAPS |= {
                f"stage{n + 1}": f"stages.{n}",
                f"stage{n + 1}_pre": f"stages.{n}",
                f"stage{n + 1}_pre_norm": f"stages.{n}.{last}.norm",
            }
        self._ends = ends
        _initialise(self)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.neck(x).mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """What follows stage i (counted from 0), made anew, up to what is pooled; after the last stage, one
        more of its kind that keeps the grid."""
        last = len(self.stages) - 1
        follows = [self._stage(n, self._ends[n - 1]) for n in range(i + 1, last + 1)]
        tail = nn.Sequential(
            *(follows or [self._stage(last, self._ends[last], stride=1)]),
            _conv(self._ends[last], self.head.in_features, 1),
        )
        _initialise(tail)
        return tail.to(self.head.weight)

    def _wide(self, width: int) -> int:
        return int(width * self._factor)

    def _stage(self, n: int, inputs: int, stride: int | None = None) -> nn.Sequential:
        """Stage n, at another stride than its own if one is given."""
        blocks = []
        for expands, width, count, own in STAGES[n]:
            for place in range(count):
                step = (own if stride is None else stride) if place == 0 else 1
                blocks.append(_Block(inputs, self._wide(width), self._expansion if expands else 1, step))
                inputs = self._wide(width)
        return nn.Sequential(*blocks)


class _Block(nn.Module):
    """An inverted residual: wide inside, narrow between blocks, where no activation cuts anything off."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.branch = nn.Sequential(
            _conv(inputs, inside, 1),
            _conv(inside, inside, 3, stride, groups=inside),
            nn.Conv2d(inside, outputs, 1, bias=False),
        )
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.norm(self.branch(x))
        return x + y if self.residual else y


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _initialise(network: nn.Module) -> None:
    """RepDistiller's initial weights; BatchNorm's are torch's own."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def mobilenetv2_half(classes: int, channels: int = 3) -> MobileNetV2:
    return MobileNetV2(classes, channels, width=0.5)


MODELS = {"mobilenetv2_half": mobilenetv2_half}
