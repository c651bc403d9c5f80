"""Retrieval, or metric learning: rows of one class should lie close together; the triplet loss, recall@k.

The triplet loss is that of RKD's metric-learning runs (Park, Kim, Lu, Cho; CVPR 2019; arXiv:1904.05068):
embeddings of length 1, margin 0.2, a negative for every positive pair, drawn by how rare its distance is.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.task import Task
from limbeck.pieces.distances import distances
from limbeck.pieces.similarity import unit
from limbeck.pieces.triplet import all_triplets, distance_weighted, semi_hard, triplet

RANKS = (1, 2, 4, 8)
ROOM = 2**22
"""Distances held at once while scoring: 32 MB, whatever the number of rows."""


class Retrieve(Task):
    """The model answers with an embedding (b d); labels say which rows belong together.

    margin: of the triplet loss. negatives: which triplets (see `pieces/triplet.py`). squared: of squared
    distances, as in RKD's paper; by default of plain ones, as in its code, which gave the published numbers.
    normalise: the loss is taken of embeddings divided by their length. The score takes them as they are, and
    beside it says what they are worth by direction alone.
    """

    headline = "recall@1"
    per_sample = False

    def __init__(
        self,
        margin: float = 0.2,
        negatives: Literal["distance_weighted", "semi_hard", "all"] = "distance_weighted",
        squared: bool = False,
        normalise: bool = True,
    ) -> None:
        self.margin, self.negatives = margin, negatives
        self.squared, self.normalise = squared, normalise

    def loss(self, s: Seen, batch: Batch) -> Float[Tensor, ""]:
        """The mean over triplets among the labelled rows of all processes; 0 when there are none."""
        assert batch.y is not None
        y = across.gather(batch.y)
        # In no triplet, and not by rounding in anybody's distance either.
        x = across.gather(s.out.masked_fill((batch.y == IGNORE)[:, None], 0.0))
        directions = unit(x)
        far = distances(directions if self.normalise else x)
        if self.negatives == "all":
            triplets = all_triplets(y)
        elif self.negatives == "semi_hard":
            triplets = semi_hard(far, y)
        else:
            assert batch.index is not None
            draw = across.gather(keyed(batch.lesson, batch.index, "negatives", 2))
            among = far if self.normalise else distances(directions.detach())
            triplets = distance_weighted(among, y, x.shape[1], draw)
        return triplet(far.square() if self.squared else far, triplets, self.margin).to(directions.dtype)

    def score(self, answers: Iterable[tuple[Seen, Batch]]) -> dict[str, float]:
        """Recall@1, 2, 4, 8 in percent over the labelled rows by Euclidean distance; recall@1 by cosine."""
        pairs = [(seen.out, batch.y) for seen, batch in answers]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))  # type: ignore[arg-type]
        x, y = x[y != IGNORE], y[y != IGNORE]
        euclidean = recall(x, y, RANKS)
        return {
            **{f"recall@{k}": share for k, share in zip(RANKS, euclidean, strict=True)},
            "cosine recall@1": recall(unit(x), y, (1,))[0],
        }

    def check(self, s: Seen, batch: Batch) -> None:
        if not isinstance(s.out, Tensor) or s.out.ndim != 2:
            found = (
                f"shape {tuple(s.out.shape)}" if isinstance(s.out, Tensor) else f"a {type(s.out).__name__}"
            )
            raise Refused(
                f"The model's answer has {found}, and retrieval expects embeddings of shape (rows, width); "
                "name the embedding with the tap 'out'."
            )
        if batch.y is None or batch.y.ndim != 1:
            raise Refused(
                "The data has no label for each row, and the triplet loss learns from which rows belong "
                "together; give some, or distil without a task."
            )
        labels = batch.y if batch.lesson.labels is None else batch.lesson.labels
        rows = labels[labels != IGNORE].unique(return_counts=True)[1].tolist()
        if len(rows) < 2 or max(rows) < 2:
            raise Refused(
                f"The data has {sum(rows)} labelled rows of {len(rows)} classes, and a triplet is two rows "
                "of a class and one of another; label more, or distil without a task."
            )
        if self.negatives == "distance_weighted" and batch.index is None:
            raise Refused(
                "Negatives are drawn by each row's number in its data set, and the batch has none; give it "
                "its `index`, or choose negatives = 'semi_hard' or 'all'."
            )


def recall(x: Float[Tensor, "n d"], y: Int[Tensor, " n"], ranks: Sequence[int]) -> list[float]:
    """For each k the share of rows, in percent, with a row of their own class among the k nearest others.

    A row alone in its class is never right; of no rows, 0.
    """
    if len(x) < 2:
        return [0.0 for _ in ranks]
    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    norm = x.square().sum(1)
    deepest = min(max(ranks), len(x) - 1)
    right = torch.zeros(deepest, dtype=torch.long, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(max(1, ROOM // len(x))):
        # A row's own squared length moves all its distances alike.
        far = torch.addmm(norm, x[rows], x.T, alpha=-2)
        far[torch.arange(len(rows), device=x.device), rows] = torch.inf
        nearest = far.topk(deepest, largest=False).indices
        right += ((y[nearest] == y[rows][:, None]).cumsum(1) > 0).sum(0)
    return [100.0 * int(right[min(k, deepest) - 1]) / len(x) for k in ranks]
