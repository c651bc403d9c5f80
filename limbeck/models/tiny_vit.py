"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers (Wu, Zhang, Peng, Liu, Xiao, Fu, Yuan;
ECCV 2022; arXiv:2207.10666).

Two convolutions make patches of four; a stage of inverted residuals (MBConv) and three of attention within
windows, each at half the grid of the one before; the mean over the grid, a norm, a linear head. A block of
attention lets each place look at its window, then at its eight neighbours (a depthwise convolution), then
thinks for itself. How far two places lie apart, whichever is above or to the left, is a bias of each head.

Parameters at 3 channels, and 1,000 classes but for the last:

    tiny_vit_5m   5,392,764    tiny_vit_21m  21,198,568
    tiny_vit_11m 10,996,972    tiny_vit_32    2,449,540 (100 classes)

`tiny_vit_32` is ours, for images of 32x32 or so: `tiny_vit_5m` without the last stage, and its second
convolution keeps the grid, so that patches are of two. Its stages are at 16x16, 8x8 and 4x4; windows of 4
make four of the second and one of the third. For a smaller network lower `dims` and `depths`.

The layout, the initial weights and the tensors' names are those of the official code (microsoft/Cream), whose
weights fit these once they are written as safetensors, without `attention_bias_idxs` where a file has such.
timm's have other names.

Departures: any size of image is taken, with the windows as they are: those that the lower and the right edge
cut are filled up with zeros, as in the official code. Between blocks there are maps, not tokens. Biases for
another size of window are not interpolated.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.refused import Refused

EXPANSION = 4  # of an inverted residual and of an MLP


class TinyViT(nn.Module):
    """Args: classes and channels of the data; dims, the width of each stage; depths, the blocks of each;
    windows, the side of a window in each stage but the first, which has none; strides of the two
    convolutions that make patches; head_width, channels a head of attention; drop_path, how often a row does
    without a branch of the last block in training, growing from 0 at the first block.

    Taps: `stem`, the patches; `stage1` … (b c h w), the map after each stage's blocks; `pooled` (b c), what
    the head reads. At 224x224 the stages' grids are 56x56, 28x28, 14x14 and 7x7.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        dims: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        windows: Sequence[int] = (7, 14, 7),
        strides: Sequence[int] = (2, 2),
        head_width: int = 32,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _refuse_misfits(dims, depths, windows, strides, head_width, drop_path)
        self._dims, self._windows, self._head_width = tuple(dims), tuple(windows), head_width
        rates = [drop_path * n / max(sum(depths) - 1, 1) for n in range(sum(depths))]
        self._rates = [rates[a:b] for a, b in pairwise(accumulate(depths, initial=0))]
        self.patch_embed = nn.Sequential(OrderedDict(seq=_patches(channels, dims[0], strides)))
        self.layers = nn.Sequential(*(self._layer(n) for n in range(len(dims))))
        self.norm_head = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes)
        _initialise(self)
        self.TAPS = {"stem": "patch_embed", "pooled": "head:in"}
        self.TAPS |= {f"stage{n + 1}": f"layers.{n}.blocks" for n in range(len(dims))}

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The blocks of each stage. What leads from one to the next, `downsample`, is in none."""
        return tuple(self.get_submodule(f"layers.{n}.blocks") for n in range(len(self._dims)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        x = self.layers(self.patch_embed(x))
        return self.head(self.norm_head(x.mean((2, 3))))

    def tail(self, i: int) -> nn.Module:
        """What follows stage i (counted from 0), made anew, up to the last stage's map; after the last stage,
        its blocks once more. Pooled, what a tail gives stands beside `pooled`, less the norm there."""
        last = len(self._dims) - 1
        follows = [part for n in range(i, last) for part in (self._merging(n), self._blocks(n + 1))]
        tail = nn.Sequential(*(follows or [self._blocks(last)]))
        _initialise(tail)
        return tail.to(self.head.weight)  # to its device and precision

    def _layer(self, n: int) -> nn.Sequential:
        layer = nn.Sequential(OrderedDict(blocks=self._blocks(n)))
        if n + 1 < len(self._dims):
            layer.add_module("downsample", self._merging(n))
        return layer

    def _blocks(self, n: int) -> nn.Sequential:
        dim = self._dims[n]
        if n == 0:
            return nn.Sequential(*(_MBConv(dim, rate) for rate in self._rates[0]))
        window = self._windows[n - 1]
        return nn.Sequential(*(_Block(dim, window, self._head_width, rate) for rate in self._rates[n]))

    def _merging(self, n: int) -> nn.Sequential:
        """From stage n to half its grid, at the width of the next."""
        inputs, outputs = self._dims[n : n + 2]
        return nn.Sequential(
            OrderedDict(
                conv1=_conv(inputs, outputs, 1),
                act1=nn.GELU(),
                conv2=_conv(outputs, outputs, 3, stride=2, groups=outputs),
                act2=nn.GELU(),
                conv3=_conv(outputs, outputs, 1),
            )
        )


class _MBConv(nn.Module):
    """An inverted residual. Its last BatchNorm starts at 0, so that the block begins as a GELU."""

    def __init__(self, dim: int, rate: float) -> None:
        super().__init__()
        self.conv1 = _conv(dim, EXPANSION * dim, 1)
        self.conv2 = _conv(EXPANSION * dim, EXPANSION * dim, 3, groups=EXPANSION * dim)
        self.conv3 = _conv(EXPANSION * dim, dim, 1, gamma=0)
        self.drop_path = _DropPath(rate)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        inside = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.drop_path(self.conv3(inside)))


class _Block(nn.Module):
    """Attention within windows and an MLP, each added to what it was given; between them a depthwise
    convolution, which is not."""

    def __init__(self, dim: int, window: int, head_width: int, rate: float) -> None:
        super().__init__()
        self.window = window
        self.attn = _Attention(dim, window, head_width)
        self.mlp = nn.Sequential(
            OrderedDict(
                norm=nn.LayerNorm(dim),
                fc1=nn.Linear(dim, EXPANSION * dim),
                act=nn.GELU(),
                fc2=nn.Linear(EXPANSION * dim, dim),
            )
        )
        self.local_conv = _conv(dim, dim, 3, groups=dim)
        self.drop_path = _DropPath(rate)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = x + self.drop_path(self._look(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = self.local_conv(x)
        return x + self.drop_path(self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def _look(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """Each place at its window."""
        side, (h, w) = self.window, x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
        windows = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # b rows columns h w c
        seen = self.attn(windows.flatten(0, 2).flatten(1, 2)).view(windows.shape)
        return seen.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]


class _Attention(nn.Module):
    """Of all the places of a window to each other, with a bias a head for how far apart they are."""

    offsets: Tensor

    def __init__(self, dim: int, window: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.scale = dim // head_width, head_width**-0.5
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)  # of head after head
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(self.heads, window**2))
        place = torch.arange(window**2)
        rows, columns = (axis[:, None].sub(axis).abs() for axis in (place // window, place % window))
        self.register_buffer("offsets", rows * window + columns, persistent=False)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind()
        weights = (q @ k.transpose(2, 3) * self.scale + self.attention_biases[:, self.offsets]).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class _DropPath(nn.Module):
    """In training a row's branch is zero at this rate, and larger where it is not, so that the mean stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


def _patches(channels: int, dim: int, strides: Sequence[int]) -> nn.Sequential:
    first, second = strides
    half = _conv(channels, dim // 2, 3, first)
    return nn.Sequential(half, nn.GELU(), _conv(dim // 2, dim, 3, second))


def _conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, gamma: float = 1
) -> nn.Sequential:
    """A convolution and a BatchNorm whose weight starts at gamma."""
    c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    bn = nn.BatchNorm2d(outputs)
    nn.init.constant_(bn.weight, gamma)
    return nn.Sequential(OrderedDict(c=c, bn=bn))


def _initialise(network: nn.Module) -> None:
    """The official initial weights; convolutions' and norms' are torch's own."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def _refuse_misfits(
    dims: Sequence[int],
    depths: Sequence[int],
    windows: Sequence[int],
    strides: Sequence[int],
    head_width: int,
    drop_path: float,
) -> None:
    said = {"dims": dims, "depths": depths, "windows": windows, "strides": strides}
    for knob, numbers in said.items():
        if not numbers or min(numbers) < 1:
            raise Refused(f"A tiny_vit has {knob} {list(numbers)}; expected numbers from 1 on.")
    if not len(dims) == len(depths) == len(windows) + 1:
        raise Refused(
            f"A tiny_vit has {len(dims)} dims, {len(depths)} depths and {len(windows)} windows; expected as "
            "many depths as dims, and a window for every stage but the first."
        )
    if len(strides) != 2:
        raise Refused(f"A tiny_vit has strides {list(strides)}; expected two, of its first two convolutions.")
    if head_width < 1 or any(dim % head_width for dim in dims[1:]):
        raise Refused(
            f"A tiny_vit has dims {list(dims)} and head_width {head_width}; expected every one but the first "
            "as a multiple of head_width."
        )
    if not 0 <= drop_path < 1:
        raise Refused(f"The drop_path of a tiny_vit is {drop_path}, expected a number from 0 up to below 1.")


MODELS = {
    "tiny_vit_5m": TinyViT,
    "tiny_vit_11m": partial(TinyViT, dims=(64, 128, 256, 448), drop_path=0.1),
    "tiny_vit_21m": partial(TinyViT, dims=(96, 192, 384, 576), drop_path=0.2),
    "tiny_vit_32": partial(TinyViT, dims=(64, 128, 160), depths=(2, 2, 6), windows=(4, 4), strides=(2, 1)),
}
