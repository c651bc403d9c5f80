r"""Masked Autoencoders Enable Efficient Knowledge Distillers (Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou, Xie;
CVPR 2023; arXiv:2208.12256).

While a small autoencoder learns to reconstruct what is hidden of an image, its tokens $z^S_l$ of the visible
patches, lifted to the width of a larger autoencoder by a linear projector $\sigma_l$, should be that one's
tokens $z^T_l$ of the same patches. Of the teacher nothing runs but the blocks up to its last aligned layer:

$$L = \sum_l \operatorname*{mean}_{b,\,n,\,d}
  \left| \frac{\sigma_l(z^S_l)}{\lVert \sigma_l(z^S_l) \rVert_2}
  - \frac{z^T_l}{\lVert z^T_l \rVert_2} \right|$$

The class token is among the tokens, and no layer has gone through its network's last norm. By default one
layer of each is aligned, at three quarters of the depth, which our autoencoders call `stage3`; where the
teacher's is another, a recipe's `pairs` says so.

Weight: the mean of $|\cdot|$ over the $d$ coordinates of two unit vectors falls as $1/\sqrt d$: at $d = 1024$
it begins near 0.035. A weight of 1, the paper's, is then very little; with `target_norm = "none"` it is much.

Departures from the paper:
- Its equation has no lengths taken out: that is `target_norm = "none"`. Tokens grow from block to block, and
  their gap then drowns the reconstruction; so the default is what the official code does (`"l2"`), and
  `"layernorm"` standardises each token of the teacher alone.
- The projector is one linear layer, the paper's choice, without its options of an MLP.

Departures from the official code (UCSC-VLAA/DMAE):
- It runs the whole teacher, its decoder too, at every step, and throws the answer away; here it stops.
- It takes lengths out only where there are projectors; here there always are.
- The loss that it prints leaves this term out.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.maps import shown
from limbeck.pieces.similarity import unit

TARGET_NORMS = ("l2", "layernorm", "none")


def align(s: Float[Tensor, "b n d"], t: Float[Tensor, "b n d"], target_norm: str = "l2") -> Float[Tensor, ""]:
    """The mean absolute gap between tokens: of both at length 1 (`l2`), of the student's and the teacher's
    standardised (`layernorm`), or of both as they are (`none`)."""
    s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, t))
    if target_norm == "l2":
        s, t = unit(s.flatten(0, 1)), unit(t.flatten(0, 1))
    elif target_norm == "layernorm":
        t = F.layer_norm(t, t.shape[2:])
    return F.l1_loss(s, t)


class DMAE(Method):
    """Tokens of the visible patches, at three quarters of the depth, through a projector that is dropped
    after training."""

    card = Card(
        "arXiv:2208.12256",
        2023,
        ("feature",),
        taps=("stage3",),
        fidelity="code",  # both sides at length 1
        per_sample=True,
        reads_out=False,
    )
    cosine: Tensor

    def __init__(self, taps: Sequence[str] = ("stage3",), target_norm: str = "l2") -> None:
        super().__init__()
        if target_norm not in TARGET_NORMS:
            raise Refused(
                f"The target_norm of 'dmae' is '{target_norm}', expected one of {', '.join(TARGET_NORMS)}."
            )
        self.taps, self.target_norm = tuple(taps), target_norm
        self.register_buffer("cosine", torch.zeros(()), persistent=False)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        for tap in self.taps:
            here, there = s.at[tap], t.at[tap]
            if not here.ndim == there.ndim == 3 or here.shape[1] != there.shape[1]:
                raise Refused(
                    f"Method 'dmae' compares tokens (rows, tokens, width) of the same patches, and "
                    f"{shown(tap, s, t)}; take two networks with patches of one size, and give the stage and "
                    "the teacher the same view = { name = 'mask', … }."
                )
        widths = [(s.at[tap].shape[2], t.at[tap].shape[2]) for tap in self.taps]
        self.projects = nn.ModuleList(nn.Linear(here, there) for here, there in widths)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        pairs = [
            (project(s.at[tap]), t.at[tap]) for project, tap in zip(self.projects, self.taps, strict=True)
        ]
        with torch.no_grad():
            alike = [F.cosine_similarity(here.float(), there.float(), dim=2).mean() for here, there in pairs]
            self.cosine.copy_(torch.stack(alike).mean())
        return torch.stack([align(here, there, self.target_norm) for here, there in pairs]).sum()

    def figures(self) -> dict[str, float]:
        """How alike the aligned tokens point: the mean cosine over tokens, rows and layers."""
        return {"cosine": float(self.cosine)}
