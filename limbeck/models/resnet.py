"""ResNets for small images: Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016;
arXiv:1512.03385), section 4.2.

A 3x3 convolution, three stages of n basic blocks at full, half and a quarter of the grid, global average
pooling, a linear head: 6n + 2 layers. `resnet8x4` and `resnet32x4` have wider stages, 64-128-256 for
16-32-64, and a stem of 32 for 16.

Where a block changes grid or width its shortcut is one of the paper's two:

- `"B"`, a 1x1 convolution with BatchNorm, as in RepDistiller and mdistiller, whose tensors' names these are:
  their weights fit.
- `"A"`, every second row and column, with channels of zeros on both sides, as in the paper's own CIFAR
  networks and in akamaster/pytorch_resnet_cifar10, whose weights fit these: there the head is called
  `linear`.

Initial weights are each source's: convolutions normal by fan-out for B, and by fan-in, with the head, for A.

Parameters for 100 classes and colour images (B):

    resnet8      83,892    resnet32     472,756    resnet110  1,736,564
    resnet14    181,108    resnet44     667,188    resnet8x4  1,233,540
    resnet20    278,324    resnet56     861,620    resnet32x4 7,433,860

Departure: the sources pool over 8x8, which is all there is of a 32x32 image; here it is over any grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ResNet(nn.Module):
    """Args: classes and channels of the data; depth, 6n + 2; widths of the stem and of the stages; shortcut,
    "A" or "B".

    Taps: `stem`; `stage1` … `stage3` (b c h w, after the last ReLU), `stage1_pre` … (the sum in front of that
    ReLU) and `stage1_pre_norm` … (the BatchNorm of that sum's residual branch); `pooled` (b c), what the head
    reads.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        depth: int = 20,
        widths: Sequence[int] = (16, 16, 32, 64),
        shortcut: str = "B",
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a ResNet's depth is 8, 14, 20 … (6n + 2), not {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"a ResNet's shortcut is 'A' or 'B', not '{shortcut}'")
        self._widths, self._blocks, self._shortcut = tuple(widths), (depth - 2) // 6, shortcut
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = (self._stage(n) for n in range(3))
        self._head = "linear" if shortcut == "A" else "fc"
        head = nn.Linear(widths[-1], classes)
        self.add_module(self._head, head)
        self._initialise(self)
        if shortcut == "A":
            nn.init.kaiming_normal_(head.weight)

        self.TAPS = {"stem": "relu"}
        for stage in (1, 2, 3):
            last = f"layer{stage}.{self._blocks - 1}"
            self.TAPS[f"stage{stage}"] = f"layer{stage}"
            self.TAPS[f"stage{stage}_pre"] = f"{last}.relu2:in"
            self.TAPS[f"stage{stage}_pre_norm"] = f"{last}.bn2"
        self.TAPS["pooled"] = f"{self._head}:in"

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.layer1, self.layer2, self.layer3

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        return getattr(self, self._head)(x.mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """Fresh stages like those that follow stage i (counted from 0); after the last, one more that keeps
        grid and width. Pooled, what a tail gives stands beside `pooled`."""
        follows = [self._stage(n) for n in range(i + 1, 3)] or [self._stage(3)]
        tail = nn.Sequential(*follows)
        self._initialise(tail)
        return tail.to(self.conv1.weight)  # to its device and precision

    def _stage(self, n: int) -> nn.Sequential:
        """Stage n as it begins; 3 is one more than there are."""
        inputs, outputs = self._widths[n], self._widths[min(n + 1, 3)]
        stride = 2 if n in (1, 2) else 1
        first = BasicBlock(inputs, outputs, stride, self._shortcut)
        rest = (BasicBlock(outputs, outputs, 1, self._shortcut) for _ in range(self._blocks - 1))
        return nn.Sequential(first, *rest)

    def _initialise(self, module: nn.Module) -> None:
        mode: Literal["fan_in", "fan_out"] = "fan_in" if self._shortcut == "A" else "fan_out"
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. Each ReLU is its own module, so that each can be tapped."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module
        if stride == 1 and inputs == outputs:
            self.downsample = nn.Identity()
        elif shortcut == "A":
            self.downsample = Padded(stride, outputs - inputs)
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.downsample(x))


class Padded(nn.Module):
    """The shortcut without parameters: every `stride`-th row and column, and `more` channels of zeros, half
    in front and half behind."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        front = self.more // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.more - front))


MODELS = {f"resnet{depth}": partial(ResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)} | {
    f"resnet{depth}x4": partial(ResNet, depth=depth, widths=(32, 64, 128, 256)) for depth in (8, 32)
}
