"""No ordinary job: the student learns from its teachers alone, and nobody needs a label."""

from collections.abc import Iterable

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.task import Task


class Nothing(Task):
    """Label-free distillation. It scores nothing: there is no honest score without a job.

    So a run ships its last epoch, and boards, patience and `keep = "best"`, which compare scores, refuse it.
    """

    headline = ""

    def loss(self, s: Seen, batch: Batch) -> Tensor:
        raise Refused(
            "The task 'none' has no loss to learn from; name a task, or give the stage a term and train "
            "without a task."
        )

    def score(self, answers: Iterable[tuple[Seen, Batch]]) -> dict[str, float]:
        """Empty; no row is looked at."""
        return {}

    def check(self, s: Seen, batch: Batch) -> None:
        """Any data will do."""
