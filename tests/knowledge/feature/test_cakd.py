"""Cross-architecture distillation: its equations against loops, what its parts promise, whom it takes."""

import copy
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import recipe
from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Term
from limbeck.core.taps import Tapped
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature.cakd import (
    CAKD,
    GroupLinear,
    Layout,
    attention,
    crossed,
    pca,
    pca_of_the_code,
    told_apart,
)
from limbeck.models.cnn import CNN
from limbeck.models.mobilenet import MODELS as MOBILENETS
from limbeck.models.resnet import MODELS as RESNETS
from limbeck.models.vit import ViT
from limbeck.models.wrn import MODELS as WRNS
from limbeck.schemes.offline import Offline

ROWS, HEADS, TOKENS, D = 2, 3, 5, 4
DRAW = torch.Generator().manual_seed(0)
S, T = torch.randn(2, 3, ROWS, HEADS, TOKENS, D, generator=DRAW, dtype=torch.float64)


# --- the equations ---


def slow_attention(q: list[Any], k: list[Any], v: list[Any]) -> list[list[float]]:
    """One row's one head, token by token."""
    out = []
    for a in q:
        raised = [math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(D)) for b in k]
        out.append([sum(e * b[j] for e, b in zip(raised, v, strict=True)) / sum(raised) for j in range(D)])
    return out


def slow_pca(s: Tensor, t: Tensor, mixed: Tensor) -> float:
    first, second = [], []
    for r in range(ROWS):
        for h in range(HEADS):
            mine = slow_attention(*(x[r, h].tolist() for x in mixed))
            theirs = slow_attention(*(x[r, h].tolist() for x in t))
            for a, b in zip(mine, theirs, strict=True):
                first += [(x - y) ** 2 for x, y in zip(a, b, strict=True)]
            for i in range(TOKENS):
                for j in range(TOKENS):
                    gap = (t[2, r, h, i] @ t[2, r, h, j] - s[2, r, h, i] @ s[2, r, h, j]) / math.sqrt(D)
                    second.append(float(gap) ** 2)
    return sum(first) / len(first) + sum(second) / len(second)


def test_partially_crossed_attention_is_the_equation() -> None:
    mixed = crossed(S, T, torch.rand(S.shape, generator=DRAW, dtype=torch.float64), 0.5)
    assert pca(S, T, mixed).item() == pytest.approx(slow_pca(S, T, mixed), rel=1e-12)
    assert pca(S, T, S).item() == pytest.approx(slow_pca(S, T, S), rel=1e-12)  # nothing crossed: equation 2
    seen, alike = pca(S, T, mixed, values=0.0), pca(S, T, T)  # its terms, each by itself
    torch.testing.assert_close(pca(S, T, mixed, values=0.3), seen + 0.3 * alike)


def test_the_releases_form_compares_scores_meaned_over_heads() -> None:
    other = torch.randn(3, ROWS, 2, TOKENS, 6, generator=DRAW, dtype=torch.float64)  # its own heads
    scores, values = [], []
    for r in range(ROWS):
        for i in range(TOKENS):
            for j in range(TOKENS):
                here = sum(float(S[0, r, h, i] @ S[1, r, h, j]) for h in range(HEADS)) / HEADS / math.sqrt(D)
                there = sum(float(other[0, r, h, i] @ other[1, r, h, j]) for h in range(2)) / 2 / math.sqrt(6)
                scores.append((here - there) ** 2)
                here = sum(float(S[2, r, h, i] @ S[2, r, h, j]) for h in range(HEADS)) / HEADS / math.sqrt(D)
                there = sum(float(other[2, r, h, i] @ other[2, r, h, j]) for h in range(2)) / 2
                values.append((here - there) ** 2)
    truth = 0.2 * sum(scores) / len(scores) + 0.05 * sum(values) / len(values)
    assert pca_of_the_code(S, other).item() == pytest.approx(truth, rel=1e-12)


def test_all_crossed_is_the_teacher_and_teaches_values_alone() -> None:
    s = S.clone().requires_grad_()
    mixed = crossed(s, T, torch.rand(S.shape, generator=DRAW).double(), 1.0)
    assert torch.equal(attention(mixed), attention(T))
    (grad,) = torch.autograd.grad(pca(s, T, mixed), s)
    assert not grad[:2].any() and grad[2].any()
    assert torch.equal(crossed(S, T, torch.rand(S.shape, generator=DRAW).double(), 0.0), S)


def test_the_share_of_crossed_elements() -> None:
    s, t = torch.zeros(3, 50, 4, 10, 6), torch.ones(3, 50, 4, 10, 6)
    for share in (0.2, 0.5):
        taken = crossed(s, t, torch.rand(s.shape, generator=DRAW), share)
        assert taken.mean((1, 2, 3, 4)).tolist() == pytest.approx([share] * 3, abs=0.02)


def test_equal_queries_keys_and_values_give_zero_under_every_mask() -> None:
    for share in (0.0, 0.5, 1.0):
        assert pca(T, T, crossed(T, T, torch.rand(T.shape, generator=DRAW).double(), share)) == 0


def test_values_are_alike_up_to_an_orthogonal_map() -> None:
    turn = torch.linalg.qr(torch.randn(D, D, generator=DRAW, dtype=torch.float64)).Q
    turned = torch.stack([S[0], S[1], T[2] @ turn])
    # Mixed wholly, the first term is 0, and what is left is the second.
    assert pca(turned, T, T).item() == pytest.approx(0, abs=1e-12)
    assert pca(torch.stack([S[0], S[1], 2 * T[2] @ turn]), T, T) > 0.1


def test_the_discriminators_loss_is_the_equation() -> None:
    real, fake = torch.randn(2, 7, generator=DRAW, dtype=torch.float64)
    truth = -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean()
    torch.testing.assert_close(told_apart(real, fake), truth)


# --- the group-wise linear projector ---


@pytest.mark.parametrize(
    ("grid", "side", "groups"), [((14, 14), 4, 16), ((7, 7), 4, 4), ((5, 6), 2, 9), ((3, 4), 4, 1)]
)
def test_each_neighbourhood_has_its_own_linear_map(grid: tuple[int, int], side: int, groups: int) -> None:
    maps = GroupLinear(3, 2, grid, side)
    assert sum(p.numel() for p in maps.parameters()) == groups * (3 * 2 + 2)
    x = torch.randn(2, 3, *grid, generator=DRAW)
    wide = math.ceil(grid[1] / side)
    there = [
        x[:, :, i, j] @ maps.weight[i // side * wide + j // side] + maps.bias[i // side * wide + j // side]
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    torch.testing.assert_close(maps(x), torch.stack(there, 1))


def test_the_groups_of_the_paper_hold_so_many_tokens() -> None:
    for grid, sizes in (((14, 14), [16, 16, 16, 8] * 3 + [8, 8, 8, 4]), ((7, 7), [16, 12, 12, 9])):
        maps = GroupLinear(1, 1, grid)
        with torch.no_grad():
            maps.weight.zero_()
            maps.bias.copy_(torch.arange(len(sizes)).view(-1, 1, 1))
        assert maps(torch.zeros(1, 1, *grid)).flatten().long().bincount().tolist() == sizes


def test_a_token_changes_its_own_output_alone() -> None:
    maps = GroupLinear(3, 2, (7, 7))
    x = torch.randn(1, 3, 7, 7, generator=DRAW)
    changed = x.clone()
    changed[:, :, 2, 5] += 1
    assert (maps(changed) != maps(x)).any(2).nonzero()[:, 1].tolist() == [2 * 7 + 5]
    alike = torch.randn(1, 3, 1, 1, generator=DRAW).expand(1, 3, 7, 7)
    out = maps(alike).unflatten(1, (7, 7))[0]
    assert torch.allclose(out[0, 0], out[3, 3]) and torch.allclose(out[4, 4], out[6, 6])
    assert not torch.allclose(out[0, 0], out[0, 4]) and not torch.allclose(out[0, 0], out[4, 0])


def test_one_group_is_a_1x1_convolution() -> None:
    maps, conv = GroupLinear(3, 2, (5, 5), side=5), nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        maps.weight.copy_(conv.weight[:, :, 0, 0].T[None])
        maps.bias.copy_(conv.bias)
    x = torch.randn(2, 3, 5, 5, generator=DRAW)
    torch.testing.assert_close(maps(x), conv(x).flatten(2).mT)


def test_it_begins_as_linear_layers_do() -> None:
    maps = GroupLinear(25, 400, (8, 8))
    for p in (maps.weight, maps.bias):
        assert 0.19 < p.detach().abs().max() <= 0.2 and p.detach().mean().abs() < 0.01


# --- a lesson ---


def teacher(pool: str = "class", size: int = 20, patch: int = 4) -> ViT:
    torch.manual_seed(1)
    return ViT(5, channels=1, size=size, patch=patch, width=24, depth=3, heads=3, pool=pool)


def student(widths: tuple[int, ...] = (4, 8, 16)) -> CNN:
    torch.manual_seed(2)
    return CNN(5, widths=widths)


def rows(count: int = 6, size: tuple[int, int] = (20, 20), epoch: int = 0) -> Batch:
    x = torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(3))
    return Batch(x, torch.arange(count) % 5, torch.arange(count), Lesson(epoch=epoch, epochs=3))


def lesson(pool: str = "class", batch: Batch | None = None, task: Any = None, **knobs: Any) -> Distiller:
    return Distiller(student(), teacher(pool), CAKD(**knobs), example=batch or rows(), task=task).train()


def method(distiller: Distiller) -> CAKD:
    return distiller.methods["cakd"]  # type: ignore[return-value]


def loss(distiller: Distiller, batch: Batch | None = None) -> Tensor:
    return distiller.losses(distiller.see(batch or rows()))["cakd"]


def rival(distiller: Distiller, batch: Batch | None = None) -> Tensor:
    ((name, value),) = distiller.rival_losses(distiller.see(batch or rows()))
    assert name == "cakd.critic"
    return value


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_shapes_and_the_class_token_left_out(pool: str) -> None:
    distiller = lesson(pool)
    cakd = method(distiller)
    sight = distiller.see(rows())
    (s, batch), t = sight.students[0], sight.teachers[0]
    assert s.at["stage3"].shape == (6, 16, 5, 5)
    assert t.at["stage3_qkv"].shape == (6, 26 if pool == "class" else 25, 72)
    assert cakd.layout == Layout((5, 5), heads=3)
    mine, theirs = cakd._queries(s), cakd._teachers_queries(t)
    assert mine.shape == theirs.shape == (3, 6, 3, 25, 8)
    assert cakd._tokens(s, batch).shape == cakd._teachers_tokens(t).shape == (6, 25, 24)
    assert torch.equal(cakd._teachers_tokens(t), t.at["stage3"][:, -25:])
    patches = t.at["stage3_qkv"][:, -25:]
    assert torch.equal(theirs.permute(1, 3, 0, 2, 4).flatten(2), patches)
    # What our ViT itself attends with, head by head.
    weights = (theirs[0] @ theirs[1].mT / math.sqrt(8)).softmax(-1)
    if pool == "mean":
        tapped = Tapped(teacher(pool).eval())
        tapped.look(["stage3_attention"])
        torch.testing.assert_close(weights, tapped(batch.x).at["stage3_attention"])


def test_the_whole_loss_is_its_parts_in_eval() -> None:
    distiller = lesson(adversary=0.3, values=0.2)
    cakd = method(distiller)
    sight = distiller.eval().see(rows())
    (s, batch), t = sight.students[0], sight.teachers[0]
    mine, theirs = cakd._queries(s), cakd._teachers_queries(t)
    here, there = cakd.to_tokens(s.at["stage3"]), t.at["stage3"][:, 1:]
    fooled = -cakd.critic(here).sigmoid().log().mean()
    truth = pca(mine, theirs, mine, 0.2) + (here - there).square().mean() + 0.3 * fooled
    torch.testing.assert_close(cakd.loss(s, t, batch), truth)
    cakd.saturating = True
    truth = truth - 0.3 * fooled + 0.3 * (1 - cakd.critic(here).sigmoid()).log().mean()
    torch.testing.assert_close(cakd.loss(s, t, batch), truth)


def test_the_releases_loss_is_its_parts() -> None:
    for pool in ("class", "mean"):
        distiller = lesson(pool, mode="code", adversary=1.0)
        cakd = method(distiller)
        sight = distiller.eval().see(rows())
        (s, batch), t = sight.students[0], sight.teachers[0]
        assert cakd.to_qkv.weight.shape == (48, 16, 1, 1) and cakd.to_qkv.bias is None
        mine, theirs = cakd._queries(s), cakd._teachers_queries(t)
        assert mine.shape == (3, 6, 16, 25, 1)
        there = t.at["stage3"][:, -25:]
        token = t.at["stage3"][:, 0] if pool == "class" else there.mean(1)
        scores = (mine[0] @ mine[1].mT).mean(1)  # of heads one wide
        truth = pca_of_the_code(mine, theirs)
        truth = truth + 0.05 * (cakd.to_tokens(s.at["stage3"]) - there).square().mean()
        truth = truth + (s.out - t.out).square().mean()
        truth = truth + (cakd.to_class(s.at["pooled"]) - token).square().mean()
        truth = truth - cakd.critic(scores).sigmoid().log().mean()
        torch.testing.assert_close(cakd.loss(s, t, batch), truth)
        real = (theirs[0] @ theirs[1].mT / math.sqrt(8)).mean(1)
        torch.testing.assert_close(
            cakd.rival_loss("critic", s, t, batch), 0.5 * told_apart(cakd.critic(real), cakd.critic(scores))
        )


def test_the_releases_discriminator_looks_at_scores_as_at_images() -> None:
    critic = method(lesson(mode="code")).critic
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (1, 8, 4, 2),
        (8, 16, 4, 2),
        (16, 32, 4, 2),
        (32, 64, 4, 1),
        (64, 1, 4, 1),
    ]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in critic.modules()) == 3
    assert critic(torch.randn(2, 196, 196)).shape == (2,)


def test_in_training_it_mixes_by_the_clock_and_in_eval_not_at_all() -> None:
    distiller = lesson(adversary=0.0)
    cakd = method(distiller)
    assert torch.equal(loss(distiller), loss(distiller)), "the same draw for the same epoch and rows"
    assert not torch.equal(loss(distiller), loss(distiller, rows(epoch=1)))
    calm = loss(distiller.eval())
    assert torch.equal(calm, loss(distiller, rows(epoch=1)))
    distiller.train()
    cakd.cross_prob = 0.0
    assert not torch.allclose(loss(distiller), calm, rtol=1e-6), "tokens are dropped in training"
    cakd.dropout = 0.0
    distiller.student.eval()  # its BatchNorm, too, differs between the two
    bare = loss(distiller)
    torch.testing.assert_close(bare, loss(distiller.eval()))


def test_rows_draw_by_their_number_and_elements_on_their_own() -> None:
    cakd = method(lesson())
    s, t = torch.zeros(3, 4, 3, 25, 8), torch.ones(3, 4, 3, 25, 8)
    batch = Batch(torch.zeros(4, 1), None, torch.tensor([7, 3, 9, 2]))
    mixed = cakd._mixed(s, t, batch)
    assert set(mixed.unique().tolist()) == {0.0, 1.0} and mixed.mean().item() == pytest.approx(0.5, abs=0.02)
    again = cakd._mixed(s[:, :2], t[:, :2], Batch(torch.zeros(2, 1), None, torch.tensor([9, 7])))
    assert torch.equal(again[:, 0], mixed[:, 2]) and torch.equal(again[:, 1], mixed[:, 0])
    flat = mixed.flatten(2).flatten(0, 1)
    assert (torch.corrcoef(flat) - torch.eye(12)).abs().max() < 0.2, "masks of Q, K and V are their own"


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    distiller = lesson(dropout=0.3)
    cakd = method(distiller)
    with torch.no_grad():
        cakd.to_tokens.weight.copy_(F.one_hot(torch.arange(24).clamp(max=15), 16).T.float())
        cakd.to_tokens.bias.zero_()
    s, batch = distiller.see(rows(64)).students[0]
    s.at["stage3"] = torch.ones_like(s.at["stage3"])
    shown = cakd._tokens(s, batch)[:, :, :16]
    assert (shown == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(shown.unique(), torch.tensor([0, 1 / 0.7]))


# --- the discriminator ---


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_each_step_is_its_players_alone(mode: str) -> None:
    distiller = lesson(mode=mode)
    players = distiller.players()
    assert players.keys() == {"student", "cakd.critic"}
    rival(distiller).backward()
    moved = {name for name, p in distiller.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(name.startswith("methods.cakd.critic.") for name in moved)
    distiller.zero_grad()

    plan = Offline(distiller).turns(rows())
    assert next(plan)[0] == "cakd.critic"
    player, losses = next(plan)
    assert player == "student"
    before = copy.deepcopy(method(distiller).critic.state_dict())
    mine = list(players["student"].values())
    grads = torch.autograd.grad(losses["cakd"], mine, allow_unused=True)
    assert all(p.grad is None for p in players["cakd.critic"].values())
    assert sum(g is not None and bool(g.any()) for g in grads) >= len(mine) - 3  # the head has its own task
    for name, value in method(distiller).critic.named_parameters():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("mode", ["paper", "code"])
@pytest.mark.parametrize("saturating", [False, True])
def test_the_adversary_teaches_the_student(mode: str, saturating: bool) -> None:
    """Where the release detaches what its student shows, nothing of this reaches it."""
    distiller = lesson(mode=mode, adversary=1.0, saturating=saturating, cross_prob=0.0)
    first = next(distiller.student.parameters())
    (whole,) = torch.autograd.grad(loss(distiller), first)
    method(distiller).adversary = 0.0
    (rest,) = torch.autograd.grad(loss(distiller), first)
    assert (whole - rest).abs().max() > 1e-7


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_the_discriminator_learns_from_both(mode: str) -> None:
    distiller = lesson(mode=mode)
    critic = method(distiller).critic
    sight = distiller.see(rows())
    (s, batch), t = sight.students[0], sight.teachers[0]
    parameters = list(critic.parameters())
    grads = []
    for other in (s, copy.deepcopy(s.detach())):
        if other is not s:
            other.at["stage3"].mul_(3)
        grads.append(torch.autograd.grad(method(distiller).rival_loss("critic", other, t, batch), parameters))
    t.at["stage3"] = 3 * t.at["stage3"]
    t.at["stage3_qkv"] = 3 * t.at["stage3_qkv"]
    grads.append(torch.autograd.grad(method(distiller).rival_loss("critic", s, t, batch), parameters))
    flat = [torch.cat([g.flatten() for g in gs]) for gs in grads]
    assert not torch.allclose(flat[0], flat[1]) and not torch.allclose(flat[0], flat[2])


def test_the_discriminator_comes_to_tell_them_apart_and_figures_say_so() -> None:
    distiller = lesson(dropout=0.0)
    cakd, batch = method(distiller), rows(32)
    optimiser = torch.optim.Adam(cakd.critic.parameters(), 0.01)
    for _ in range(30):
        optimiser.zero_grad()
        value = rival(distiller, batch)
        value.backward()
        optimiser.step()
    assert value.item() < 0.7 * 2 * math.log(2) and cakd.figures()["critic_right"] > 0.9
    sight = distiller.see(batch)
    (s, _), t = sight.students[0], sight.teachers[0]
    cakd.loss(s, t, batch)
    here, there = cakd.to_tokens(s.at["stage3"]), t.at["stage3"][:, 1:]
    cosine = (F.normalize(here, dim=2) * F.normalize(there, dim=2)).sum(2).mean()
    assert distiller.figures()["cakd.cosine"] == pytest.approx(cosine.item(), abs=1e-6)


def test_lessons_turn_the_students_tokens_to_the_teachers() -> None:
    distiller, batch = lesson(), rows(16)
    scheme = Offline(distiller)
    optimisers = {name: torch.optim.Adam(p.values(), 0.01) for name, p in scheme.players().items()}
    cosines = []
    for _ in range(25):
        for player, losses in scheme.turns(batch):
            optimisers[player].zero_grad()
            parameters = list(scheme.players()[player].values())
            grads = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            optimisers[player].step()
        cosines.append(distiller.figures()["cakd.cosine"])
    assert cosines[-1] > cosines[0] + 0.3


def test_without_an_adversary_there_is_no_discriminator_and_nothing_of_one() -> None:
    """At lambda 0 the student learns from the other terms alone, and begins with the same weights."""
    with_one, without = lesson(), lesson(adversary=0.0)
    assert without.players().keys() == {"student"} and not method(without).rivals()
    assert "critic_right" not in method(without).figures() and not hasattr(method(without), "critic")
    for name, p in method(without).named_parameters():
        assert torch.equal(p, method(with_one).get_parameter(name))
    sight = without.eval().see(rows())
    (s, batch), t = sight.students[0], sight.teachers[0]
    cakd = method(without)
    mine = cakd._queries(s)
    truth = pca(mine, cakd._teachers_queries(t), mine)
    truth = truth + (cakd._tokens(s, batch) - t.at["stage3"][:, 1:]).square().mean()
    torch.testing.assert_close(cakd.loss(s, t, batch), truth)


def test_a_terms_ramp_says_the_releases_weight() -> None:
    content = {
        "data": "digits",
        "models": {"teacher": "vit_tiny", "student": "cnn"},
        "stages": [
            {
                "learner": "student",
                "epochs": 120,
                "terms": [
                    {"method": "cakd", "mode": "code", "weight": 0.2, "ramp": {"epochs": 10, "after": 26}}
                ],
            }
        ],
    }
    use = recipe.parse(content).stages[0].terms[0]
    ramp = Ramp(use.ramp.epochs, use.ramp.after)
    for epoch in range(120):
        omega = min(max(epoch - 25, 0) / 50, 0.2)
        assert use.weight * ramp(Lesson(epoch=epoch, epochs=120)) == pytest.approx(omega, abs=1e-12)
    for epoch, weight in ((25, 0.0), (30, 0.1), (35, 0.2), (119, 0.2)):
        assert use.weight * ramp(Lesson(epoch=epoch)) == pytest.approx(weight, abs=1e-12)


# --- whom it takes ---


STUDENTS = {
    "resnet": lambda: RESNETS["resnet8"](classes=5, channels=1),
    "mobilenet": lambda: MOBILENETS["mobilenetv2_half"](classes=5, channels=1),
    "wrn": lambda: WRNS["wrn_16_1"](classes=5, channels=1),
    "vit": lambda: ViT(5, channels=1, size=20, patch=4, width=12, depth=3, heads=2, pool="class"),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_any_grid_learn(name: str) -> None:
    torch.manual_seed(0)
    model = STUDENTS[name]()
    distiller = Distiller(model, teacher(patch=5), CAKD(), example=rows()).train()
    sight = distiller.see(rows())
    assert sight.students[0][0].at["stage3"][0, 0].numel() not in (16, 17), "not the teacher's grid"
    sum(distiller.losses(sight).values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_row_by_itself_is_enough() -> None:
    for mode in ("paper", "code"):
        for distiller in (lesson(mode=mode), lesson(mode=mode, batch=rows(1))):
            distiller.student.eval()  # whose own BatchNorm is its own affair
            for value in (loss(distiller, rows(1)), rival(distiller, rows(1))):
                value.backward()
                assert torch.isfinite(value)


class Wide(nn.Module):
    """A transformer for images of 12x24, by patches of 4: its tokens are a grid of 3x6."""

    TAPS = {"stage3": "block", "stage3_qkv": "block.attn.qkv"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 4, 4)
        self.block = Block(12, heads=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


class Block(nn.Module):
    """With timm's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.attn.num_heads = heads
        self.heads = width + 1  # further out, so not the attention's

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(x).unflatten(2, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_images_that_are_not_square_have_the_grid_of_their_shape() -> None:
    batch = rows(size=(12, 24))
    distiller = Distiller(student(), Wide(), CAKD(), example=batch)
    cakd = method(distiller)
    assert cakd.layout == Layout((3, 6), heads=2) and cakd.grid == (3, 6)
    assert torch.isfinite(loss(distiller, batch))
    # Places agree: what the student shows in a corner is compared with the teacher's tokens of that corner.
    assert cakd.to_tokens.grid == (3, 6) and cakd.to_tokens.groups == (1, 2)


class Window(nn.Module):
    """A Swin's block by timm's names: attention within (shifted) windows of an (h, w) grid, channels last."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width)
        self.attn.num_heads = heads
        self.window_size, self.shift_size = (side, side), (shift, shift)

    def forward(self, x: Tensor) -> Tensor:
        (b, h, w, d), side, shift = x.shape, self.window_size[0], self.shift_size[0]
        rolled = x.roll((-shift, -shift), (1, 2))
        windows = rolled.view(b, h // side, side, w // side, side, d).transpose(2, 3).reshape(-1, side**2, d)
        q, k, v = self.attn.qkv(windows).unflatten(2, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        seen = seen.view(b, h // side, w // side, side, side, d).transpose(2, 3).reshape(b, h, w, d)
        return x + seen.roll((shift, shift), (1, 2))


class Swin(nn.Module):
    def __init__(self, side: int, shift: int, grid: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 24 // grid, 24 // grid)
        self.block = Window(12, 3, side, shift)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))


SWIN = {"stage3": "block", "stage3_qkv": "block.attn.qkv"}


@pytest.mark.parametrize(("side", "shift"), [(3, 0), (3, 1), (2, 1), (6, 0)])
def test_a_swins_windows_are_cut_from_the_students_map_too(side: int, shift: int) -> None:
    torch.manual_seed(0)
    batch, swin = rows(size=(24, 24)), Swin(side, shift)
    distiller = Distiller(student(), Frozen(swin, taps=SWIN), CAKD(adversary=0.0), example=batch).eval()
    cakd = method(distiller)
    assert cakd.layout.grid == (6, 6) and cakd.layout.heads == 3
    sight = distiller.see(batch)
    (s, _), t = sight.students[0], sight.teachers[0]
    assert len(t.at["stage3_qkv"]) == 6 * (6 // side) ** 2
    # A student that shows the teacher's very patches, through the teacher's very layer, attends as it does.
    layer = nn.Conv2d(12, 36, 1)
    with torch.no_grad():
        layer.weight.copy_(swin.block.attn.qkv.weight[:, :, None, None])
        layer.bias.copy_(swin.block.attn.qkv.bias)
    cakd.to_qkv = layer
    s.at["stage3"] = swin.patches(batch.x)
    torch.testing.assert_close(cakd._queries(s), cakd._teachers_queries(t))
    torch.testing.assert_close(cakd._teachers_tokens(t).unflatten(1, (6, 6)), t.at["stage3"])


def test_queries_keys_and_values_may_be_three_taps() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 12, 4, 4)
            self.attention = nn.ModuleDict({name: nn.Linear(12, 12) for name in ("query", "key", "value")})
            self.attention.num_attention_heads = 4
            self.last = nn.Identity()
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).mT
            q, k, v = (self.attention[name](x) for name in ("query", "key", "value"))
            return self.head(self.last(x + (q @ k.mT).softmax(-1) @ v).mean(1))

    taps = [f"attention.{name}" for name in ("query", "key", "value")]
    cakd = CAKD(tokens="last", qkv=taps)
    distiller = Distiller(student(), Apart(), cakd, example=rows())
    t = distiller.see(rows()).teachers[0]
    q, k, v = cakd._teachers_queries(t)
    assert cakd.layout.heads == 4
    for shown, tap in ((q, taps[0]), (k, taps[1]), (v, taps[2])):
        assert torch.equal(shown.transpose(1, 2).flatten(2), t.at[tap])


def test_a_teachers_layers_may_be_paired_with_the_methods_names() -> None:
    pairs = {"stage3": "stage2", "stage3_qkv": "stage2_qkv"}
    distiller = Distiller(student(), teacher(), Term(CAKD(), pairs=pairs), example=rows())
    assert method(distiller).layout.heads == 3 and torch.isfinite(loss(distiller))


def test_heads_are_as_said_and_else_of_64() -> None:
    def heads(width: int, said: int | None = None) -> int:
        silent = nn.ModuleDict({"patches": nn.Conv2d(1, width, 4, 4), "qkv": nn.Linear(width, 3 * width)})
        silent.head = nn.Linear(3 * width, 5)
        silent.forward = lambda x: silent.head(silent["qkv"](silent["patches"](x).flatten(2).mT).mean(1))
        cakd = CAKD(tokens="qkv", qkv="qkv", heads=said, adversary=0.0)
        Distiller(student(), silent, cakd, example=rows())
        return cakd.layout.heads

    assert (heads(128), heads(24), heads(24, 8)) == (2, 1, 8)
    with pytest.raises(Refused, match=r"7 heads do not share a width of 24; .*`heads`"):
        heads(24, 7)


# --- real ones ---


def hf_vit() -> tuple[nn.Module, str, list[str], int]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 8}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=20, patch_size=4, num_channels=1))
    last = "vit.layers.1.attention"
    return model, "vit.layers.1", [f"{last}.{name}_proj" for name in "qkv"], 3


def hf_swin() -> tuple[nn.Module, str, list[str], int]:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=24, patch_size=2, num_channels=1, embed_dim=8, depths=[2], num_heads=[2], window_size=4
    )
    model = SwinForImageClassification(config)
    block = next(path for path, m in model.named_modules() if getattr(m, "shift_size", 0))
    return model, f"{block}[0]", [f"{block}.attention.{name}_proj" for name in "qkv"], 2


REAL = [hf_vit, hf_swin] if find_spec("transformers") else []


@pytest.mark.slow  # its import takes seconds
@pytest.mark.parametrize("make", REAL, ids=lambda make: make.__name__)
def test_networks_of_hugging_face_teach(make: Any) -> None:
    torch.manual_seed(0)
    model, tokens, qkv, heads = make()
    model.TAPS = {"out": "[logits]"}
    side = 20 if make is hf_vit else 24
    batch = rows(size=(side, side))
    distiller = Distiller(student(), model, CAKD(tokens=tokens, qkv=qkv), example=batch)
    cakd = method(distiller)
    assert cakd.layout.heads == heads
    if make is hf_swin:
        assert cakd.layout == Layout((12, 12), 2, window=4, shift=(2, 2))
    else:
        assert cakd.layout == Layout((5, 5), 3) and cakd.class_token
    assert torch.isfinite(loss(distiller, batch))


# --- what cannot be is said in a sentence ---


class Blind(CNN):
    """Its tap of queries, keys and values shows a map."""

    def __init__(self) -> None:
        super().__init__(5, widths=(4, 8, 16))
        self.TAPS["stage3_qkv"] = "stages.2"


def said(s: nn.Module, t: nn.Module | Frozen, batch: Batch | None = None, **knobs: Any) -> str:
    with pytest.raises(Refused) as caught:
        Distiller(s, t, CAKD(**knobs), example=batch or rows())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_teacher_without_attention_is_refused() -> None:
    assert "(6, 16, 5, 5) at 'stage3_qkv'" in (why := said(student(), Blind()))
    assert "shows none" in why and "the student shows (6, 16, 5, 5) at 'stage3'" in why
    assert "'stage3_qkv'" in said(student(), student()), "a network without such a tap"
    assert "shows none" in said(student(), teacher(), qkv=["stage3", "stage3", "stage3_qkv"])


def test_tokens_that_are_no_grid_of_the_image_are_refused() -> None:
    class Few(nn.Module):
        TAPS = {"stage3": "tokens", "stage3_qkv": "qkv"}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.qkv, self.head = nn.Identity(), nn.Linear(50, 36), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.qkv(self.tokens(x.flatten(1).unflatten(1, (8, 50)))).mean(1))

    for size in ((20, 20), (10, 40)):
        why = said(student(), Few(), rows(size=size), heads=1)
        assert f"tokens here are no grid of an image of {size[0]}x{size[1]}" in why and "(6, 8, 50)" in why
    assert "no grid of an image of 20x20" in said(student(), teacher(), tap="pooled")


def test_windows_that_do_not_tile_the_grid_are_refused() -> None:
    class Padded(Swin):
        """Pads its 5x5 patches to windows of 3, as a Swin does."""

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(self.patches(x).permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1))
            return self.head(self.cut(self.block(x)).mean((1, 2)))

        def __init__(self) -> None:
            super().__init__(3, 0)
            self.patches = nn.Conv2d(1, 12, 4, 4)
            self.cut = Cut()

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :5, :5]

    taps = {"stage3": "cut", "stage3_qkv": "block.attn.qkv"}
    assert "4 windows of 9 patches do not tile 5x5" in said(student(), Frozen(Padded(), taps=taps))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"mode": "release"}, "'release'; expected 'paper' or 'code'"),
        ({"cross_prob": 1.5}, "cross_prob = 1.5"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"adversary": -1.0}, "adversary = -1.0"),
        ({"values": math.inf}, "values = inf"),
        ({"group": 0}, "group = 0"),
        ({"qkv": ("a", "b")}, "2 taps as `qkv`"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words):
        CAKD(**knobs)


def test_what_the_releases_mode_cannot_do_is_refused() -> None:
    assert "16 heads, which mode 'code' has, do not share 6 channels" in said(
        student((4, 8, 6)), teacher(), mode="code"
    )
    small = rows(size=(16, 16))
    assert "needs 24 patches, and there are 16" in said(student(), teacher(size=16), small, mode="code")
    Distiller(student(), teacher(size=16), CAKD(mode="code", adversary=0.0), example=small)
    fewer = CNN(4, widths=(4, 8, 16))
    assert "compares logits, which are (4, 4) and (4, 5)" in said(fewer, teacher(), rows(4), mode="code")


def test_rows_without_numbers_are_refused() -> None:
    x = rows()
    with pytest.raises(Refused, match="'cakd' needs index"):
        Distiller(student(), teacher(), CAKD(), example=(x.x, x.y))
