"""A vision transformer for small images (An Image is Worth 16x16 Words, Dosovitskiy et al.; ICLR 2021;
arXiv:2010.11929).

The layout is the paper's: patches as tokens, learned positions, blocks with their norm in front, one more
norm at the end, a linear head. `vit_tiny` has the width, depth and heads of DeiT-Ti (Touvron et al.; ICML
2021; arXiv:2012.12877) with patches of 4 for images of 32x32, and 5,379,748 parameters at 100 classes and 3
channels. With `size=224, patch=16, pool="class"` and 1,000 classes it is DeiT-Ti, of 5,717,416.

Departures from the paper: by default the head reads the mean of the patches and there is no class token, so
that tokens are a grid and can be compared with maps; no dropout; no hidden layer in the head; weights start
as DeiT's.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.refused import Refused

POOLS = ("mean", "class")


class ViT(nn.Module):
    """Args: classes and channels of the data; size of the (square) images and of a patch; width of a token;
    depth, blocks in all; heads of attention; stages, the equal groups that blocks are looked at in; pool,
    what the head reads: the `mean` of the patches, or a `class` token, which comes first.

    Taps: `stage1` … (b n d), the tokens after each stage; `stage1_attention` … (b heads n n), where its last
    block looks, each row summing to 1; `stage1_qkv` … (b n 3d), that block's queries, keys and values side by
    side, each of them head after head; `pooled` (b d), what the head reads. `grid` is the patches' rows and
    columns.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        size: int = 32,
        patch: int = 4,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        stages: int = 3,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        _refuse_uneven("size", size, "patch", patch)
        _refuse_uneven("width", width, "heads", heads)
        _refuse_uneven("depth", depth, "stages", stages)
        if pool not in POOLS:
            raise Refused(f"The pool of a vit is '{pool}', expected {' or '.join(POOLS)}.")
        self._size, self._heads, self._depth = size, heads, depth // stages
        self.grid = (size // patch, size // patch)
        tokens = self.grid[0] * self.grid[1] + (pool == "class")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if pool == "class" else None
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.stages = nn.ModuleList(self._stage(width) for _ in range(stages))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.TAPS = {"pooled": "head:in"}
        for n in range(stages):
            self.TAPS[f"stage{n + 1}"] = f"stages.{n}"
            self.TAPS[f"stage{n + 1}_attention"] = f"stages.{n}.{self._depth - 1}.attention.weights"
            self.TAPS[f"stage{n + 1}_qkv"] = f"stages.{n}.{self._depth - 1}.attention.qkv"
        _initialise(self)
        for parameter in (self.positions, self.class_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        if x.shape[-2:] != (self._size, self._size):
            raise Refused(
                f"A vit for images of {self._size}x{self._size} was shown {x.shape[-2]}x{x.shape[-1]}; say "
                "how large they are with its knob `size`."
            )
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        x = x + self.positions
        for stage in self.stages:
            x = stage(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])

    def tail(self, i: int) -> nn.Module:
        """What follows stage i (counted from 0), made anew, up to what is pooled; after the last stage, one
        more of its kind."""
        width = self.head.in_features
        count = max(len(self.stages) - 1 - i, 1)
        tail = nn.Sequential(*(self._stage(width) for _ in range(count)), nn.LayerNorm(width, eps=1e-6))
        _initialise(tail)
        return tail.to(self.head.weight)

    def _stage(self, width: int) -> nn.Sequential:
        return nn.Sequential(*(Block(width, self._heads) for _ in range(self._depth)))


class Block(nn.Module):
    """Tokens look at each other, then each thinks for itself; both are added to what they were."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    """Written out, for torch's fused attention does not show its weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.weights = nn.Identity()  # a place to look at the weights
        self.project = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        weights = self.weights((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1))
        return self.project((weights @ v).transpose(1, 2).flatten(2))


def _initialise(network: nn.Module) -> None:
    """DeiT's initial weights; the patches' are torch's own."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def _refuse_uneven(whole: str, size: int, part: str, count: int) -> None:
    if size < 1 or count < 1 or size % count:
        raise Refused(
            f"A vit has {whole} {size} and {part} {count}; expected {whole} as a multiple of {part}."
        )


MODELS = {"vit_tiny": ViT}
