r"""Data-Free Learning of Student Networks, DAFL (Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian; ICCV 2019;
arXiv:1904.01186).

There is no data: a generator $G$ invents images that the trained teacher $t$ takes for the kind it learned
from, and the student learns the teacher's answers on them. With $z$ a random code, $x = G(z)$, $p = t(x)$ and
$f$ the teacher's pooled features, the generator lowers

$$L_G = \mathrm{CE}(p, \arg\max p) - \alpha\, \tfrac1{bd} \lVert f \rVert_1
  + \beta \sum_k \bar p_k \log \bar p_k$$

(a sure answer, features that are alive, classes in balance), and the student lowers its terms, the paper's
being `kd`, on the same images, detached. In a recipe: `learner = ["student", "generator"]`,
`scheme = "dafl"`, and a model such as `generator = "invent"`. The images of the recipe's data are never
looked at: it says how many batches an epoch has, and what is scored.

Defaults are the paper's, α = 0.1 and β = 5. As in the authors' code generator and student learn from the
same images and the same answers of the teacher, whose BatchNorm keeps its own statistics, and $f$ is divided
by both its axes ($b d$), where the paper sums over $d$.

Departures from that code:
- It takes the logarithm of $\bar p$ to base 10: its β of 5 is 2.17 here.
- For CIFAR-10 it weighs the three losses 0.05, 0.01 and 5. The first is always 1 here; what counts is their
  ratio, and the generator's learning rate.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch, Lesson
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller, Sight
from limbeck.core.keyed import forked, keyed_normal
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme, Turn, to_work
from limbeck.core.taps import unmoved
from limbeck.core.teachers import Teacher, each_once


def one_hot(t: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Cross-entropy of the teacher's logits with its own first choice: low when it is sure."""
    return F.cross_entropy(t, t.argmax(1))


def aliveness(f: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Minus the mean size of the teacher's features: real images wake more of them than noise does."""
    return -f.abs().mean()


def imbalance(t: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Minus the entropy of the mean answer: least, −log k, when every class is invented equally often."""
    log = t.log_softmax(1).logsumexp(0) - math.log(len(t))  # so that a class nobody is, is no log 0
    return (log.exp() * log).sum()


def codes(lesson: Lesson, index: Int[Tensor, " b"], width: int) -> Float[Tensor, "b {width}"]:
    """Normal codes for the generator, fixed by (seed, epoch, index)."""
    return keyed_normal(lesson, index, "code", width)


class DAFL(Scheme):
    """Args: distiller, the student's lesson, built on invented images; generator, from codes (b d) to images,
    whose `codes` says how wide a code is; teacher, who judges the images; alpha and beta as above; tap, the
    teacher's features that are to be alive."""

    def __init__(
        self,
        distiller: Distiller,
        generator: nn.Module,
        teacher: Teacher,
        alpha: float = 0.1,
        beta: float = 5.0,
        tap: str = "pooled",
    ) -> None:
        self.distiller, self.generator, self.teacher = distiller, generator, teacher
        self.alpha, self.beta, self.tap = alpha, beta, tap
        if alpha:
            teacher.look((tap,))

    @classmethod
    def staged(cls, cast: Cast, alpha: float = 0.1, beta: float = 5.0, tap: str = "pooled") -> "DAFL":
        student, inventor = cast.names("dafl", "student", "generator")
        generator = cast.learners[inventor]
        teachers = each_once(teacher for term in cast.terms for teacher in term.teachers)
        if len(teachers) != 1:
            raise Refused(
                f"The scheme 'dafl' has one teacher, whom its images are made for, and the terms name "
                f'{len(teachers)}; write terms = [{{ method = "kd", teacher = "teacher" }}].'
            )
        if "teacher_gradient" not in teachers[0].offers:
            raise Refused(
                f"The scheme 'dafl' needs teacher_gradient, which a {type(teachers[0]).__name__} teacher "
                "cannot give; use a live teacher."
            )
        if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
            raise Refused(f"The weights are alpha = {alpha} and beta = {beta}, expected numbers >= 0.")
        if getattr(teachers[0], "view", None) is not None:
            raise Refused(
                "The teacher has a view of its own, and invented images are judged as they are; leave its "
                "`view` out."
            )
        if not isinstance(getattr(generator, "codes", None), int):
            raise Refused(
                f"'{inventor}' is a {type(generator).__name__}, which does not say in `codes` how wide a "
                "code it makes an image from; choose the model `invent`, or give yours that number."
            )
        to_work(generator)
        with torch.no_grad(), unmoved(generator), forked(cast.seed, "dry run"):
            example = _without_data(cast.example, generator)
        shape, wanted = example.x.shape[1:], cast.example.x.shape[1:]
        if shape != wanted:
            raise Refused(
                f"'{inventor}' makes images of {tuple(shape)}, and the data it stands in for has "
                f"{tuple(wanted)}; give it the knobs `channels` and `size`."
            )
        lesson = replace(cast, example=example, task=None, peers={}).distiller(student)
        return cls(lesson, generator, teachers[0], alpha, beta, tap)

    def turns(self, batch: Batch) -> Iterator[Turn]:
        invented = _without_data(batch, self.generator)
        judged = self.teacher.through(invented.x)
        losses = {"one_hot": one_hot(judged.out), "balance": self.beta * imbalance(judged.out)}
        if self.alpha:
            losses["alive"] = self.alpha * aliveness(judged.at[self.tap])
        images = invented.x.detach()
        yield "generator", losses
        sight = Sight(self.distiller.show(invented.replace(x=images)), [judged.detach()])
        yield from self.distiller.turns(sight)

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        inventing = {name: p for name, p in self.generator.named_parameters() if p.requires_grad}
        return {"generator": inventing, **self.distiller.players()}

    def figures(self) -> dict[str, float]:
        return self.distiller.figures()

    def shipped(self) -> nn.Module:
        return self.distiller.student

    def modules(self) -> Mapping[str, nn.Module]:
        return {"distiller": self.distiller, "generator": self.generator}

    def teachers(self) -> tuple[Teacher, ...]:
        return self.distiller.teachers()

    def refuse_cut(self) -> str | None:
        return "balance"  # it compares the rows of a batch


def _without_data(batch: Batch, generator: nn.Module) -> Batch:
    """Invented images in place of a batch, of which only the number and names of its rows are used."""
    assert batch.index is not None
    lesson = replace(batch.lesson, labels=None)
    z = codes(lesson, batch.index, generator.codes)  # type: ignore[arg-type]
    return Batch(generator(z), None, batch.index, lesson)
