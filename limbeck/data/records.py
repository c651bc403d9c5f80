r"""How an answer becomes bytes of fixed size, and an answer again: one record a sample.

A record is a few columns side by side, packed and little-endian. What a teacher answers (`out`) may be kept
whole, or only its largest entries: `top` keeps probabilities, as TinyViT does (K. Wu et al.; ECCV 2022;
arXiv:2207.10666), `top-logits` the logits themselves. What is not kept of $C$ classes shares the mass that is
left evenly. With kept probabilities $v_1 \ge \dots \ge v_K$ of classes $i_1 \dots i_K$:

$$q_c = \frac{v_k}{Z} \text{ if } c = i_k, \qquad
q_c = \frac{1}{Z} \min\Bigl(v_K, \frac{1 - \sum_k v_k}{C - K}\Bigr) \text{ else}$$

and the answer read back is $\log q$, whose softmax is $q$. Departures from TinyViT's code: the rest is
clamped between 0 and $v_K$ and $Z$ makes the sum 1 again, for half precision can keep more than all; no
probability is below $2^{-40}$, so that its logarithm is a number; K = C leaves no rest to divide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from limbeck.core.refused import Refused

WHOLE = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}  # NumPy has no bfloat16; its bits are kept
TOP = ("top", "top-logits")
OUT_KINDS, TAP_KINDS = (*WHOLE, *TOP), (*WHOLE, "int8")
FLOOR = 2.0**-40


@dataclass(frozen=True)
class Field:
    """What is kept of one tensor of an answer.

    name: `out`, or a tap's. kind: of `OUT_KINDS` for out, of `TAP_KINDS` for a tap; int8 has one scale a
    record. shape: of one sample's tensor, classes first for out. top: how many classes the kinds `top` keep.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    top: int = 0

    def __post_init__(self) -> None:
        known = OUT_KINDS if self.name == "out" else TAP_KINDS
        if self.kind not in known:
            raise Refused(f"'{self.name}' cannot be kept as '{self.kind}'; expected {', '.join(known)}.")
        if self.kind in TOP and not (self.shape and 1 <= self.top <= self.shape[0]):
            raise Refused(
                f"The top {self.top} of '{self.name}' were asked for, and it has "
                f"{self.shape[0] if self.shape else 0} classes; ask for as many at most, and for 1 at least."
            )

    def columns(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, NumPy's dtype, shape) of each column."""
        if self.kind in WHOLE:
            return [(self.name, WHOLE[self.kind], self.shape)]
        if self.kind == "int8":
            return [(f"{self.name}:scale", "<f4", ()), (self.name, "|i1", self.shape)]
        classes, *place = self.shape
        width = "|u1" if classes <= 1 << 8 else "<u2" if classes <= 1 << 16 else "<i4"
        rest = 1 if self.kind == "top-logits" else 0
        return [
            (f"{self.name}:class", width, (*place, self.top)),
            (self.name, "<f2", (*place, self.top + rest)),
        ]

    def encode(self, v: Tensor) -> dict[str, np.ndarray]:
        """The columns of a batch (b *shape). Raises `Refused` for what is not finite or too large for the
        kind."""
        if tuple(v.shape[1:]) != self.shape:
            raise Refused(
                f"'{self.name}' of one sample has shape {tuple(v.shape[1:])}, expected {self.shape}, as in "
                "the store's first batch; a store keeps records of one size."
            )
        v = v.detach().to("cpu", torch.float32)
        if self.kind == "int8":
            scale = v.flatten(1).abs().amax(1) / 127
            steps = v / scale.where(scale > 0, torch.ones(())).view(-1, *[1] * (v.ndim - 1))
            self._finite(scale)
            return {self.name: steps.round().to(torch.int8).numpy(), f"{self.name}:scale": scale.numpy()}
        if self.kind in WHOLE:
            v = v.to(getattr(torch, self.kind))
            self._finite(v)
            return {self.name: (v.view(torch.int16) if v.dtype == torch.bfloat16 else v).numpy()}
        v = v.movedim(1, -1)
        self._finite(v)
        kept, classes = (v.softmax(-1) if self.kind == "top" else v).topk(self.top, -1)
        if self.kind == "top-logits":
            others = v.scatter(-1, classes, -math.inf).logsumexp(-1, keepdim=True)
            others = others - math.log(max(self.shape[0] - self.top, 1))
            kept = torch.cat([kept, kept[..., -1:] if self.top == self.shape[0] else others], -1)
            self._finite(kept.half())
        return {self.name: kept.half().numpy(), f"{self.name}:class": classes.numpy()}

    def decode(self, records: np.ndarray) -> Tensor:
        """What a batch of records says (b *shape), float32."""
        column = records[self.name]
        if self.kind == "int8" or self.kind in WHOLE:
            v = torch.from_numpy(np.ascontiguousarray(column))
            if self.kind == "int8":
                scale = torch.from_numpy(np.ascontiguousarray(records[f"{self.name}:scale"]))
                return v.float() * scale.view(-1, *[1] * len(self.shape))
            return (v.view(torch.bfloat16) if self.kind == "bfloat16" else v).float()
        kept = column.reshape(-1, column.shape[-1])
        logs = spread(kept, self.shape[0]) if self.kind == "top" else kept.astype(np.float32)
        chosen = records[f"{self.name}:class"].reshape(-1, self.top)
        rows = torch.from_numpy(dense(chosen, logs, self.shape[0]))
        if len(self.shape) == 1:
            return rows
        return rows.view(*column.shape[:-1], self.shape[0]).movedim(-1, 1)

    def _finite(self, v: Tensor) -> None:
        if not bool(torch.isfinite(v).all()):
            raise Refused(
                f"'{self.name}' has values that are NaN, infinite or too large to be kept as {self.kind}; "
                "look at the teacher's answers, or keep it as float32."
            )


# In NumPy, and in few calls: each batch of a lesson comes through here, so small that calls are its cost.
def spread(v: Float[np.ndarray, "b top"], classes: int) -> Float[np.ndarray, "b top+1"]:
    """log q of the kept classes, whose probabilities fall; in the last column that of each other class."""
    others = classes - v.shape[1]
    q = np.empty((v.shape[1] + 1, len(v)), np.float32)  # class by class: rows as short as these are slow
    kept, rest = q[:-1], q[-1]
    kept[:] = v.T
    mass = kept.sum(0)
    np.divide(1 - mass, max(others, 1), out=rest)
    np.maximum(q, FLOOR, out=q)
    np.minimum(rest, kept[-1], out=rest)
    q /= mass + others * rest
    return np.log(q, out=q).T


def dense(
    chosen: Integer[np.ndarray, "b top"], logs: Float[np.ndarray, "b top+1"], classes: int
) -> Float[np.ndarray, "b k"]:
    """`logs` at the chosen classes, their last column at all others."""
    full = logs[:, -1].repeat(classes)
    full[np.arange(0, full.size, classes)[:, None] + chosen] = logs[:, :-1]
    return full.reshape(-1, classes)


def record(fields: Sequence[Field]) -> np.dtype:
    """The whole record, its columns packed."""
    return np.dtype([column for field in fields for column in field.columns()])


def encode(fields: Sequence[Field], answer: Mapping[str, Tensor]) -> np.ndarray:
    """The records of a batch: `answer` has a tensor for each field's name."""
    records = np.zeros(len(answer["out"]), record(fields))
    for field in fields:
        for column, values in field.encode(answer[field.name]).items():
            records[column] = values
    return records
