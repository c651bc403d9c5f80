r"""Be Your Own Teacher: self-distillation by branches (Zhang, Song, Gao, Chen, Bao, Ma; ICCV 2019;
arXiv:1905.08094).

Branches grow from the network's earlier stages, each ending in a classifier of its own; the deepest, which is
the network's own answer, teaches them while it learns. With $q_i$ and $F_i$ the answer and the features of
exit $i$ and $C$ the deepest,

$$L = \mathrm{CE}(y, q_C) + \sum_{i<C} (1-\alpha)\,\mathrm{CE}(y, q_i)
  + \alpha T^2\,\mathrm{KL}(q_C \,\|\, q_i) + \lambda \lVert F_i - F_C \rVert^2$$

which in a recipe is `learner = "student"`, `scheme = "branches"` and terms that name the student as its own
teacher: `{ method = "kd", temperature = 3, weight = 0.1, teacher = "student" }`, and for the features
`{ method = "fitnet", tap = "stageN", teacher = "student" }` with N the last stage, where each branch is as
wide as the network. Terms with other teachers teach the network itself. What ships is the plain network.

A branch is what `tail(i)` gives, a fresh copy of what follows stage i, with pooling and a linear head.

Departures:
- The paper's branches are bottlenecks of their own design; ours are the network's own kind, for any network
  of ours.
- What teaches, $q_C$ and $F_C$, does not learn from the branches, as in the authors' code. That code has
  α = 0.3, no $T^2$ and, in the version that is public, no features.
- Features are compared as a term's method does: `fitnet` takes half the mean over elements, through a
  projector of each branch, where the paper takes the sum of plain differences.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import forked
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme, Turn
from limbeck.core.taps import Seen, Tapped, lying, unmoved
from limbeck.core.teachers import Peer, Teacher, each_once
from limbeck.pieces.branch import Branch, pool, stages


class Branches(Scheme):
    """Args: network, its own lesson; branches, the lesson of each branch by the stage it grows from; itself,
    the network as the branches' teacher."""

    learners_teach = True

    def __init__(self, network: Distiller, branches: Mapping[str, Distiller], itself: Peer) -> None:
        self.network, self.branches, self.itself = network, dict(branches), itself
        network.look([*self.branches, *itself.names])

    @classmethod
    def staged(cls, cast: Cast, branch_task: float = 0.9) -> "Branches":
        """branch_task: weight of each branch's own task loss, the paper's 1 − α."""
        (name,) = cast.names("branches", "student")
        if not 0 <= branch_task < math.inf:
            raise Refused(f"The weight `branch_task` is {branch_task}, expected a number >= 0; try 0.9.")
        network, itself = cast.learners[name], cast.peers[name]
        own = [term for term in cast.terms if itself in term.teachers]
        others = [term for term in cast.terms if itself not in term.teachers]
        lesson = replace(cast, terms=others).distiller(name)
        for term in own:
            if len(term.teachers) > 1:
                raise Refused(
                    f"'{term.name}' names '{name}' and other teachers; write one term for what the branches "
                    "learn from the network, and one for what it learns from others."
                )
        shown = _stages(network, name, cast, itself.example)
        names, classes = list(shown.at), shown.out.shape[1]
        branches = {}
        for i, stage in enumerate(names[:-1]):
            with forked(cast.seed, "branch", name, stage), torch.no_grad():
                tail = network.tail(i)  # type: ignore[operator]
                with unmoved(tail):
                    width = pool(tail(shown.at[stage])).shape[1]
                branch = Branch(tail, width, classes, names[-1]).to(shown.out)
            example = itself.example.replace(x=shown.at[stage])
            alone = Cast(
                {stage: branch},
                example,
                own,
                cast.task,
                branch_task,
                channels_last={stage: cast.channels_last.get(name, True)},
                seed=cast.seed,
            )
            branches[stage] = alone.distiller(stage)
        return cls(lesson, branches, itself)

    def turns(self, batch: Batch) -> Iterator[Turn]:
        shown = self.network.show(batch)
        whole, viewed = shown[0]
        self.itself.told(whole)
        sights = {"": self.network.ask(batch, shown)}
        for stage, branch in self.branches.items():
            sights[f"{stage}."] = branch.see(viewed.replace(x=lying(whole, branch.channels_last).at[stage]))
        for where, lesson in self._lessons():
            for rival, loss in lesson.rival_losses(sights[where]):
                yield where + rival, {where + rival: loss}
        yield (
            "student",
            {
                where + name: loss
                for where, lesson in self._lessons()
                for name, loss in lesson.losses(sights[where]).items()
            },
        )

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        players: dict[str, dict[str, nn.Parameter]] = {"student": {}}
        for where, lesson in self._lessons():
            for player, theirs in lesson.players().items():
                if player == "student":
                    players["student"] |= {where + name: p for name, p in theirs.items()}
                else:
                    players[where + player] = theirs
        return players

    def figures(self) -> dict[str, float]:
        return {
            where + figure: value
            for where, lesson in self._lessons()
            for figure, value in lesson.figures().items()
        }

    def shipped(self) -> nn.Module:
        return self.network.student

    def modules(self) -> Mapping[str, nn.Module]:
        return {"network": self.network, **self.branches}

    def teachers(self) -> tuple[Teacher, ...]:
        each = [*self.network.teachers(), self.itself]
        return each_once(each)

    def refuse_cut(self) -> str | None:
        return next(filter(None, (lesson.refuse_cut() for _, lesson in self._lessons())), None)

    def _lessons(self) -> list[tuple[str, Distiller]]:
        """(what its losses' names begin with, lesson): the network's own, then the branches'."""
        return [("", self.network), *((f"{stage}.", branch) for stage, branch in self.branches.items())]


def _stages(network: nn.Module, name: str, cast: Cast, example: Batch) -> Seen:
    """What each stage of the network shows for the example, in order."""
    names = stages(network, name, cast.taps.get(name))
    if len(names) < 2:
        raise Refused(
            f"'{name}' has {len(names)} stage(s), and branches grow from those before the last; choose a "
            "network of two or more stages."
        )
    tapped = Tapped(network, cast.taps.get(name), name)
    tapped.look(names)
    with torch.no_grad(), unmoved(network), forked(cast.seed, "dry run"):
        seen = tapped(example.x)
    return replace(seen, at={stage: seen.at[stage] for stage in names})
