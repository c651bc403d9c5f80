r"""Contrastive Representation Distillation (Tian, Krishnan, Isola; ICLR 2020; arXiv:1910.10699).

Shown a sample by one network, one should know it again among $K$ samples of other classes as the other
network saw them. Features are projected to 128 dimensions and length 1. For an anchor $a$ of one network,
with $v_i$ what a memory bank holds of sample $i$ from the other, $i^+$ the anchor's own sample and $i_k$ the
negatives:

$$h(a, v) = \frac{p}{p + K/n}, \quad p = \frac{e^{a \cdot v / \tau}}{Z}, \qquad
  L = \operatorname*{mean}_b \Big( -\log h(a, v_{i^+}) - \sum_{k=1}^K \log\big(1 - h(a, v_{i_k})\big) \Big)$$

summed over both directions: the student's anchors teach the student and its projection; the teacher's, whose
matches come from the student's bank, its projection alone. $n$ is the number of training samples, $Z$ makes
$p$ average $1/n$ over the pairs of the first batch and stays. After each step a row $v$ of a bank moves to
$0.5\, v + 0.5\, a$ and back to length 1.

It teaches features by how samples relate, so the surveys count it now among the ones, now among the others.

Weights: 0.8 is that of RepDistiller and mdistiller, on the pooled feature. The paper's best figures add KD
with weight 1: that is a recipe with two terms.

Departures from the paper, as in the official code (HobbitLong/RepDistiller, `crd/`), which is followed:
- The match comes from a bank too, as the other network saw the sample an epoch ago; banks begin as noise.
- $Z$, which is no part of the paper's $h$.

Departures from the official code:
- Negatives are drawn with replacement, as noise contrastive estimation has it, by (seed, epoch, sample).
  There they are distinct when there are enough of them. It is the same loss on average.
- Where there are no more samples than $K$, nothing is drawn: every negative counts, $K$ times in all. That is
  what the draws would give on average, it costs less, and weights keep their meaning on small data.
- A pair is negative unless it is *known* to share a class: an unlabelled sample is contrasted with every
  other sample, and is a negative for all (of another class, likely, and without knowing it). When no sample
  is labelled, this is the paper's variant without classes. Labels are those of the lesson; the batch's are
  not read.
- Scores are one matrix product with the whole bank and a gather of scalars, where a bank's vectors are
  gathered for each pair there: the same pairs, the same gradient. It has no second derivative.
- $\log h$ is a log-sigmoid; there $10^{-7}$ is added to $p + K/n$.
- With several processes all remember the rows of all, so banks stay equal.
- A sample shown more than once in a batch (rotations) is remembered by its mean.
- Only its mode `exact` (the match is the sample itself), not `relax` (any sample of the class).

A tapped tensor of more than two axes is flattened from axis 1.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch, Lesson
from limbeck.core.keyed import keyed
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.similarity import products, unit, weighted


def nce(
    scores: Float[Tensor, "b pairs"], times: Float[Tensor, "#b pairs"], log_noise: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    r"""The loss of one direction from $a \cdot v / \tau$, the match in column 0, and $\log (Z K / n)$.

    Pairs count `times`: the match once, the negatives of a row $K$ times in all.
    """
    odds = scores - log_noise  # log h / (1 - h)
    match = times[:, 0] * F.softplus(-odds[:, 0])  # -log h
    return (match + (times[:, 1:] * F.softplus(odds[:, 1:])).sum(1)).mean()


BLOCK = 2**17
"""Pairs that are compared at once on a CPU."""


class CRD(Method):
    """A projection and a memory bank for each network; contrast with samples of other classes."""

    card = Card(
        "arXiv:1910.10699",
        2020,
        ("feature", "relation"),
        taps=("pooled",),
        fidelity="code",
        needs=frozenset({"index"}),
        per_sample=False,  # micro-batches would contrast with what the ones before them left in the banks
        order_free=True,
        reads_out=False,
    )

    bank_s: Tensor
    bank_t: Tensor
    log_z: Tensor
    order: Tensor
    first: Tensor
    kin: Tensor

    def __init__(
        self,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        tap: str = "pooled",
    ) -> None:
        super().__init__()
        if negatives < 1 or width < 1 or not 0 < temperature < math.inf or not 0 <= momentum < 1:
            raise Refused(
                f"Method 'crd' has {negatives} negatives, width {width}, temperature {temperature} and "
                f"momentum {momentum}; expected negatives and width of at least 1, a temperature above 0 and "
                "a momentum in [0, 1)."
            )
        self.negatives, self.width = negatives, width
        self.temperature, self.momentum = temperature, momentum
        self.tap = tap

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        samples, labels = batch.lesson.samples, batch.lesson.labels
        assert batch.index is not None
        if batch.index.max() >= samples:
            raise Refused(
                f"Method 'crd' remembers every training sample, and the lesson has {samples} of them where "
                f"the batch shows number {int(batch.index.max())}; give the batch a lesson that knows how "
                "many there are."
            )
        order, first, kin = _kin(torch.full((samples,), IGNORE) if labels is None else labels.cpu())
        if int(kin.max()) == samples:
            raise Refused(
                f"Method 'crd' contrasts samples of different classes, and all {samples} of them are of one; "
                "give it samples of two classes or more."
            )
        self.project_s, self.project_t = (
            nn.Linear(seen.at[self.tap].flatten(1).shape[1], self.width) for seen in (s, t)
        )
        bound = math.sqrt(3 / self.width)  # of length 1, on average
        for bank in ("bank_s", "bank_t"):
            self.register_buffer(bank, torch.empty(samples, self.width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), -torch.inf))  # not yet known
        for name, value in {"order": order, "first": first, "kin": kin}.items():
            self.register_buffer(name, value, persistent=False)  # facts of the data

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here = unit(_projected(self.project_s, s.at[self.tap]))
        there = unit(_projected(self.project_t, t.at[self.tap]))
        assert batch.index is not None
        ways = ((here, self.bank_t, 0), (there, self.bank_s, 1))
        with torch.no_grad(), torch.autocast(here.device.type, enabled=False):
            dealt = self._deal(batch.index, batch.lesson, here.dtype)
            losses, grads = zip(*(self._one_way(*way, dealt) for way in ways), strict=True)
        self._remember(batch.index, here, there)
        # Banks move in place, so autograd cannot keep them. What is added is 0, and has the gradient.
        return sum(losses) + sum(
            ((anchor - anchor.detach()) * grad).sum() for (anchor, *_), grad in zip(ways, grads, strict=True)
        )

    def pairs(
        self, index: Int[Tensor, " b"], lesson: Lesson
    ) -> tuple[Int[Tensor, "b pairs"], Float[Tensor, "#b pairs"]]:
        """The samples that each row is compared with, its own first, and how many times each counts."""
        samples = len(self.order)
        first, kin = self.first[index, None], self.kin[index, None]
        others = samples - kin
        if self.negatives < samples:
            place = keyed(lesson, index, "negatives", self.negatives).mul_(others).long()
            place += torch.where(place >= first, kin, 0)  # kin are skipped
            times = torch.ones(1, self.negatives, device=index.device)
        else:
            place = torch.arange(samples, device=index.device).expand(len(index), -1)
            times = self.negatives / others * ((place < first) | (place >= first + kin))
        negatives = self.order.index_select(0, place.flatten()).view_as(place)
        return torch.cat([index[:, None], negatives], 1), F.pad(times, (1, 0), value=1.0)

    def _deal(
        self, index: Int[Tensor, " b"], lesson: Lesson, dtype: torch.dtype
    ) -> list[tuple[Int[Tensor, "_ pairs"], Float[Tensor, "_ pairs"]]]:
        """As `pairs`, a few rows after the other: on a CPU as many as its cache can hold. A pair is said by
        its place among the scores (n b) of all samples with all rows, flattened."""
        rows = max(BLOCK // min(self.negatives, len(self.order)), 1)
        dealt = []
        for first in range(0, len(index), rows if index.device.type == "cpu" else len(index)):
            pairs, times = self.pairs(some := index[first : first + rows], lesson)
            row = torch.arange(first, first + len(some), device=index.device)
            dealt.append((pairs.mul_(len(index)).add_(row[:, None]), times.to(dtype)))
        return dealt

    def _one_way(
        self,
        anchor: Float[Tensor, "b d"],
        bank: Float[Tensor, "n d"],
        way: int,
        dealt: Sequence[tuple[Int[Tensor, "_ pairs"], Float[Tensor, "_ pairs"]]],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b d"]]:
        """The loss of one network's anchors and its gradient in them; log Z is found if it is not yet
        known."""
        bank = bank.to(anchor.dtype)
        scores = products(bank, anchor / self.temperature)
        told = [scores.flatten().index_select(0, at.flatten()).view_as(at) for at, _ in dealt]
        if _unknown(self.log_z[way]):
            means = [(x + times.log()).logsumexp(1) for x, (_, times) in zip(told, dealt, strict=True)]
            row = across.gather(torch.cat(means)) - math.log(1 + self.negatives)
            found = row.logsumexp(0) + math.log(len(bank) / len(row))  # each pair as often as it counts
            self.log_z[way] = torch.where(self.log_z[way].isinf(), found, self.log_z[way])
        log_noise = self.log_z[way] + math.log(self.negatives / len(bank))
        losses, slopes = [], scores.zero_()  # their place is free now
        for x, (at, times) in zip(told, dealt, strict=True):
            losses.append(len(x) * nce(x, times, log_noise))
            slope = len(x) * _slope(x, times, log_noise)
            slopes.view(-1).scatter_add_(0, at.flatten(), slope.flatten())
        scale = 1 / (self.temperature * len(anchor))
        return torch.stack(losses).sum() / len(anchor), scale * weighted(bank, slopes)

    def _remember(self, index: Int[Tensor, " b"], s: Float[Tensor, "b d"], t: Float[Tensor, "b d"]) -> None:
        """Move the banks' rows of these samples, seen by all processes, towards what was seen."""
        with torch.no_grad(), torch.autocast(s.device.type, enabled=False):
            rows = across.gather(index)
            same = (rows[:, None] == rows).to(s.dtype)
            same = same / same.sum(1, keepdim=True)  # rows of one sample write the same, in whatever order
            for bank, seen in ((self.bank_s, s), (self.bank_t, t)):
                moved = torch.lerp(same @ across.gather(seen), bank[rows].to(seen.dtype), self.momentum)
                bank[rows] = unit(moved).to(bank.dtype)


def _unknown(log_z: Float[Tensor, ""]) -> bool:
    """Whether log Z may have to be found. Only on a CPU does it cost nothing to look."""
    return torch.compiler.is_compiling() or log_z.device.type != "cpu" or bool(log_z.isinf())


def _slope(
    scores: Float[Tensor, "b pairs"], times: Float[Tensor, "#b pairs"], log_noise: Float[Tensor, ""]
) -> Float[Tensor, "b pairs"]:
    r"""The gradient of `nce` in the scores: $h - 1$ for the match, $h$ for the others."""
    slope = times * torch.sigmoid(scores - log_noise)
    slope[:, 0] -= 1
    return slope / len(scores)


def _projected(project: nn.Linear, x: Tensor) -> Tensor:
    return project(x.flatten(1).to(project.weight.dtype))


def _kin(labels: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """All samples in an order where those of a class stand together; and for each, where its kin begin there
    and how many they are. Its kin are those of its class; of an unlabelled sample, itself."""
    order = labels.argsort(stable=True)
    ordered = labels[order].contiguous()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    begin, end = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    return order, torch.where(labels == IGNORE, place, begin), torch.where(labels == IGNORE, 1, end - begin)
