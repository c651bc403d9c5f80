"""The ordinary job: a loss without any teacher, and a score."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def labelled_cross_entropy(s: Seen, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of `s.out` (`b k` or `b k …`), mean over the labelled rows of the whole step; 0 when
    there are none."""
    if batch.y is None:
        raise Refused(
            "The task learns from labels, and the batch has none; give it `y`, or train without a task."
        )
    return across.labelled_mean(F.cross_entropy(s.out, batch.y, reduction="none", ignore_index=IGNORE), batch)


class Task(ABC):
    """What is to be done, with or without a teacher."""

    headline: ClassVar[str]
    """The score that boards compare; higher is better. Empty: nothing is scored."""

    per_sample: ClassVar[bool] = True
    """Whether its loss is a mean of one term a row, so that a batch may be cut into micro-batches."""

    @abstractmethod
    def loss(self, s: Seen, batch: Batch) -> Tensor:
        """The ordinary training loss, a scalar."""

    @abstractmethod
    def score(self, answers: Iterable[tuple[Seen, Batch]]) -> dict[str, float]:
        """Scores over a whole data set, answered in eval."""

    @abstractmethod
    def check(self, s: Seen, batch: Batch) -> None:
        """Refuse data that this task cannot use with this model, before the first step."""
