"""VGGs for small images: Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan,
Zisserman; ICLR 2015; arXiv:1409.1556), with BatchNorm (Ioffe, Szegedy; ICML 2015; arXiv:1502.03167).

Five blocks of [3x3 convolution, BatchNorm, ReLU] at widths 64-128-256-512-512, max pooling between all but
the last two, global average pooling and one linear layer for the paper's three. vgg11, 13, 16 and 19 are the
paper's configurations A, B, D and E; vgg8 has one convolution a block.

Layout, initial weights and the tensors' names are those of RepDistiller's and mdistiller's `vgg8_bn` …, so
their weights fit. As there, the first block counts as the stem and the four others as the stages: their
"feature 2", where hints are given, is `stage2`, at 8x8 for a 32x32 image.

Parameters for 100 classes and colour images:

    vgg8  3,965,028    vgg13   9,462,180    vgg19 20,086,692
    vgg11 9,277,284    vgg16  14,774,436

Departure: they pool once more, between the last two blocks, when images are 64 rows high.
"""

from collections.abc import Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 128, 256, 512, 512)
POOLS = (False, True, True, True, False)  # before which blocks


class VGG(nn.Module):
    """Args: classes and channels of the data; convolutions, how many in each of the five blocks.

    Taps: `stem`; `stage1` … `stage4` (b c h w, after the last ReLU) and `stage1_pre` … (in front of that
    ReLU); `pooled` (b c), what the head reads.
    """

    def __init__(
        self, classes: int, channels: int = 3, convolutions: Sequence[int] = (1, 1, 1, 1, 1)
    ) -> None:
        super().__init__()
        inputs = (channels, *WIDTHS[:-1])
        self.block0, self.block1, self.block2, self.block3, self.block4 = map(
            Block, inputs, WIDTHS, convolutions, POOLS
        )
        self.classifier = nn.Linear(WIDTHS[-1], classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self._convolutions = tuple(convolutions)

        self.TAPS = {"stem": "block0"}
        for stage in (1, 2, 3, 4):
            self.TAPS[f"stage{stage}"] = f"block{stage}"
            self.TAPS[f"stage{stage}_pre"] = f"block{stage}.{3 * convolutions[stage] - 2}"
        self.TAPS["pooled"] = "classifier:in"

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self.block1, self.block2, self.block3, self.block4

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.block0(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """Fresh stages like those that follow stage i (counted from 0); after the last, one more that keeps
        grid and width. Pooled, what a tail gives stands beside `pooled`."""
        follows = [
            Block(WIDTHS[n - 1], WIDTHS[n], self._convolutions[n], POOLS[n]) for n in range(i + 2, 5)
        ] or [Block(WIDTHS[4], WIDTHS[4], self._convolutions[4], pools=False)]
        return nn.Sequential(*follows).to(self.classifier.weight)  # to its device and precision


class Block(nn.Sequential):
    """Max pooling where `pools`, then convolutions, each with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, convolutions: int, pools: bool) -> None:
        super().__init__()
        for n in range(convolutions):
            conv = nn.Conv2d(inputs if n == 0 else outputs, outputs, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
            self.extend((conv, nn.BatchNorm2d(outputs), nn.ReLU()))
        self.pools = pools

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        return super().forward(F.max_pool2d(x, 2) if self.pools else x)


MODELS = {
    name: partial(VGG, convolutions=convolutions)
    for name, convolutions in {
        "vgg8": (1, 1, 1, 1, 1),
        "vgg11": (1, 1, 2, 2, 2),
        "vgg13": (2, 2, 2, 2, 2),
        "vgg16": (2, 2, 3, 3, 3),
        "vgg19": (2, 2, 4, 4, 4),
    }.items()
}
