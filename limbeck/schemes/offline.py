"""Offline distillation: trained teachers, one learning student (Hinton et al. 2015; arXiv:1503.02531, and
most of what followed).

For each batch the methods' rivals learn first, on what student and teachers showed, detached; then the
student takes one step on the sum of its losses. Without methods this is ordinary training, which is how a
teacher is trained and what the control does.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller
from limbeck.core.scheme import Scheme, Turn
from limbeck.core.teachers import Teacher


class Offline(Scheme):
    """One student under teachers that are done learning."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    @classmethod
    def staged(cls, cast: Cast) -> "Offline":
        (student,) = cast.names("offline", "student")
        return cls(cast.distiller(student))

    def turns(self, batch: Batch) -> Iterator[Turn]:
        yield from self.distiller.turns(self.distiller.see(batch))

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return self.distiller.players()

    def figures(self) -> dict[str, float]:
        return self.distiller.figures()

    def shipped(self) -> nn.Module:
        return self.distiller.student

    def modules(self) -> Mapping[str, nn.Module]:
        return {"distiller": self.distiller}

    def teachers(self) -> tuple[Teacher, ...]:
        return self.distiller.teachers()

    def refuse_cut(self) -> str | None:
        return self.distiller.refuse_cut()
