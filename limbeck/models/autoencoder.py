"""A masked autoencoder (Masked Autoencoders Are Scalable Vision Learners, He, Chen, Xie, Li, Dollár,
Girshick; CVPR 2022; arXiv:2111.06377), and the classifiers that are made of its encoder.

The encoder is a vision transformer that is shown some patches of an image and a class token; a narrower one,
the decoder, is given its tokens at their places and one token, the same everywhere, for what was hidden, and
says the pixels of every patch. Positions are sines and cosines of row and column, and do not learn.

`mae_base` and `mae_large` are the paper's, for images of 224x224 cut into patches of 16; `mae_small` and
`mae_tiny` are the students of DMAE (Bai et al.; CVPR 2023; arXiv:2208.12256). Parameters at 3 channels, the
decoder's among them:

    mae_tiny   31,200,000    mae_base   111,655,680
    mae_small  47,401,728    mae_large  329,239,296

`mae`, for images of 32x32 and patches of 4, is `mae_tiny` otherwise.

After pre-training a stage goes on from the encoder alone: `learner = { name = "tuned", from = "student",
change = "limbeck.models.autoencoder:encoder" }` learns whole, one with `:probe` learns a linear layer only.

Departure from the authors' code: positions are no part of the weights, since nobody learns them.
"""

import math
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck.core.refused import Refused
from limbeck.models.vit import Block
from limbeck.pieces.patches import patchify, take

QUARTERS = 4


class MAE(nn.Module):
    """Args: classes of the data, which only a classifier made of its encoder needs; channels; size of the
    (square) images and of a patch; width of a token, depth and heads of the encoder; decoder_width,
    decoder_depth and decoder_heads.

    Taps: `stage1` … `stage4` (b 1+n d), the encoder's tokens after each quarter of its blocks, rounded up,
    the class token first; `block1` … the same after every block. `stage3` is at three quarters. None has
    gone through the norm at the encoder's end. Of images that are masked only visible patches have tokens.
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
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.encoder = Encoder(channels, size, patch, width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder = Decoder(self.encoder.grid, width, decoder_width, decoder_depth, decoder_heads)
        self.pixels = nn.Linear(decoder_width, patch * patch * channels)
        self.TAPS = _taps(depth)
        _initialise(self)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        keep: Int[Tensor, "b k"] | None = None,
        hide: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n pixels"]:
        """The pixels of every patch, from those at `keep`, or from all of them. `hide` are the others."""
        n = self.encoder.grid[0] * self.encoder.grid[1]
        if keep is not None and hide is not None and keep.shape[1] + hide.shape[1] != n:
            raise Refused(
                f"An autoencoder of {n} patches was shown images of which a mask hides some of "
                f"{keep.shape[1] + hide.shape[1]}; give the view `mask` the model's size of a patch."
            )
        return self.pixels(self.decoder(self.norm(self.encoder(x, keep)), keep))


class Encoder(nn.Module):
    """Patches and a class token, through the blocks. There is no norm at the end."""

    positions: Tensor

    def __init__(self, channels: int, size: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if size < 1 or patch < 1 or size % patch:
            raise Refused(
                f"An autoencoder is made for images of size {size} and patches of {patch}; expected `size` "
                "as a multiple of `patch`."
            )
        self._size, self._patch = size, patch
        self.grid = (size // patch, size // patch)
        self.embed = nn.Linear(patch * patch * channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = _blocks(width, depth, heads)
        self.register_buffer("positions", positions(self.grid, width), persistent=False)

    def forward(
        self, x: Float[Tensor, "b c h w"], keep: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b tokens d"]:
        if x.shape[-2:] != (self._size, self._size):
            raise Refused(
                f"An autoencoder for images of {self._size}x{self._size} was shown "
                f"{x.shape[-2]}x{x.shape[-1]}; say how large they are with its knob `size`."
            )
        patches, places = patchify(x, self._patch), self.positions[None]
        if keep is not None:  # before anything is computed: what is hidden costs nothing
            patches, places = take(patches, keep), self.positions[keep]
        tokens = self.embed(patches) + places
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1).to(tokens), tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Decoder(nn.Module):
    """The encoder's tokens at their places among tokens that say "hidden", through blocks and a norm."""

    positions: Tensor

    def __init__(self, grid: tuple[int, int], encoded: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoded, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = _blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", positions(grid, width), persistent=False)

    def forward(
        self, tokens: Float[Tensor, "b k d"], keep: Int[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n e"]:
        first, rest = self.embed(tokens).tensor_split((1,), 1)
        if keep is not None:
            rest = unshuffle(rest, keep, self.hidden_token.to(rest), len(self.positions))
        tokens = torch.cat([first, rest + self.positions], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1:]


class Classifier(nn.Module):
    """An autoencoder's encoder, shown whole images; the mean over its patches, a norm, a linear head.

    Taps: as the autoencoder's, and `pooled` (b d), what the head reads.
    """

    def __init__(self, mae: MAE, norm: nn.Module) -> None:
        super().__init__()
        width = mae.encoder.embed.out_features
        self.encoder, self.norm, self.head = mae.encoder, norm, nn.Linear(width, mae.classes)
        self.TAPS = {**mae.TAPS, "pooled": "head:in"}
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The blocks, so that a learning rate can fall from layer to layer."""
        return tuple(self.encoder.blocks)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.head(self.norm(self.encoder(x)[:, 1:].mean(1)))


def encoder(model: nn.Module) -> Classifier:
    """What an autoencoder is fine-tuned as. Its decoder and its last norm are dropped; a norm over the mean
    of the patches and a head are new. Raises `Refused` for another model."""
    mae = _expect(model, "encoder")
    return Classifier(mae, nn.LayerNorm(mae.encoder.embed.out_features, eps=1e-6))


def probe(model: nn.Module) -> Classifier:
    """The same with an encoder that does not learn, to see what is in its features: a linear head over these,
    standardised by a BatchNorm without weights. Raises `Refused` for another model."""
    mae = _expect(model, "probe")
    mae.encoder.requires_grad_(False)
    return Classifier(mae, nn.BatchNorm1d(mae.encoder.embed.out_features, eps=1e-6, affine=False))


def positions(grid: tuple[int, int], width: int) -> Float[Tensor, "n d"]:
    """Where each patch lies: sines and cosines of its column in the first half of the width, of its row in
    the second, from one radian a patch down to nearly 1/10,000."""
    if width < 1 or width % 4:
        raise Refused(
            f"An autoencoder has width {width}; expected a multiple of 4, for sines and cosines of rows and "
            "columns."
        )
    pace = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side).double() for side in grid), indexing="ij")
    across, down = (place.flatten()[:, None] * pace for place in (column, row))
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], 1).float()


def unshuffle(
    kept: Float[Tensor, "b k d"], keep: Int[Tensor, "b k"], hidden: Float[Tensor, "1 1 d"], n: int
) -> Float[Tensor, "b n d"]:
    """Each kept token at its own place, the hidden one everywhere else."""
    everywhere = hidden.expand(len(kept), n, -1)
    return everywhere.scatter(1, keep[:, :, None].expand_as(kept), kept)


def _blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    if depth < 1 or heads < 1 or width % heads:
        raise Refused(
            f"An autoencoder has width {width}, heads {heads} and depth {depth}; expected a width that is a "
            "multiple of heads, and one block or more."
        )
    return nn.ModuleList(Block(width, heads) for _ in range(depth))


def _taps(depth: int) -> dict[str, str]:
    last = {f"stage{n}": math.ceil(n * depth / QUARTERS) for n in range(1, QUARTERS + 1)}
    every = {f"block{n}": n for n in range(1, depth + 1)}
    return {name: f"encoder.blocks.{n - 1}" for name, n in {**last, **every}.items()}


def _initialise(mae: MAE) -> None:
    for module in mae.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for token in (mae.encoder.class_token, mae.decoder.hidden_token):
        nn.init.normal_(token, std=0.02)


def _expect(model: nn.Module, change: str) -> MAE:
    if not isinstance(model, MAE):
        raise Refused(
            f"The change '{change}' goes on from an autoencoder, and found a {type(model).__name__}; name "
            "one such as 'mae' as `from`."
        )
    return model


_OF_224 = partial(MAE, size=224, patch=16)
MODELS = {
    "mae": MAE,
    "mae_tiny": partial(_OF_224, width=192, depth=12, heads=3),
    "mae_small": partial(_OF_224, width=384, depth=12, heads=6),
    "mae_base": partial(_OF_224, width=768, depth=12, heads=12),
    "mae_large": partial(_OF_224, width=1024, depth=24, heads=16),
}
