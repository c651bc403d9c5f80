"""Reconstruction of hidden patches: the mean squared error on these alone, and how much of a picture comes
back (Masked Autoencoders Are Scalable Vision Learners, He et al.; CVPR 2022; arXiv:2111.06377)."""

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch, Lesson
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.task import Task
from limbeck.pieces.patches import mask, patchify, take, unpatchify


class Reconstruct(Task):
    """The model answers with the pixels of every patch (b n d), those it was shown too; labels are not read.

    In training the stage's `view` says what is hidden (`mask`). For the score every image has a mask of its
    own, the same whenever it is scored, whoever is scored.

    norm_pix: a patch is to be told less its mean and in units of its own spread, as in the paper's best runs;
    DMAE has it off. ratio: the share of patches that is hidden for the score.
    """

    headline = "psnr"

    def __init__(self, norm_pix: bool = False, ratio: float = 0.75) -> None:
        self.norm_pix, self.ratio = norm_pix, ratio

    def loss(self, s: Seen, batch: Batch) -> Float[Tensor, ""]:
        return F.mse_loss(*self._hidden(s, batch))

    def score(self, answers: Iterable[tuple[Seen, Batch]]) -> dict[str, float]:
        """The peak signal-to-noise ratio of hidden patches, in dB; the peak is the range of what was to be
        told. A model that was shown whole images is asked once more."""
        squares, pixels, lowest, highest = 0.0, 0, math.inf, -math.inf
        for seen, batch in answers:
            here, there = self._hidden(*self.masked(seen, batch))
            squares += float((here - there).double().square().sum())
            pixels += there.numel()
            lowest, highest = min(lowest, float(there.min())), max(highest, float(there.max()))
        tiny = torch.finfo(torch.float32).tiny
        error, peak = squares / max(pixels, 1), max(highest - lowest, 0.0)
        return {"psnr": 10 * math.log10(max(peak**2, tiny) / max(error, tiny))}

    def check(self, s: Seen, batch: Batch) -> None:
        if not isinstance(batch.x, Mapping) or not {"x", "hide"} <= batch.x.keys():
            raise Refused(
                "Nothing is hidden from the model, and reconstruction learns from what is; give the stage "
                "view = { name = 'mask', patch = … } with the model's own size of patches."
            )
        x, n = batch.x["x"], batch.x["hide"].shape[1] + batch.x["keep"].shape[1]
        wanted = (len(x), n, x[0].numel() // n)
        if not isinstance(s.out, Tensor) or s.out.shape != wanted:
            found = f"shape {tuple(s.out.shape)}" if isinstance(s.out, Tensor) else type(s.out).__name__
            raise Refused(
                f"The model's answer has {found}, and reconstruction expects the pixels of all patches, "
                f"{wanted}; name an autoencoder such as 'mae', with patches of the mask's size."
            )

    def masked(self, seen: Seen, batch: Batch) -> tuple[Seen, Batch]:
        """The model's answer to the same rows with patches hidden from it, under the masks of the score; what
        was shown masked stays as it is."""
        if isinstance(batch.x, Mapping):
            return seen, batch
        assert seen.model is not None and batch.index is not None
        keep, hide = mask(Lesson(), batch.index, seen.out.shape[1], self.ratio, "mask of the score")
        shown = batch.replace(x={"x": batch.x, "keep": keep, "hide": hide})
        with torch.no_grad():
            return Seen(seen.model(**shown.x)), shown

    def filled(self, s: Seen, batch: Batch) -> dict[str, Float[Tensor, "b c h w"]]:
        """Images as they were `masked`, with the lowest value where they are hidden, and `reconstructed`,
        with the model's there."""
        x, hide = batch.x["x"], batch.x["hide"]
        patches, here = patchify(x, _side(s, x)), take(s.out, hide)
        if self.norm_pix:
            own = take(patches, hide)
            here = here * _spread(own) + own.mean(2, keepdim=True)
        places = hide[:, :, None].expand_as(here)
        sides = {"masked": torch.full_like(here, float(x.min())), "reconstructed": here}
        return {name: unpatchify(patches.scatter(1, places, v), x.shape[1]) for name, v in sides.items()}

    def _hidden(self, s: Seen, batch: Batch) -> tuple[Float[Tensor, "b k d"], Float[Tensor, "b k d"]]:
        """What the model says of the hidden patches, and what is to be said."""
        x, hide = batch.x["x"], batch.x["hide"]
        there = take(patchify(x, _side(s, x)), hide)
        if self.norm_pix:
            there = (there - there.mean(2, keepdim=True)) / _spread(there)
        return take(s.out, hide), there


def _side(s: Seen, x: Tensor) -> int:
    """Pixels along a patch, as the model's answer has them."""
    return math.isqrt(s.out.shape[2] // x.shape[1])


def _spread(patches: Float[Tensor, "b k d"]) -> Float[Tensor, "b k 1"]:
    return (patches.var(2, keepdim=True) + 1e-6).sqrt()
