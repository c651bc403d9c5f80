"""Pictures of a reconstruction: what was hidden is dark, then the model's, and the rest is as it was."""

import base64
import struct
import zlib

import torch
from torch import Tensor, nn

from limbeck.data.loader import Data
from limbeck.models.autoencoder import MAE
from limbeck.pictures import reconstructions
from limbeck.pieces.patches import patchify
from limbeck.tasks.reconstruct import Reconstruct

PIXELS = torch.randint(40, 250, (9, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
DATA = Data(PIXELS, torch.zeros(9).long(), ("one",), 1 / 255, 0.3, 0.5)


def read(uri: str | None) -> Tensor:
    """The grey values of a PNG, its one IDAT unpacked."""
    assert uri is not None
    png = base64.b64decode(uri.partition(",")[2])
    wide, high = struct.unpack(">II", png[16:24])
    at = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    lines = zlib.decompress(png[at + 4 : at + 4 + length])
    return torch.tensor(list(lines)).view(high, wide + 1)[:, 1:]


def patches(pixels: Tensor) -> Tensor:
    return patchify(pixels[None, None].float(), 2)[0]


class Knows(nn.Module):
    """Says every patch as it is, in its own spread when `norm_pix`."""

    def __init__(self, norm_pix: bool) -> None:
        super().__init__()
        self.norm_pix, self.scale = norm_pix, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, keep: Tensor | None = None, hide: Tensor | None = None) -> Tensor:
        there = patchify(x, 2) * self.scale
        if self.norm_pix:
            there = (there - there.mean(2, keepdim=True)) / (there.var(2, keepdim=True) + 1e-6).sqrt()
        return there


def test_a_model_that_knows_gives_the_picture_back() -> None:
    for norm_pix in (False, True):
        strips = reconstructions(Knows(norm_pix), Reconstruct(norm_pix), DATA, rows=4)
        assert len(strips) == 4
        for strip, pixels in zip(strips, PIXELS[:, 0].long(), strict=False):
            assert list(strip) == ["original", "masked", "reconstructed"]
            assert torch.equal(read(strip["original"]), pixels)
            assert (read(strip["reconstructed"]) - pixels).abs().max() <= 1
            changed = patches(read(strip["masked"])) != patches(pixels)
            hidden = changed.any(1)
            assert hidden.sum() == 12, "of 16 patches"
            assert len(patches(read(strip["masked"]))[hidden].unique()) == 1


def test_a_model_is_left_in_its_mode_and_shows_only_what_was_hidden_of_its_own() -> None:
    torch.manual_seed(0)
    small = {"width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
    model = MAE(3, channels=1, size=8, patch=2, **small).train()
    (strip,) = reconstructions(model, Reconstruct(), DATA, rows=1)
    assert model.training and all(module.training for module in model.modules())
    original, masked, told = (read(strip[side]) for side in ("original", "masked", "reconstructed"))
    shown = (patches(masked) == patches(original)).all(1)
    assert shown.sum() == 4 and torch.equal(patches(told)[shown], patches(original)[shown])
    assert (patches(told)[~shown] != patches(original)[~shown]).any(1).all()
