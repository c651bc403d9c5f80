"""A plain convolutional network: stages of [3x3 convolution, BatchNorm, ReLU], global average pooling, a
linear head.

The second and later stages halve the grid. Small enough for a laptop, and a fair pair at two widths.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.refused import Refused


class CNN(nn.Module):
    """Args: classes and channels of the data; widths, one per stage; depth, convolutions a stage.

    Taps: `stage1` … `stageN` (b c h w, after the ReLU), `stage1_pre` … (what that ReLU is given) and `pooled`
    (b c), what the head reads.
    """

    def __init__(
        self, classes: int, channels: int = 1, widths: Sequence[int] = (8, 16, 32), depth: int = 1
    ) -> None:
        super().__init__()
        if not widths or min(*widths, depth) < 1:
            raise Refused(
                f"A CNN of widths {list(widths)} and depth {depth} was asked for, expected at least one "
                "width, and numbers of 1 or more; try widths = [8, 16, 32]."
            )
        inputs = (channels, *widths[:-1])
        self.stages = nn.ModuleList(
            _stage(a, b, depth, stride=1 if n == 0 else 2)
            for n, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], classes)
        self.TAPS = {
            **{f"stage{n + 1}": f"stages.{n}" for n in range(len(widths))},
            **{f"stage{n + 1}_pre": f"stages.{n}.{3 * depth - 2}" for n in range(len(widths))},
            "pooled": "head:in",
        }
        self._widths, self._depth = tuple(widths), depth

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        """A fresh copy of what follows stage i (counted from 0), ending at the final grid and width; after
        the last, one more stage."""
        widths, last = self._widths, len(self._widths) - 1
        if i == last:
            return _stage(widths[last], widths[last], self._depth, stride=1).to(self.head.weight)
        pairs = zip(widths[i:], widths[i + 1 :], strict=False)
        return nn.Sequential(*(_stage(a, b, self._depth, stride=2) for a, b in pairs)).to(self.head.weight)


def _stage(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in range(depth):
        conv = nn.Conv2d(
            inputs if n == 0 else outputs, outputs, 3, stride=stride if n == 0 else 1, padding=1, bias=False
        )
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


MODELS = {"cnn": CNN}
