r"""Cross-Architecture Knowledge Distillation (Liu, Cao, Li, Hu, Ding, Li; ACCV 2022; arXiv:2207.05273).

A transformer teaches a convolutional network: two projectors take the student's map $h_S$ into the teacher's
attention and among its tokens, where both can be compared, and a discriminator $D$ sees to it that they stay
alike whatever was done to the images (`multi_view`):

$$L = L_{\mathrm{PCA}} + L_{\mathrm{GL}} + \lambda L_{\mathrm{MVG}}$$

*Partially cross attention.* Three 3x3 convolutions make queries, keys and values of $h_S$. In training, each
element of a $M_S \in \{Q_S, K_S, V_S\}$ is replaced by the teacher's with probability $p = \tfrac12$, which
makes $g(M_S)$. Head by head, and with means over elements:

$$A(Q, K, V) = \operatorname{softmax}\Big(\frac{Q K^\top}{\sqrt d}\Big) V, \qquad
  L_{\mathrm{PCA}} = \Big\lVert A_T - A\big(g(Q_S), g(K_S), g(V_S)\big) \Big\rVert^2
    + \Big\lVert \frac{V_T V_T^\top}{\sqrt d} - \frac{V_S V_S^\top}{\sqrt d} \Big\rVert^2$$

*Group-wise linear.* The tokens of a neighbourhood of 4x4 share a linear map to $h'_S$, as wide as the tokens
$h_T$ of the teacher's last layer; other neighbourhoods have other maps:

$$L_{\mathrm{GL}} = \lVert h_T - h'_S \rVert^2$$

*The discriminator* learns, a step before the student's, to tell $h_T$ from $h'_S$, and is to be deceived:

$$L_D = -\log D(h_T) - \log(1 - D(h'_S)), \qquad L_{\mathrm{MVG}} = -\log D(h'_S)$$

The student's map is brought to the teacher's grid of patches by adaptive average pooling. Class tokens are
left out, and the teacher's softmax is taken anew over its patches, so that $p = 1$ gives $A_T$ exactly. A
Swin attends within windows: what the student's map gives is cut into the same ones, and the bias and the mask
that a Swin adds to its scores are left out on both sides.

Neither paper nor code tells these, so they are ours: $\lambda = 0.1$, a dropout of 0.1 in front of the linear
maps, and the widths of $D$ (on the mean token, $d$ to $d/2$ to $d/4$ to 1, with leaky ReLUs).

Departures from the paper: its $L_{\mathrm{MVG}}$ is $\log(1 - D(h'_S))$, which teaches least where $D$ is
surest; `saturating = true` takes it. Both networks are shown the same view. (A student that is to see another
has a `view` of its own, which must not move anything: places are compared.)

`mode = "code"` computes what the authors' release does (yufanLIU/CrossArch_KD, `dist_train_cakd.py`):

- A linear map without bias from $c$ to $3c$ gives 16 heads, and nothing is crossed. Compared are means over
  heads, before any softmax: $0.2$ times the gap of $QK^\top / \sqrt d$, and $0.05$ times that of $VV^\top$,
  where the student's alone is divided by $\sqrt d$.
- $0.05 L_{\mathrm{GL}}$ without dropout; the gap of the logits; and that of the class token (the mean token,
  where there is none) to a linear map of the student's `pooled`.
- $D$, a PatchGAN, looks at the means over heads of $QK^\top / \sqrt d$, and learns from half the sum.

There all of this is times $\omega(e) = \min(\max(e - 25, 0) / 50, 0.2)$ in epoch $e$: a term's
`weight = 0.2, ramp = { epochs = 10, after = 26 }`. Its $\lambda$ is 1 (`adversary = 1`), and $D$ learns at a
hundredth of the student's rate (`optim."cakd.critic"`).

Departures from that release: there $D$ teaches the student nothing, and learns nothing from the teacher,
since both are detached; here, in both modes, both are heard, and a constant is left out of the student's
loss. It has a map for each neighbourhood of 14x14 and of 7x7 patches, and one for all of any other grid; here
each grid has its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import as_map

HEADS = ("heads", "num_heads", "num_attention_heads")
"""What ours, timm's and transformers' attention call their number of heads."""

CODE_HEADS = 16
FEWEST = 24
"""Patches of which the release's discriminator, which shrinks their scores eightfold and more, leaves any."""

Grid = tuple[int, int]
QKV = Float[Tensor, "3 r heads n d"]
"""Queries, keys and values, one on the other; r: rows, or their windows."""


def attention(qkv: QKV) -> Float[Tensor, "r heads n d"]:
    """What each token takes from the others."""
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v)


def alike(q: Float[Tensor, "r heads n d"], k: Float[Tensor, "r heads n d"]) -> Float[Tensor, "r heads n n"]:
    """Inner products between tokens, over the root of their length."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def crossed(s: QKV, t: QKV, draw: QKV, share: float) -> QKV:
    """The teacher's elements where `draw`, uniform in 0 to 1, is below `share`, else the student's."""
    return torch.where(draw < share, t, s)


def pca(s: QKV, t: QKV, mixed: QKV, values: float = 1.0) -> Float[Tensor, ""]:
    """How far the attention of `mixed`, and the likeness of the student's values, are from the teacher's."""
    return _gap(attention(mixed), attention(t)) + values * _gap(alike(s[2], s[2]), alike(t[2], t[2]))


def pca_of_the_code(
    s: Float[Tensor, "3 r heads_s n d_s"], t: Float[Tensor, "3 r heads_t n d_t"]
) -> Float[Tensor, ""]:
    """The same in the authors' release: scores, meaned over heads."""
    values = alike(t[2], t[2]) * math.sqrt(t.shape[-1])
    return 0.2 * _gap(scores(s), scores(t)) + 0.05 * _gap(alike(s[2], s[2]).mean(1), values.mean(1))


def scores(qkv: QKV) -> Float[Tensor, "r n n"]:
    """Where tokens look, before the softmax, meaned over heads."""
    return alike(qkv[0], qkv[1]).mean(1)


def told_apart(real: Float[Tensor, " r"], fake: Float[Tensor, " r"]) -> Float[Tensor, ""]:
    """What the discriminator lowers, from its logits: how surely it takes each network for the other."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


class GroupLinear(nn.Module):
    """A map to tokens, by a linear map for each neighbourhood of side x side places."""

    def __init__(self, inputs: int, outputs: int, grid: Grid, side: int = 4) -> None:
        super().__init__()
        self.grid, self.side = grid, side
        self.groups = (math.ceil(grid[0] / side), math.ceil(grid[1] / side))
        bound = 1 / math.sqrt(inputs)  # as nn.Linear begins
        count = self.groups[0] * self.groups[1]
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        (h, w), (down, across), side = self.grid, self.groups, self.side
        x = F.pad(x, (0, across * side - w, 0, down * side - h))
        # b c (down side) (across side) to (down across) (b side side) c, and back.
        x = x.unflatten(3, (across, side)).unflatten(2, (down, side)).permute(2, 4, 0, 3, 5, 1)
        x = torch.baddbmm(self.bias, x.flatten(2, 4).flatten(0, 1), self.weight)
        x = x.unflatten(1, (-1, side, side)).unflatten(0, (down, across)).permute(2, 0, 3, 1, 4, 5)
        return x.flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


class TokenCritic(nn.Module):
    """Three layers on the mean token (b n d): a logit for each row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        self.layers = nn.Sequential(
            nn.Linear(width, half),
            nn.LeakyReLU(0.2),
            nn.Linear(half, quarter),
            nn.LeakyReLU(0.2),
            nn.Linear(quarter, 1),
        )

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        return self.layers(x.mean(1))[:, 0]


class ScoreCritic(nn.Module):
    """A PatchGAN on scores (r n n), seen as images: a logit for each."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in ((8, 16, 2), (16, 32, 2), (32, 64, 1)):
            conv = nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 1, 4, 1, 1))

    def forward(self, x: Float[Tensor, "r n n"]) -> Float[Tensor, " r"]:
        return self.layers(x[:, None]).mean((1, 2, 3))


@dataclass(frozen=True)
class Layout:
    """How a teacher lays out its queries, keys and values, and a map laid out likewise.

    grid: of all its patches. heads: of its attention. window: the side of the square of patches that attend
    to each other; 0 when all do. shift: how far down and to the right the windows begin.
    """

    grid: Grid
    heads: int
    window: int = 0
    shift: Grid = (0, 0)

    def of_tokens(self, shown: Sequence[Float[Tensor, "r tokens _"]]) -> QKV:
        """Of one tensor (r n 3d), or of three; a class token, which comes first, is left out."""
        patches = self.window**2 or self.grid[0] * self.grid[1]
        return _split(torch.cat([x[:, -patches:] for x in shown], 2), self.heads)

    def of_map(self, x: Float[Tensor, "b c h w"], heads: int) -> QKV:
        side, (h, w) = self.window, self.grid
        if not side:
            return _split(x.flatten(2).mT, heads)
        x = x.roll((-self.shift[0], -self.shift[1]), (2, 3))
        x = x.unflatten(3, (w // side, side)).unflatten(2, (h // side, side)).permute(0, 2, 4, 3, 5, 1)
        return _split(x.flatten(3, 4).flatten(0, 2), heads)


class CAKD(Method):
    """A student's map, taken into a transformer's attention and into its tokens, before a discriminator.

    tap: of the student, a map, or tokens of a grid. tokens: of the teacher, those of its last layer (b n d).
    qkv: of the teacher, what its last attention is made of: one tap of queries, keys and values side by side
        (b n 3d), or three taps, in this order.
    mode: `paper`, or `code` for the losses of the authors' release. cross_prob, dropout: in training, in
        mode `paper`. values: there, the weight of their likeness, whose gap grows with the fourth power of a
        teacher's values and may drown the rest. group: side of a neighbourhood. adversary: lambda; at 0 there
        is no discriminator. saturating: the paper's form of its loss.
    heads: of the teacher's attention. None reads them off the teacher; where nothing there tells, they are
        64 wide, as a ViT's are, or one.
    """

    critic: nn.Module
    cosine: Tensor
    critic_right: Tensor

    card = Card(
        "arXiv:2207.05273",
        2022,
        ("feature",),
        taps=("stage3",),
        needs=frozenset({"index"}),
        per_sample=True,
    )

    def __init__(
        self,
        tap: str = "stage3",
        tokens: str = "stage3",
        qkv: str | Sequence[str] = "stage3_qkv",
        mode: str = "paper",
        cross_prob: float = 0.5,
        dropout: float = 0.1,
        values: float = 1.0,
        group: int = 4,
        adversary: float = 0.1,
        saturating: bool = False,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.tap, self.tokens, self.qkv = tap, tokens, (qkv,) if isinstance(qkv, str) else tuple(qkv)
        self.mode, self.cross_prob, self.dropout, self.group = mode, cross_prob, dropout, group
        self.values, self.adversary, self.saturating, self.heads = values, adversary, saturating, heads
        if mode not in ("paper", "code"):
            raise Refused(f"The mode of 'cakd' is '{mode}'; expected 'paper' or 'code'.")
        weighed = all(0 <= weight < math.inf for weight in (values, adversary))
        if not (0 <= cross_prob <= 1 and 0 <= dropout < 1 and weighed and group >= 1):
            raise Refused(
                f"Method 'cakd' was given cross_prob = {cross_prob}, dropout = {dropout}, values = {values}, "
                f"adversary = {adversary} and group = {group}; expected a share of 0 to 1, one below 1, two "
                "weights of 0 or more, and a side of 1 or more."
            )
        if len(self.qkv) not in (1, 3):
            raise Refused(
                f"Method 'cakd' was given {len(self.qkv)} taps as `qkv`; expected one that shows queries, "
                "keys and values side by side, or three that show one of them each."
            )

    def looks(self) -> tuple[str, ...]:
        return (self.tap, "pooled") if self.mode == "code" else (self.tap,)

    def teacher_looks(self) -> tuple[str, ...]:
        return (self.tokens, *self.qkv)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self._lay_out(s, t, batch)
        channels, width = self._map(s, self.grid).shape[1], self._teachers_tokens(t).shape[2]
        if self.mode == "paper":
            inner = sum(t.at[tap].shape[2] for tap in self.qkv)
            self.to_qkv = nn.Conv2d(channels, inner, 3, padding=1)  # three convolutions, side by side
        else:
            self._refuse_code(s, t, channels)
            self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
            self.to_class = nn.Linear(s.at["pooled"].shape[1], width)
        self.to_tokens = GroupLinear(channels, width, self.grid, self.group)
        if self.adversary:  # the last, so that without it the others begin as with it
            self.critic = TokenCritic(width) if self.mode == "paper" else ScoreCritic()
        for figure in ("cosine", "critic_right"):
            self.register_buffer(figure, torch.zeros(()))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        mine, theirs = self._queries(s), self._teachers_queries(t)
        here, there = self._tokens(s, batch), self._teachers_tokens(t)
        with torch.no_grad():
            self.cosine.copy_(F.cosine_similarity(here, there, dim=2).mean())
        if self.mode == "paper":
            mixed = self._mixed(mine, theirs, batch)
            loss = pca(mine, theirs, mixed, self.values) + _gap(here, there)
        else:
            token = t.at[self.tokens][:, 0] if self.class_token else there.mean(1)
            loss = pca_of_the_code(mine, theirs) + 0.05 * _gap(here, there)
            loss = loss + _gap(s.out, t.out) + _gap(self.to_class(s.at["pooled"]), token)
        if not self.adversary:
            return loss
        logits = self.critic(here if self.mode == "paper" else scores(mine))
        fooled = -F.softplus(logits) if self.saturating else F.softplus(-logits)
        return loss + self.adversary * fooled.mean()

    def rivals(self) -> dict[str, nn.Module]:
        return {"critic": self.critic} if self.adversary else {}

    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        with torch.no_grad():  # the projectors learn with the student
            if self.mode == "paper":
                fake, real = self._tokens(s, batch), self._teachers_tokens(t)
            else:
                fake, real = scores(self._queries(s)), scores(self._teachers_queries(t))
        fake, real = self.critic(fake), self.critic(real)
        with torch.no_grad():
            self.critic_right.copy_(torch.cat([real > 0, fake < 0]).float().mean())
        return told_apart(real, fake) * (1.0 if self.mode == "paper" else 0.5)

    def figures(self) -> dict[str, float]:
        """The cosine of the student's tokens to the teacher's, and how often the discriminator was right."""
        right = {"critic_right": float(self.critic_right)} if self.adversary else {}
        return {"cosine": float(self.cosine), **right}

    # --- what is compared ---

    def _map(self, s: Seen, grid: Grid) -> Float[Tensor, "b c h w"]:
        x = as_map(s.at[self.tap], self.own_grid)
        return x if x.shape[2:] == grid else F.adaptive_avg_pool2d(x, grid)

    def _queries(self, s: Seen) -> QKV:
        heads = self.layout.heads if self.mode == "paper" else CODE_HEADS
        return self.layout.of_map(self.to_qkv(self._map(s, self.layout.grid)), heads)

    def _teachers_queries(self, t: Seen) -> QKV:
        return self.layout.of_tokens([t.at[tap] for tap in self.qkv])

    def _mixed(self, s: QKV, t: QKV, batch: Batch) -> QKV:
        if not self.training:
            return s
        draw = keyed(batch.lesson, _index(batch), "cakd crossing", s.numel() // batch.rows)
        return crossed(s, t, draw.view(s.transpose(0, 1).shape).transpose(0, 1), self.cross_prob)

    def _tokens(self, s: Seen, batch: Batch) -> Float[Tensor, "b n d"]:
        x = self._map(s, self.grid)
        if self.training and self.mode == "paper" and self.dropout:
            draw = keyed(batch.lesson, _index(batch), "cakd dropout", x[0].numel())
            x = x * (draw.view(x.shape) >= self.dropout) / (1 - self.dropout)
        return self.to_tokens(x)

    def _teachers_tokens(self, t: Seen) -> Float[Tensor, "b n d"]:
        x = t.at[self.tokens]
        return x.flatten(1, 2) if self.channels_last else as_map(x, self.grid).flatten(2).mT

    # --- what fits ---

    def _lay_out(self, s: Seen, t: Seen, batch: Batch) -> None:
        """Where patches lie in what both show. Raises `Refused`."""
        image = batch.x.shape[-2:] if isinstance(batch.x, Tensor) and batch.x.ndim == 4 else (1, 1)
        here, there = s.at[self.tap], t.at[self.tokens]
        shown = [t.at[tap] for tap in self.qkv]
        width, odd = divmod(sum(x.shape[-1] for x in shown), 3)
        if odd or any(x.ndim != 3 or len(x) % batch.rows or x.shape != shown[0].shape for x in shown):
            why = "this teacher shows none: expected queries, keys and values (rows, tokens, 3 widths)"
            raise self._unfit(s, t, why)
        heads = self.heads or _told(t, self.qkv[0], HEADS) or (1 if width % 64 else width // 64)
        if not isinstance(heads, int) or heads < 1 or width % heads:
            why = f"{heads} heads do not share a width of {width}; say how many there are with `heads`"
            raise self._unfit(s, t, why)
        windows, patches = len(shown[0]) // batch.rows, shown[0].shape[1]
        whole = _grid((batch.rows, windows * patches, width), image)
        self.channels_last = there.ndim == 4 and there.shape[3] == width != there.shape[1]
        own = _grid(here.shape, image)
        last = _grid((there.shape[0], width, *there.shape[1:3]) if self.channels_last else there.shape, image)
        if whole is None or own is None or last is None:
            why = f"tokens here are no grid of an image of {image[0]}x{image[1]}; bring images that they tile"
            raise self._unfit(s, t, why)
        self.own_grid, self.grid = own, last
        self.class_token = there.ndim == 3 and there.shape[1] > last[0] * last[1]
        side, shift = 0, (0, 0)
        if windows > 1:
            side, found = math.isqrt(patches), _told(t, self.qkv[0], ("shift_size",)) or 0
            shift = (found, found) if isinstance(found, int) else tuple(found)
            tiled = side * side == patches and whole[0] // side * (whole[1] // side) == windows
            merged = (whole[0] // 2, whole[1] // 2)  # a stage of a Swin may end so
            if not tiled or last not in (whole, merged):
                why = f"its {windows} windows of {patches} patches do not tile {last[0]}x{last[1]} unpadded"
                raise self._unfit(s, t, why)
        self.layout = Layout(whole, heads, side, shift)

    def _refuse_code(self, s: Seen, t: Seen, channels: int) -> None:
        tokens = self.layout.window**2 or self.layout.grid[0] * self.layout.grid[1]
        if channels % CODE_HEADS:
            why = f"{CODE_HEADS} heads, which mode 'code' has, do not share {channels} channels"
            raise self._unfit(s, t, why)
        if self.adversary and tokens < FEWEST:
            why = f"the discriminator of mode 'code' needs {FEWEST} patches, and there are {tokens}"
            raise self._unfit(s, t, why)
        if s.out.shape != t.out.shape:
            why = f"mode 'code' compares logits, which are {tuple(s.out.shape)} and {tuple(t.out.shape)}"
            raise self._unfit(s, t, why)

    def _unfit(self, s: Seen, t: Seen, why: str) -> Refused:
        there = ", ".join(f"{tuple(t.at[tap].shape)} at '{tap}'" for tap in self.teacher_looks())
        return Refused(
            f"Method 'cakd' takes a student's map into a transformer's attention, and {why} (the student "
            f"shows {tuple(s.at[self.tap].shape)} at '{self.tap}', the teacher {there})."
        )


def _gap(s: Tensor, t: Tensor) -> Tensor:
    """The mean squared gap, in float32 at least."""
    exact = torch.promote_types(s.dtype, torch.float32)
    return F.mse_loss(s.to(exact), t.to(exact))


def _split(x: Tensor, heads: int) -> Tensor:
    """Rows of packed queries, keys and values (r n 3d), by head."""
    return x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _index(batch: Batch) -> Tensor:
    assert batch.index is not None  # the card says that it is needed
    return batch.index


def _grid(shape: Sequence[int], image: Sequence[int]) -> Grid | None:
    """Rows and columns of a map, or of tokens that are an image's patches, with or without a class token."""
    if len(shape) == 4:
        return shape[2], shape[3]
    (high, wide), tokens = image, shape[1] if len(shape) == 3 else 0
    for patches in (tokens, tokens - 1):
        h = round(math.sqrt(max(patches, 0) * high / wide))
        if h and patches % h == 0 and abs(h * wide - patches // h * high) < min(high, wide):
            return h, patches // h
    return None


def _told(t: Seen, tap: str, names: Sequence[str]) -> Any:
    """What the innermost module around a tap says of itself by one of these names."""
    if t.model is None:
        return None
    path = next((path for path, module in t.model.named_modules() if module is t.modules.get(tap)), "")
    while path:
        path = path.rpartition(".")[0]
        for name in names:
            found = getattr(t.model.get_submodule(path), name, None)
            if isinstance(found, int | tuple | list):
                return found
    return None
