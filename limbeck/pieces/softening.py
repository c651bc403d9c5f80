"""Soft targets: answers at a temperature, and how far two of them are apart. Axis 1 is the classes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def log_soften(z: Float[Tensor, "b k *rest"], temperature: float) -> Float[Tensor, "b k *rest"]:
    r"""$\log p$ with $p_i = e^{z_i/T} / \sum_j e^{z_j/T}$: uniform for $T \to \infty$, one-hot for $T \to 0$.

    In float32 at least: the eight bits of bfloat16 cannot tell two softened classes apart.
    """
    return (z.to(torch.promote_types(z.dtype, torch.float32)) / temperature).log_softmax(1)


def kl(s: Float[Tensor, "b k *rest"], t: Float[Tensor, "b k *rest"]) -> Float[Tensor, "b *rest"]:
    r"""$\sum_i p_{t,i} (\log p_{t,i} - \log p_{s,i})$ of log-probabilities, for each row and position."""
    return F.kl_div(s, t, reduction="none", log_target=True).sum(1)
