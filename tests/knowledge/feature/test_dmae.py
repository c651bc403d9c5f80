"""DMAE's alignment against a slow reference, its three targets, and a teacher that stops at its tap."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen, Tapped
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature.dmae import DMAE, TARGET_NORMS, align
from limbeck.models.autoencoder import MAE
from limbeck.tasks.reconstruct import Reconstruct
from limbeck.views.mask import mask

every_norm = pytest.mark.parametrize("target_norm", TARGET_NORMS)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


S, T = tokens(3, 4, 6), 2 * tokens(3, 4, 6, seed=1) + 1


def slow(s: Tensor, t: Tensor, target_norm: str) -> float:
    """Token by token, coordinate by coordinate."""

    def at_length_1(v: list[float]) -> list[float]:
        return [x / math.sqrt(sum(y * y for y in v)) for x in v]

    def standardised(v: list[float]) -> list[float]:
        mean = sum(v) / len(v)
        spread = math.sqrt(sum((x - mean) ** 2 for x in v) / len(v) + 1e-5)
        return [(x - mean) / spread for x in v]

    gaps = []
    for here, there in zip(s.flatten(0, 1).tolist(), t.flatten(0, 1).tolist(), strict=True):
        if target_norm == "l2":
            here, there = at_length_1(here), at_length_1(there)
        if target_norm == "layernorm":
            there = standardised(there)
        gaps += [abs(a - b) for a, b in zip(here, there, strict=True)]
    return sum(gaps) / len(gaps)


@every_norm
def test_it_is_the_equation(target_norm: str) -> None:
    assert align(S, T, target_norm).item() == pytest.approx(slow(S, T, target_norm), rel=1e-9)


@every_norm
def test_its_gradient_is_right(target_norm: str) -> None:
    s = S.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: align(s, T, target_norm), (s,))


@every_norm
def test_the_order_of_tokens_does_not_matter_if_it_is_the_same(target_norm: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(align(S[:, order], T[:, order], target_norm), align(S, T, target_norm))
    assert not torch.isclose(align(S[:, order], T, target_norm), align(S, T, target_norm))


def test_lengths_count_only_where_they_are_not_taken_out() -> None:
    factors = torch.tensor([0.5, 3.0, 1.0, 20.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(align(factors * S, T, "l2"), align(S, T, "l2"))
    torch.testing.assert_close(align(S, factors * T, "l2"), align(S, T, "l2"))
    torch.testing.assert_close(
        align(S, factors * T, "layernorm"), align(S, T, "layernorm"), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(align(3 * S, 3 * T, "none"), 3 * align(S, T, "none"))
    assert align(3 * S, T, "layernorm") > 1.5 * align(S, T, "layernorm")


def test_it_is_zero_where_they_agree() -> None:
    for target_norm in ("l2", "none"):
        assert align(T, T, target_norm) == 0
    standard = nn.functional.layer_norm(T, (6,))
    assert align(standard, T, "layernorm") < 1e-12 < align(T, T, "layernorm")


def test_a_unit_vectors_mean_gap_is_small_in_many_dimensions() -> None:
    """What the page says of the weight: 0.035 at 1024."""
    gap = align(tokens(64, 4, 1024), tokens(64, 4, 1024, seed=1))
    assert gap.item() == pytest.approx(2 / math.sqrt(math.pi * 1024), rel=0.02)


# --- the method ---


def seen(**at: Tensor) -> Seen:
    return Seen(None, at)


def built(s: Seen, t: Seen, **knobs: Any) -> DMAE:
    torch.manual_seed(0)
    method = DMAE(**knobs)
    method.build(s, t, Batch(S))
    return method.double()


@every_norm
def test_the_loss_is_the_sum_over_layers_each_through_its_projector(target_norm: str) -> None:
    taps = ("block1", "stage3")
    s = seen(block1=tokens(3, 4, 5), stage3=tokens(3, 4, 7, seed=2))
    t = seen(block1=T, stage3=tokens(3, 4, 9, seed=3))
    method = built(s, t, taps=taps, target_norm=target_norm)
    expected = 0.0
    for project, tap in zip(method.projects, taps, strict=True):
        lifted = s.at[tap] @ project.weight.detach().T + project.bias.detach()
        expected += slow(lifted, t.at[tap], target_norm)
    assert method.loss(s, t, Batch(S)).item() == pytest.approx(expected, rel=1e-6)


def identity(method: DMAE) -> DMAE:
    with torch.no_grad():
        for project in method.projects:
            nn.init.eye_(project.weight)
            project.bias.zero_()
    return method


@pytest.mark.parametrize("target_norm", ["l2", "none"])
def test_a_student_that_is_its_teacher_loses_nothing_once_the_projector_says_so(target_norm: str) -> None:
    same = seen(stage3=T)
    method = built(same, same, target_norm=target_norm)
    assert method.loss(same, same, Batch(S)) > 0.01 and not method.card.zero_at_match
    assert identity(method).loss(same, same, Batch(S)) == 0


def test_its_figure_is_the_mean_cosine() -> None:
    s, t = seen(stage3=S), seen(stage3=T)
    method = identity(built(s, t))
    method.loss(s, t, Batch(S))
    slow_cosine = (S * T).sum(2) / (S.norm(dim=2) * T.norm(dim=2))
    assert method.figures() == {"cosine": pytest.approx(slow_cosine.mean().item(), rel=1e-5)}
    method.loss(t, t, Batch(S))
    assert method.figures()["cosine"] == pytest.approx(1.0)
    method.loss(seen(stage3=-T), t, Batch(S))
    assert method.figures()["cosine"] == pytest.approx(-1.0)


def test_finite_in_bfloat16_with_the_gap_in_float32() -> None:
    s, t = seen(stage3=S.bfloat16()), seen(stage3=T.float())
    method = built(s, t).bfloat16()
    loss = method.loss(s, t, Batch(S))
    assert loss.dtype == torch.float32
    exact = method.double().loss(seen(stage3=S), seen(stage3=T), Batch(S))
    torch.testing.assert_close(loss.double(), exact, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("s", "t"),
    [((3, 5, 8), (3, 17, 8)), ((3, 8, 4, 4), (3, 16, 8)), ((3, 8), (3, 8)), ((3, 16, 8), (3, 8, 4, 4))],
)
def test_what_are_not_the_same_tokens_is_refused_with_both_shapes(
    s: tuple[int, ...], t: tuple[int, ...]
) -> None:
    with pytest.raises(Refused) as caught:
        built(seen(stage3=torch.zeros(s)), seen(stage3=torch.zeros(t)))
    for part in ("'dmae'", "'stage3'", f"{s} in the student", f"{t} in the teacher", "the same view"):
        assert part in str(caught.value)


def test_a_target_that_is_not_known_is_refused() -> None:
    with pytest.raises(Refused, match="'batchnorm', expected one of l2, layernorm, none"):
        DMAE(target_norm="batchnorm")


# --- through the Distiller ---

X = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
DECODER = {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def mae(width: int, depth: int, seed: int) -> MAE:
    torch.manual_seed(seed)
    return MAE(5, channels=1, size=16, width=width, depth=depth, heads=2, **DECODER)


def shown(batch: Batch) -> Batch:
    return mask(batch, 0.75, 4)


def batch(epoch: int = 0) -> Batch:
    return Batch(X, None, torch.arange(4), Lesson(seed=1, epoch=epoch))


def lesson(teacher_view: Any = shown, **term: Any) -> tuple[Distiller, MAE, MAE]:
    student, teacher = mae(8, 4, 0), mae(12, 8, 1)
    watched = Frozen(teacher, view=teacher_view)
    distiller = Distiller(
        student, watched, Term(DMAE(), **term), example=batch(), task=Reconstruct(), view=shown
    )
    return distiller.train(), student, teacher


def calls(teacher: MAE) -> list[int]:
    """The numbers of the blocks that run from now on; 100 stands for what follows the encoder."""
    found: list[int] = []
    later = [(100, teacher.norm), (100, teacher.decoder), (100, teacher.pixels)]
    for n, module in [*enumerate(teacher.encoder.blocks), *later]:
        forward = module.forward

        def counted(*args: Any, n: int = n, forward: Any = forward) -> Any:
            found.append(n)
            return forward(*args)

        module.forward = counted  # type: ignore[method-assign]
    return found


def test_of_the_teacher_nothing_runs_after_the_aligned_block() -> None:
    distiller, _, teacher = lesson()
    full = Tapped(teacher.eval())
    full.look(["stage3"])
    expected = full(shown(batch()).x).at["stage3"]
    found = calls(teacher)
    sight = distiller.see(batch())
    assert found == [0, 1, 2, 3, 4, 5], "stage3 of 8 blocks ends with the 6th"
    assert torch.equal(sight.teachers[0].at["stage3"], expected) and sight.teachers[0].out is None


def test_another_layer_of_the_teacher_is_a_pair() -> None:
    distiller, _, teacher = lesson(pairs={"stage3": "block2"})
    found = calls(teacher)
    distiller.see(batch())
    assert found == [0, 1]


def test_both_are_shown_the_same_patches_in_every_epoch() -> None:
    distiller, student, teacher = lesson()
    kept: dict[MAE, list[Tensor]] = {student: [], teacher: []}
    for net, seen in kept.items():
        net.encoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
    for epoch in range(3):
        distiller.see(batch(epoch))
    assert len(kept[student]) == len(kept[teacher]) == 3
    assert all(torch.equal(s, t) for s, t in zip(*kept.values(), strict=True))
    assert not torch.equal(kept[student][0], kept[student][1])


def test_a_teacher_that_is_shown_other_patches_is_refused() -> None:
    for other in (None, lambda batch: mask(batch, 0.5, 4)):
        with pytest.raises(Refused, match=r"compares tokens .* the same view"):
            lesson(other)


def test_it_reaches_the_student_up_to_its_layer_and_the_projector_and_not_the_teacher() -> None:
    student, teacher = mae(8, 4, 0), mae(12, 8, 1)
    distiller = Distiller(
        student, Frozen(teacher, view=shown), DMAE(), example=batch(), task=None, view=shown
    ).train()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    optimiser = torch.optim.Adam(distiller.parameters(), 0.01)
    losses = []
    for _ in range(25):
        loss = distiller(batch())["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    learned = {name for name, p in distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name in learned if "methods" in name} == {
        "methods.dmae.projects.0.weight",
        "methods.dmae.projects.0.bias",
    }
    assert {name.split(".")[3] for name in learned if ".blocks." in name} == {"0", "1", "2"}
    assert not any("decoder" in name or "pixels" in name for name in learned)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert distiller.figures()["dmae.cosine"] > 0.5


def test_beside_the_task_it_is_added() -> None:
    distiller, student, _ = lesson(weight=3.0)
    losses = distiller(batch())
    torch.testing.assert_close(losses["loss"], losses["task"] + losses["dmae"])
    s, t = (Seen(None, {"stage3": v}) for v in _tokens(distiller))
    torch.testing.assert_close(losses["dmae"], 3 * distiller.methods["dmae"].loss(s, t, batch()))
    assert student.state_dict().keys() == mae(8, 4, 0).state_dict().keys()


def _tokens(distiller: Distiller) -> tuple[Tensor, Tensor]:
    sight = distiller.see(batch())
    return sight.students[0][0].at["stage3"], sight.teachers[0].at["stage3"]
