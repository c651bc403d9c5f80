r"""TinyViT: Fast Pretraining Distillation for Small Vision Transformers (Wu et al.; ECCV 2022;
arXiv:2207.10666), as far as it is a loss: a lens.

The paper stores of a teacher's answer only the $K$ largest probabilities $v_1 \ge \dots \ge v_K$, of classes
$i_1 \dots i_K$, in half precision. The $C - K$ other classes share what is left evenly:

$$q_c = \frac{v_k}{Z} \text{ if } c = i_k, \qquad
q_c = \frac{1}{Z} \min\Bigl(v_K, \frac{1 - \sum_k v_k}{C - K}\Bigr) \text{ else}$$

Through this lens the teacher answers $\log q$, whose softmax is $q$; the student is left as it is. The
paper's loss is the cross-entropy of $q$, without label or temperature: a term `{ method = "kd", temperature =
1, through = [{ name = "top_k", k = 10 }] }` with `task_weight = 0`. $K$ is 10 for 1,000 classes, 100 for
21,841.

A store of `kind = "top"` keeps and gives back the same $q$, so a live teacher behind this lens and one that
is replayed teach alike, but for the rounding of a logarithm. What sparse answers cost in accuracy can then be
seen without writing any.

Departures from the official code (microsoft/Cream), as in our store: the rest is clamped between 0 and $v_K$
and $Z$ makes the sum 1 again, for rounded values can sum to more; no probability is below $2^{-40}$, so that
its logarithm is a number; $K = C$ leaves no rest to divide.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen

FLOOR = 2.0**-40


def top_k(s: Seen, t: Seen, k: int = 10) -> tuple[Seen, Seen, float]:
    """What is kept of the teacher's answer; the loss keeps its factor."""
    found = tuple(t.out.shape)
    if len(found) < 2 or not 1 <= k <= found[1]:
        raise Refused(
            f"Lens 'top_k' keeps {k} of a teacher's classes, and it answers {found}, expected (rows, "
            "classes, …) with as many at least; choose `k` from 1 to the number of classes."
        )
    return s, replace(t, out=sparse(t.out, k)), 1.0


def sparse(z: Float[Tensor, "b c *rest"], k: int) -> Float[Tensor, "b c *rest"]:
    """log q of logits z, float32."""
    classes = z.shape[1]
    v, chosen = z.float().softmax(1).topk(k, 1)
    v = v.half().float().clamp(min=FLOOR)
    others = classes - k
    rest = ((1 - v.sum(1, keepdim=True)) / max(others, 1)).clamp(min=FLOOR).minimum(v[:, -1:])
    total = v.sum(1, keepdim=True) + others * rest
    return (rest / total).log().expand(z.shape).clone().scatter_(1, chosen, (v / total).log())
