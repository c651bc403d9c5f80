"""Probe: a view that turns b rows into 4b with joint labels (SLA, HSSAKD), for a student and its teacher."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import Batch, Card, Distiller, Frozen, Method, Refused, Seen, Term
from limbeck.core.batch import IGNORE
from limbeck.engine import Engine, Pace
from limbeck.models.cnn import CNN
from limbeck.schemes.offline import Offline
from limbeck.views.rotations import rotations

CLASSES = 3


class Match(Method):
    """Squared distance of the answers, a mean of one term a row."""

    card = Card("the least a method can be", 2025, ("response",), per_sample=True, zero_at_match=True)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return (s.out - t.out).square().sum(1).mean()


@dataclass
class Once:
    """A loader of one batch."""

    batch: Batch
    steps: int = 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield self.batch


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4 * CLASSES)).double()


def example() -> Batch:
    """Ten images, seven of them labelled, in parts that differ when it is cut."""
    x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0, IGNORE, IGNORE, 2, 1, IGNORE, 1, 0, 2, 2])
    return Batch(x, y, torch.arange(20, 30))


def test_student_and_teacher_see_the_same_turns() -> None:
    student, batch = network(0), example()
    teacher = Frozen(copy.deepcopy(student), view=rotations)
    distiller = Distiller(student, teacher, Match(), example=batch, view=rotations)
    sight = distiller.see(batch)
    assert len(sight.students[0][0].out) == len(sight.teachers[0].out) == 40
    assert distiller.losses(sight)["match"] == 0  # equal networks, so row by row the same image


def test_the_labelled_mean_is_over_the_turned_rows() -> None:
    student, batch = network(0), example()
    distiller = Distiller(student, Frozen(network(1), view=rotations), Match(), example=batch, view=rotations)
    errors = []
    for image, label in zip(batch.x, batch.y.tolist(), strict=True):
        for turn in range(4) if label != IGNORE else ():
            scores = student(image.rot90(turn, (1, 2))[None])[0]
            errors.append(scores.logsumexp(0) - scores[label * 4 + turn])
    assert len(errors) == 28
    torch.testing.assert_close(distiller(batch)["task"], torch.stack(errors).mean(), rtol=1e-12, atol=0)


def test_a_pair_with_batch_norm_learns_something_finite() -> None:
    student, teacher = CNN(4 * CLASSES, widths=(4, 8)), CNN(4 * CLASSES, widths=(8, 8))
    batch = example().map(lambda v: v.float() if v.is_floating_point() else v)
    distiller = Distiller(student, Frozen(teacher, view=rotations), Match(), example=batch, view=rotations)
    losses = distiller(batch)
    losses["loss"].backward()
    assert losses["logits"].shape == (40, 4 * CLASSES) and losses["loss"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_a_term_may_turn_its_rows_while_the_task_sees_them_upright() -> None:
    """HSSAKD's shape: hard labels for upright images, the teacher's answers for all four turns."""
    student, teacher, batch = network(0), network(1), example()
    term = Term(Match(), (Frozen(teacher, view=rotations),), view=rotations)
    losses = Distiller(student, None, term, example=batch)(batch)
    turned = rotations(batch).x
    gap = (student(turned) - teacher(turned)).square().sum(1).mean()
    torch.testing.assert_close(losses["match"], gap, rtol=1e-12, atol=0)
    upright = F.cross_entropy(student(batch.x), batch.y, ignore_index=IGNORE)
    torch.testing.assert_close(losses["task"], upright, rtol=1e-12, atol=0)


def test_a_teacher_that_sees_plain_rows_is_refused() -> None:
    with pytest.raises(Refused, match=r"'match' .* 40 rows of the student with 10 of the teacher"):
        Distiller(network(0), network(1), Term(Match(), view=rotations), example=example())


def gradient(accumulate: int) -> dict[str, Tensor]:
    """What one step of SGD at rate 1 takes off each weight; the batch is cut first and each part turned."""
    student, batch = network(0), example()
    distiller = Distiller(student, Frozen(network(1), view=rotations), Match(), example=batch, view=rotations)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    scheme = Offline(distiller)
    pace = Pace(torch.optim.SGD(distiller.parameters(), lr=1.0), lambda step: 1.0)
    for _ in Engine(scheme, Once(batch), {"student": pace}, epochs=1, accumulate=accumulate).lessons():
        pass
    return {name: before[name] - p.detach() for name, p in student.named_parameters()}


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_add_up_to_the_gradient_of_the_whole(parts: int) -> None:
    whole, cut = gradient(1), gradient(parts)
    assert all(g.abs().max() > 0.01 for g in whole.values())
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)
