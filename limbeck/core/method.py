"""A Method turns what student and teacher showed into a loss. One paper, one subclass, one file."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.taps import Seen

KNOWLEDGE = ("response", "feature", "relation")
NEEDS = ("teacher_model", "teacher_gradient", "same_classes", "labels", "index")


@dataclass(frozen=True)
class Card:
    """What is to be known about a method without running it.

    paper: `arXiv:…` or a DOI. year: of publication. knowledge: which of response, feature, relation it
        teaches.
    taps: the taps it reads by default. fidelity: `paper` (its equations), `code` (the official code's, where
        they differ) or `reconstruction` (the source leaves gaps that we filled). needs: of `NEEDS`, what it
        cannot do without.
    per_sample: the loss is a mean of one term a row, so a batch may be cut into micro-batches. order_free:
        the order of rows does not matter. zero_at_match: the loss is 0 when the student shows exactly what
        the teacher shows.
    reads_out: it reads the teacher's answer; one that reads taps alone says False, and its teacher may stop
        at the last of them.
    """

    paper: str
    year: int
    knowledge: tuple[str, ...]
    taps: tuple[str, ...] = ()
    fidelity: str = "paper"
    needs: frozenset[str] = frozenset()
    per_sample: bool = False
    order_free: bool = True
    zero_at_match: bool = False
    reads_out: bool = True

    def __post_init__(self) -> None:
        assert self.knowledge and set(self.knowledge) <= set(KNOWLEDGE), self.knowledge
        assert self.fidelity in ("paper", "code", "reconstruction"), self.fidelity
        assert self.needs <= set(NEEDS), self.needs


class Method(nn.Module, ABC):
    """Keyword knobs whose defaults are the paper's → `build` makes modules from shapes → `loss` is
    mathematics.

    Modules made in `build` learn with the student and are dropped after training. Whatever a method remembers
    between steps is a registered buffer, so that a resumed run remembers it too.
    """

    card: ClassVar[Card]

    def looks(self) -> tuple[str, ...]:
        """The taps this instance reads: its knob `taps` or `tap` when it has one, else those of its card."""
        if hasattr(self, "taps"):
            return tuple(self.taps)  # type: ignore[arg-type]
        return (self.tap,) if hasattr(self, "tap") else self.card.taps  # type: ignore[return-value]

    def teacher_looks(self) -> tuple[str, ...]:
        """The taps of the teacher this instance reads: those of the student unless a method says
        otherwise."""
        return self.looks()

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        """Make modules from the shapes in `s` and `t`. The only place where `t.model` may be read. Raises
        `Refused`."""

    @abstractmethod
    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        """The scalar the student lowers. `batch` is what the student was shown."""

    def figures(self) -> dict[str, float]:
        """What is worth watching of the last batch, by name: a ratio, a similarity. Noted once an epoch."""
        return {}

    def rivals(self) -> dict[str, nn.Module]:
        """Submodules that learn against the student (a discriminator): each is a player with an optimiser of
        its own."""
        return {}

    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Tensor:
        """The scalar the rival `name` lowers, asked for before the student's turn; `s` and `t` are
        detached."""
        raise KeyError(name)
