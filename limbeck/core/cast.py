"""Who is in a lesson: what a recipe's stage (or you) brings to a scheme."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from limbeck.core.batch import Batch, View
from limbeck.core.distiller import Distiller, TaskLoss
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.task import Task
from limbeck.core.teachers import Peer


@dataclass(frozen=True)
class Cast:
    """Learners by name (the first is what the lesson is there for), the terms they learn by, and the example
    that shapes are taken from.

    example: on the learners' device. peers: each learner as a teacher of the others; terms name these
    objects among their teachers. taps: names for looks inside the learners, by learner. channels_last: by
    learner, whether it may compute in that layout (True). The rest is as in `Distiller`.
    """

    learners: Mapping[str, nn.Module]
    example: Batch
    terms: Sequence[Term] = ()
    task: Task | TaskLoss | None = None
    task_weight: float = 1.0
    view: View | None = None
    taps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    channels_last: Mapping[str, bool] = field(default_factory=dict)
    peers: Mapping[str, Peer] = field(default_factory=dict)
    seed: int = 0

    def names(self, scheme: str, *parts: str) -> tuple[str, ...]:
        """The learners' names, which must be as many as the parts there are to play."""
        if len(self.learners) != len(parts):
            raise Refused(
                f"The scheme '{scheme}' has {len(parts)} learner(s) ({', '.join(parts)}), and the stage "
                f"names {len(self.learners)} ({', '.join(self.learners)}); write learner = "
                f"{list(parts) if len(parts) > 1 else repr(parts[0])} with your models' names."
            )
        return tuple(self.learners)

    def distiller(self, name: str) -> Distiller:
        """The lesson of one learner under every term, with itself taken out of the teachers of each."""
        itself = self.peers.get(name)
        terms = []
        for term in self.terms:
            others = tuple(teacher for teacher in term.teachers if teacher is not itself)
            if term.teachers and not others:
                raise Refused(
                    f"'{term.name or type(term.method).__name__}' would let '{name}' teach itself; name "
                    "another learner among its teachers."
                )
            # Modules of its own: what projects one learner must not learn from another. Views are shared:
            # a student is shown the same one once.
            method, through = copy.deepcopy((term.method, term.through))
            terms.append(replace(term, method=method, through=through, teachers=others))
        return Distiller(
            self.learners[name],
            None,
            terms,
            example=self.example,
            task=self.task,
            task_weight=self.task_weight,
            view=self.view,
            taps=self.taps.get(name),
            channels_last=self.channels_last.get(name, True),
            seed=self.seed,
            called=name,
        )
