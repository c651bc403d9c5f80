"""Classes that nobody learns from: whether an embedding is of use beyond the classes it was trained on."""

from dataclasses import replace

from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits


def keep_unseen(splits: Splits, seen: int) -> Splits:
    """The first `seen` classes are what is learned from, chosen on and tested on; the test part's rows of the
    others become `unseen`.

    Rows without a label could be of any class, and are left out. Raises `Refused` when no class would be left
    on one side, or a part has no row.
    """
    names = splits.train.classes
    if not 1 <= seen < len(names):
        raise Refused(
            f"The first {seen} of {len(names)} classes were asked to be seen; ask for 1 to {len(names) - 1}, "
            "so that some are left unseen."
        )
    train, valid, test = (_classes(part, 0, seen) for part in (splits.train, splits.valid, splits.test))
    return Splits(train, valid, test, unseen=_classes(splits.test, seen, len(names)))


def _classes(data: Data, first: int, stop: int) -> Data:
    """The rows of some classes. Labels stay what they were, so names after the last are all that goes."""
    rows = ((data.y >= first) & (data.y < stop)).nonzero()[:, 0]
    return replace(data, x=data.x[rows], y=data.y[rows], classes=data.classes[:stop])
