r"""A Comprehensive Overhaul of Feature Distillation (Heo et al.; ICCV 2019; arXiv:1904.01866).

Layers are compared in front of their ReLU. Where the teacher is above 0 the student should be the same.
Elsewhere the ReLU cuts, so the student need only be as low as the teacher or as a margin $m < 0$, whichever
is higher:

$$\sigma_m(t) = \max(t, m), \qquad
  d(s, t) = \sum_i \begin{cases} 0 & s_i \le t_i \le 0 \\ (s_i - t_i)^2 & \text{otherwise,} \end{cases} \qquad
  L = \alpha \sum_{l=1}^{n} 2^{l-n} \operatorname*{mean}_b d\big(\mathrm{BN}(W_l s_l), \sigma_m(t_l)\big)$$

The margin of a channel is what the teacher shows on average where it is below 0, taken from the BatchNorm
in front of the ReLU, whose channels have mean $\beta$ and deviation $\lvert\gamma\rvert$:

$$m = \operatorname{E}\big[x \mid x < 0,\ x \sim \mathcal N(\beta, \gamma^2)\big]
    = \beta - \lvert\gamma\rvert \frac{\varphi(\beta/\gamma)}{\Phi(-\beta/\lvert\gamma\rvert)}$$

A tap shows what a ReLU is about to cut, `stage1_pre` in the tables of our models. Its BatchNorm is the
tapped module itself, or the only one in it. A sum (the last block of a residual stage) has none of its own;
then the teacher's table says which it is (`stage1_pre_norm`), or the knob `norms` does. The official code
takes the residual branch's last. Margins are read once; those of a mean teacher stay as they were at the
start.

Weights: the official code sums over channels and positions, and so do we; where channels double as the grid
halves, $2^{l-n}$ makes all layers equal per element. Its $\alpha$ is 1e-3 on CIFAR-100, as is mdistiller's,
and 1e-4 on ImageNet. It is the knob `scale`, so a term's weight of 1 is theirs.

Departures from the paper:
- Its teacher, and those of both codes, normalise by the batch's statistics, which was a little better for
  it (Table 8) and moves the running ones. Here a teacher is in eval and nothing of it moves.
- From the official code: $m = -3 \lvert\gamma\rvert$ in a channel of which less than 0.001 is below 0.

Departures from the official code (clovaai/overhaul-distillation):
- Where grids differ the teacher's map is averaged over the student's cells, as in mdistiller; there they
  never do.
- A student's tokens are compared as the map that they make; a teacher's come with no BatchNorm for margins.
- A channel whose $\gamma$ is 0 has the margin $\min(\beta, 0)$; there it is a division by 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map, expect_maps, shown

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def margins(beta: Float[Tensor, " c"], gamma: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    r"""What channels $\mathcal N(\beta, \gamma^2)$ are on average where they are below 0."""
    exact = torch.promote_types(beta.dtype, torch.float32)
    beta, sigma = beta.to(exact), gamma.to(exact).abs()
    z = beta / sigma
    below = torch.special.ndtr(-z)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return torch.where(below > 0.001, beta - sigma * density / below, -3 * sigma)


def partial_l2(
    s: Float[Tensor, "b c h w"], t: Float[Tensor, "b c h w"], margin: Float[Tensor, " c"]
) -> Float[Tensor, ""]:
    r"""$d(s, \sigma_m(t))$, summed over a row and averaged over rows."""
    exact = torch.promote_types(s.dtype, torch.float32)
    s, t = s.to(exact), t.to(exact).maximum(margin.to(exact)[:, None, None])
    asked = (s > t) | (t > 0)
    return (F.mse_loss(s, t, reduction="none") * asked).sum() / len(s)


class Connector(nn.Module):
    """Lifts a layer of the student to the teacher's width, and knows the teacher's margins."""

    margin: Tensor

    def __init__(self, inputs: int, margin: Float[Tensor, " c"]) -> None:
        super().__init__()
        self.project = nn.Conv2d(inputs, len(margin), 1, bias=False)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_out")
        self.norm = nn.BatchNorm2d(len(margin))
        self.register_buffer("margin", margin)

    def forward(self, s: Float[Tensor, "b c h w"], t: Float[Tensor, "b k h2 w2"]) -> Float[Tensor, ""]:
        s = self.norm(self.project(s))
        if t.shape[-2:] != s.shape[-2:]:
            t = F.adaptive_avg_pool2d(t, (s.shape[2], s.shape[3]))
        return partial_l2(s, t, self.margin)


class OFD(Method):
    """What the teacher's ReLUs let through, matched in front of them.

    taps: from shallow to deep, each in front of a ReLU. scale: the sum over layers is times this. norms: the
        teacher's BatchNorm before each ReLU, by path or by name in its table; empty where the taps tell.
    """

    card = Card(
        "arXiv:1904.01866",
        2019,
        ("feature",),
        taps=("stage1_pre", "stage2_pre", "stage3_pre"),
        fidelity="code",
        needs=frozenset({"teacher_model"}),
        per_sample=True,
        reads_out=False,
    )

    def __init__(
        self,
        taps: tuple[str, ...] = ("stage1_pre", "stage2_pre", "stage3_pre"),
        scale: float = 1e-3,
        norms: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        if not taps or (norms and len(norms) != len(taps)):
            raise Refused(
                f"Method 'ofd' was given {len(taps)} taps and {len(norms)} norms; expected at least one tap, "
                "and a norm for each or none at all."
            )
        self.taps, self.scale, self.norms = tuple(taps), scale, tuple(norms)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_maps("ofd", self.taps, s, t)
        self.connectors = nn.ModuleList()
        for place, tap in enumerate(self.taps):
            if not (t.at[tap] < 0).any():
                raise Refused(
                    f"Method 'ofd' compares layers in front of their ReLU, and {shown(tap, s, t)}, where "
                    "nothing is below 0; tap what the ReLU is given, often the BatchNorm before it."
                )
            norm = _norm_before(s, t, tap, self.norms[place] if self.norms else "")
            self.connectors.append(Connector(as_map(s.at[tap]).shape[1], _margins_of(norm)))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        last = len(self.taps) - 1
        losses = [
            connector(as_map(s.at[tap]), as_map(t.at[tap])) / 2 ** (last - place)
            for place, (tap, connector) in enumerate(zip(self.taps, self.connectors, strict=True))
        ]
        return self.scale * torch.stack(losses).sum()


def _norm_before(s: Seen, t: Seen, tap: str, name: str) -> Norm:
    """The teacher's BatchNorm whose output a ReLU cuts: the one of that name, or the only one in the tap."""
    assert t.model is not None
    table = getattr(t.model, "TAPS", {})
    name = name or (f"{tap}_norm" if f"{tap}_norm" in table else "")
    module = t.model.get_submodule(table.get(name, name)) if name else t.modules[tap]
    width = as_map(t.at[tap]).shape[1]
    norms = [m for m in module.modules() if isinstance(m, Norm) and m.num_features == width]
    if len(norms) != 1:
        raise Refused(
            f"Method 'ofd' takes margins from the BatchNorm in front of a ReLU, and '{name or tap}' of the "
            f"teacher is a {type(module).__name__} with {len(norms)} BatchNorms of {width} channels, "
            f"expected one ({shown(tap, s, t)}); tap it, or name it in `norms`."
        )
    return norms[0]


def _margins_of(norm: Norm) -> Float[Tensor, " c"]:
    if not norm.affine:
        return margins(torch.zeros(norm.num_features), torch.ones(norm.num_features))
    return margins(norm.bias.detach(), norm.weight.detach())
