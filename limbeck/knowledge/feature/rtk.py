r"""RTK, Representative Teacher Keys (Yang, Kao, Huang; 2022; arXiv:2206.12788). A reconstruction.

Certain, from its abstract: it teaches feature maps of a frozen teacher by an attention; it minds how
*similar* a map of the student and one of the teacher are, which it says that others do not; and it *filters
out* what of the teacher is useless. There is no code, and we had no full text. Inferred: everything below.
"The state-of-the-art attention-based KD method" that it improves is most likely AFD (`afd`), so this is AFD
with the teacher's maps as keys, and a selection among them. Departures from the paper cannot be told, only
expected: do not take its numbers for the paper's.

A layer $s$ of the student asks all layers of the teacher, for each row anew. $u$ are the maps' means over
positions, a linear layer and a BatchNorm, $p$ learned positions, $q$ the energy of a map's positions as a
unit vector (as in `at`), $q_{s \to t}$ the student's on the teacher's grid, and $R_s$ the
$r = \max(1, \operatorname{round}(\rho T))$ of the $T$ keys that are most similar; no other key is heard:

$$\sigma_{s,t} = \frac{\langle u_s, u_t \rangle + \langle p_s, p_t \rangle}{\sqrt d}, \qquad
  \alpha_{s,t} = \operatorname*{softmax}_{t \in R_s} \sigma_{s,t}, \qquad
  L = \frac1S \sum_s \operatorname*{mean}_b \sum_{t \in R_s} \alpha_{s,t} \lVert q_{s \to t} - q_t \rVert^2$$

The guesses can be exchanged:
- `query_side = "teacher"`: as in AFD the teacher's layers ask, and the student's are selected and weighed.
- `similarity = "cosine_map"`: $\sigma = \langle q_{s \to t}, q_t \rangle$, which takes "similarity of feature
  maps" at its word; nothing learns but the student.
- `selection`: `topk`; `threshold` keeps the keys whose weight among all is at least `threshold` times an even
  share; `stage_medoid` keeps, of the teacher's layers on one grid, the one whose $q$ is most like the
  others', the deeper of equals; `none` keeps all.

Weights: start at 1 to 5 and choose on the validation split, beside 0.9 of KD at temperature 4 and the labels.
AFD's 200 is for means over positions. Here the distance is a sum, 0 to 2 on any grid: a mean is at most
$2/n$, and weights over the *teacher's* layers that learn from it would run to the finest grid, whatever it
shows. (AFD's are over the student's layers, for each of the teacher's.)

What to watch for (the tests show each of these):
- What filters is which maps are near, not which are useful. By their cosine, maps of another image, or of a
  few spots drawn at random, are selected less often than by chance; one that is equally strong everywhere, or
  whose grid is coarse, is near to all and passes. So the keys are fairest where their grids are alike.
- A learned similarity knows the maps only by the loss that it weighs, and runs to the pairs that are easiest,
  which the selection makes sudden. It comes to give maps of another image no weight, with a selection and
  without; among the half that is selected they are about as often as by chance. `entropy`, `top_pair` and
  `chosen.TAP` (how often a key is heard) show it; with `detach_after = k` it learns in k epochs only.
- With $r = 1$ the one weight is 1 whatever the similarity, so a learned one never learns, and what it selects
  is left to its first weights. Take `cosine_map` there.
- BatchNorm compares the rows of a batch; with a learned similarity a batch to learn from must have two.

Both networks are looked at at the end of each stage by default. AFD, and so likely RTK, looks at every
residual block, which a recipe says by the blocks' paths (see `afd`).
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.attention_maps import (
    AttentionWatch,
    LayerVectors,
    attention,
    attention_gaps,
    expect_layers,
    expect_rows,
    similarity,
)
from limbeck.pieces.maps import as_map


def rtk(alpha: Float[Tensor, "b q k"], gap: Float[Tensor, "b q k"]) -> Float[Tensor, ""]:
    """Squared distances weighed over keys, the mean over queries and rows."""
    return (alpha * gap).sum(2).mean()


def among(similar: Float[Tensor, "b q k"], kept: Bool[Tensor, "b q k"]) -> Float[Tensor, "b q k"]:
    """The weights of the keys that are kept; 0 for the others, which get no gradient."""
    return similar.masked_fill(~kept, -torch.inf).softmax(2)


def topk(similar: Float[Tensor, "b q k"], r: int) -> Bool[Tensor, "b q k"]:
    """The r most similar keys of each query."""
    chosen = similar.detach().topk(r, dim=2).indices
    return torch.zeros_like(similar, dtype=torch.bool).scatter(2, chosen, True)


def threshold(similar: Float[Tensor, "b q k"], shares: float) -> Bool[Tensor, "b q k"]:
    """The keys whose weight among all is at least so many even shares; up to 1, the best is one of them."""
    similar = similar.detach()
    weight = similar.softmax(2) * similar.shape[2]
    return (weight >= shares) | (similar == similar.amax(2, keepdim=True))


def medoids(maps: Sequence[Float[Tensor, "b _ _ _"]]) -> Bool[Tensor, "b k"]:
    """Of the maps on one grid, the one whose attention is most like the others'; the last of equals."""
    stages: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, x in enumerate(maps):
        stages[tuple(x.shape[2:])].append(place)
    kept = torch.zeros(len(maps[0]), len(maps), dtype=torch.bool, device=maps[0].device)
    for places in stages.values():
        looks = torch.stack([attention(maps[place].detach()) for place in reversed(places)], 1)
        with torch.autocast(looks.device.type, enabled=False):
            cosine = looks @ looks.mT
        cosine = (cosine + cosine.mT).masked_fill(torch.eye(len(places)).to(kept), 0)  # exactly symmetric
        last_first = torch.tensor(places[::-1], device=kept.device)
        kept = kept.scatter(1, last_first[cosine.sum(2).argmax(1, keepdim=True)], True)
    return kept


class RTK(Method):
    """Every layer of the student listens to the teacher's that are most like it.

    query_side: who asks, `student` or `teacher`. similarity: `learned` or `cosine_map`. selection: `topk`,
        `threshold`, `stage_medoid` or `none`. share: rho, of the keys that `topk` keeps. threshold: in even
        shares.
    detach_after: epochs after which the similarity no longer learns; None: it always does.
    width: of the vectors that a learned similarity compares. taps: the student's layers. teacher_taps: the
        teacher's.
    """

    card = Card(
        "arXiv:2206.12788",
        2022,
        ("feature",),
        taps=("stage1", "stage2", "stage3"),
        fidelity="reconstruction",
        per_sample=True,
        reads_out=False,
    )

    def __init__(
        self,
        query_side: str = "student",
        similarity: str = "learned",
        selection: str = "topk",
        share: float = 0.5,
        threshold: float = 1.0,
        detach_after: int | None = None,
        width: int = 128,
        taps: Sequence[str] = ("stage1", "stage2", "stage3"),
        teacher_taps: Sequence[str] = ("stage1", "stage2", "stage3"),
    ) -> None:
        super().__init__()
        for knob, found, wanted in (
            ("query_side", query_side, ("student", "teacher")),
            ("similarity", similarity, ("learned", "cosine_map")),
            ("selection", selection, ("topk", "threshold", "stage_medoid", "none")),
        ):
            if found not in wanted:
                raise Refused(
                    f"The `{knob}` of 'rtk' is '{found}', expected one of {', '.join(wanted)}; choose one."
                )
        if not 0 < share <= 1 or not 0 < threshold <= 1:
            raise Refused(
                f"The `share` and `threshold` of 'rtk' are {share} and {threshold}, expected numbers above 0 "
                "and up to 1; try 0.5 and 1."
            )
        if width < 1 or not taps or not teacher_taps:
            raise Refused(
                f"Method 'rtk' was given width {width}, {len(taps)} taps and {len(teacher_taps)} "
                "teacher_taps; expected a width of 1 or more and at least one tap of each network."
            )
        if detach_after is not None and detach_after < 0:
            raise Refused(
                f"The `detach_after` of 'rtk' is {detach_after}, expected a number of epochs, 0 or more; "
                "leave it out to let the similarity always learn."
            )
        if selection == "stage_medoid" and query_side == "teacher":
            raise Refused(
                "The selection 'stage_medoid' of 'rtk' chooses among the teacher's layers, which ask with "
                "query_side = 'teacher'; leave one of the two out."
            )
        self.query_side, self.similarity, self.selection = query_side, similarity, selection
        self.share, self.threshold, self.detach_after, self.width = share, threshold, detach_after, width
        self.taps, self.teacher_taps = tuple(taps), tuple(teacher_taps)

    def teacher_looks(self) -> tuple[str, ...]:
        return self.teacher_taps

    @property
    def keys(self) -> tuple[str, ...]:
        """The layers that are selected and weighed."""
        return self.teacher_taps if self.query_side == "student" else self.taps

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_layers("rtk", self.taps, s, self.teacher_taps, t)
        here, there = self._maps(s, t)
        if self.similarity == "learned":
            expect_rows("rtk", len(here[0]))
            self.student, self.teacher = LayerVectors(here, self.width), LayerVectors(there, self.width)
        asking = self.taps if self.query_side == "student" else self.teacher_taps
        self.watch = AttentionWatch(len(asking), len(self.keys))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = self._maps(s, t)
        cosine, gap = attention_gaps(here, there)
        similar = cosine if self.similarity == "cosine_map" else self.compared(here, there)
        if self.query_side == "teacher":
            similar, gap = similar.mT, gap.mT
        alpha = among(similar, self.selected(similar, there))
        self.watch(alpha)
        if self.detach_after is not None and batch.lesson.epoch >= self.detach_after:
            alpha = alpha.detach()
        return rtk(alpha, gap)

    def compared(
        self, s: Sequence[Float[Tensor, "b _ _ _"]], t: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, "b s t"]:
        """The learned similarity of every layer of the student and every one of the teacher."""
        if self.training:
            expect_rows("rtk", len(s[0]))
        products = self.student(s) @ self.teacher(t).mT
        return similarity(products, self.student.position, self.teacher.position)

    def selected(
        self, similar: Float[Tensor, "b q k"], t: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Bool[Tensor, "b q k"]:
        """The keys that are heard; each query has at least one."""
        match self.selection:
            case "topk":
                return topk(similar, max(1, round(self.share * similar.shape[2])))
            case "threshold":
                return threshold(similar, self.threshold)
            case "stage_medoid":
                return medoids(t)[:, None].expand_as(similar)
        return torch.ones_like(similar, dtype=torch.bool)

    def figures(self) -> dict[str, float]:
        return {
            **self.watch.figures(),
            **{f"chosen.{tap}": float(x) for tap, x in zip(self.keys, self.watch.chosen, strict=True)},
        }

    def _maps(self, s: Seen, t: Seen) -> tuple[list[Tensor], list[Tensor]]:
        return [as_map(s.at[tap]) for tap in self.taps], [as_map(t.at[tap]) for tap in self.teacher_taps]
