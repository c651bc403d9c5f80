r"""Which layers of a teacher give hints: PURSUhInT, In Search of Informative Hint Points Based on Layer
Clustering for Knowledge Distillation (Keser, Ayanzadeh, Aghdam, Kilcioglu, Toreyin, Ure; Expert Systems with
Applications 213, 2023; arXiv:2103.00053).

A teacher's blocks are clustered by how alike they are, and each cluster's centre gives a hint. It is done
once for a teacher: neither the student, nor the hint's loss, nor a label has a say in it. For block i let
$X_i$ be what it shows of some training images, averaged over positions. With a likeness $s$ of
`representation`:

$$d(i, j) = 1 - s(X_i, X_j), \qquad a(i) = \operatorname*{argmin}_c d(i, c)$$

The centres begin at $\lfloor t (L - 1) / (k - 1) \rfloor$, t from 0 to k - 1. Each block goes to the centre
that is nearest; then a cluster's new centre is the member whose *place* is closest to the mean place of its
members, rounded down. That is repeated until nothing changes, at most 80 times.

    found = hints(teacher, batches, count=3)
    found.chosen                      # ("layer1.1", "layer2.2", "layer3.3")

Departures from the code: it does not centre R2-CCA, and so finds alike whatever is positive; here that is
`centre=False`. The mean place is the middle of a cluster of neighbours only: `contiguous` says whether all
are, and `update="medoid"` takes the member that is nearest to all others instead. One cluster alone begins
in the middle; the code divides by zero there. How the centres move is known from a rewrite of the code.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.teachers import Frozen
from limbeck.models.choose import blocks
from limbeck.pieces.representation import alive, similarities

ROUNDS = 80
SAMPLES = 10_000
FOR_EACH = 10
"""Samples for each channel of the widest block; with fewer a likeness tells of shapes, not of contents."""


@dataclass(frozen=True)
class Hints:
    """How a teacher's blocks cluster.

    layers: the blocks, first to last, as taps. similarity: of every two, 0 … 1. assignment: each block's
    cluster, counted from the first one's. centres: the block that stands for each cluster. contiguous:
    whether every cluster is a run of neighbours. rounds: how often the centres moved.
    """

    layers: tuple[str, ...]
    similarity: Float[Tensor, "l l"]
    assignment: tuple[int, ...]
    centres: tuple[int, ...]
    contiguous: bool
    rounds: int

    @property
    def chosen(self) -> tuple[str, ...]:
        """The taps that give hints, first to last."""
        return tuple(self.layers[centre] for centre in self.centres)


def hints(
    teacher: nn.Module | Frozen,
    batches: Iterable[Batch],
    count: int,
    metric: str = "r2_cca",
    centre: bool = True,
    update: str = "paper",
    samples: int | None = None,
    layers: Sequence[str] | None = None,
) -> Hints:
    """Cluster a teacher's blocks into `count`.

    teacher: a network, or one with the view and statistics that it was trained under. batches: training
    images without augmentation. metric: `r2_cca`, `cka` or `cka_rbf`. update: `paper`, by places, or
    `medoid`, by distances. samples: how many are looked at; by default the paper's 10,000, or ten for each
    channel of the widest block. layers: taps to choose among; by default the teacher's blocks. Raises
    `Refused`.
    """
    teacher = teacher if isinstance(teacher, Frozen) else Frozen(teacher)
    each = iter(batches)
    first = next(each, None)
    if first is None:
        raise Refused("There is no batch to look at the teacher's layers with; bring some training images.")
    taps = _blocks(teacher, first) if layers is None else tuple(layers)
    _refuse_count(count, taps)
    teacher.look(taps)
    shown = [_pooled(teacher, taps, first)]
    wanted = samples or max(SAMPLES, FOR_EACH * max(x.shape[1] for x in shown[0]))
    for batch in islice(each, math.ceil(wanted / first.rows) - 1):
        shown.append(_pooled(teacher, taps, batch))
    features = [torch.cat(parts)[:wanted] for parts in zip(*shown, strict=True)]
    _refuse_few(len(features[0]), [int(alive(x).sum()) for x in features])
    similarity = similarities(features, metric, centre)
    assignment, centres, rounds = cluster(1 - similarity, count, update)
    contiguous = list(assignment) == sorted(assignment)
    return Hints(taps, similarity, assignment, centres, contiguous, rounds)


def cluster(
    distance: Float[Tensor, "l l"], count: int, update: str = "paper"
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Each layer's cluster, the centres in order, and how often they moved. A layer that is as near to two
    centres goes to the earlier one. Raises `Refused`."""
    if update not in ("paper", "medoid"):
        raise Refused(f"There is no update '{update}'; expected paper (the middle place) or medoid.")
    _refuse_count(count, range(len(distance)))
    centres, rounds = _spread(len(distance), count), 0
    while rounds < ROUNDS:
        clusters = _assign(distance, centres)
        members = [[i for i, c in enumerate(clusters) if c == n] for n in range(count)]
        moved = sorted(_middle(some) if update == "paper" else _medoid(distance, some) for some in members)
        if moved == centres:
            break
        centres, rounds = moved, rounds + 1
    return tuple(_assign(distance, centres)), tuple(centres), rounds


def paired(
    teacher: nn.Module | Frozen, batches: Iterable[Batch], names: Sequence[str], metric: str = "r2_cca"
) -> dict[str, str]:
    """For each name by which a method looks at the teacher, from shallow to deep, the block that gives its
    hint. What the head reads, `pooled`, stays what it is. Raises `Refused`."""
    stages = _stages(names)
    return dict(zip(stages, hints(teacher, batches, len(stages), metric).chosen, strict=True))


def unasked(teacher: Frozen, batch: Batch, names: Sequence[str], samples: int) -> dict[str, str]:
    """As `paired` before the teacher has learned: evenly spaced blocks, so that a rehearsal finds out what
    does not fit. Raises `Refused` when all the samples there are will be too few."""
    stages, taps = _stages(names), _blocks(teacher, batch)
    _refuse_count(len(stages), taps)
    teacher.look(taps)
    _refuse_few(samples, [x.shape[1] for x in _pooled(teacher, taps, batch)])
    return dict(zip(stages, (taps[place] for place in _spread(len(taps), len(stages))), strict=True))


# --- the teacher ---


def _blocks(teacher: Frozen, batch: Batch) -> tuple[str, ...]:
    shown = batch if teacher.view is None else teacher.view(batch)
    return blocks(teacher.model, shown.x)


def _pooled(teacher: Frozen, taps: Sequence[str], batch: Batch) -> list[Float[Tensor, "b c"]]:
    """What each block shows, averaged over positions: of a map (b c h w) or of tokens (b n d)."""
    at = teacher.at_taps(batch).at
    shown = [at[tap].float().cpu() for tap in taps]
    return [x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x for x in shown]


def _refuse_few(samples: int, widths: Sequence[int]) -> None:
    """Refuse to compare layers of these widths by so few samples."""
    if samples < FOR_EACH * max(widths):
        raise Refused(
            f"Layers of up to {max(widths)} channels would be compared by {samples:,} samples, which tells "
            f"little of what is in them; bring {FOR_EACH * max(widths):,} or more."
        )


def _stages(names: Sequence[str]) -> list[str]:
    """The names that mean a block's output."""
    stages = [name for name in names if name != "pooled"]
    before = [name for name in stages if name.endswith(("_pre", "_pre_norm"))]
    if before or not stages:
        looks = f"'{before[0]}', in front of an activation" if before else "no block's output"
        raise Refused(
            f"Clustering chooses among a teacher's blocks, and this method looks at {looks}; name its taps "
            "yourself, or take a method that compares what blocks show."
        )
    return stages


# --- the clusters ---


def _refuse_count(count: int, layers: Sequence[object]) -> None:
    if not 1 <= count <= len(layers):
        raise Refused(
            f"{count} clusters of {len(layers)} layers were asked for, expected 1 to {len(layers)}; change "
            "the count, or take a deeper teacher."
        )


def _spread(layers: int, count: int) -> list[int]:
    """Where clustering begins: the first layer, the last, and even steps between; one alone in the middle."""
    if count == 1:
        return [(layers - 1) // 2]
    return [t * (layers - 1) // (count - 1) for t in range(count)]


def _assign(distance: Float[Tensor, "l l"], centres: Sequence[int]) -> list[int]:
    nearest: list[int] = distance[:, list(centres)].argmin(1).tolist()  # the first of equals
    for cluster, centre in enumerate(centres):
        nearest[centre] = cluster  # though a layer just like it be another's centre
    return nearest


def _middle(members: Sequence[int]) -> int:
    place = sum(members) // len(members)
    return min(members, key=lambda i: abs(i - place))


def _medoid(distance: Float[Tensor, "l l"], members: Sequence[int]) -> int:
    some = list(members)
    return some[int(distance[some][:, some].sum(1).argmin())]
