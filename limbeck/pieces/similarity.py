"""How alike the rows of a batch are, by their directions and inner products. In float32 at least, autocast or
not."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

ONEDNN = torch.backends.mkldnn.is_available()
MANY = 4096
"""Vectors of a bank from which on the way of a product matters."""


def unit(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Rows of length 1. A row of zeros has no direction: it stays 0 and passes no gradient.

    `F.normalize` would multiply that gradient by 1e12.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square().sum(1, keepdim=True)
    long = square > 0
    return x * torch.where(long, torch.where(long, square, 1.0).rsqrt(), 0.0)  # at 0 rsqrt has no gradient


def gram(x: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """The inner product of every two rows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.T


def hsic(s: Float[Tensor, "b b"], t: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    r"""How alike two Gram matrices of the same b rows are, without what they owe to chance: 0 on average for
    independent features, however few the rows. b is 4 or more.

    $$\mathrm{HSIC}_1 = \frac{1}{b(b-3)} \Big( \operatorname{tr} S T
      + \frac{(1^\top S 1) (1^\top T 1)}{(b-1)(b-2)} - \frac{2}{b-2} \, 1^\top S T 1 \Big)$$

    of the matrices with zeros on their diagonals (Song, Smola, Gretton, Bedo, Borgwardt; JMLR 2012; averaged
    over batches by Nguyen, Raghu, Kornblith; ICLR 2021; arXiv:2010.15327).
    """
    b, itself = len(s), torch.eye(len(s), dtype=torch.bool, device=s.device)
    s, t = s.masked_fill(itself, 0.0), t.masked_fill(itself, 0.0)
    rows_s, rows_t = s.sum(1), t.sum(1)
    chance = rows_s.sum() * rows_t.sum() / ((b - 1) * (b - 2)) - 2 / (b - 2) * (rows_s * rows_t).sum()
    return ((s * t).sum() + chance) / (b * (b - 3))


def hsic_terms(s: Float[Tensor, "b d_s"], t: Float[Tensor, "b d_t"]) -> Float[Tensor, "3"]:
    """HSIC of student with teacher, of the student with itself and of the teacher with itself, all of inner
    products: what `cka` is made of, and what may be averaged over batches before."""
    exact = torch.promote_types(s.dtype, torch.float32)
    s, t = s.to(exact), t.to(exact)
    here, there = gram(s - s.mean(0)), gram(t - t.mean(0))  # it moves nothing, but keeps small what cancels
    return torch.stack([hsic(here, there), hsic(here, here), hsic(there, there)])


def cka(terms: Float[Tensor, "*stages 3"]) -> Float[Tensor, " *stages"]:
    r"""$\mathrm{HSIC}(s, t) / \sqrt{\mathrm{HSIC}(s, s) \, \mathrm{HSIC}(t, t)}$: 1 for features alike but
    for a rotation and a scale; about 0 for independent ones, so at times below. 0 where either does not
    vary."""
    st, ss, tt = terms.unbind(-1)
    varies = (ss > 0) & (tt > 0)
    scale = torch.where(varies, ss, 1.0).sqrt() * torch.where(varies, tt, 1.0).sqrt()  # at 0 no gradient
    return torch.where(varies, st / scale, 0.0)


def products(bank: Float[Tensor, "n d"], rows: Float[Tensor, "b d"]) -> Float[Tensor, "n b"]:
    """`bank @ rows.T`, for a bank of many vectors; without gradient."""
    maps = _as_maps(bank)
    if maps is None:
        return bank @ rows.T
    return F.conv2d(maps, rows[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(bank), -1)


def weighted(bank: Float[Tensor, "n d"], weights: Float[Tensor, "n b"]) -> Float[Tensor, "b d"]:
    """`weights.T @ bank`: the gradient of `products` in its rows; without one of its own."""
    maps = _as_maps(bank)
    if maps is None:
        return weights.T @ bank
    n, d, h, w = maps.shape
    b = weights.shape[1]
    slopes = weights.view(n, h, w, b).permute(0, 3, 1, 2)
    return conv2d_weight(maps, (b, d, 1, 1), slopes).view(b, d)


def _as_maps(bank: Float[Tensor, "n d"]) -> Float[Tensor, "maps d h w"] | None:
    """The bank as maps in `channels_last`, for whom a product is a convolution with 1x1 kernels, where that
    is the faster way: in float32 on a CPU torch gives convolutions of 16 maps or more to oneDNN and matrix
    products to MKL, which took two to three times as long on an AMD EPYC. None elsewhere."""
    if not ONEDNN or bank.device.type != "cpu" or bank.dtype != torch.float32 or len(bank) < MANY:
        return None
    maps = next((n for n in range(16, 1000) if len(bank) % n == 0), None)
    if maps is None:
        return None
    wide = next(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if len(bank) // maps % n == 0)
    return bank.view(maps, -1, wide, bank.shape[1]).permute(0, 3, 1, 2)
