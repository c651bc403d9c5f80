"""Classification: cross-entropy over labelled rows, accuracy.

With `smoothing` a label is a certainty no more: this share of it belongs to all classes alike (C. Szegedy, V.
Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna; CVPR 2016; arXiv:1512.00567, section 7).
"""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.task import Task, labelled_cross_entropy


class Classify(Task):
    """The model answers with logits (b k); labels are class numbers."""

    headline = "accuracy"

    def __init__(self, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise Refused(
                f"The smoothing of labels is {smoothing}, expected a share from 0 up to below 1; try 0.1."
            )
        self.smoothing = smoothing

    def loss(self, s: Seen, batch: Batch) -> Float[Tensor, ""]:
        certain = labelled_cross_entropy(s, batch)
        if self.smoothing == 0 or batch.y is None:
            return certain
        # Against all classes alike: their mean.
        even = across.labelled_mean(-s.out.log_softmax(1).mean(1), batch)
        return (1 - self.smoothing) * certain + self.smoothing * even

    def score(self, answers: Iterable[tuple[Seen, Batch]]) -> dict[str, float]:
        """Accuracy in percent over the labelled rows (0 when there are none)."""
        right = labelled = 0
        for seen, batch in answers:
            right += int((seen.out.argmax(1) == batch.y).sum())
            labelled += int((batch.y != IGNORE).sum())  # type: ignore[union-attr]
        return {"accuracy": 100.0 * right / max(labelled, 1)}

    def check(self, s: Seen, batch: Batch) -> None:
        if not isinstance(s.out, Tensor) or s.out.ndim != 2:
            found = (
                f"shape {tuple(s.out.shape)}" if isinstance(s.out, Tensor) else f"a {type(s.out).__name__}"
            )
            raise Refused(
                f"The model's answer has {found}, and classification expects logits of shape (rows, "
                "classes); name the logits with the tap 'out'."
            )
        # A view may have changed the batch's.
        known = [y for y in (batch.lesson.labels, batch.y) if y is not None]
        if not known:
            raise Refused(
                "The data has no labels, and classification learns from them; give some, or distil without "
                "a task."
            )
        highest = max(int(y.max()) for y in known)
        if highest >= s.out.shape[1]:
            raise Refused(
                f"The data has label {highest}, and the model's head has {s.out.shape[1]} outputs (0 to "
                f"{s.out.shape[1] - 1}); give the model `classes = {highest + 1}`, or mend the labels."
            )
