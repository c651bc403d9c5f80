"""A label splits a row of logits: the one it names, and the others."""

import pytest
import torch
from torch import Tensor

from limbeck.pieces.target_class import others, target


def split(z: Tensor, y: Tensor) -> tuple[list[float], list[list[float]]]:
    """One row at a time."""
    rows = list(zip(z.tolist(), y.tolist(), strict=True))
    return [row[k] for row, k in rows], [row[:k] + row[k + 1 :] for row, k in rows]


def test_the_one_and_the_others_in_their_order() -> None:
    z, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 2])
    one, rest = split(z, y)
    assert target(z, y).tolist() == one
    assert others(z, y).tolist() == rest


def test_dense_labels() -> None:
    z, y = torch.randn(2, 4, 3, 5), torch.arange(30).reshape(2, 3, 5) % 4
    one, rest = split(z.movedim(1, -1).reshape(30, 4), y.flatten())
    assert target(z, y).flatten().tolist() == one
    assert others(z, y).movedim(1, -1).reshape(30, 3).tolist() == rest


def test_together_they_have_the_whole_gradient() -> None:
    z = torch.randn(6, 5).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 4, 2])
    (slope,) = torch.autograd.grad(2 * target(z, y).sum() + others(z, y).sum(), z)
    assert torch.equal(slope, 1.0 + torch.nn.functional.one_hot(y, 5))


@pytest.mark.parametrize("k", [2, 5])
def test_a_row_without_a_label_is_split_somewhere(k: int) -> None:
    """Whoever takes a mean leaves it out; until then it must be as good as any other."""
    z, y = torch.randn(3, k), torch.full((3,), -100)
    assert target(z, y).isfinite().all()
    assert others(z, y).shape == (3, k - 1)
