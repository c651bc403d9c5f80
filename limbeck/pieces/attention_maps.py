"""Where maps are strong, and an attention between the layers of two networks that weighs which of one's maps
should learn from which of the other's."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map


def energy(x: Float[Tensor, "b c h w"], power: float = 2.0) -> Float[Tensor, "b h w"]:
    """The sum over channels of |x|^power, in units of a row's largest; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    energy = (x.square() if power == 2 else x.abs() ** power).sum(1)  # square: half the work
    largest = energy.detach().amax((1, 2), keepdim=True)
    return energy / torch.where(largest > 0, largest, 1.0)


def attention(x: Float[Tensor, "b c h w"], power: float = 2.0) -> Float[Tensor, "b n"]:
    """Where a map is strong: a unit vector over positions for each row, in float32 at least."""
    return F.normalize(energy(x, power).flatten(1))


def attention_gaps(
    s: Sequence[Float[Tensor, "b _ _ _"]], t: Sequence[Float[Tensor, "b _ _ _"]]
) -> tuple[Float[Tensor, "b s t"], Float[Tensor, "b s t"]]:
    """The cosine, and the squared distance (0 to 2), of the attentions of every two maps of two networks.

    The student's energies are first brought to the teacher's grid by adaptive average pooling, which repeats
    cells where that grid is finer. A map of zeros attends nowhere: its cosines are 0.
    """
    energies = [energy(here).unsqueeze(1) for here in s]
    cosines: dict[int, Tensor] = {}
    gaps: dict[int, Tensor] = {}
    for h, w in dict.fromkeys((x.shape[2], x.shape[3]) for x in t):
        places = [place for place, x in enumerate(t) if x.shape[2:] == (h, w)]
        here = torch.stack([F.normalize(F.adaptive_avg_pool2d(e, (h, w)).flatten(1)) for e in energies], 1)
        there = torch.stack([attention(t[place]) for place in places], 1)
        with torch.autocast(here.device.type, enabled=False):
            cosine = here @ there.mT
        lengths = here.square().sum(2)[:, :, None] + there.square().sum(2)[:, None]
        gap = (lengths - 2 * cosine).clamp(min=0)  # rounding may pull it below, and its gradient is 0 there
        for column, place in enumerate(places):
            cosines[place], gaps[place] = cosine[:, :, column], gap[:, :, column]
    every = range(len(t))
    return torch.stack([cosines[n] for n in every], 2), torch.stack([gaps[n] for n in every], 2)


class LayerVectors(nn.Module):
    """A vector for each map of a network and row: its mean over positions, a linear layer, BatchNorm.

    `position` has one for each map whatever the row shows, Xavier-normal at first. The linear layers have no
    bias, which the BatchNorm would cancel.
    """

    def __init__(self, maps: Sequence[Float[Tensor, "b _ _ _"]], width: int) -> None:
        super().__init__()
        self.embed = nn.ModuleList(
            nn.Sequential(nn.Linear(x.shape[1], width, bias=False), nn.BatchNorm1d(width)) for x in maps
        )
        self.position = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(maps), width)))

    def forward(self, maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b layers d"]:
        return torch.stack([e(x.mean((2, 3))) for e, x in zip(self.embed, maps, strict=True)], 1)


class AttentionWatch(nn.Module):
    """What an attention over pairs of layers did in the last batch of training, for `Method.figures`."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.share: Tensor
        self.chosen: Tensor
        self.entropy: Tensor
        self.register_buffer("share", torch.zeros(queries, keys))
        self.register_buffer("chosen", torch.zeros(keys))
        self.register_buffer("entropy", torch.zeros(()))

    @torch.no_grad()
    def forward(self, alpha: Float[Tensor, "b q k"]) -> None:
        if self.training:
            self.share.copy_(alpha.mean(0))
            self.chosen.copy_((alpha > 0).to(alpha.dtype).mean((0, 1)))
            self.entropy.copy_(torch.special.entr(alpha).sum(2).mean())

    def figures(self) -> dict[str, float]:
        """`entropy`: of a query's weights, in nats, mean over rows and queries. `top_pair`: how much of all
        weight is on the pair that has most."""
        return {"entropy": float(self.entropy), "top_pair": float(self.share.max()) / len(self.share)}


def expect_layers(method: str, taps: Sequence[str], s: Seen, teacher_taps: Sequence[str], t: Seen) -> None:
    """Refuse a tap that shows neither a map nor tokens that make one, or but one position; names what both
    networks show."""
    for who, names, seen in (("student", taps, s), ("teacher", teacher_taps, t)):
        for tap in names:
            if _positions(seen.at[tap]) < 2:
                raise Refused(
                    f"Method '{method}' compares where maps (rows, channels, height, width), or tokens of a "
                    f"square grid, are strong, and the {who} shows {_shapes([tap], seen)}, expected a grid "
                    f"of 2 positions or more; tap other layers (the student shows {_shapes(taps, s)}, the "
                    f"teacher {_shapes(teacher_taps, t)})."
                )


def _positions(x: Tensor) -> int:
    try:
        return as_map(x)[0, 0].numel()
    except Refused:
        return 0


def _shapes(taps: Sequence[str], seen: Seen) -> str:
    return ", ".join(f"'{tap}' {tuple(seen.at[tap].shape)}" for tap in taps)


def expect_rows(method: str, rows: int) -> None:
    """Refuse a batch to learn from that BatchNorm on one vector a row cannot use."""
    if rows < 2:
        raise Refused(
            f"Method '{method}' normalises over the rows of a batch, and this one to learn from has {rows}, "
            "expected at least 2; take a larger `batch`, or leave the last rows out."
        )


def similarity(
    products: Float[Tensor, "b q k"], queries: Float[Tensor, "q d"], keys: Float[Tensor, "k d"]
) -> Float[Tensor, "b q k"]:
    """How alike layers are: the inner products of their vectors, and of their positions, scaled."""
    return (products + queries @ keys.T) / math.sqrt(queries.shape[1])
