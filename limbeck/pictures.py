"""Pictures for a page: what an autoencoder makes of images that it is shown in part."""

import torch

from limbeck.answers import picture
from limbeck.core.taps import Seen
from limbeck.data.loader import Data, Loader
from limbeck.tasks.reconstruct import Reconstruct

SHOWN = 6


def reconstructions(
    model: torch.nn.Module, task: Reconstruct, data: Data, rows: int = SHOWN
) -> list[dict[str, str | None]]:
    """The first `rows` images of a data set, each as `original`, `masked` (what is hidden is black) and
    `reconstructed` (what is hidden is the model's), all PNGs in data URIs; None for what is no picture. Masks
    are those of the score."""
    batch = next(Loader(data, rows, seed=0).once(rows))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        home = next(model.parameters()).device
        with torch.no_grad():
            whole = batch.to(home)
            seen, shown = task.masked(Seen(model(whole.x), model=model), whole)
            told = task.filled(seen, shown)
    finally:
        for module, mode in modes:
            module.training = mode
    mean, std = (torch.as_tensor(v).reshape(-1, 1, 1) for v in (data.mean, data.std))
    sides = {side: (x.cpu() * std + mean).clamp(0, 1) for side, x in {"original": whole.x, **told}.items()}
    return [{side: picture(x[row]) for side, x in sides.items()} for row in range(whole.rows)]
