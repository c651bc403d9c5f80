"""Retrieval: the triplet loss over labelled rows, and recall@k against plain loops."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import build, recipe
from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import keyed
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace, evaluate
from limbeck.knowledge.relation.rkd import RKD
from limbeck.schemes.offline import Offline
from limbeck.tasks import retrieve
from limbeck.tasks.retrieve import Retrieve, recall

Y = [0, 1, 0, IGNORE, 2, 1, 0, 2, IGNORE, 1]


def rows(b: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(b, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(y: list[int], lesson: Lesson | None = None, start: int = 0) -> Batch:
    index = torch.arange(start, start + len(y))
    return Batch(torch.zeros(len(y), 1), torch.tensor(y), index, lesson or Lesson())


# --- the loss ---


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_is_the_mean_over_all_triplets(squared: bool, normalise: bool) -> None:
    x = rows(10, 3)
    e = F.normalize(x) if normalise else x
    power = 2 if squared else 1
    costs = [
        max(0.0, float((e[a] - e[p]).norm() ** power - (e[a] - e[n]).norm() ** power) + 0.5)
        for a in range(10)
        for p in range(10)
        for n in range(10)
        if a != p and Y[a] == Y[p] != IGNORE and Y[n] not in (IGNORE, Y[a])
    ]
    task = Retrieve(margin=0.5, negatives="all", squared=squared, normalise=normalise)
    assert task.loss(Seen(x), batch(Y)).item() == pytest.approx(sum(costs) / len(costs), rel=1e-9)


@pytest.mark.parametrize("negatives", ["distance_weighted", "semi_hard", "all"])
def test_rows_without_a_label_do_not_matter(negatives: str) -> None:
    x = rows(10, 3)
    y = torch.tensor(Y)
    labelled = y != IGNORE
    task = Retrieve(negatives=negatives)
    few = batch(Y).map(lambda v: v[labelled])
    expected = task.loss(Seen(x[labelled]), few)
    x[~labelled] = torch.nan
    x.requires_grad_()
    loss = task.loss(Seen(x), batch(Y))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (x.grad[~labelled] == 0).all() and x.grad.any()


@pytest.mark.parametrize("negatives", ["distance_weighted", "semi_hard", "all"])
def test_it_is_0_when_no_row_is_labelled(negatives: str) -> None:
    x = rows(4, 3).requires_grad_()
    loss = Retrieve(negatives=negatives).loss(Seen(x), batch([IGNORE] * 4))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_negatives_are_drawn_by_seed_epoch_and_row_and_by_nothing_else() -> None:
    x, y = rows(60, 4), [n % 3 for n in range(60)]

    def loss(lesson: Lesson, start: int = 0, normalise: bool = True) -> float:
        return float(Retrieve(normalise=normalise).loss(Seen(x), batch(y, lesson, start)))

    first = loss(Lesson(seed=1, epoch=2))
    torch.rand(5)
    assert loss(Lesson(seed=1, epoch=2, step=99)) == first
    others = [loss(Lesson(seed=2, epoch=2)), loss(Lesson(seed=1, epoch=3)), loss(Lesson(seed=1, epoch=2), 60)]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("normalise", [False, True])
def test_negatives_are_weighed_by_directions_in_either_case(normalise: bool) -> None:
    """The weights are those of the unit sphere."""
    x = F.normalize(rows(10, 16))
    lengths = torch.linspace(50, 60, 10, dtype=torch.float64)[:, None]
    asked = []

    def weighted(far: Tensor, *rest: object) -> Tensor:
        asked.append(far)
        return torch.zeros(0, 3, dtype=torch.long)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieve, "distance_weighted", weighted)
        Retrieve(normalise=normalise).loss(Seen(lengths * x), batch([n % 3 for n in range(10)]))
    torch.testing.assert_close(asked[0], torch.cdist(x, x), rtol=0, atol=1e-6)


def test_triplets_reach_across_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, whole = rows(10, 3), batch(Y)
    expected = Retrieve().loss(Seen(x), whole)
    here, there = whole.split(2)
    others = {
        torch.float64: x[5:],
        torch.int64: there.y,
        torch.float32: keyed(there.lesson, there.index, "negatives", 2),
    }
    monkeypatch.setattr(across, "gather", lambda mine: torch.cat([mine, others[mine.dtype]]))
    torch.testing.assert_close(Retrieve().loss(Seen(x[:5]), here), expected)


def test_a_step_that_is_cut_into_micro_batches_is_refused() -> None:
    plan = recipe.parse(
        {
            "data": "digits",
            "task": "retrieve",
            "models": {"student": {"name": "cnn", "classes": 4}},
            "stages": [{"learner": "student", "epochs": 1, "accumulate": 2}],
        }
    )
    with pytest.raises(Refused, match=r"loss of 'task' compares the rows.*accumulate = 1"):
        build.rehearse(plan)


# --- the score ---


def slow_recall(x: Tensor, y: list[int], k: int) -> float:
    right = 0
    for i in range(len(y)):
        others = sorted((float((x[i] - x[j]).norm()), j) for j in range(len(y)) if j != i)
        right += any(y[j] == y[i] for _, j in others[:k])
    return 100 * right / len(y)


@pytest.mark.parametrize("room", [1, 37, 300, 10**6])
def test_recall_is_the_share_of_rows_with_a_friend_among_the_nearest(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In however many pieces it is computed."""
    x, y = rows(30, 2), [n % 4 for n in range(30)]
    monkeypatch.setattr(retrieve, "ROOM", room)
    found = recall(x, torch.tensor(y), (1, 2, 4, 8))
    assert found == pytest.approx([slow_recall(x, y, k) for k in (1, 2, 4, 8)])
    assert found[0] < found[1] < found[2] < found[3] < 100


def test_pieces_bound_what_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    addmm = torch.addmm

    def note(*args: Tensor, alpha: float) -> Tensor:
        far = addmm(*args, alpha=alpha)
        held.append(far.numel())
        return far

    monkeypatch.setattr(torch, "addmm", note)
    monkeypatch.setattr(retrieve, "ROOM", 1000)
    recall(rows(100, 3), torch.arange(100) % 7, (1,))
    assert max(held) <= 1000 and sum(held) == 100 * 100


def test_recall_is_exact_far_from_the_origin() -> None:
    x, y = (rows(40, 3) * 0.125 + 512).float(), torch.arange(40) % 4
    assert recall(x, y, (1, 4)) == pytest.approx([slow_recall(x, y.tolist(), k) for k in (1, 4)])


def test_recall_of_next_to_nothing() -> None:
    assert recall(rows(1, 3), torch.tensor([0]), (1, 2)) == [0, 0]
    assert recall(rows(2, 3), torch.tensor([1, 1]), (1, 8)) == [100, 100]
    assert recall(rows(3, 3), torch.tensor([0, 1, 2]), (1, 8)) == [0, 0]


def test_the_score_is_of_all_labelled_rows_of_all_batches() -> None:
    x, y = rows(10, 2), torch.tensor(Y)
    parts = [(Seen(x[a:b]), batch(Y[a:b])) for a, b in [(0, 4), (4, 7), (7, 10)]]
    kept = (y != IGNORE).nonzero()[:, 0]
    score = Retrieve().score(iter(parts))
    assert list(score) == ["recall@1", "recall@2", "recall@4", "recall@8", "cosine recall@1"]
    assert Retrieve.headline == "recall@1"
    for k in (1, 2, 4, 8):
        assert score[f"recall@{k}"] == pytest.approx(slow_recall(x[kept], y[kept].tolist(), k))


def test_lengths_count_for_the_score_and_not_for_its_cosine() -> None:
    y = [n % 2 for n in range(40)]
    x = rows(40, 4) + 2 * torch.tensor(y)[:, None]
    lengths = torch.linspace(0.1, 10, 40)[:, None]
    plain, scaled = (Retrieve().score([(Seen(v), batch(y))]) for v in (x, lengths * x))
    assert scaled["recall@1"] != plain["recall@1"]
    assert scaled["cosine recall@1"] == plain["cosine recall@1"]
    assert plain["cosine recall@1"] == pytest.approx(slow_recall(F.normalize(x), y, 1))


# --- what does not fit ---


def test_the_check_passes_what_fits() -> None:
    Retrieve().check(Seen(rows(10, 3)), batch(Y))


@pytest.mark.parametrize(
    ("out", "found"),
    [
        (torch.zeros(6, 4, 2), r"shape \(6, 4, 2\)"),
        (SimpleNamespace(), "a SimpleNamespace"),
        ({"a": rows(6, 2)}, "a dict"),
    ],
    ids=["map", "object", "dict"],
)
def test_an_answer_that_is_no_embedding_is_refused(out: object, found: str) -> None:
    with pytest.raises(Refused, match=f"answer has {found}.*embeddings.*tap 'out'"):
        Retrieve().check(Seen(out), batch(Y))


def test_data_that_holds_no_triplet_is_refused() -> None:
    seen = Seen(rows(4, 2))
    with pytest.raises(Refused, match="no label for each row"):
        Retrieve().check(seen, Batch(torch.zeros(4, 1)))
    for y, found in [
        ([0, 0, 0, IGNORE], "3 labelled rows of 1 classes"),
        ([0, 1, 2, 3], "4 labelled rows of 4 classes"),
        ([IGNORE] * 4, "0 labelled rows of 0 classes"),
    ]:
        with pytest.raises(Refused, match=found):
            Retrieve().check(seen, batch(y))
    labels = torch.tensor([0, 0, 1])  # of the data, whatever this batch holds
    Retrieve().check(seen, batch([0, 1, 2, 3], Lesson(labels=labels)))


def test_drawing_needs_the_rows_numbers() -> None:
    plain = Batch(torch.zeros(10, 1), torch.tensor(Y))
    with pytest.raises(Refused, match=r"row's number.*'semi_hard' or 'all'"):
        Retrieve().check(Seen(rows(10, 3)), plain)
    Retrieve(negatives="all").check(Seen(rows(10, 3)), plain)


# --- it learns ---


def clusters(seed: int, classes: int = 6) -> Data:
    """Classes that differ in four of forty directions; the others are noise."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 4, generator=torch.Generator().manual_seed(9))
    y = torch.arange(192) % classes
    x = 4 * torch.randn(192, 40, generator=draw)
    x[:, :4] = 3 * centres[y] + torch.randn(192, 4, generator=draw)
    return Data(x.reshape(-1, 1, 1, 40), y, tuple("abcdef"))


def train(distiller: Distiller, epochs: int = 12) -> None:
    loader = Loader(clusters(0), 48, seed=0, epochs=epochs, per_class=8)
    scheme = Offline(distiller)
    adam = torch.optim.Adam(distiller.parameters(), 0.02)
    for _ in Engine(scheme, loader, {"student": Pace(adam, lambda step: 1.0)}, epochs=epochs).lessons():
        pass


def net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Flatten(), nn.Linear(40, width))


@pytest.mark.parametrize("negatives", ["distance_weighted", "semi_hard", "all"])
def test_the_loss_gathers_the_classes_and_rkd_hands_it_on_without_a_label(negatives: str) -> None:
    task = Retrieve(negatives=negatives)
    example = Loader(clusters(0), 48, seed=0).at(0)
    teacher = net(8)

    def worth(model: nn.Module) -> float:
        return evaluate(model, task, Loader(clusters(1), 64, seed=0).once(64))["recall@1"]

    blank = worth(teacher)
    train(Distiller(teacher, None, [], example=example, task=task))
    taught = worth(teacher)
    assert taught > blank + 20

    student = net(3)
    before = worth(student)
    rkd = RKD(distance=1, angle=2, tap="", normalise_teacher=True)
    train(Distiller(student, Frozen(teacher), rkd, example=example, task=None), epochs=20)
    assert worth(student) > before + 20
