"""RTK against slow loops, what its spec says of any such method, and what its selection does and does not
do."""

import math
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Lens, Term
from limbeck.core.taps import Seen
from limbeck.knowledge.feature.at import at, attention
from limbeck.knowledge.feature.rtk import RTK, among, medoids, rtk, threshold, topk
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN

B = 4
BATCH = Batch(torch.zeros(B, 1))
SIDES = pytest.mark.parametrize("side", ["student", "teacher"])
SIMILARITIES = pytest.mark.parametrize("similarity", ["learned", "cosine_map"])


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(**at: Tensor) -> Seen:
    return Seen(None, at)


S = seen(a=maps(B, 2, 4, 4), b=maps(B, 4, 2, 2, seed=1), c=maps(B, 3, 4, 4, seed=2))
T = seen(**{f"t{n}": maps(B, 2 + n, *((4, 4) if n % 2 else (2, 2)), seed=3 + n) for n in range(5)})


def made(s: Seen = S, t: Seen = T, **knobs: object) -> RTK:
    torch.manual_seed(0)
    method = RTK(width=5, taps=tuple(s.at), teacher_taps=tuple(t.at), **knobs)
    method.build(s, t, BATCH)
    for p in method.parameters():  # scales and biases that are neither 1 nor 0
        nn.init.normal_(p)
    return method.double()


def sims(seed: int = 0) -> Tensor:
    return maps(B, 3, 6, seed=seed)


# --- the equation, one number at a time ---


def slow_norm(rows: list[Tensor], norm: nn.BatchNorm1d) -> list[Tensor]:
    mean = sum(rows) / len(rows)
    variance = sum((row - mean) ** 2 for row in rows) / len(rows)
    return [(row - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias for row in rows]


def slow_attention(x: Tensor, h: int, w: int) -> Tensor:
    """A row's energy, averaged or repeated to a grid that divides or is divided by its own."""
    e = (x**2).sum(0)
    rows, columns = e.shape
    cells = [
        e[
            i * rows // h : math.ceil((i + 1) * rows / h), j * columns // w : math.ceil((j + 1) * columns / w)
        ].mean()
        for i in range(h)
        for j in range(w)
    ]
    flat = torch.stack(cells)
    return flat / flat.square().sum().sqrt()


def slow_similarity(method: RTK, s: list[Tensor], t: list[Tensor]) -> Tensor:
    vectors = []
    for layers, maps_ in ((method.student, s), (method.teacher, t)):
        vectors.append(
            [
                slow_norm([layers.embed[n][0].weight @ row.mean((1, 2)) for row in x], layers.embed[n][1])
                for n, x in enumerate(maps_)
            ]
        )
    found = torch.zeros(len(s[0]), len(s), len(t)).double()
    for b in range(len(s[0])):
        for i in range(len(s)):
            for j in range(len(t)):
                near = vectors[0][i][b] @ vectors[1][j][b]
                placed = method.student.position[i] @ method.teacher.position[j]
                found[b, i, j] = (near + placed) / math.sqrt(method.width)
    return found


def slow_pairs(s: list[Tensor], t: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The cosine and the squared distance of every two maps, on the teacher's grid."""
    cosine, gap = (torch.zeros(len(s[0]), len(s), len(t)).double() for _ in range(2))
    for b in range(len(s[0])):
        for i in range(len(s)):
            for j in range(len(t)):
                grid = t[j].shape[2:]
                here, there = slow_attention(s[i][b], *grid), slow_attention(t[j][b], *grid)
                cosine[b, i, j], gap[b, i, j] = (here * there).sum(), (here - there).square().sum()
    return cosine, gap


@SIDES
@SIMILARITIES
def test_it_is_the_equation(similarity: str, side: str) -> None:
    method = made(query_side=side, similarity=similarity, share=0.35)
    s, t = list(S.at.values()), list(T.at.values())
    similar, gap = slow_pairs(s, t)
    if similarity == "learned":
        similar = slow_similarity(method, s, t)
        torch.testing.assert_close(method.compared(s, t), similar)
    if side == "teacher":
        similar, gap = similar.mT, gap.mT
    _, queries, keys = similar.shape
    expected = 0.0
    for b in range(B):
        for q in range(queries):
            to = similar[b, q].tolist()
            heard = sorted(range(keys), key=lambda k: -to[k])[: 2 if keys == 5 else 1]
            total = sum(math.exp(to[k]) for k in heard)
            expected += sum(math.exp(to[k]) / total * gap[b, q, k].item() for k in heard) / (B * queries)
    assert method.loss(S, T, BATCH).item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck() -> None:
    similar, gap = sims().requires_grad_(), maps(B, 3, 6, seed=1).abs().requires_grad_()
    kept = topk(similar, 3)
    assert torch.autograd.gradcheck(lambda s, g: rtk(among(s, kept), g), (similar, gap))


# --- the spec's invariants ---


@pytest.mark.parametrize("r", [1, 2, 3, 6])
def test_1_weights_add_to_1_over_r_keys_and_the_others_get_no_gradient(r: int) -> None:
    similar = sims().requires_grad_()
    kept = topk(similar, r)
    alpha = among(similar, kept)
    torch.testing.assert_close(alpha.sum(2), torch.ones(B, 3).double())
    assert ((alpha > 0).sum(2) == r).all()
    (alpha * maps(B, 3, 6, seed=1)).sum().backward()
    assert not similar.grad[~kept].any()
    assert r == 1 or similar.grad[kept].all()
    least_kept = similar.masked_fill(~kept, math.inf).amin(2)
    assert r == 6 or (least_kept > similar.masked_fill(kept, -math.inf).amax(2)).all()


@SIDES
@SIMILARITIES
def test_1_of_the_method(similarity: str, side: str) -> None:
    for share, r in ((0.01, 1), (0.4, 2 if side == "student" else 1), (1.0, 5 if side == "student" else 3)):
        method = made(similarity=similarity, query_side=side, share=share)
        method.loss(S, T, BATCH)
        torch.testing.assert_close(method.watch.share.sum(1), torch.ones_like(method.watch.share[:, 0]))
        assert sum(method.watch.chosen.tolist()) == pytest.approx(r)


@SIDES
@SIMILARITIES
def test_2_all_keys_are_no_filter_and_one_is_the_nearest(similarity: str, side: str) -> None:
    knobs = {"similarity": similarity, "query_side": side}
    whole, unfiltered = made(**knobs, share=1), made(**knobs, selection="none")
    torch.testing.assert_close(whole.loss(S, T, BATCH), unfiltered.loss(S, T, BATCH), rtol=0, atol=0)
    assert abs(whole.loss(S, T, BATCH) - made(**knobs, share=0.4).loss(S, T, BATCH)) > 1e-6
    one, here, there = made(**knobs, share=0.01), list(S.at.values()), list(T.at.values())
    cosine, gap = slow_pairs(here, there)
    similar = one.compared(here, there) if similarity == "learned" else cosine
    over = 2 if side == "student" else 1
    nearest = gap.gather(over, similar.argmax(over, keepdim=True))
    torch.testing.assert_close(one.loss(S, T, BATCH), nearest.mean())


def test_2_one_key_teaches_a_learned_similarity_nothing() -> None:
    """As the docstring says: a single weight is 1, so it passes no gradient."""
    for share, learns in ((0.01, False), (0.4, True)):
        method = made(share=share)
        method.loss(seen(**{n: x.requires_grad_() for n, x in S.at.items()}), T, BATCH).backward()
        assert any(p.grad is not None and p.grad.any() for p in method.parameters()) == learns


def test_3_a_student_that_is_the_teacher() -> None:
    method = made(S, S, similarity="cosine_map", share=0.01)
    assert method.loss(S, S, BATCH) < 1e-14
    assert made(S, S, similarity="cosine_map", share=1).loss(S, S, BATCH) > 1e-3


@SIDES
@SIMILARITIES
def test_3_one_map_of_each_is_plain_attention_transfer_summed(similarity: str, side: str) -> None:
    s, t = seen(a=S.at["a"]), seen(t1=T.at["t1"])
    method = made(s, t, similarity=similarity, query_side=side)
    torch.testing.assert_close(method.loss(s, t, BATCH), 16 * at(s.at["a"], t.at["t1"]))


@SIDES
@SIMILARITIES
@pytest.mark.parametrize("selection", ["topk", "threshold", "none"])
def test_4_the_loss_is_0_to_2_and_strength_does_not_matter(
    similarity: str, side: str, selection: str
) -> None:
    knobs = {"similarity": similarity, "query_side": side, "selection": selection}
    apart = torch.zeros(2, B, 1, 4, 4).double()
    apart[0, :, :, 0, 0], apart[1, :, :, 3, 3] = 1, 1
    far = [seen(a=apart[0] * torch.rand(B, 1, 1, 1)), seen(x=apart[1], y=2 * apart[1])]
    assert made(*far, **knobs).loss(*far, BATCH).item() == pytest.approx(2)
    method = made(**knobs)
    for layers in (method.student, method.teacher) if similarity == "learned" else ():
        for _, norm in layers.embed:
            norm.eps = 1e-14
    loss = method.loss(S, T, BATCH)
    assert 0 < loss < 2
    s, t = S.at | {"a": 100 * S.at["a"]}, T.at | {"t2": 0.03 * T.at["t2"]}
    torch.testing.assert_close(method.loss(seen(**s), seen(**t), BATCH), loss)


@SIMILARITIES
@pytest.mark.parametrize(
    ("side", "selection"),
    [(side, one) for side in ("student", "teacher") for one in ("topk", "threshold", "none")]
    + [("student", "stage_medoid")],
)
def test_5_the_order_of_taps_does_not_matter(similarity: str, side: str, selection: str) -> None:
    """Of the two on the finer grid the later stays the later: a medoid of two is the deeper."""
    knobs = {"similarity": similarity, "query_side": side, "selection": selection}
    method = made(**knobs)
    loss = method.loss(S, T, BATCH)
    for s, t in (((0, 1, 2), (4, 1, 0, 3, 2)), ((2, 0, 1), (0, 1, 2, 3, 4))):
        here, there = [list(S.at)[n] for n in s], [list(T.at)[n] for n in t]
        other = made(seen(**{n: S.at[n] for n in here}), seen(**{n: T.at[n] for n in there}), **knobs)
        if similarity == "learned":
            for mine, its, order in (
                (other.student, method.student, s),
                (other.teacher, method.teacher, t),
            ):
                mine.position = nn.Parameter(its.position[list(order)])
                mine.embed = nn.ModuleList(its.embed[n] for n in order)
        torch.testing.assert_close(other.loss(S, T, BATCH), loss)


def nets() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = CNN(3, widths=(4, 6)), CNN(3, widths=(5, 7, 9), depth=2)
    return student, teacher, torch.randn(8, 1, 8, 8), torch.arange(8) % 3


BLOCKS = ("stages.0.2", "stage1", "stages.1.2", "stage2", "stages.2.2", "stage3")


def test_6_weight_0_is_the_task_and_kd_and_what_should_learn_does() -> None:
    losses = {}
    for weight in (0.0, 2.0, None):
        student, teacher, x, y = nets()
        method = RTK(width=16, taps=("stage1", "stage2"), teacher_taps=BLOCKS)
        terms = [Term(KD(4), weight=0.9)] + ([] if weight is None else [Term(method, weight=weight)])
        distiller = Distiller(student, teacher, terms, example=(x, y))
        losses[weight] = distiller(x, y)["loss"]
        losses[weight].backward()
        assert all(p.grad is None for p in teacher.parameters())
        if weight:
            assert all(p.grad is not None and p.grad.any() for p in method.parameters())
            assert student.stages[0][0].weight.grad.any()
    assert torch.equal(losses[0.0], losses[None]) and losses[2.0] > losses[0.0]


# --- the other selections ---


def test_threshold_keeps_what_weighs_more_than_so_many_even_shares() -> None:
    similar = torch.tensor([[[0.5, 0.24, 0.2, 0.06], [0.25, 0.25, 0.25, 0.25]]]).log()
    for shares, kept in ((1.0, (1, 0, 0, 0)), (0.9, (1, 1, 0, 0)), (0.5, (1, 1, 1, 0)), (0.1, (1, 1, 1, 1))):
        assert threshold(similar, shares)[0, 0].tolist() == [bool(k) for k in kept]
    assert threshold(similar, 1.0)[0, 1].any(), "the best of equals is kept, whatever rounding does"


def test_a_medoid_is_the_map_most_like_the_others_of_its_grid() -> None:
    left, right = torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, 1, 2, 2).double()
    left[:, :, :, 0], right[:, :, :, 1] = 1, 1
    middle = torch.ones(2, 1, 2, 2).double()
    fine = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    assert medoids([left, fine, middle, right]).tolist() == [[False, True, True, False]] * 2
    per_row = [torch.cat([a[:1], b[1:]]) for a, b in ((left, middle), (middle, left), (right, right))]
    assert medoids(per_row).tolist() == [[False, True, False], [True, False, False]]
    assert medoids([left, right, fine]).tolist() == [[False, True, True]] * 2, "of two, the deeper"
    slow = made(selection="stage_medoid", similarity="cosine_map")
    kept = slow.selected(torch.zeros(B, 3, 5).double(), list(T.at.values()))
    for b in range(B):
        for places in ((0, 2, 4), (1, 3)):
            looks = {n: attention(T.at[f"t{n}"])[b] for n in places}
            best = max(places, key=lambda n: (round(sum((looks[n] @ looks[m]).item() for m in places), 9), n))
            assert [kept[b, 1, n].item() for n in places] == [n == best for n in places]


# --- in use ---


def test_detached_weights_stop_learning_and_the_student_goes_on() -> None:
    grads = {}
    for epoch in (1, 2):
        student, teacher, x, y = nets()
        method = RTK(width=16, detach_after=2, taps=("stage1", "stage2"), teacher_taps=BLOCKS)
        distiller = Distiller(student, teacher, method, example=(x, y), task=None)
        distiller(Batch(x, y, torch.arange(8), Lesson(epoch=epoch, epochs=4)))["rtk"].backward()
        grads[epoch] = any(p.grad is not None and p.grad.any() for p in method.parameters())
        assert student.stages[0][0].weight.grad.any()
    assert grads == {1: True, 2: False}


@SIDES
def test_figures_tell_which_layers_are_heard(side: str) -> None:
    student, teacher, x, y = nets()
    method = RTK(side, width=16, taps=("stage1", "stage2"), teacher_taps=BLOCKS)
    Distiller(student, teacher, method, example=(x, y))(x, y)
    figures, keys = method.figures(), BLOCKS if side == "student" else ("stage1", "stage2")
    assert set(figures) == {"entropy", "top_pair", *(f"chosen.{tap}" for tap in keys)}
    assert sum(figures[f"chosen.{tap}"] for tap in keys) == pytest.approx(len(keys) / 2)
    queries = 2 if side == "student" else 6
    assert 1 / (queries * len(keys)) <= figures["top_pair"] <= 1 / queries + 1e-6
    assert 0 <= figures["entropy"] <= math.log(max(1, len(keys) / 2)) + 1e-6


def test_one_row_is_refused_where_a_batch_is_normalised() -> None:
    one = [Seen(None, {name: x[:1] for name, x in shown.at.items()}) for shown in (S, T)]
    method = made()
    with pytest.raises(Refused, match="'rtk' normalises over the rows"):
        method.loss(*one, BATCH)
    with pytest.raises(Refused, match="'rtk' normalises over the rows"):
        made(*one)
    assert torch.isfinite(method.eval().loss(*one, BATCH))
    assert torch.isfinite(made(*one, similarity="cosine_map").loss(*one, BATCH))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"query_side": "both"}, "`query_side` of 'rtk' is 'both'"),
        ({"similarity": "cosine"}, "`similarity` of 'rtk' is 'cosine'"),
        ({"selection": "all"}, "`selection` of 'rtk' is 'all'"),
        ({"share": 0.0}, "0.0 and 1.0, expected"),
        ({"share": 1.5}, "1.5 and 1.0, expected"),
        ({"threshold": 1.5}, "0.5 and 1.5, expected"),
        ({"threshold": math.nan}, "0.5 and nan, expected"),
        ({"detach_after": -1}, "`detach_after` of 'rtk' is -1"),
        ({"width": 0}, "'rtk' was given width 0"),
        ({"taps": ()}, "0 taps"),
        ({"teacher_taps": ()}, "0 teacher_taps"),
        ({"selection": "stage_medoid", "query_side": "teacher"}, "'stage_medoid' of 'rtk'"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs: dict, said: str) -> None:
    with pytest.raises(Refused, match=said):
        RTK(**knobs)


# --- what filtering by nearness does: keys of the teacher beside corrupted ones ---


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


@cache
def trained() -> nn.Module:
    """Some thousand steps of a row: its maps have something to show."""
    torch.manual_seed(0)
    teacher, (x, y) = CNN(10, widths=(8, 16), depth=3), digits()
    adam = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for rows in torch.arange(1200).split(50) * 2:
        adam.zero_grad()
        F.cross_entropy(teacher(x[rows]), y[rows]).backward()
        adam.step()
    return teacher


CLEAN, BAD = ("stages.0.2", "stages.0.5", "stages.0.8"), ("bad0", "bad1", "bad2")
STUDENT = ("stage1", "stage2")


def corrupted(kind: str) -> Lens:
    """A lens: beside each of the teacher's maps, on the same grid, one that says nothing of the image."""

    def lens(s: Seen, t: Seen) -> tuple[Seen, Seen, float]:
        at = {}
        for n, tap in enumerate(CLEAN):
            clean = t.at[tap]
            draw = torch.Generator().manual_seed(n)
            at[tap] = clean
            match kind:
                case "another image's":
                    at[f"bad{n}"] = clean.roll(1, 0)
                case "spots":  # all channels are strong at the same few places
                    at[f"bad{n}"] = torch.randn(clean[:, :1].shape, generator=draw).expand_as(clean)
                case "haze":  # each channel is strong elsewhere, so their sum is nearly even
                    at[f"bad{n}"] = torch.randn(clean.shape, generator=draw)
        return s, Seen(t.out, at), 1.0

    return lens


def heard(kind: str, similarity: str, share: float) -> tuple[float, float]:
    """How often a corrupted key is chosen, and how much of all weight they have, after a short training."""
    x, y = (v[:200] for v in digits())
    torch.manual_seed(1)
    student = CNN(10, widths=(4, 8))
    method = RTK(similarity=similarity, share=share, taps=STUDENT, teacher_taps=CLEAN + BAD)
    teacher = trained()
    teacher.TAPS = {**teacher.TAPS, **dict(zip(BAD, CLEAN, strict=True))}
    term = Term(method, weight=3, through=(corrupted(kind),))
    distiller = Distiller(student, teacher, term, example=(x[:100], y[:100]))
    adam = torch.optim.Adam(distiller.parameters(), lr=0.01)
    for step in range(40):
        rows = torch.arange(200)[step % 2 :: 2]
        adam.zero_grad()
        distiller(x[rows], y[rows])["loss"].backward()
        adam.step()
    return float(method.watch.chosen[3:].mean()), float(method.watch.share[:, 3:].sum(1).mean())


OF_NOTHING = pytest.mark.parametrize("kind", ["another image's", "spots"])


@OF_NOTHING
def test_corrupted_keys_are_selected_less_than_by_chance(kind: str) -> None:
    """By the maps' cosine; chance is a half of three of six, and a sixth of one of six."""
    assert heard(kind, "cosine_map", 0.5)[0] < 0.45
    assert heard(kind, "cosine_map", 0.01)[0] < 0.05


@OF_NOTHING
def test_a_learned_similarity_comes_to_give_them_no_weight(kind: str) -> None:
    """It is the weights that tell them apart: among the half that is selected they may be as often as not."""
    assert heard(kind, "learned", 0.5)[1] < 0.1
    assert heard(kind, "learned", 1.0)[1] < 0.1


def test_what_is_equally_strong_everywhere_passes_the_filter() -> None:
    """As the docstring says: near is not useful."""
    assert heard("haze", "cosine_map", 0.5)[0] > 0.7


def test_one_learned_key_is_left_to_chance() -> None:
    assert 0.1 < heard("another image's", "learned", 0.01)[0] < 0.25


def test_a_coarse_grid_is_near_whatever_it_shows() -> None:
    method = RTK(similarity="cosine_map", share=0.01, taps=("a",), teacher_taps=("fine", "coarse"))
    x = maps(256, 8, 8, 8)
    s, t = seen(a=x), seen(fine=maps(256, 8, 8, 8, seed=1), coarse=maps(256, 8, 2, 2, seed=2))
    method.build(s, t, BATCH)
    method.loss(s, t, BATCH)
    assert method.figures()["chosen.coarse"] > 0.8
