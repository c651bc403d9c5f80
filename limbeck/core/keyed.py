"""Counted randomness: every draw is a hash of (seed, epoch, index, purpose, k).

So a draw does not depend on the batch a sample fell into, on the worker, the process or on how often we
resumed; and two views that name the same purpose see the same number. A `torch.Generator` per sample would
have to be made and seeded for every draw; here a whole batch is hashed at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.core.batch import Lesson

_WORD = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def number(*parts: int | str) -> int:
    """A 63-bit number fixed by `parts`: FNV-1a over their text, finished with splitmix64."""
    h = 0xCBF29CE484222325
    for byte in "\x1f".join(str(p) for p in parts).encode():
        h = ((h ^ byte) * 0x100000001B3) & _WORD
    h = ((h ^ (h >> 30)) * _MIX1) & _WORD
    h = ((h ^ (h >> 27)) * _MIX2) & _WORD
    return (h ^ (h >> 31)) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `parts`; for permutations and initial weights, where a hash per element is no
    help."""
    return torch.Generator().manual_seed(number(*parts))


def reseed(device: torch.device, *parts: int | str) -> None:
    """Seed the global generators that dropout draws from. `torch.manual_seed` would queue a call for every
    absent GPU, each time."""
    torch.default_generator.manual_seed(number(*parts))
    if device.type == "cuda":
        torch.cuda.manual_seed_all(number(*parts))


def keyed(lesson: Lesson, index: Int[Tensor, " b"], purpose: str, k: int = 1) -> Float[Tensor, "b {k}"]:
    """`k` uniform numbers in [0, 1) for each row, on the device of `index` (float32, 24 random bits)."""
    hashed = _traced if torch.compiler.is_compiling() else _hashed
    return hashed(index, lesson.seed, lesson.epoch, purpose, k)


AT_ONCE = 1 << 16
"""Numbers that are hashed together: their bits take twice what they do."""


def _hashed(index: Tensor, seed: int, epoch: int, purpose: str, k: int) -> Tensor:
    begin = number(seed, epoch, purpose, k)
    return _by_numpy(index, begin, k) if index.device.type == "cpu" else _by_torch(index, begin, k)


def _by_numpy(index: Tensor, begin: int, k: int) -> Tensor:
    """In place, and a part after the other: new arrays would cost more than the hash."""
    golden, mix1, mix2, first = (np.uint64(word) for word in (_GOLDEN, _MIX1, _MIX2, begin))
    rows, each = index.long().numpy().astype(np.uint64)[:, None], np.arange(k, dtype=np.uint64)
    drawn = np.empty((len(rows), k), np.float32)
    size = max(AT_ONCE // max(k, 1), 1)
    for start in range(0, len(rows), size):
        z = rows[start : start + size] * np.uint64(k) + each
        z *= golden
        z += first
        z ^= z >> 30
        z *= mix1
        z ^= z >> 27
        z *= mix2
        z ^= z >> 31
        z >>= 40
        there = drawn[start : start + size]
        np.multiply(z.view(np.int64), 2.0**-24, out=there, casting="unsafe", dtype=np.float32)
    return torch.from_numpy(drawn)


def _by_torch(index: Tensor, begin: int, k: int) -> Tensor:
    """The same where the index is: on an accelerator. Torch has no unsigned numbers of 64 bits."""
    drawn = torch.empty(len(index), k, dtype=torch.float32, device=index.device)
    size = max(AT_ONCE // max(k, 1), 1)
    for some, there in zip(index.long().split(size), drawn.split(size), strict=True):
        z = some[:, None] * k + torch.arange(k, device=index.device)
        z.mul_(_signed(_GOLDEN)).add_(begin)
        z.bitwise_xor_(_shift(z, 30)).mul_(_signed(_MIX1))
        z.bitwise_xor_(_shift(z, 27)).mul_(_signed(_MIX2))
        z.bitwise_xor_(_shift(z, 31))
        torch.mul(_shift(z, 40), 2.0**-24, out=there)
    return drawn


# A compiler cannot follow the text that `number` makes of the clock, and would trace anew every epoch.
_traced = torch.library.custom_op("limbeck::keyed", _hashed, mutates_args=())


@_traced.register_fake
def _(index: Tensor, seed: int, epoch: int, purpose: str, k: int) -> Tensor:
    return index.new_empty(len(index), k, dtype=torch.float32)


def keyed_normal(
    lesson: Lesson, index: Int[Tensor, " b"], purpose: str, k: int = 1
) -> Float[Tensor, "b {k}"]:
    """`k` standard normal numbers for each row."""
    return torch.special.ndtri(keyed(lesson, index, purpose, k).clamp(min=2.0**-25))  # at 0 it is infinite


@contextmanager
def forked(*parts: int | str) -> Iterator[None]:
    """Inside, torch's global CPU generator is seeded by `parts`; outside, nobody notices."""
    with torch.random.fork_rng(devices=[]):  # modules are made on the CPU
        torch.default_generator.manual_seed(number(*parts))
        yield


def _signed(word: int) -> int:
    """The same 64 bits as the int64 that torch multiplies with wrap-around."""
    return word - (1 << 64) if word >> 63 else word


def _shift(z: Int[Tensor, "b k"], n: int) -> Int[Tensor, "b k"]:
    """Logical right shift: torch's `>>` on int64 copies the sign bit."""
    return (z >> n).bitwise_and_((1 << (64 - n)) - 1)
