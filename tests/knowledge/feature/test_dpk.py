"""DPK against slow loops written from its equations, and what its ratio and its places promise."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core import across
from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.knowledge.feature.dpk import DPK, Teller, gaps, places, stitch
from limbeck.pieces.similarity import cka, hsic_terms

TAP = "stage3"


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


S, T = maps(40, 4, 4, 4), maps(40, 6, 4, 4, seed=1)


def seen(*shown: Tensor) -> Seen:
    names = (TAP, "stage2")
    return Seen(None, dict(zip(names, shown, strict=False)))


def batch(rows: int = 40, **lesson: int) -> Batch:
    return Batch(torch.zeros(rows, 1), index=torch.arange(rows) + 100, lesson=Lesson(**lesson))


def built(s: Tensor = S, t: Tensor = T, **knobs: object) -> DPK:
    torch.manual_seed(0)
    method = DPK(**knobs)
    method.build(seen(s), seen(t), batch(len(s)))
    return method.double()


def loss(method: DPK, s: Tensor = S, t: Tensor = T, **lesson: int) -> Tensor:
    return method.loss(seen(s), seen(t), batch(len(s), **lesson))


def ratio(method: DPK) -> float:
    return method.figures()[f"ratio.{TAP}"]


def given_at(method: DPK, rows: Batch, share: float) -> Tensor:
    return places(method._draw(rows, TAP, 16), torch.tensor(share))


# --- which places are given ---


@pytest.mark.parametrize("n", [1, 5, 16, 49])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_as_many_places_are_given_in_every_row_as_the_ratio_says(n: int, share: float) -> None:
    given = places(torch.rand(30, n), torch.tensor(share))
    assert given.sum(1).tolist() == [round(share * n)] * 30


def test_places_of_equal_draws_are_still_counted() -> None:
    assert places(torch.zeros(3, 8), torch.tensor(0.25)).sum(1).tolist() == [2, 2, 2]


def test_every_place_is_given_about_as_often_and_alone() -> None:
    method = built()
    given = given_at(method, batch(4000), 0.25).double()
    assert (given.mean(0) - 0.25).abs().max() < 0.035
    together = torch.corrcoef(given.T).fill_diagonal_(-1 / 15)
    assert (
        together + 1 / 15
    ).abs().max() < 0.08  # without replacement each pair is a little shy of the other


def test_a_row_has_its_own_places_whatever_stands_beside_it() -> None:
    method, rows = built(), batch()
    given = given_at(method, rows, 0.5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    assert torch.equal(given_at(method, rows.map(lambda v: v[order]), 0.5), given[order])
    assert torch.equal(given_at(method, rows.map(lambda v: v + 1), 0.5)[:-1], given[1:])
    assert len({tuple(row) for row in given.tolist()}) > 35
    for other in ({"epoch": 1}, {"seed": 1}):
        assert not torch.equal(given_at(method, batch(**other), 0.5), given)
    assert torch.equal(given_at(method, batch(step=7), 0.5), given)


def test_more_is_given_where_it_was_given_before() -> None:
    """One order of places a draw: a growing ratio adds to them."""
    method = built()
    less, more = given_at(method, batch(), 0.3), given_at(method, batch(), 0.6)
    assert (less <= more).all() and (less != more).any()


def test_shared_places_are_alike_for_all_rows_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    method, rows = built(shared=True), batch()
    given = given_at(method, rows, 0.5)
    assert given.shape == (1, 16) and given.sum() == 8
    assert torch.equal(given_at(method, rows.map(lambda v: v.flip(0)), 0.5), given)
    assert not torch.equal(given_at(method, batch(epoch=1), 0.5), given)
    everybody = torch.arange(60) + 60
    monkeypatch.setattr(across, "gather", lambda x: everybody)
    others = [given_at(method, batch().map(lambda v, n=n: v + n), 0.5) for n in (0, 1)]
    assert torch.equal(*others) and not torch.equal(others[0], given)


# --- the equation ---


def slow_loss(method: DPK, s: Tensor, t: Tensor, given: Tensor, which: str = "all") -> float:
    """Row by row and place by place; patches of one cell."""
    teller = method.tellers[0]
    total, count = 0.0, 0
    for row in range(len(s)):
        here, there = s[row].flatten(1).T[None], t[row].flatten(1).T[None]
        tokens, prior = teller.encode_s(here)[0], teller.encode_t(there)[0]
        mixed = torch.stack([prior[n] if given[row, n] else tokens[n] for n in range(len(tokens))])
        told = teller.decode(mixed[None])[0]
        for n in range(len(told)):
            if which == "all" or bool(given[row, n]) == (which == "masked"):
                total += float(((told[n] - there[0, n]) ** 2).sum().detach())
                count += told.shape[1]
    return total / max(count, 1)


@pytest.mark.parametrize("which", ["all", "masked", "unmasked"])
def test_equals_the_loop(which: str) -> None:
    method = built(ratio=0.3, positions=which)
    given = given_at(method, batch(), 0.3)
    assert loss(method).item() == pytest.approx(slow_loss(method, S, T, given, which), rel=1e-6)


def test_stitches_token_by_token() -> None:
    s, t, given = maps(3, 5, 2), maps(3, 5, 2, seed=1), maps(3, 5, seed=2) > 0
    mixed = stitch(s, t, given)
    for b in range(3):
        for n in range(5):
            assert torch.equal(mixed[b, n], t[b, n] if given[b, n] else s[b, n])


def test_gaps_are_of_all_places_of_the_given_and_of_the_others() -> None:
    told, t, given = maps(3, 5, 2), maps(3, 5, 2, seed=1), maps(3, 5, seed=2) > 0
    square = (told - t) ** 2
    expected = [square.mean(), square[given].mean(), square[~given].mean()]
    torch.testing.assert_close(gaps(told, t, given), torch.stack(expected))
    every = torch.ones_like(given)
    assert gaps(told, t, every)[2] == 0 and gaps(told, t, ~every)[1] == 0


def test_gradcheck() -> None:
    s, t, given = maps(2, 4, 3).requires_grad_(), maps(2, 4, 3, seed=1), maps(2, 4, seed=2) > 0
    prior = maps(2, 4, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: gaps(stitch(s, p, given), t, given), (s, prior))


def test_taps_add_up() -> None:
    s, t = maps(40, 3, 2, 2, seed=5), maps(40, 5, 2, 2, seed=6)
    torch.manual_seed(0)
    both = DPK(taps=(TAP, "stage2"))
    both.build(seen(S, s), seen(T, t), batch())
    both.double()
    assert not torch.equal(both._draw(batch(), TAP, 16), both._draw(batch(), "stage2", 16))
    both.loss(seen(S, s), seen(T.flip(0), t.flip(0)), batch())  # each remembers its own
    total = both.loss(seen(S, s), seen(T, t), batch())
    alone = []
    for place, (name, here, there) in enumerate(((TAP, S, T), ("stage2", s, t))):
        one = DPK(taps=(name,))
        one.build(Seen(None, {name: here}), Seen(None, {name: there}), batch())
        one.double().tellers[0].load_state_dict(both.tellers[place].state_dict())
        one.loss(Seen(None, {name: here}), Seen(None, {name: there.flip(0)}), batch())
        alone.append(one.loss(Seen(None, {name: here}), Seen(None, {name: there}), batch()))
        assert torch.equal(both.hsic[place], one.hsic[0])
        assert both.figures().items() >= one.figures().items()
    torch.testing.assert_close(total, alone[0] + alone[1])


# --- all given, nothing given ---


def test_with_everything_given_the_student_is_not_asked() -> None:
    method, s, t = built(ratio=1.0), S.clone().requires_grad_(), T.clone().requires_grad_()
    found = loss(method, s, t)
    assert torch.equal(found, loss(method, maps(*S.shape, seed=9)))
    found.backward()
    assert not s.grad.any() and t.grad is None
    assert not any(p.grad.any() for p in method.tellers[0].encode_s.parameters())
    assert all(p.grad.any() for p in method.tellers[0].encode_t.parameters())


def test_with_nothing_given_it_is_a_hint_through_encoder_and_decoder() -> None:
    method = built(ratio=0.0)
    found, teller = loss(method), method.tellers[0]
    told = teller.decode(teller.encode_s(S.flatten(2).mT))
    torch.testing.assert_close(found, F.mse_loss(told, T.flatten(2).mT), rtol=1e-6, atol=0)
    found.backward()
    assert not any(p.grad.any() for p in teller.encode_t.parameters())
    for p in teller.encode_t.parameters():
        p.data.normal_()
    assert torch.equal(loss(method), found)


def test_the_less_is_given_the_more_gradient_reaches_the_student() -> None:
    sizes = []
    for share in (0.9, 0.6, 0.3, 0.0):
        s = S.clone().requires_grad_()
        loss(built(ratio=share), s).backward()
        sizes.append(float(s.grad.norm()))
    assert sizes == sorted(sizes) and sizes[0] < 0.7 * sizes[-1]


def test_without_a_prior_nothing_of_the_teacher_is_read() -> None:
    method = built(ratio=0.5, prior=False)
    teller, given = method.tellers[0], given_at(method, batch(), 0.5)
    here = teller.patches(S)
    told = teller(here, teller.patches(T), given)
    assert torch.equal(told, teller(here, teller.patches(maps(*T.shape, seed=9)), given))
    loss(method).backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    wiser = built(ratio=0.5)
    told = wiser.tellers[0](here, teller.patches(T), given)
    assert not torch.equal(told, wiser.tellers[0](here, teller.patches(maps(*T.shape, seed=9)), given))


# --- the ratio ---


def test_the_ratio_is_what_cka_leaves() -> None:
    method, t = built(), torch.cat([S, S.flip(1)], 1)[:, :6] + T
    loss(method, S, t)
    found = 1 - float(cka(hsic_terms(S.flatten(1), t.flatten(1))))
    assert 0.1 < found < 0.9
    assert ratio(method) == pytest.approx(found, rel=1e-9)
    assert method.watched[0, 0] == (1 - cka(method.hsic[0]))


def test_the_terms_of_cka_are_running_means() -> None:
    """Not CKA itself, and the first batch counts whole."""
    method, terms = built(decay=0.75), []
    for seed, scale in ((0, 1.0), (1, 3.0), (2, 0.2)):
        t = T + scale * F.pad(S, (0, 0, 0, 0, 0, 2)) + maps(*T.shape, seed=seed)
        terms.append(hsic_terms(S.flatten(1), t.flatten(1)))
        loss(method, S, t)
    mean = 0.75 * (0.75 * terms[0] + 0.25 * terms[1]) + 0.25 * terms[2]
    torch.testing.assert_close(method.hsic[0], mean)
    assert ratio(method) == pytest.approx(1 - float(cka(mean)))


def test_the_ratio_falls_as_the_student_comes_closer() -> None:
    """Towards the teacher's map turned around, which is as like it as can be."""
    turned = T.flatten(1) @ torch.linalg.qr(maps(96, 96, seed=7))[0]
    goal, start = turned.view(40, 6, 4, 4), maps(40, 6, 4, 4, seed=8)
    found = []
    for way in (0.0, 0.25, 0.5, 0.75, 1.0):
        method = built(start)
        loss(method, (1 - way) * start + way * goal)
        found.append(ratio(method))
    assert all(b < a - 0.02 for a, b in pairwise(found))
    assert found[0] > 0.9 and found[-1] < 1e-6


def test_the_ratio_stays_within_0_and_1() -> None:
    opposite = built()
    with torch.no_grad():
        opposite.hsic[0] = torch.tensor([-5.0, 1.0, 1.0])
    loss(opposite)
    assert ratio(opposite) == 1
    beyond = built()
    with torch.no_grad():
        beyond.hsic[0] = torch.tensor([1e6, 1.0, 1.0])
    loss(beyond)
    assert ratio(beyond) == 0


def test_the_ratio_passes_no_gradient() -> None:
    """The student's gradient is that of the same places given by a fixed ratio."""
    t, grads = T + F.pad(S, (0, 0, 0, 0, 0, 2)), []
    dynamic = built()
    loss(dynamic, S, t)
    for method in (dynamic, built(ratio=ratio(dynamic))):
        s = S.clone().requires_grad_()
        loss(method, s, t).backward()
        grads.append(s.grad)
    assert torch.equal(*grads) and grads[0].any()
    assert not dynamic.hsic.requires_grad, "a graph that grows with every batch"


def test_too_few_rows_leave_the_ratio_as_it_is() -> None:
    method, t = built(), T + F.pad(S, (0, 0, 0, 0, 0, 2))
    loss(method, S, t)
    before, known = ratio(method), method.hsic.clone()
    for rows in (31, 3, 1):
        assert loss(method, S[:rows], maps(rows, 6, 4, 4, seed=rows)).isfinite()
        assert ratio(method) == before and torch.equal(method.hsic, known)
    loss(method, S[:32], T[:32])
    assert ratio(method) != before


@pytest.mark.parametrize("rows", [1, 3, 31])
def test_too_few_rows_are_refused(rows: int) -> None:
    with pytest.raises(Refused, match=rf"'dpk'.*batch has {rows}, expected 32 or more.*ratio a number"):
        built(S[:rows], T[:rows])
    assert loss(built(S[:rows], T[:rows], ratio=0.5), S[:rows], T[:rows]).isfinite()


def test_processes_share_one_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of each one's terms, of those that have rows enough."""
    other = torch.tensor([2.0, 900.0, 400.0, 1.0]).double()
    mine = F.pad(hsic_terms(S.flatten(1), T.flatten(1)), (0, 1), value=1.0)
    method = built()
    monkeypatch.setattr(across, "total", lambda x: x + other)
    loss(method)
    torch.testing.assert_close(method.hsic[0], (mine + other)[:3] / 2)
    few = built()
    loss(few, S[:5], T[:5])
    torch.testing.assert_close(few.hsic[0], other[:3])


# --- what it is shown ---


SQUARE = [(1, 1), (7, 1), (8, 1), (11, 1), (14, 2), (16, 2), (28, 4), (32, 4), (56, 8)]


@pytest.mark.parametrize(
    ("h", "w", "patch"),
    [*((side, side, patch) for side, patch in SQUARE), (8, 16, 2), (12, 6, 2), (9, 16, 1)],
)
def test_patches_are_as_large_as_it_takes(h: int, w: int, patch: int) -> None:
    method = built(maps(2, 3, h, w), maps(2, 5, h, w, seed=1), ratio=0.5, width=8)
    teller = method.tellers[0]
    assert teller.patch == patch and teller.tokens == (h // patch) * (w // patch)
    assert loss(method, maps(2, 3, h, w), maps(2, 5, h, w)).isfinite()


def test_a_patch_holds_the_cells_that_lie_together() -> None:
    teller = Teller(maps(1, 2, 4, 6), maps(1, 2, 4, 6), 2, 8, 1, 4, True)
    x = maps(3, 2, 4, 6)
    patches = teller.patches(x)
    assert patches.shape == (3, 6, 8)
    for n in range(6):
        i, j = 2 * (n // 3), 2 * (n % 3)
        assert torch.equal(patches[:, n], x[:, :, i : i + 2, j : j + 2].flatten(1))


@pytest.mark.parametrize(("channels", "width"), [(6, 8), (16, 16), (300, 256)])
def test_a_token_is_as_wide_as_a_patch_of_the_student_but_for_the_heads(channels: int, width: int) -> None:
    assert built(maps(2, channels, 2, 2), T[:2, :, :2, :2], ratio=0.5).tellers[
        0
    ].encode_s.positions.shape == (
        4,
        width,
    )


def test_sizes_are_as_asked() -> None:
    teller = built(S, T, patch=2, width=12, depth=3, heads=2).tellers[0]
    assert tuple(teller.encode_s.embed.weight.shape) == (12, 16)
    assert tuple(teller.encode_t.embed.weight.shape) == (12, 24)
    assert tuple(teller.encode_t.positions.shape) == (4, 12)
    assert tuple(teller.decode[1].weight.shape) == (24, 12)
    for blocks in (teller.encode_s.blocks, teller.encode_t.blocks, teller.decode[0]):
        assert len(blocks) == 4 and blocks[0].heads == 2 and blocks[0].mlp[0].out_features == 24


def test_the_teachers_grid_becomes_the_students() -> None:
    method = built(ratio=0.5)
    large = T.repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = maps(40, 6, 8, 8, seed=3)
    flat = noise - F.avg_pool2d(noise, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(loss(method, S, large + flat), loss(method))
    coarse = T[:, :, ::2, ::2]
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(loss(method, S, coarse), loss(method, S, fine))


def test_tokens_are_the_map_that_they_make() -> None:
    method = built(ratio=0.5)
    tokens = torch.cat([maps(40, 1, 4, seed=2), S.flatten(2).mT], 1)
    torch.testing.assert_close(loss(method, tokens, T.flatten(2).mT), loss(method))


def test_the_teachers_patches_may_be_normalised() -> None:
    method = built(ratio=0.5, normalise=True, patch=2)
    found = loss(method)
    assert torch.equal(loss(method, S, T), found)
    teller, given = method.tellers[0], places(method._draw(batch(), TAP, 4), torch.tensor(0.5))
    there = teller.patches(T)
    mean, sd = there.mean(2, keepdim=True), there.std(2, correction=0, keepdim=True)
    told = teller(teller.patches(S), there, given)
    torch.testing.assert_close(found, ((told - (there - mean) / sd) ** 2).mean(), rtol=1e-4, atol=0)


def test_figures_tell_the_ratio_and_both_parts_of_the_loss() -> None:
    method = built(ratio=0.25)
    total = loss(method).item()
    found = method.figures()
    assert found.keys() == {f"ratio.{TAP}", f"masked.{TAP}", f"unmasked.{TAP}"}
    assert found[f"ratio.{TAP}"] == 0.25
    given = given_at(method, batch(), 0.25)
    for which in ("masked", "unmasked"):
        assert found[f"{which}.{TAP}"] == pytest.approx(slow_loss(method, S, T, given, which), rel=1e-6)
    parts = 0.25 * found[f"masked.{TAP}"] + 0.75 * found[f"unmasked.{TAP}"]
    assert parts == pytest.approx(total, rel=1e-6)
    for share, lacks in ((0.0, "masked"), (1.0, "unmasked")):
        method = built(ratio=share)
        loss(method)
        assert f"{lacks}.{TAP}" not in method.figures() and len(method.figures()) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_dead_maps_are_finite(dtype: torch.dtype) -> None:
    s, t = maps(40, 4, 4, 4, dtype=dtype), maps(40, 6, 4, 4, seed=1, dtype=dtype)
    s[0], s[:, 1], t[1], t[:, 4] = 0, 3, 0, 0
    s.requires_grad_()
    method = built(s, t).to(dtype)
    found = loss(method, s, t)
    found.backward()
    assert found.dtype == torch.float32 and found.isfinite() and s.grad.isfinite().all()
    dead = torch.zeros_like(s)
    method = built(dead, t).to(dtype)
    assert loss(method, dead, t).isfinite() and ratio(method) == 1


# --- refusals ---


@pytest.mark.parametrize("value", [-0.1, 1.5, "static", float("nan")])
def test_a_ratio_that_is_none_is_refused(value: float | str) -> None:
    with pytest.raises(Refused, match=r"ratio of 'dpk' is .*'dynamic' or a number from 0 to 1"):
        DPK(ratio=value)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"positions": "given"}, "positions of 'dpk' are 'given'.*all, masked, unmasked"),
        ({"taps": ()}, "0 taps"),
        ({"depth": 0}, "depth 0"),
        ({"heads": 0}, "0 heads"),
        ({"patch": 0}, "patch 0"),
        ({"width": 0}, "width 0"),
        ({"width": 10}, "width 10.*4 heads.*multiple"),
        ({"decay": 1.0}, r"decay of 'dpk' is 1\.0"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        DPK(**knobs)


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(Refused, match=r"patches of 3x3, and tap 'stage3' shows \(4, 4\)"):
        built(patch=3)


def test_vectors_are_refused_with_both_shapes() -> None:
    with pytest.raises(Refused, match=r"'dpk'.*\(40, 4, 4, 4\).*\(40, 6\)"):
        built(S, T.mean((2, 3)))


def test_a_grid_that_changes_is_refused() -> None:
    with pytest.raises(Refused, match=r"'stage3' of method 'dpk' shows a grid of \(2, 2\).*\(4, 4\)"):
        loss(built(), S[:, :, ::2, ::2])


# --- in use ---


class Net(nn.Module):
    TAPS = {TAP: "stage"}  # noqa: RUF012

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stage = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x).mean((2, 3))


def test_the_ratio_falls_as_the_student_learns_and_the_student_is_all_that_ships() -> None:
    x, index = maps(40, 2, 4, 4, dtype=torch.float32), torch.arange(40)
    student, teacher = Net(4, 1), Net(8, 2)
    with torch.no_grad():
        teacher.stage[0].weight *= torch.tensor([[0.2], [2.0]])[None, :, :, None]
        student.stage[0].weight *= torch.tensor([[2.0], [0.2]])[None, :, :, None]
    before = {name: v.clone() for name, v in teacher.state_dict().items()}
    example = Batch(x, index=index)
    distiller = Distiller(student, teacher, DPK(), example=example, task=None)
    adam, method = torch.optim.Adam(distiller.parameters(), lr=0.03), distiller.methods["dpk"]
    course = []
    for epoch in range(40):
        adam.zero_grad()
        distiller(replace(example, lesson=Lesson(epoch=epoch)))["dpk"].backward()
        adam.step()
        course.append(ratio(method))
    assert course[0] > 0.3 and course[-1] < 0.5 * course[0]
    assert student.state_dict().keys() == {"stage.0.weight", "stage.0.bias"}
    assert all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
