"""A label splits an answer in two: the class it names, and the others. Axis 1 is the classes.

A row without a label (`-100`) is split as if class 0 were its own; whoever takes a mean leaves it out.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen


def target(z: Float[Tensor, "b k *rest"], y: Int[Tensor, "b *rest"]) -> Float[Tensor, "b *rest"]:
    """What `z` says of the labelled class."""
    return z.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)


def others(z: Float[Tensor, "b k *rest"], y: Int[Tensor, "b *rest"]) -> Float[Tensor, "b k-1 *rest"]:
    """What `z` says of all other classes, in their order."""
    place = torch.arange(z.shape[1] - 1, device=z.device).view(1, -1, *(1 for _ in y.shape[1:]))
    return z.gather(1, place + (place >= y.unsqueeze(1)))


def expect_labelled_answers(method: str, s: Seen, t: Seen, batch: Batch) -> None:
    """Refuse answers that are not alike, that know fewer than two classes, or whose labels do not fit."""
    assert batch.y is not None
    here, there, labels = (tuple(x.shape) for x in (s.out, t.out, batch.y))
    if len(here) < 2 or here[1] < 2 or here != there or labels != here[:1] + here[2:]:
        raise Refused(
            f"Method '{method}' sets the labelled class against the others, and the student answers {here}, "
            f"the teacher {there}, with labels {labels}; expected the same (rows, classes, …) twice, with at "
            "least two classes, and one whole number for each answer."
        )
    highest = int(batch.y.max())
    if highest >= here[1]:
        raise Refused(
            f"Method '{method}' is shown label {highest}, and the student knows {here[1]} classes (0 to "
            f"{here[1] - 1}); mend the labels, or give the student a wider head."
        )
