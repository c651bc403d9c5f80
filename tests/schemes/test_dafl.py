"""Data-free learning: the generator's losses against loops, and who learns from what."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import build, recipe
from limbeck.core.batch import Batch, Lesson
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine
from limbeck.schemes.dafl import DAFL, aliveness, codes, imbalance, one_hot

ROWS = 12


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(v) for v in row]
    return [p / sum(powers) for p in powers]


# --- the three losses ---


def test_one_hot_is_the_loop() -> None:
    t = 2 * randn(5, 4)
    slow = sum(-math.log(max(softmax(row))) for row in t.tolist()) / 5
    assert one_hot(t).item() == pytest.approx(slow, rel=1e-12)
    assert one_hot(100 * t).item() < 1e-3 < math.log(4) == pytest.approx(one_hot(0 * t).item())


def test_aliveness_is_the_loop() -> None:
    f = randn(3, 5)
    slow = -sum(abs(v) for row in f.tolist() for v in row) / 15
    assert aliveness(f).item() == pytest.approx(slow, rel=1e-12)


def test_imbalance_is_the_loop() -> None:
    t = 2 * randn(5, 4)
    answers = [softmax(row) for row in t.tolist()]
    means = [sum(p[k] for p in answers) / 5 for k in range(4)]
    assert imbalance(t).item() == pytest.approx(sum(m * math.log(m) for m in means), rel=1e-12)


def test_imbalance_is_least_when_classes_are_in_balance_however_sure_each_answer_is() -> None:
    sure = 20.0 * torch.eye(4, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(imbalance, sure)
    assert imbalance(sure).item() == pytest.approx(-math.log(4), abs=1e-6)
    assert slope.abs().max() < 1e-6
    for other in (sure[[0, 1, 2, 2]], sure[[0, 0, 0, 0]], 2 * randn(4, 4)):
        assert imbalance(other) > imbalance(sure) + 0.1


def test_one_class_alone_has_a_finite_balance() -> None:
    t = torch.tensor([[2000.0, 0, 0]]).repeat(3, 1).requires_grad_()
    loss = imbalance(t)
    (slope,) = torch.autograd.grad(loss, t)
    assert loss == 0 and slope.isfinite().all()


@pytest.mark.parametrize("loss", [one_hot, aliveness, imbalance])
def test_gradcheck(loss: Any) -> None:
    assert torch.autograd.gradcheck(loss, (randn(3, 4).requires_grad_(),))


# --- the codes ---


def test_codes_are_fixed_by_seed_epoch_and_index() -> None:
    index = torch.tensor([4, 9, 2])
    z = codes(Lesson(seed=1, epoch=2), index, 8)
    assert z.shape == (3, 8)
    assert torch.equal(codes(Lesson(seed=1, epoch=2, step=7), index.flip(0), 8).flip(0), z)
    for other in (Lesson(seed=2, epoch=2), Lesson(seed=1, epoch=3)):
        assert not torch.equal(codes(other, index, 8), z)
    assert len(z.unique()) == z.numel()


def test_codes_are_standard_normal() -> None:
    z = codes(Lesson(), torch.arange(4000), 10).double()
    assert z.isfinite().all()
    moments = [z.mean(), z.var(), (z**3).mean(), (z**4).mean()]
    assert torch.allclose(torch.stack(moments), torch.tensor([0.0, 1, 0, 3]).double(), atol=0.1)
    assert (torch.corrcoef(z.T) - torch.eye(10)).abs().max() < 0.07
    share = (z < 1).double().mean().item()
    assert share == pytest.approx(0.8413, abs=0.005)


# --- the lesson ---


def tiny() -> Splits:
    draw = torch.Generator().manual_seed(0)
    data = Data(torch.randn(2 * ROWS, 1, 8, 8, generator=draw), torch.arange(2 * ROWS) % 3, ("x", "y", "z"))
    return Splits(data, data, data)


def blank() -> Splits:
    whole = tiny()
    return replace(whole, train=replace(whole.train, x=torch.zeros_like(whole.train.x)))


class Noise(nn.Module):
    """Makes images, and does not say from what."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 64)


class Curious(Method):
    """Looks for what it should not find."""

    card = Card("none", 2000, ("response",))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        assert batch.y is None and batch.lesson.labels is None
        assert batch.lesson.samples == 2 * ROWS and batch.index is not None
        return (s.out - t.out).square().mean()


def plan(data: str = "tiny", **stage: Any) -> recipe.Recipe:
    return recipe.parse(
        {
            "data": f"{__name__}:{data}",
            "models": {
                "teacher": {"name": "cnn", "widths": [4, 6]},
                "other": {"name": "cnn", "widths": [3, 4]},
                "both": {"ensemble": ["teacher", "other"]},
                "student": {"name": "cnn", "widths": [3, 4]},
                "generator": {"name": "invent", "width": 6, "codes": 5},
                "wide": {"name": "invent", "width": 6, "channels": 3, "size": 9},
                "noise": {"name": f"{__name__}:Noise"},
                "viewed": {"name": "cnn", "widths": [4, 6], "view": "flip"},
            },
            "stages": [
                {
                    "learner": ["student", "generator"],
                    "scheme": "dafl",
                    "epochs": 2,
                    "batch": ROWS,
                    "terms": [{"method": "kd", "temperature": 1}],
                    "optim": {"generator": {"name": "adam", "lr": 0.01}},
                    **stage,
                }
            ],
        }
    )


def lesson(*args: Any, **stage: Any) -> tuple[build.Lab, Engine]:
    lab = build.lab(plan(*args, **stage))
    engine = lab.engine(0)
    engine.scheme.train()
    return lab, engine


def test_the_generators_turn_is_the_papers_and_comes_first() -> None:
    lab, engine = lesson(scheme={"name": "dafl", "alpha": 0.3, "beta": 2.0})
    batch, teacher = engine.loader.at(0), lab.models["teacher"].eval()
    images = lab.models["generator"](codes(batch.lesson, batch.index, 5))
    features = teacher.stages[1](teacher.stages[0](images)).mean((2, 3))
    logits = teacher.head(features)
    player, losses = next(engine.scheme.turns(batch))
    assert player == "generator"
    expected = {
        "one_hot": one_hot(logits),
        "alive": 0.3 * aliveness(features),
        "balance": 2.0 * imbalance(logits),
    }
    torch.testing.assert_close(losses, expected)


def test_the_student_learns_the_same_images_whatever_the_generator_did_since() -> None:
    lab, engine = lesson()
    batch, generator = engine.loader.at(0), lab.models["generator"]
    images = generator(codes(batch.lesson, batch.index, 5)).detach()
    s, t = lab.models["student"](images), lab.models["teacher"].eval()(images)
    turns = engine.scheme.turns(batch)
    next(turns)
    with torch.no_grad():
        for p in generator.parameters():
            p.zero_()
    player, losses = next(turns)
    assert player == "student" and losses.keys() == {"kd"}
    gap = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(losses["kd"], gap)
    losses["kd"].backward()  # everything it can reach, on purpose
    assert all(p.grad is None for p in [*generator.parameters(), *lab.models["teacher"].parameters()])
    assert any(p.grad is not None for p in lab.models["student"].parameters())
    assert next(turns, None) is None


def test_each_loss_reaches_the_generator_through_the_teacher_and_nobody_else() -> None:
    lab, engine = lesson()
    generator, others = lab.models["generator"], (lab.models["teacher"], lab.models["student"])
    _, losses = next(engine.scheme.turns(engine.loader.at(0)))
    for loss in losses.values():
        loss.backward(retain_graph=True)
        assert generator.first.weight.grad.any()
        generator.zero_grad()
    assert all(p.grad is None for model in others for p in model.parameters())
    assert all(p.requires_grad for p in lab.models["teacher"].parameters())


def test_the_teacher_does_not_move() -> None:
    lab, engine = lesson()
    teacher = lab.models["teacher"]
    before = {name: v.clone() for name, v in teacher.state_dict().items()}
    for _ in engine.lessons():
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())


def test_the_data_is_never_looked_at() -> None:
    """Not its images and not its labels: only how many samples it has, and their shape."""
    ends = []
    for data in ("tiny", "blank"):
        lab, engine = lesson(data)
        list(engine.lessons())
        ends.append(lab.models["student"].state_dict() | lab.models["generator"].state_dict())
    assert all(torch.equal(v, ends[1][name]) for name, v in ends[0].items())
    unlabelled, engine = lesson(labels=0)
    list(engine.lessons())
    assert all(torch.equal(v, ends[0][name]) for name, v in unlabelled.models["student"].state_dict().items())


def test_a_method_finds_no_labels() -> None:
    _, engine = lesson(terms=[{"method": f"{__name__}:Curious"}])
    *_, record = engine.lessons()
    assert record is not None and record.losses["curious"] > 0


def test_an_ensemble_judges_answers_only() -> None:
    terms = [{"method": "kd", "teacher": "both"}]
    _, engine = lesson(terms=terms, scheme={"name": "dafl", "alpha": 0.0})
    *_, record = engine.lessons()
    assert record is not None and record.losses.keys() == {"one_hot", "balance", "kd"}
    with pytest.raises(Refused, match="ensemble of teachers has no tap 'pooled'"):
        lesson(terms=terms)


def test_the_generator_lowers_its_losses() -> None:
    _, engine = lesson(epochs=20, scheme={"name": "dafl", "beta": 0.0})
    first, *_, last = [record.losses for record in engine.lessons() if record is not None]
    assert last["one_hot"] < first["one_hot"] - 0.03
    assert last["alive"] < 1.2 * first["alive"] < 0


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    kd = {"method": "kd"}
    yield {"terms": []}, r"one teacher, .* name 0; write terms"
    yield {"terms": [kd, {**kd, "teacher": "other"}]}, r"one teacher, .* name 2; write terms"
    yield {"learner": "student"}, r"2 learner\(s\) \(student, generator\), .* 1 \(student\)"
    yield {"learner": ["student", "other"]}, "'other' is a CNN, which does not say in `codes`"
    yield {"learner": ["student", "noise"]}, "'noise' is a Noise, which does not say in `codes`"
    yield {"learner": ["student", "wide"]}, r"'wide' makes images of \(3, 9, 9\), .* \(1, 8, 8\)"
    yield {"terms": [{"method": "dkd"}]}, "'dkd' needs labels, and the example has none"
    yield {"terms": [{**kd, "teacher": "viewed"}]}, "teacher has a view of its own"
    yield {"accumulate": 2}, "'balance' compares the rows of a batch"
    yield {"scheme": {"name": "dafl", "beta": -1.0}}, "beta = -1.0, expected numbers >= 0"
    yield {"scheme": {"name": "dafl", "alpha": float("inf")}}, "alpha = inf"
    yield {"scheme": {"name": "dafl", "tap": "pooling"}}, "'pooling' does not exist in the teacher"


@pytest.mark.parametrize(("stage", "words"), list(refusals()))
def test_what_cannot_be_is_refused_in_a_sentence(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        lesson(**stage)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_passes_no_gradient_is_refused() -> None:
    class Told(build.Frozen):
        offers = frozenset()

    lab, engine = lesson()
    cast = build.Cast(
        {"student": lab.models["student"], "generator": lab.models["generator"]},
        engine.loader.at(0),
        [build.Term(build.registry.find("method", "kd")(), (Told(lab.models["teacher"]),))],
    )
    with pytest.raises(Refused, match="needs teacher_gradient, which a Told teacher cannot give"):
        DAFL.staged(cast)
