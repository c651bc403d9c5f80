"""Wide ResNets: Wide Residual Networks (Zagoruyko, Komodakis; BMVC 2016; arXiv:1605.07146).

`wrn_d_w` is a ResNet of d layers whose stages are w times as wide as 16-32-64, in the order BatchNorm, ReLU,
convolution: a 3x3 convolution, three stages of (d - 4) / 6 blocks at full, half and a quarter of the grid,
BatchNorm, ReLU, global average pooling, a linear head.

Layout, initial weights and the tensors' names are RepDistiller's and mdistiller's, so their weights fit.
Where a block changes width, its shortcut is a 1x1 convolution of what the block's first ReLU gives.

A stage ends in a sum, and its BatchNorm and ReLU belong to the block that follows. So what those two codes
call a stage's feature is the sum, here `stage1`; what they call its pre-activation is the BatchNorm's output
in the next block, here `stage1_pre`.

Parameters for 100 classes and colour images:

    wrn_16_1  180,916    wrn_16_2  703,284    wrn_40_1  569,780    wrn_40_2  2,255,156

Departures from RepDistiller: no dropout (it is 0 there by default), and pooling over any grid for its 8x8,
which is all there is of a 32x32 image.
"""

from collections import OrderedDict
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn


class WideResNet(nn.Module):
    """Args: classes and channels of the data; depth, 6n + 4; widen, how many times 16-32-64.

    Taps: `stem`; `stage1` … `stage3` (b c h w, the stage's sum) and `stage1_pre` … (that sum's BatchNorm, in
    front of its ReLU); `pooled` (b c), what the head reads.
    """

    TAPS: ClassVar = {
        "stem": "conv1",
        "stage1": "block1",
        "stage1_pre": "block2.layer.0.bn1",
        "stage2": "block2",
        "stage2_pre": "block3.layer.0.bn1",
        "stage3": "block3",
        "stage3_pre": "bn1",
        "pooled": "fc:in",
    }

    def __init__(self, classes: int, channels: int = 3, depth: int = 16, widen: int = 1) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"a wide ResNet's depth is 10, 16, 22 … (6n + 4), not {depth}")
        self._widths, self._blocks = (16, 16 * widen, 32 * widen, 64 * widen), (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1, self.block2, self.block3 = (self._stage(n) for n in range(3))
        self.bn1 = nn.BatchNorm2d(self._widths[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(self._widths[-1], classes)
        _initialise(self)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.block1, self.block2, self.block3

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """Fresh modules like those that follow stage i (counted from 0), to the last ReLU; after the last
        stage, one more that keeps grid and width. Pooled, what a tail gives stands beside `pooled`."""
        follows = [self._stage(n) for n in range(i + 1, 3)] or [self._stage(3)]
        tail = nn.Sequential(*follows, nn.BatchNorm2d(self._widths[-1]), nn.ReLU())
        _initialise(tail)
        return tail.to(self.conv1.weight)  # to its device and precision

    def _stage(self, n: int) -> nn.Sequential:
        """Stage n as it begins; 3 is one more than there are."""
        inputs, outputs = self._widths[n], self._widths[min(n + 1, 3)]
        first = PreactBlock(inputs, outputs, stride=2 if n in (1, 2) else 1)
        rest = (PreactBlock(outputs, outputs, stride=1) for _ in range(self._blocks - 1))
        return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))


class PreactBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        active = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return residual + (x if self.convShortcut is None else self.convShortcut(active))


def _initialise(module: nn.Module) -> None:
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)


MODELS = {f"wrn_{d}_{w}": partial(WideResNet, depth=d, widen=w) for d in (16, 40) for w in (1, 2)}
