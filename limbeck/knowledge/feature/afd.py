r"""Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching (Ji, Heo, Park; AAAI
2021; arXiv:2102.02973).

Nobody says which layer of the student learns from which of the teacher's: each of the teacher's asks all of
the student's, for each row anew. $u_t$ and $v_s$ are the maps' means over positions, a linear layer and a
BatchNorm (for the student a ReLU too), $B_t$ is a linear layer and a BatchNorm for each layer of the
teacher, $p$ are learned positions, $q$ the energy of a map's positions as a unit vector (as in `at`), and
$q_{s \to t}$ the student's, averaged onto the teacher's grid of $n_t$ positions:

$$\alpha_{s,t} = \operatorname*{softmax}_s
    \frac{\langle u_t, B_t v_s \rangle + \langle p_t, p_s \rangle}{\sqrt d}, \qquad
  L = \sum_t \operatorname*{mean}_b \sum_s \alpha_{s,t} \,
    \frac{1}{n_t} \lVert q_{s \to t} - q_t \rVert^2$$

Weight: 200 in the official code (clovaai/attention-feature-distillation), beside 0.9 of KD at temperature 4
and the labels. It is no large weight, as in `at`: a distance is at most $2/n_t$. So a teacher's layer of a
fine grid counts for less than one of a coarse grid, and each finds its students by itself.

Both networks are looked at at the end of each stage. The paper looks at every residual block (of ResNet-110
at every second), which a recipe says by the blocks' paths, for example for resnet8x4 and resnet20:
`taps = ["layer1.0", "layer2.0", "layer3.0"]`, `teacher_taps = ["layer1.0", "layer1.1", "layer1.2", …]`.
Numbers of layers, widths and grids need not agree.

Departures from the official code:
- Its linear layers have a bias that their BatchNorm cancels, and the BatchNorm of $B$ one that the softmax
  cancels; here they have none, or one that stays 0.
- The squared distance comes from the cosine, and energies are in units of a row's largest: the same numbers
  in less memory, at any scale. A map of zeros attends nowhere: $q = 0$.
- Tokens are looked at as the map that they make; the paper has none.

BatchNorm compares the rows of a batch, here as in the student itself; a batch to learn from must have two.
The weights learn from the loss that they weigh, and so drift to the pairs that are easiest: watch `entropy`
and `share.TAP`, how much of all weight is on a layer of the student.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.pieces.attention_maps import (
    AttentionWatch,
    LayerVectors,
    attention_gaps,
    expect_layers,
    expect_rows,
    similarity,
)
from limbeck.pieces.maps import as_map


def afd(
    alpha: Float[Tensor, "b t s"], gap: Float[Tensor, "b t s"], positions: Float[Tensor, " t"]
) -> Float[Tensor, ""]:
    """Squared distances (each a sum over `positions`) weighed over the student's layers, the sum over the
    teacher's."""
    return ((alpha * gap).sum(2) / positions).sum(1).mean()


class AFD(Method):
    """Every layer of the teacher finds its students; the attention is dropped after training.

    width: of the vectors that are compared. taps: the student's layers. teacher_taps: the teacher's.
    """

    card = Card(
        "arXiv:2102.02973",
        2021,
        ("feature",),
        taps=("stage1", "stage2", "stage3"),
        fidelity="code",
        per_sample=True,
        reads_out=False,
    )

    def __init__(
        self,
        width: int = 128,
        taps: Sequence[str] = ("stage1", "stage2", "stage3"),
        teacher_taps: Sequence[str] = ("stage1", "stage2", "stage3"),
    ) -> None:
        super().__init__()
        if width < 1 or not taps or not teacher_taps:
            raise Refused(
                f"Method 'afd' was given width {width}, {len(taps)} taps and {len(teacher_taps)} "
                "teacher_taps; expected a width of 1 or more and at least one tap of each network."
            )
        self.width, self.taps, self.teacher_taps = width, tuple(taps), tuple(teacher_taps)

    def teacher_looks(self) -> tuple[str, ...]:
        return self.teacher_taps

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        expect_layers("afd", self.taps, s, self.teacher_taps, t)
        here, there = self._maps(s, t)
        expect_rows("afd", len(here[0]))
        self.student, self.teacher = LayerVectors(here, self.width), LayerVectors(there, self.width)
        several = self.width * len(there)
        self.answer = nn.Sequential(
            nn.ReLU(), nn.Linear(self.width, several, bias=False), nn.BatchNorm1d(several)
        )
        self.answer[2].bias.requires_grad_(False)  # the same for all students: the softmax cancels it
        self.watch = AttentionWatch(len(there), len(here))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Float[Tensor, ""]:
        here, there = self._maps(s, t)
        if self.training:
            expect_rows("afd", len(here[0]))
        alpha = self.attend(here, there)
        self.watch(alpha)
        _, gap = attention_gaps(here, there)
        positions = torch.tensor([x.shape[2] * x.shape[3] for x in there]).to(gap)
        return afd(alpha, gap.mT, positions)

    def attend(
        self, s: Sequence[Float[Tensor, "b _ _ _"]], t: Sequence[Float[Tensor, "b _ _ _"]]
    ) -> Float[Tensor, "b t s"]:
        """How much each layer of the teacher teaches each of the student's; 1 over these."""
        queries = self.teacher(t)
        keys = self.answer(self.student(s).flatten(0, 1)).view(len(queries), len(s), len(t), -1)
        products = torch.einsum("btd,bstd->bts", queries, keys)
        return similarity(products, self.teacher.position, self.student.position).softmax(2)

    def figures(self) -> dict[str, float]:
        share = self.watch.share.mean(0)
        return {
            **self.watch.figures(),
            **{f"share.{tap}": float(x) for tap, x in zip(self.taps, share, strict=True)},
        }

    def _maps(self, s: Seen, t: Seen) -> tuple[list[Tensor], list[Tensor]]:
        return [as_map(s.at[tap]) for tap in self.taps], [as_map(t.at[tap]) for tap in self.teacher_taps]
