"""A block against loops, token by token."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.pieces.transformer import Block, attention


def tokens(b: int, n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    width = q.shape[2] // heads
    out = torch.empty_like(q)
    for b in range(len(q)):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            for n in range(q.shape[1]):
                scores = [math.exp(float(q[b, n, own] @ one[own]) / math.sqrt(width)) for one in k[b]]
                shares = [score / sum(scores) for score in scores]
                out[b, n, own] = sum(share * one[own] for share, one in zip(shares, v[b], strict=True))
    return out


def block(width: int = 8, heads: int = 2, mlp_ratio: float = 2.0) -> Block:
    torch.manual_seed(0)
    return Block(width, heads, mlp_ratio).double().requires_grad_(False)


def test_attention_equals_the_loop() -> None:
    q, k, v = tokens(2, 3, 6), tokens(2, 5, 6, seed=1), tokens(2, 5, 6, seed=2)
    for heads in (1, 2, 3):
        torch.testing.assert_close(attention(q, k, v, heads), slow_attention(q, k, v, heads))


def test_attention_gradcheck() -> None:
    inputs = [tokens(2, 3, 4, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, 2), inputs)


def test_a_block_adds_attention_then_an_mlp_each_behind_its_norm() -> None:
    one, x = block(), tokens(2, 5, 8)
    q, k, v = (F.layer_norm(x, (8,)) @ one.qkv.weight.T + one.qkv.bias).split(8, 2)
    x2 = x + slow_attention(q, k, v, 2) @ one.out.weight.T + one.out.bias
    first, _, second = one.mlp
    hidden = F.gelu(F.layer_norm(x2, (8,)) @ first.weight.T + first.bias)
    torch.testing.assert_close(one(x), x2 + hidden @ second.weight.T + second.bias)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_sizes_are_as_asked(ratio: float) -> None:
    shapes = [tuple(p.shape) for p in block(12, 3, ratio).mlp.parameters()]
    hidden = int(12 * ratio)
    assert shapes == [(hidden, 12), (hidden,), (12, hidden), (12,)]


def test_the_order_of_tokens_means_nothing_to_it() -> None:
    """Positions are for whoever uses it to add."""
    one, x = block(), tokens(2, 5, 8)
    torch.testing.assert_close(one(x.flip(1)), one(x).flip(1))
    alone = torch.cat([one(token) for token in x.split(1, 1)], 1)
    assert not torch.allclose(one(x), alone), "tokens do not see each other"
