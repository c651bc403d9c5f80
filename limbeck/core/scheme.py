"""Who learns, whose turn it is, and what is shipped."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from limbeck.core.batch import Lesson, View
from limbeck.core.method import Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import MeanOf, Teacher, each_once

Turn = tuple[str, dict[str, Tensor]]
"""One step of one player: its name and the named losses it lowers."""

Lens = Callable[[Seen, Seen], tuple[Seen, Seen, float | Tensor]]
"""Changes what a method compares (logit standardisation): `(s, t) -> (s, t, factor)`, the factor multiplies
the loss."""

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 - 0.5 * math.cos(math.pi * p),
    "sigmoid": lambda p: math.exp(-5 * (1 - p) ** 2) if p > 0 else 0.0,
}


@dataclass(frozen=True)
class Ramp:
    """A weight that grows from 0 to its full value: it stands at 0 for `after` epochs and is full in the
    `epochs`-th one after that. One that `falls` is full for `after` epochs and the next one, and is 0 when
    `epochs` more have passed (a hint that only begins a training)."""

    epochs: int
    after: int = 0
    shape: str = "linear"
    falls: bool = False

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES or self.epochs < 1 or self.after < 0:
            raise Refused(
                f"Cannot ramp over {self.epochs} epochs after {self.after} with shape '{self.shape}'; "
                f"epochs >= 1, after >= 0, shape one of {', '.join(_SHAPES)}."
            )

    def __call__(self, lesson: Lesson) -> float:
        passed = lesson.epoch - self.after + (0 if self.falls else 1)
        grown = _SHAPES[self.shape](min(max(passed / self.epochs, 0.0), 1.0))
        return 1 - grown if self.falls else grown


@dataclass(frozen=True)
class Term:
    """A method in use.

    teachers: whom it listens to (empty: the only one there is); with several it is built once for each and
        the mean is taken.
    pairs: for a name by which the method looks at the teacher, the teacher's tap that is meant.
    view: what the student is shown for this term, when that differs from everybody's. through: lenses, first
        to last.
    """

    method: Method
    teachers: tuple[Teacher, ...] = ()
    weight: float = 1.0
    ramp: Ramp | None = None
    pairs: Mapping[str, str] = field(default_factory=dict)
    view: View | None = None
    through: tuple[Lens, ...] = ()
    name: str = ""


class Scheme(ABC):
    """A lesson plan. The engine asks for turns, steps the player of each, and asks `ships` at the end."""

    learners_teach: ClassVar[bool] = False
    """Whether a term may name a learner of this very lesson as its teacher."""

    mean: MeanOf | None = None
    """A running mean of the learner, to be shipped in its place; a recipe's `ships` sets it."""

    @classmethod
    def staged(cls, cast: Any) -> "Scheme":
        """The lesson of a recipe's stage: `cast` is a `core.cast.Cast`, further keywords are the knobs that a
        recipe may give. Raises `Refused`."""
        raise Refused(f"The scheme {cls.__name__} cannot be used in a recipe: it does not define `staged`.")

    @abstractmethod
    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """The parameters that learn, by player and by name. No parameter belongs to two players."""

    @abstractmethod
    def turns(self, batch: Any) -> Iterator[Turn]:
        """What happens with one batch (a `Batch`, or a dict of them by stream). Resumed after each player's
        step."""

    @abstractmethod
    def shipped(self) -> nn.Module:
        """What the user gets. By default the plain student; whoever ships more says so here."""

    @abstractmethod
    def modules(self) -> Mapping[str, nn.Module]:
        """Everything with state that is trained here, by name: it is moved, saved and resumed."""

    def combine(self, player: str, losses: dict[str, Tensor]) -> Tensor:
        """One scalar of a turn's losses; the sum unless a balancing method says otherwise."""
        return sum(losses.values())  # type: ignore[return-value]

    def teachers(self) -> tuple[Teacher, ...]:
        return ()

    @property
    def asking(self) -> float:
        """Seconds that lessons spent on asking their teachers so far."""
        return sum(float(getattr(module, "asking", 0.0)) for module in self.modules().values())

    def how(self) -> list[str]:
        """By which ways the lessons are learned, each once, in words; none where all is as usual."""
        ways = [getattr(module, "how", str)() for module in self.modules().values()]
        return list(dict.fromkeys(filter(None, ways)))

    def refuse_cut(self) -> str | None:
        """The name of a loss that cannot be cut into micro-batches because it compares rows; None when all
        can."""
        return None

    def figures(self) -> dict[str, float]:
        """What the methods found worth watching in the last batch, by name."""
        return {}

    def ships(self) -> nn.Module:
        """What is evaluated and saved: what the scheme ships, or its running mean."""
        return self.shipped() if self.mean is None else self.mean.model

    def follow(self) -> None:
        """After a step: teachers that move do so, each once."""
        movers = [*self.teachers(), *([] if self.mean is None else [self.mean])]
        for teacher in each_once(movers):
            teacher.follow()

    def train(self) -> None:
        for module in self.modules().values():
            to_work(module)

    def state_dict(self) -> dict[str, Any]:
        return {
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "teachers": [teacher.state_dict() for teacher in self.teachers()],
            "mean": None if self.mean is None else self.mean.state_dict(),
            "layouts": {n: m.layout for n, m in self.modules().items() if hasattr(m, "layout")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])
        for teacher, its in zip(self.teachers(), state["teachers"], strict=True):
            teacher.load_state_dict(its)
        if self.mean is not None:
            self.mean.load_state_dict(state["mean"])
        for name, found in state["layouts"].items():
            self.modules()[name].layout = found


def to_work(module: nn.Module) -> None:
    """Train mode for a learner: all of it, except subtrees that own parameters of which none learns. Those
    are in eval with everything below them, BatchNorm and dropout too."""
    module.train()
    for child in module.modules():
        own = list(child.parameters())
        if own and not any(p.requires_grad for p in own):
            child.eval()
