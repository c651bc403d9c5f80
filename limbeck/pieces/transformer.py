"""A transformer's block with its norms in front (Vaswani et al.; 2017; arXiv:1706.03762. Dosovitskiy et al.;
ICLR 2021; arXiv:2010.11929), for methods that learn to read tokens.

Its attention is torch's fused one, which does not show where it looks; the blocks of `models/vit.py` do.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def attention(
    q: Float[Tensor, "b n d"], k: Float[Tensor, "b m d"], v: Float[Tensor, "b m d"], heads: int
) -> Float[Tensor, "b n d"]:
    r"""Each of n tokens takes a mean of m values, $\operatorname{softmax}(q k^\top / \sqrt{d / heads})\, v$,
    in each head by itself. `heads` divides d."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Tokens look at each other, then each thinks for itself; both are added to what they were.

    width: of a token. heads: of attention; they divide the width. mlp_ratio: the MLP's hidden width, in
        widths.
    """

    def __init__(self, width: int, heads: int = 4, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=2)
        x = x + self.out(attention(q, k, v, self.heads))
        return x + self.mlp(self.norm2(x))
