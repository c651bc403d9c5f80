"""What crosses process borders: gathering with gradient, and means over all processes. One process: the
identity.

Convention: every process computes *its share of one global loss*, and DDP or FSDP2 average the gradients. A
gathered loss is the same on every process; a mean over labelled rows divides by the average number of
labelled rows a process holds.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core.batch import IGNORE, Batch


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if processes() > 1 else 0


def gather(
    x: Float[Tensor, "b *rest"] | Int[Tensor, "b *rest"],
) -> Float[Tensor, "all *rest"] | Int[Tensor, "all *rest"]:
    """The rows of all processes, in rank order. Gradient flows back to the process a row came from."""
    return x if processes() == 1 else _Gather.apply(x)


def total(x: Tensor) -> Tensor:
    """Sum over processes, without gradient."""
    if processes() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def labelled_mean(values: Float[Tensor, " *rows"], batch: Batch) -> Float[Tensor, ""]:
    """Mean of `values` (one per label) over the rows that carry a label, of all processes and micro-batches;
    0 when none does.

    A mean over one's own labelled rows would be wrong whenever processes hold different numbers of them.
    """
    assert batch.y is not None
    where = batch.y != IGNORE
    exact = torch.promote_types(values.dtype, torch.float32)  # bfloat16 cannot count beyond 256
    count = total(where.sum()).to(exact) / processes() if batch.labelled is None else batch.labelled.to(exact)
    return torch.where(where, values, 0.0).sum(dtype=exact) / count.clamp(min=torch.finfo(exact).tiny)


class _Gather(torch.autograd.Function):
    """all_gather of unequal row counts. Backward: each process' loss saw my rows, so their gradients are
    summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(processes())]
        dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
        rows = [int(s) for s in sizes]
        padded = x.new_zeros(max(rows), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        ctx.start, ctx.stop = sum(rows[: rank()]), sum(rows[: rank() + 1])
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.stop]
