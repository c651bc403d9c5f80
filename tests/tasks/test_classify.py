"""Classification: cross-entropy and accuracy over the rows that carry a label."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import IGNORE, Batch, Lesson
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.tasks.classify import Classify

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def batch(*y: int, labels: Tensor | None = None) -> Batch:
    return Batch(torch.zeros(len(y), 1), torch.tensor(y), lesson=Lesson(labels=labels))


def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_rows() -> None:
    y = [0, IGNORE, 3, 1, IGNORE, 2]
    labelled = [0, 2, 3, 5]
    expected = F.cross_entropy(LOGITS[labelled], torch.tensor(y)[labelled])
    assert torch.allclose(Classify().loss(Seen(LOGITS), batch(*y)), expected)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_a_smoothed_label_gives_a_share_to_all_classes_alike(smoothing: float) -> None:
    y = [0, IGNORE, 3, 1, IGNORE, 2]
    total = 0.0
    for row, label in zip(LOGITS.double().log_softmax(1).tolist(), y, strict=True):
        if label != IGNORE:
            q = [smoothing / 4 + (1 - smoothing) * (c == label) for c in range(4)]
            total -= sum(a * b for a, b in zip(q, row, strict=True)) / 4  # of the four labelled rows
    assert float(Classify(smoothing).loss(Seen(LOGITS), batch(*y))) == pytest.approx(total, rel=1e-5)
    logits = LOGITS.clone().requires_grad_()
    loss = Classify(smoothing).loss(Seen(logits), batch(*[IGNORE] * 6))
    loss.backward()
    assert loss == 0 and logits.grad.abs().sum() == 0


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_leaves_no_label_is_refused(smoothing: float) -> None:
    with pytest.raises(Refused, match=f"smoothing of labels is {smoothing}, expected"):
        Classify(smoothing)


def test_the_loss_is_0_when_no_row_is_labelled() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = Classify().loss(Seen(logits), batch(*[IGNORE] * 6))
    loss.backward()
    assert loss == 0 and logits.grad.abs().sum() == 0


def answer(*classes: int) -> Seen:
    return Seen(F.one_hot(torch.tensor(classes), 4).float())


def test_accuracy_is_in_percent_over_labelled_rows_of_all_batches() -> None:
    answers = [
        (answer(0, 1, 2), batch(0, 1, 3)),
        (answer(0, 1), batch(IGNORE, 1)),
        (answer(3), batch(IGNORE)),
    ]
    assert Classify().score(iter(answers)) == {"accuracy": 75.0}
    assert Classify.headline == "accuracy"


def test_accuracy_without_a_labelled_row_is_0() -> None:
    assert Classify().score([(answer(0), batch(IGNORE))]) == {"accuracy": 0.0}


def test_the_check_passes_what_fits() -> None:
    Classify().check(Seen(LOGITS), batch(0, 3, IGNORE, 1, 1, 2))


def test_a_label_outside_the_head_is_refused_also_when_it_is_not_in_the_batch() -> None:
    words = r"label 4, and the model's head has 4 outputs \(0 to 3\).*classes = 5"
    with pytest.raises(Refused, match=words):
        Classify().check(Seen(LOGITS), batch(0, 1, 4, 0, 0, 0))
    with pytest.raises(Refused, match=words):
        Classify().check(Seen(LOGITS), batch(0, 1, 2, 0, 0, 0, labels=torch.tensor([0, 4, IGNORE])))


@pytest.mark.parametrize(
    ("out", "found"),
    [
        (torch.zeros(6, 4, 2), r"shape \(6, 4, 2\)"),
        (SimpleNamespace(), "a SimpleNamespace"),
        ({"a": LOGITS}, "a dict"),
    ],
    ids=["map", "object", "dict"],
)
def test_an_answer_that_is_no_logits_is_refused(out: object, found: str) -> None:
    with pytest.raises(Refused, match=f"answer has {found}.*logits.*tap 'out'"):
        Classify().check(Seen(out), batch(0, 1, 2, 0, 0, 0))


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(Refused, match="has no labels"):
        Classify().check(Seen(LOGITS), Batch(torch.zeros(6, 1)))
