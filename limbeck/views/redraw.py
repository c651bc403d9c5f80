"""Other draws for the views that come after it: those of another epoch, or of another purpose.

For a teacher that is to see other views than its student, or old ones: as with a store that was written for
another seed, or for fewer epochs. Ablations need it; a lesson does better without.

    view = [{ name = "redraw", epoch = 0 }, "crop", "flip"]       # those of the first epoch, again and again
    view = [{ name = "redraw", purpose = "another" }, "crop"]     # of another seed
"""

from dataclasses import replace

from limbeck.core.batch import Batch
from limbeck.core.keyed import number
from limbeck.core.refused import Refused


def redraw(batch: Batch, epoch: int | None = None, purpose: str = "") -> Batch:
    """The same rows under another clock: of `epoch` (None: of the batch's own), and of a seed that is made of
    the batch's own and `purpose`. Raises `Refused` for an epoch below 0, and where nothing would change."""
    if epoch is None and not purpose:
        raise Refused("Redraw is given neither `epoch` nor `purpose`, so it changes no draw; leave it out.")
    if epoch is not None and epoch < 0:
        raise Refused(f"Redraw is asked for the views of epoch {epoch}; expected 0 or more.")
    lesson = batch.lesson
    seed = number(lesson.seed, purpose) if purpose else lesson.seed
    return batch.replace(lesson=replace(lesson, seed=seed, epoch=lesson.epoch if epoch is None else epoch))
