"""Normal noise on every number of x: the perturbation of Mean Teacher (Tarvainen & Valpola; NeurIPS 2017;
arXiv:1703.01780) and of many others."""

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.keyed import keyed_normal
from limbeck.core.refused import Refused


def noise(batch: Batch, sd: float = 0.15, purpose: str = "noise") -> Batch:
    """x plus noise of standard deviation `sd`, in the units of x as models are shown it. Two models under one
    `purpose` see the same noise, under two they see different noise."""
    if sd < 0:
        raise Refused(f"Noise of standard deviation {sd} was asked for, expected a number >= 0; try 0.15.")
    if not isinstance(batch.x, Tensor) or not batch.x.is_floating_point():
        found = f"{batch.x.dtype}" if isinstance(batch.x, Tensor) else f"a {type(batch.x).__name__}"
        raise Refused(
            f"Noise is added to numbers, and x is {found}; use this view as a model's `view`, where x is "
            "float, not in `augment`."
        )
    if batch.index is None:
        raise Refused("Noise is drawn by each row's number, and the batch has no `index`; give it one.")
    drawn = keyed_normal(batch.lesson, batch.index, purpose, batch.x[0].numel())
    return batch.replace(x=batch.x + sd * drawn.view_as(batch.x).to(batch.x))
