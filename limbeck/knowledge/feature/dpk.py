r"""Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge Distillation (Qiu et al.; ICLR 2023;
arXiv:2206.06067).

A teacher far above its student is hard to follow. So part of the teacher's map is *given*: at $\pi N$ of its
$N$ places, drawn anew each time, its tokens take the place of the student's, and from what is stitched
together the teacher's whole map is to be told. The less alike the two networks are, the more is given:

$$\pi = 1 - \mathrm{CKA}(s, t), \qquad
  h_n = \begin{cases} \mathrm{Enc}_t(t)_n & n \text{ is given} \\ \mathrm{Enc}_s(s)_n & \text{otherwise}
  \end{cases}, \qquad
  L = \sum_{\text{taps}} \operatorname{mean} \big(\mathrm{Dec}(h) - t\big)^2$$

$\pi$ is kept within 0 and 1 and passes no gradient. At $\pi = 0$ this is a hint through an encoder and a
decoder; at $\pi = 1$ the student is not asked, and learns nothing from it. A student far from its teacher is
thus taught little by this loss, and must begin with the task's or KD's.

A reconstruction: the authors never published their code. Several accounts agree on the mechanism and on
$\pi$. Inferred, by us or by those who wrote it anew, is:
- Patches so large that no side has more than 8 where it can be halved so often; a token as wide as a
  student's patch (and so many more that the heads share it evenly), at most 256; learned positions.
- Both maps are encoded whole and mixed after that. Encoders and decoder are pre-norm transformer blocks, one
  deep, of 4 heads, with an MLP of two widths and a norm behind. (Elsewhere: Swin blocks, 4, 3 and 2 deep over
  the stages.)
- Places are drawn for each row by itself (`shared`: alike for all), and the gap is averaged over all places
  (`positions` leaves out the given ones, or the others).
- The last stage, at a weight of 1; the teacher's map as it is (`normalise`: each of its patches with mean 0
  and variance 1). The paper has all stages for detection: `taps` takes any number.

Departures from the paper:
- CKA is made of the *unbiased* HSIC of a batch (`pieces/similarity.py`). The biased one calls independent
  features alike in small batches, which would switch the method off.
- Its three HSIC terms are running means over batches, and over processes; not CKA itself. It takes 32 rows a
  process to say anything, so smaller batches are refused for the dynamic ratio. A last batch that is smaller
  leaves $\pi$ as it is.
- The teacher's map is brought to the student's grid, averaged where it is larger and repeated where it is
  smaller; tokens are the map that they make.

`prior = false` puts learned tokens in the places of the teacher's: nothing is given, and the rest must do. To
watch: $\pi$, and the loss at the student's places and at the given ones apart, for an encoder and a decoder
that copy what is given lower the loss without a student.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, expect_maps
from limbeck.pieces.similarity import cka, hsic_terms
from limbeck.pieces.transformer import Block

FEWEST_ROWS = 32
"""How alike fewer rows lie is left to chance, unbiased or not."""

MOST_PATCHES = 8
"""Along a side, where patches are not told how large to be."""

POSITIONS = ("all", "masked", "unmasked")


def places(draw: Float[Tensor, "#b n"], ratio: Float[Tensor, ""]) -> Bool[Tensor, "#b n"]:
    """Which places are given: round(ratio · n) in each row, the first of a permutation made by its draws."""
    return draw.argsort(dim=1, stable=True) < (ratio * draw.shape[1]).round()


def stitch(
    s: Float[Tensor, "b n d"], t: Float[Tensor, "#b n d"], given: Bool[Tensor, "#b n"]
) -> Float[Tensor, "b n d"]:
    """The teacher's token in the places that are given, the student's in the others."""
    return torch.where(given[:, :, None], t, s)


def gaps(
    told: Float[Tensor, "b n d"], t: Float[Tensor, "b n d"], given: Bool[Tensor, "#b n"]
) -> Float[Tensor, "3"]:
    """The mean squared gap over all places, over those given (masked) and over the others (unmasked); 0 where
    there are none."""
    exact = torch.promote_types(told.dtype, torch.float32)
    gap = (told.to(exact) - t.to(exact)).square().mean(2)
    every = torch.ones_like(gap, dtype=torch.bool)
    means = [(gap * one).sum() / one.sum().clamp(min=1) for one in (every, every & given, every & ~given)]
    return torch.stack(means)


class Encoder(nn.Module):
    """Patches as tokens, each with its position, that have looked at each other."""

    def __init__(self, patch: int, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(patch, width)
        self.positions = _learned(tokens, width)
        self.blocks = _blocks(width, depth, heads)

    def forward(self, x: Float[Tensor, "b n p"]) -> Float[Tensor, "b n d"]:
        return self.blocks(self.embed(x.to(self.embed.weight.dtype)) + self.positions)


class Teller(nn.Module):
    """Tells the teacher's map of one tap from the student's and from what is given of the teacher's.

    s, t: the example's maps. patch: its side; None for as large as it takes.
    """

    def __init__(
        self,
        s: Float[Tensor, "b c_s h w"],
        t: Float[Tensor, "b c_t h_t w_t"],
        patch: int | None,
        width: int | None,
        depth: int,
        heads: int,
        prior: bool,
    ) -> None:
        super().__init__()
        (_, here, h, w), there = s.shape, t.shape[1]
        self.patch = patch or _patch(h, w)
        self.grid, self.tokens = (h, w), h * w // self.patch**2
        here, there = here * self.patch**2, there * self.patch**2
        width = width or heads * math.ceil(min(here, 256) / heads)
        self.encode_s = Encoder(here, self.tokens, width, depth, heads)
        self.encode_t = Encoder(there, self.tokens, width, depth, heads) if prior else None
        self.nothing = None if prior else _learned(self.tokens, width)  # a place where nothing is given
        self.decode = nn.Sequential(_blocks(width, depth, heads), nn.Linear(width, there))

    def forward(
        self, s: Float[Tensor, "b n p_s"], t: Float[Tensor, "b n p_t"], given: Bool[Tensor, "#b n"]
    ) -> Float[Tensor, "b n p_t"]:
        if self.encode_t is None:
            assert self.nothing is not None
            prior = self.nothing[None]
        else:
            prior = self.encode_t(t)
        return self.decode(stitch(self.encode_s(s), prior, given))

    def patches(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        return F.pixel_unshuffle(x, self.patch).flatten(2).mT


class DPK(Method):
    """The teacher's map is told from a mixture of both maps, which holds the more of the teacher's the less
    the student's is like it.

    taps: where. ratio: share of the places that is given, `dynamic` or a number from 0 to 1. patch: side of a
    place, in cells of the student's map. width, depth and heads: of encoders and decoder. positions: which
    places the loss is a mean over, `all`, the given ones (`masked`) or the others (`unmasked`). shared: the
    same places in all rows. prior: whether the teacher's tokens are given there, or learned ones that know
    nothing. normalise: the teacher's patches, before they are told. decay: of the running means that the
    dynamic ratio is made of, a batch.
    """

    card = Card(
        "arXiv:2206.06067",
        2023,
        ("feature",),
        taps=("stage3",),
        fidelity="reconstruction",
        needs=frozenset({"index"}),
        reads_out=False,
    )

    hsic: Tensor
    watched: Tensor

    def __init__(
        self,
        taps: Sequence[str] = ("stage3",),
        ratio: float | str = "dynamic",
        patch: int | None = None,
        width: int | None = None,
        depth: int = 1,
        heads: int = 4,
        positions: str = "all",
        shared: bool = False,
        prior: bool = True,
        normalise: bool = False,
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        if ratio != "dynamic" and (isinstance(ratio, str) or not 0 <= ratio <= 1):
            raise Refused(
                f"The ratio of 'dpk' is {ratio!r}, expected 'dynamic' or a number from 0 to 1; try 0.5."
            )
        if positions not in POSITIONS:
            raise Refused(
                f"The positions of 'dpk' are '{positions}', expected one of {', '.join(POSITIONS)}."
            )
        sizes = [depth, heads, *(size for size in (patch, width) if size is not None)]
        if not taps or min(sizes) < 1 or (width or 0) % heads:
            raise Refused(
                f"Method 'dpk' was given {len(taps)} taps, patch {patch}, width {width}, depth {depth} and "
                f"{heads} heads; expected at least one tap, numbers of 1 or more, and a width that is a "
                "multiple of the heads."
            )
        if not 0 <= decay < 1:
            raise Refused(f"The decay of 'dpk' is {decay}, expected a number in [0, 1); try 0.9.")
        self.taps, self.ratio, self.patch = tuple(taps), ratio, patch
        self.width, self.depth, self.heads = width, depth, heads
        self.positions, self.shared, self.prior = positions, shared, prior
        self.normalise, self.decay = normalise, decay

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_maps("dpk", self.taps, s, t)
        rows = len(s.at[self.taps[0]])
        if self.ratio == "dynamic" and rows < FEWEST_ROWS:
            raise Refused(
                f"Method 'dpk' tells its ratio from how alike the rows of a batch lie, and the batch has "
                f"{rows}, expected {FEWEST_ROWS} or more; make batches larger, or the ratio a number."
            )
        self.tellers = nn.ModuleList()
        for tap in self.taps:
            here = as_map(s.at[tap])
            if self.patch is not None and any(side % self.patch for side in here.shape[2:]):
                raise Refused(
                    f"Method 'dpk' cuts maps in patches of {self.patch}x{self.patch}, and tap '{tap}' shows "
                    f"{tuple(here.shape[2:])} in the student; choose a patch that divides both, or none."
                )
            self.tellers.append(
                Teller(here, as_map(t.at[tap]), self.patch, self.width, self.depth, self.heads, self.prior)
            )
        self.register_buffer("hsic", torch.zeros(len(self.taps), 3))  # 0: not yet known
        self.register_buffer("watched", torch.zeros(len(self.taps), 3))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        losses = []
        for place, (tap, teller) in enumerate(zip(self.taps, self.tellers, strict=True)):
            assert isinstance(teller, Teller)
            here = as_map(s.at[tap])
            if (found := tuple(here.shape[2:])) != teller.grid:
                raise Refused(
                    f"Tap '{tap}' of method 'dpk' shows a grid of {found}, and positions are "
                    f"learned for {teller.grid}; keep images of one size."
                )
            there = as_map(t.at[tap]).detach()
            if there.shape[2:] != here.shape[2:]:
                there = F.adaptive_avg_pool2d(there, teller.grid)
            ratio = self._ratio(place, here, there)
            given = places(self._draw(batch, tap, teller.tokens), ratio)
            here, there = teller.patches(here), teller.patches(there)
            target = F.layer_norm(there, there.shape[2:]) if self.normalise else there
            gap = gaps(teller(here, there, given), target, given)
            losses.append(gap[POSITIONS.index(self.positions)])
            with torch.no_grad():
                self.watched[place] = torch.stack([ratio, *gap[1:]])
        return torch.stack(losses).sum()

    def figures(self) -> dict[str, float]:
        """The ratio of each tap and, where there are such places, its gap at the given ones (masked) and at
        the student's (unmasked)."""
        found = {}
        for tap, teller, watched in zip(self.taps, self.tellers, self.watched.tolist(), strict=True):
            assert isinstance(teller, Teller)
            ratio, masked, unmasked = watched
            given = round(ratio * teller.tokens)
            found[f"ratio.{tap}"] = ratio
            found |= {f"masked.{tap}": masked} if given else {}
            found |= {f"unmasked.{tap}": unmasked} if given < teller.tokens else {}
        return found

    @torch.no_grad()
    def _ratio(
        self, place: int, s: Float[Tensor, "b c_s h w"], t: Float[Tensor, "b c_t h w"]
    ) -> Float[Tensor, ""]:
        """The share that is given; the dynamic one of what is known after this batch."""
        if not isinstance(self.ratio, str):
            return torch.full((), self.ratio, device=s.device)
        before = self.hsic[place].to(torch.promote_types(self.hsic.dtype, torch.float32))
        now = before.new_zeros(4)  # the fourth counts the processes with rows enough
        if len(s) >= FEWEST_ROWS:
            now = F.pad(hsic_terms(s.flatten(1), t.flatten(1)), (0, 1), value=1.0).to(now)
        now = across.total(now)
        mean = now[:3] / now[3].clamp(min=1)
        mean = torch.where(before.any(), torch.lerp(mean, before, self.decay), mean)
        mean = torch.where(now[3] > 0, mean, before)
        self.hsic[place] = mean
        return (1 - cka(mean)).clamp(0, 1)

    def _draw(self, batch: Batch, tap: str, tokens: int) -> Float[Tensor, "#b n"]:
        assert batch.index is not None
        index = across.gather(batch.index).amin()[None] if self.shared else batch.index
        return keyed(batch.lesson, index, f"given at {tap}", tokens)


def _patch(h: int, w: int) -> int:
    """Doubled until no side has more than 8 patches, or until one cannot be halved."""
    patch = 1
    while max(h, w) > MOST_PATCHES * patch and h % (2 * patch) == 0 and w % (2 * patch) == 0:
        patch *= 2
    return patch


def _learned(tokens: int, width: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(tokens, width))


def _blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, mlp_ratio=2.0) for _ in range(depth)), nn.LayerNorm(width))
