"""TinyViT's sparse answer against a loop written from the paper, its invariants, and what a store replays."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck import recipe, registry
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen, Teacher
from limbeck.data.loader import Data, Loader
from limbeck.data.store_write import write
from limbeck.data.stored import Stored
from limbeck.knowledge.response.kd import KD
from limbeck.knowledge.response.top_k import sparse, top_k
from limbeck.views.crop import crop

Z = 3 * torch.randn(9, 20, generator=torch.Generator().manual_seed(0))


def slow_q(z: list[float], k: int) -> list[float]:
    """The paper's target for one row, from half-precision values, the rest clamped and all summing to 1."""
    total = sum(map(math.exp, z))
    p = [math.exp(v) / total for v in z]
    kept = sorted(range(len(z)), key=lambda c: -p[c])[:k]
    v = {c: float(np.float16(p[c])) for c in kept}
    others = len(z) - k
    rest = min(max((1 - sum(v.values())) / others, 0.0), v[kept[-1]]) if others else 0.0
    norm = sum(v.values()) + others * rest
    return [v.get(c, rest) / norm for c in range(len(z))]


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_it_is_the_papers_target(k: int) -> None:
    q = sparse(Z, k).exp()
    torch.testing.assert_close(q, torch.tensor([slow_q(row, k) for row in Z.tolist()]), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(q.sum(1), torch.ones(9), rtol=0, atol=1e-6)
    kept = Z.topk(k).indices
    assert torch.equal(q.topk(k).values, q.gather(1, kept))  # in the teacher's order
    left = q.scatter(1, kept, -1)
    rest = left[left >= 0].view(9, -1)
    assert rest.shape[1] == 20 - k
    if k < 20:
        assert torch.equal(rest.amax(1), rest.amin(1))
        assert bool((rest[:, 0] <= q.gather(1, kept).amin(1)).all())


def test_the_more_is_kept_the_nearer_it_is_and_all_is_the_answer_itself() -> None:
    p = Z.softmax(1)
    gaps = [(sparse(Z, k).exp() - p).abs().sum(1) / 2 for k in (1, 3, 10, 20)]
    for less, more in pairwise(gaps):
        assert bool((more <= less + 1e-3).all()) and bool((more < less).any())
    for k, gap in zip((1, 3, 10, 20), gaps, strict=True):
        assert bool((gap <= 1 - p.topk(k).values.sum(1) + 1e-3).all())
    assert float(gaps[-1].max()) < 1e-3


def test_its_cross_entropy_is_least_at_the_target_with_the_papers_gradient() -> None:
    """At least the entropy of q, equal where the student says q; slope (softmax - q)/b."""
    q = sparse(Z, 3).exp()

    def cross_entropy(z: Tensor) -> Tensor:
        return -(q * z.log_softmax(1)).sum(1).mean()

    entropy = -(q * q.log()).sum(1).mean()
    torch.testing.assert_close(cross_entropy(q.log() + 5), entropy)
    s = torch.randn(9, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(s), s)
    assert cross_entropy(s) > entropy + 0.1
    torch.testing.assert_close(slope, (s.softmax(1) - q) / 9, rtol=1e-4, atol=1e-6)
    seen_s, seen_t, factor = top_k(Seen(s), Seen(Z), k=3)
    loss = factor * KD(temperature=1.0).loss(seen_s, seen_t, Batch(s.detach()))
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], slope, rtol=1e-4, atol=1e-6)


def test_a_certain_teacher_has_finite_logarithms() -> None:
    z = torch.zeros(2, 20)
    z[0, 4], z[1, 3] = 100, 40
    found = sparse(z, 3)
    assert bool(found.isfinite().all()) and found.argmax(1).tolist() == [4, 3]


@pytest.mark.parametrize("k", [1, 4])
def test_what_was_kept_is_never_less_likely_than_the_rest(k: int) -> None:
    """A teacher without an opinion: in half precision a twentieth is a little less than that."""
    assert float(torch.tensor(0.05).half()) < 0.05
    torch.testing.assert_close(sparse(torch.zeros(1, 20), k), torch.full((1, 20), -math.log(20)))
    assert len(sparse(torch.zeros(1, 20), k).unique()) == 1


def test_a_dense_answer_is_that_of_each_place() -> None:
    z = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(2))
    rows = sparse(z.movedim(1, -1).reshape(-1, 6), 2).view(2, 3, 4, 6).movedim(-1, 1)
    assert torch.equal(sparse(z, 2), rows)


def test_only_the_teachers_answer_is_changed() -> None:
    model, taps, mask = nn.Identity(), {"pooled": Z[:, :2]}, torch.ones(9, 3, dtype=torch.bool)
    s, t = Seen(Z + 1, taps, mask, model), Seen(Z, taps, mask, model)
    s_seen, t_seen, factor = top_k(s, t, 4)
    assert s_seen is s and factor == 1.0 and torch.equal(t_seen.out, sparse(Z, 4))
    assert (t_seen.at, t_seen.mask, t_seen.model) == (taps, mask, model)


@pytest.mark.parametrize(("shape", "k"), [((4, 3), 4), ((4, 3), 0), ((4,), 1)])
def test_more_than_there_are_is_refused(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(Refused, match=rf"keeps {k} of a teacher's classes, and it answers \({shape[0]},"):
        top_k(Seen(torch.zeros(shape)), Seen(torch.zeros(shape)), k)


# --- beside a store ---


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12))


def loader() -> Loader:
    x = torch.randint(0, 256, (40, 1, 8, 8), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    data = Data(x, torch.arange(40) % 12, tuple("abcdefghijkl"), 1 / 255, 0.5, 0.3)
    return Loader(data, 8, seed=3, epochs=2, augment=(crop,))


def losses(under: Teacher, lens: tuple[object, ...]) -> list[float]:
    lessons, student = loader(), net(1)
    term = Term(KD(temperature=1.0), through=lens)  # type: ignore[arg-type]
    distiller = Distiller(student, under, term, example=lessons.at(0), task=None)
    optimiser = torch.optim.SGD(distiller.parameters(), 0.05)
    found = []
    for epoch in range(lessons.epochs):
        for batch in lessons.epoch(epoch):
            loss = distiller(batch)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("k", [1, 4])
def test_a_live_teacher_behind_it_teaches_as_a_store_of_the_top_does(tmp_path: Path, k: int) -> None:
    for _ in write(tmp_path, Frozen(net(0)), loader(), range(2), kind="top", top=k):
        pass
    live = losses(Frozen(net(0)), (lambda s, t: top_k(s, t, k),))
    assert len(live) == 10
    assert live == pytest.approx(losses(Stored(tmp_path), ()), rel=1e-5)
    assert live != pytest.approx(losses(Frozen(net(0)), ()), rel=1e-3)


def test_a_recipe_names_it() -> None:
    assert registry.find("lens", "top_k") is top_k
    term = {"method": "kd", "temperature": 1, "through": [{"name": "top_k", "k": 3}]}
    stage = {"learner": "student", "epochs": 1, "task_weight": 0, "terms": [term]}
    models = {"teacher": "cnn", "student": "cnn"}
    said = recipe.parse({"data": "digits", "models": models, "stages": [stage]}).stages[0].terms[0].through
    assert [(lens.name, lens.knobs) for lens in said] == [("top_k", {"k": 3})]
