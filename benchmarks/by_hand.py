"""The same training steps as a competent person writes them without limbeck, to time ours against.

One loop for a student under a teacher, a criterion for each method, and loops of their own for two peers,
for cross-architecture KD and its rival, and for four turns with branches. Nothing of limbeck is imported; the
networks are its ResNets, looked into by a forward that returns what is wanted, and its vision transformer.
Formulas are those of the papers or of their official code, in plain autograd. Where that is wasteful in a way
that one sees (CRD gathers a gigabyte a step) it is the better way: to beat a slow loop proves nothing.
`GatheredCRD` is the official way, to be measured by itself.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, y, index) → what the loss was, of all who learn, detached; they have learned."""
Looks = Mapping[str, Tensor]
Net = Any
"""A ResNet of limbeck.models."""


def under_teacher(student: Net, teacher: Net, criterion: "Criterion", weight: float) -> Step:
    """Cross-entropy, and the criterion times its weight."""
    student.train()
    teacher.eval()
    optimiser = sgd([*student.parameters(), *criterion.parameters()])

    def step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        s = look(student, x, criterion.wants)
        with torch.no_grad():
            t = look(teacher, x, criterion.wants)
        loss = F.cross_entropy(s["logits"], y) + weight * criterion({**s, "labels": y}, t, index)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        criterion.after_step()
        return loss.detach()

    return step


def alone(student: Net) -> Step:
    """Cross-entropy, and no teacher."""
    optimiser = sgd(student.train().parameters())

    def step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        loss = F.cross_entropy(student(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def mutual(one: Net, other: Net) -> Step:
    """Two peers (Zhang et al. 2018): both answer, then each learns from labels and from the other."""
    nets = one.train(), other.train()
    optimisers = [sgd(net.parameters()) for net in nets]

    def step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        answers = [net(x) for net in nets]
        losses = [
            F.cross_entropy(mine, y)
            + F.kl_div(mine.log_softmax(1), theirs.detach().softmax(1), reduction="batchmean")
            for mine, theirs in zip(answers, reversed(answers), strict=True)
        ]
        for loss, optimiser in zip(losses, optimisers, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return torch.stack(losses).detach().sum()

    return step


def across(student: Net, teacher: Net, between: "Across") -> Step:
    """CAKD (Liu et al. 2022). Its discriminator learns first; what is returned is the sum of both losses. The
    teacher is a vision transformer of limbeck.models without a class token."""
    student.train()
    teacher.eval()
    projectors = (*between.to_qkv.parameters(), *between.to_tokens.parameters())
    optimiser, rival = sgd([*student.parameters(), *projectors]), sgd(between.critic.parameters())
    caught: dict[str, Tensor] = {}
    last = teacher.stages[-1]
    last.register_forward_hook(lambda module, given, shown: caught.update(tokens=shown))
    last[-1].attention.qkv.register_forward_hook(lambda module, given, shown: caught.update(qkv=shown))

    def step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        s = look(student, x, ("stage3",))
        with torch.no_grad():
            teacher(x)
        there, shown = caught["tokens"], s["stage3"]
        crossing, kept = between.draw(shown)
        here = between.to_tokens((shown * kept / (1 - between.dropout)).flatten(2).mT)

        told = F.softplus(-between.judge(there)).mean() + F.softplus(between.judge(here.detach())).mean()
        rival.zero_grad()
        told.backward()
        rival.step()

        loss = F.cross_entropy(s["logits"], y) + between.attend(shown, caught["qkv"], crossing)
        loss = loss + F.mse_loss(here, there) + 0.1 * F.softplus(-between.judge(here)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return (told + loss).detach()

    return step


class Across(nn.Module):
    """CAKD's projectors and its discriminator, where the student's last map has as many places as the teacher
    has patches."""

    share, dropout = 0.5, 0.1
    dealt: tuple[Tensor, Tensor] | None = None
    """Draws to take once, instead of drawing: which elements are crossed, and which of the map are kept."""

    def __init__(self, student: Net, teacher: Net) -> None:
        super().__init__()
        channels, width = widths(student)["stage3"], teacher.head.in_features
        self.heads = teacher.stages[-1][-1].attention.heads
        self.to_qkv = nn.Conv2d(channels, 3 * width, 3, padding=1)
        self.to_tokens = Neighbourhoods(channels, width, teacher.grid[0])
        self.critic = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.LeakyReLU(0.2),
            nn.Linear(width // 2, width // 4),
            nn.LeakyReLU(0.2),
            nn.Linear(width // 4, 1),
        )

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.dealt is not None:
            dealt, self.dealt = self.dealt, None
            return dealt
        tokens, width = x[0, 0].numel(), self.to_qkv.out_channels // 3
        crossing = torch.rand(3, len(x), self.heads, tokens, width // self.heads, dtype=x.dtype)
        return crossing < self.share, torch.rand_like(x) >= self.dropout

    def attend(self, x: Tensor, qkv: Tensor, crossing: Tensor) -> Tensor:
        mine, theirs = self.split(self.to_qkv(x).flatten(2).mT), self.split(qkv)
        mixed = torch.where(crossing, theirs, mine)
        here, there = (F.scaled_dot_product_attention(*each) for each in (mixed, theirs))
        alike, told = (v @ v.mT / math.sqrt(v.shape[-1]) for v in (mine[2], theirs[2]))
        return F.mse_loss(here, there) + F.mse_loss(alike, told)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def judge(self, tokens: Tensor) -> Tensor:
        return self.critic(tokens.mean(1))


class Neighbourhoods(nn.Module):
    """A linear map for each square of 4x4 places."""

    def __init__(self, inputs: int, outputs: int, grid: int) -> None:
        super().__init__()
        side, count = torch.arange(grid) // 4, math.ceil(grid / 4)
        square = (side[:, None] * count + side).flatten()
        self.places = [(square == n).nonzero()[:, 0] for n in range(count**2)]
        self.back = torch.cat(self.places).argsort()
        self.weight = nn.Parameter(torch.randn(count**2, inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(count**2, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.places, self.weight, self.bias, strict=True)
        return torch.cat([x[:, places] @ weight + bias for places, weight, bias in parts], 1)[:, self.back]


def hierarchy(student: Net, teacher: Net, ours: "Branches", theirs: "Branches") -> Step:
    """HSSAKD (Yang et al. 2021): four turns of every image, and at each stage a branch for class and turn."""
    student.train()
    ours.train()
    teacher.eval()
    theirs.eval()
    optimiser = sgd([*student.parameters(), *ours.parameters()])
    stages = ("stage1", "stage2", "stage3")

    def apart(s: Tensor, t: Tensor) -> Tensor:
        soft = F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean")
        return 9 * soft

    def step(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        x = torch.stack([torch.rot90(x, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
        s = look(student, x, stages)
        mine = ours(s)
        with torch.no_grad():
            t = look(teacher, x, stages)
            told = theirs(t)
        loss = F.cross_entropy(s["logits"][::4], y) + apart(s["logits"], t["logits"])
        loss = loss + sum(apart(a, b) for a, b in zip(mine, told, strict=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


class Branches(nn.Module):
    """From each stage's map, layers like those that follow, and a head for class and turn."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.tails = nn.ModuleList(net.tail(i) for i in range(3))
        self.heads = nn.ModuleList(nn.Linear(net.fc.in_features, 4 * net.fc.out_features) for _ in range(3))

    def forward(self, seen: Looks) -> list[Tensor]:
        parts = zip(self.tails, self.heads, ("stage1", "stage2", "stage3"), strict=True)
        return [head(tail(seen[stage]).mean((2, 3))) for tail, head, stage in parts]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Slow enough that networks which are only timed stay finite."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def look(net: Net, x: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
    """A ResNet's forward that returns its logits and what is wanted of stage1, stage2, stage3 and pooled."""
    if not wanted:
        return {"logits": net(x)}
    seen = {}
    x = net.relu(net.bn1(net.conv1(x)))
    for name, layer in (("stage1", net.layer1), ("stage2", net.layer2), ("stage3", net.layer3)):
        x = layer(x)
        if name in wanted:
            seen[name] = x
    x = x.mean((2, 3))
    if "pooled" in wanted:
        seen["pooled"] = x
    return {"logits": net.fc(x), **seen}


def widths(net: Net) -> dict[str, int]:
    stages = {f"stage{n}": layer[-1].bn2.num_features for n, layer in enumerate(net.stages, start=1)}
    return {**stages, "pooled": net.fc.in_features}


class Criterion(nn.Module):
    """A loss on what a student and a teacher show, with whatever it trains or remembers."""

    wants: tuple[str, ...] = ()

    def after_step(self) -> None:
        pass


class KD(Criterion):
    temperature = 4.0

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        mine = F.log_softmax(s["logits"] / self.temperature, dim=1)
        theirs = F.softmax(t["logits"] / self.temperature, dim=1)
        return F.kl_div(mine, theirs, reduction="batchmean") * self.temperature**2


class DKD(Criterion):
    """The labelled class is taken from among the others by a logit that is 1,000 lower, as in mdistiller."""

    alpha, beta, temperature = 1.0, 8.0, 4.0

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        own = F.one_hot(s["labels"], s["logits"].shape[1]).to(s["logits"].dtype)
        here, there = s["logits"] / self.temperature, t["logits"] / self.temperature
        mine, theirs = (self.label_or_not(x.softmax(1), own) for x in (here, there))
        target = F.kl_div(mine.log(), theirs, reduction="batchmean")
        others = F.kl_div(
            (here - 1000 * own).log_softmax(1), (there - 1000 * own).softmax(1), reduction="batchmean"
        )
        return (self.alpha * target + self.beta * others) * self.temperature**2

    @staticmethod
    def label_or_not(p: Tensor, own: Tensor) -> Tensor:
        return torch.stack([(p * own).sum(1), (p * (1 - own)).sum(1)], dim=1)


class FitNet(Criterion):
    def __init__(self, student: Net, teacher: Net, stage: str = "stage2") -> None:
        super().__init__()
        self.wants = (stage,)
        self.project = nn.Conv2d(widths(student)[stage], widths(teacher)[stage], 1)

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        (stage,) = self.wants
        return 0.5 * F.mse_loss(self.project(s[stage]), t[stage])


class AT(Criterion):
    wants = ("stage1", "stage2", "stage3")

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        gaps = [F.mse_loss(self.attention(s[name]), self.attention(t[name])) for name in self.wants]
        return torch.stack(gaps).sum()

    @staticmethod
    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))


class RKD(Criterion):
    wants = ("pooled",)

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        here = s["pooled"]
        with torch.no_grad():
            distances, angles = self.distances(t["pooled"]), self.angles(t["pooled"])
        return 25 * F.smooth_l1_loss(self.distances(here), distances) + 50 * F.smooth_l1_loss(
            self.angles(here), angles
        )

    @staticmethod
    def distances(x: Tensor) -> Tensor:
        square = x.pow(2).sum(1)
        distance = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        distance = distance * (1 - torch.eye(len(x), dtype=x.dtype))
        return distance / distance[distance > 0].mean()

    @staticmethod
    def angles(x: Tensor) -> Tensor:
        arms = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(arms, arms.mT)


class CRD(Criterion):
    """`labels` of all training samples say which of them are negatives."""

    wants = ("pooled",)
    width, temperature, momentum = 128, 0.07, 0.5

    bank_s: Tensor
    bank_t: Tensor
    log_z: Tensor
    dealt: Tensor | None = None
    """Negatives to take once, instead of drawing."""

    def __init__(self, student: Net, teacher: Net, labels: Tensor, negatives: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / self.width)
        self.register_buffer("bank_s", torch.empty(len(labels), self.width).uniform_(-bound, bound))
        self.register_buffer("bank_t", torch.empty(len(labels), self.width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), -torch.inf))
        self.project_s = nn.Linear(widths(student)["pooled"], self.width)
        self.project_t = nn.Linear(widths(teacher)["pooled"], self.width)
        self.negatives, self.labels = negatives, labels
        self.by_class = labels.argsort(stable=True)
        self.many = labels.bincount()
        self.first = self.many.cumsum(0) - self.many

    def draw(self, index: Tensor) -> Tensor:
        """Samples of other classes for each row, with replacement."""
        own = self.labels[index]
        first, many = self.first[own, None], self.many[own, None]
        place = (torch.rand(len(index), self.negatives) * (len(self.labels) - many)).long()
        return self.by_class[place + many * (place >= first)]

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        here = F.normalize(self.project_s(s["pooled"]))
        there = F.normalize(self.project_t(t["pooled"]))
        negatives, self.dealt = self.draw(index) if self.dealt is None else self.dealt, None
        pairs = torch.cat([index[:, None], negatives], dim=1)
        self.shown = index, here.detach(), there.detach()
        return self.contrast(here, self.bank_t, pairs, 0) + self.contrast(there, self.bank_s, pairs, 1)

    def contrast(self, anchor: Tensor, bank: Tensor, pairs: Tensor, way: int) -> Tensor:
        scores = self.alike(anchor, bank, pairs) / self.temperature
        if self.log_z[way].isinf():  # the first batch fixes it
            mean = scores.detach().flatten().logsumexp(0) - math.log(scores.numel())
            self.log_z[way] = mean + math.log(len(bank))
        odds = scores - self.log_z[way] - math.log(self.negatives / len(bank))
        return F.softplus(-odds[:, 0]).mean() + F.softplus(odds[:, 1:]).sum(1).mean()

    def alike(self, anchor: Tensor, bank: Tensor, pairs: Tensor) -> Tensor:
        return (anchor @ bank.T).gather(1, pairs)

    @torch.no_grad()
    def after_step(self) -> None:
        index, *shown = self.shown
        del self.shown
        for bank, seen in zip((self.bank_s, self.bank_t), shown, strict=True):
            bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * seen)


class GatheredCRD(CRD):
    """As in RepDistiller: a vector of the bank for each pair."""

    def alike(self, anchor: Tensor, bank: Tensor, pairs: Tensor) -> Tensor:
        vectors = bank.index_select(0, pairs.flatten()).view(*pairs.shape, -1)
        return torch.bmm(vectors, anchor[:, :, None]).squeeze(2)


class ReviewKD(Criterion):
    wants = ("stage1", "stage2", "stage3", "pooled")

    def __init__(self, student: Net, teacher: Net) -> None:
        super().__init__()
        s, t = widths(student), widths(teacher)
        deepest_first = self.wants[::-1]
        self.fusions = nn.ModuleList(
            Fusion(s[name], min(512, s["pooled"]), t[name], fuse=name != "pooled") for name in deepest_first
        )

    def forward(self, s: Looks, t: Looks, index: Tensor) -> Tensor:
        losses, above = [], None
        for name, fusion in zip(self.wants[::-1], self.fusions, strict=True):
            here, there = (x[name] if name != "pooled" else x[name][:, :, None, None] for x in (s, t))
            given, above = fusion(here, above, there.shape[-1])
            losses.append(self.hcl(given, there))
        return torch.stack(losses).sum()

    @staticmethod
    def hcl(s: Tensor, t: Tensor) -> Tensor:
        loss, weight, weights = F.mse_loss(s, t), 1.0, 1.0
        for level in (4, 2, 1):
            if level < s.shape[-1]:
                weight /= 2
                weights += weight
                here, there = F.adaptive_avg_pool2d(s, level), F.adaptive_avg_pool2d(t, level)
                loss = loss + weight * F.mse_loss(here, there)
        return loss / weights


class Fusion(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = nn.Conv2d(2 * width, 2, 1) if fuse else None
        self.give = nn.Sequential(
            nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor, above: Tensor | None, grid: int) -> tuple[Tensor, Tensor]:
        x = self.own(x)
        if self.attend is not None and above is not None:
            above = F.interpolate(above, x.shape[-2:], mode="nearest")
            share = self.attend(torch.cat([x, above], dim=1)).sigmoid()
            x = x * share[:, :1] + above * share[:, 1:]
        if x.shape[-1] != grid:
            x = F.interpolate(x, (grid, grid), mode="nearest")
        return self.give(x), x
