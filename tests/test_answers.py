"""What networks said of the test split: kept as they said it, and measured against loops written from the
definitions."""

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from limbeck import answers
from limbeck.answers import Answers, Kept
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.task import Task
from limbeck.data.loader import Data
from limbeck.tasks.classify import Classify


def drawn(seed: int, rows: int = 40, classes: int = 4, sharp: float = 2.0) -> Answers:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    return Answers(sharp * torch.randn(rows, classes, generator=g) + torch.eye(classes)[y], y)


def softmax(row: list[float]) -> list[float]:
    top = [math.exp(z - max(row)) for z in row]
    return [e / sum(top) for e in top]


# --- kept while they are scored ---


def heard(a: Answers, task: Task | None = None, batch: int = 7) -> Kept:
    def said() -> Iterator[tuple[Seen, Batch]]:
        for z, y in zip(a.z.split(batch), a.y.split(batch), strict=True):
            yield Seen(z), Batch(z, y)

    kept = Kept(task or Classify())
    kept.scores = kept.score(said())  # type: ignore[attr-defined]
    return kept


def test_keeping_answers_changes_no_score_and_asks_once() -> None:
    a = drawn(0)
    kept = heard(a)
    assert kept.scores == Classify().score([(Seen(a.z), Batch(a.z, a.y))])  # type: ignore[attr-defined]
    told = kept.answers()
    assert told is not None and torch.equal(told.z, a.z) and torch.equal(told.y, a.y)


def test_what_was_scored_last_is_what_is_kept() -> None:
    kept = heard(drawn(0))
    b = drawn(1, rows=5)
    kept.score([(Seen(b.z), Batch(b.z, b.y))])
    told = kept.answers()
    assert told is not None and torch.equal(told.z, b.z)


class Recall(Classify):
    headline = "recall"


@pytest.mark.parametrize(
    ("z", "y", "task"),
    [
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), Recall()),
        (torch.randn(4, 3, 2), torch.zeros(4, 2).long(), Classify()),
        (torch.randn(4, 3), torch.full((4,), IGNORE), Classify()),
    ],
    ids=["vectors-to-compare", "maps-of-classes", "no-labels"],
)
def test_answers_that_tell_no_classes_apart_are_not_kept(
    z: Tensor, y: Tensor, task: Task, tmp_path: Path
) -> None:
    kept = Kept(task)
    kept.score([(Seen(z), Batch(z, y))])
    assert kept.answers() is None
    answers.write(tmp_path / "a.safetensors", kept.answers(), {})
    assert not list(tmp_path.iterdir()) and answers.read(tmp_path / "a.safetensors") is None


def test_they_come_back_from_the_disk_as_probable_as_they_were(tmp_path: Path) -> None:
    a = drawn(2, rows=200, sharp=4.0)
    # Half precision rounds 1000.1 and 1000.2 to one number and 1e6 to infinity; less the largest it does not.
    odd = torch.tensor([[1000.1, 1000.2, 999.0, 0.0], [1e6, -1e6, 0.0, 1.0], [-3e4, -3e4 + 0.01, -4e4, -9e4]])
    a = Answers(torch.cat([a.z, odd]), torch.cat([a.y, torch.tensor([0, 1, IGNORE])]))
    path = answers.place(tmp_path, "student")
    answers.write(path, a, {"seed": 3})
    b = answers.read(path)
    assert b is not None and torch.equal(a.y, b.y)
    assert torch.equal(a.z.argmax(1), b.z.argmax(1)) and torch.equal(a.right, b.right)
    torch.testing.assert_close(a.p, b.p, atol=5e-4, rtol=0)
    assert path.stat().st_size < 203 * (4 * 2 + 8) + 500  # two bytes a logit


def test_damaged_answers_are_refused_by_name(tmp_path: Path) -> None:
    path = answers.place(tmp_path, "student")
    answers.write(path, drawn(0), {})
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Refused, match=r"answers-student.safetensors.*changed"):
        answers.read(path)


def test_weights_in_the_place_of_answers_are_refused(tmp_path: Path) -> None:
    from limbeck import checkpoint

    checkpoint.save_weights(tmp_path / "answers-a.safetensors", {"fc.bias": torch.zeros(2)}, {})
    with pytest.raises(Refused, match=r"holds fc.bias, expected logits and labels"):
        answers.read(tmp_path / "answers-a.safetensors")


# --- measured ---


def test_accuracy_is_counted_class_by_class() -> None:
    y = torch.tensor([0, 0, 0, 2, 2, IGNORE])
    said = torch.tensor([0, 1, 0, 2, 2, 1])
    told = answers.by_class(Answers(torch.eye(3)[said], y))
    assert told[0] == pytest.approx(200 / 3) and told[2] == 100.0
    assert math.isnan(told[1])  # nobody was of this class


def test_agreement_and_divergence_are_their_definitions() -> None:
    s, t = drawn(0), drawn(1)
    same, apart = 0, 0.0
    for a, b in zip(s.z.tolist(), t.z.tolist(), strict=True):
        same += a.index(max(a)) == b.index(max(b))
        apart += sum(q * math.log(q / p) for p, q in zip(softmax(a), softmax(b), strict=True)) / len(s.z)
    assert answers.agreement(s, t) == pytest.approx(100 * same / len(s.z))
    assert answers.divergence(s, t) == pytest.approx(apart, abs=1e-6)
    assert answers.agreement(s, s) == 100.0 and answers.divergence(s, s) == pytest.approx(0.0)
    assert answers.divergence(s, t) != pytest.approx(answers.divergence(t, s), rel=1e-3)


def slow_calibration_error(a: Answers, bins: int = 15) -> float:
    """Sum over bins of share of rows × |accuracy - confidence|, a row at a time."""
    total = 0.0
    labelled = [(softmax(z), y) for z, y in zip(a.z.tolist(), a.y.tolist(), strict=True) if y != IGNORE]
    for n in range(bins):
        inside = [(p, y) for p, y in labelled if n / bins < max(p) <= (n + 1) / bins]
        if inside:
            sure = sum(max(p) for p, _ in inside) / len(inside)
            right = sum(p.index(max(p)) == y for p, y in inside) / len(inside)
            total += len(inside) / len(labelled) * abs(sure - right)
    return 100 * total


@pytest.mark.parametrize("sharp", [0.2, 2.0, 8.0])
def test_the_calibration_error_is_its_definition(sharp: float) -> None:
    a = drawn(3, rows=300, sharp=sharp)
    a = Answers(a.z, torch.where(torch.arange(300) % 7 == 0, IGNORE, a.y))
    bins = answers.calibration(a)
    assert len(bins) == 15 and sum(many for many, _, _ in bins) == int((a.y != IGNORE).sum())
    assert answers.calibration_error(bins) == pytest.approx(slow_calibration_error(a), abs=1e-4)


def test_a_network_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    z = torch.tensor([0.8, 0.2]).log().expand(10, 2)
    y = torch.tensor([0] * 8 + [1] * 2)
    assert answers.calibration_error(answers.calibration(Answers(z, y))) == pytest.approx(0, abs=1e-5)
    assert answers.calibration_error(answers.calibration(Answers(z, 0 * y))) == pytest.approx(20, abs=1e-4)
    sure = answers.calibration(Answers(1e4 * torch.eye(2)[y], y))
    assert sure[-1] == (10, 1.0, 1.0)  # 1 belongs to the last bin
    thirds = answers.calibration(Answers(torch.zeros(6, 3), torch.arange(6) % 3))
    assert [n for n, (many, _, _) in enumerate(thirds) if many] == [4]  # 5/15 to the one below it


def test_seeds_are_pooled_row_by_row() -> None:
    a, b = drawn(4, rows=60), drawn(5, rows=24)
    both = Answers(torch.cat([a.z, b.z]), torch.cat([a.y, b.y]))
    pooled = answers.pooled([answers.calibration(a), answers.calibration(b)])
    for one, same in zip(pooled, answers.calibration(both), strict=True):
        assert one == pytest.approx(same)


def test_an_arm_is_told_in_pairs_over_the_seeds() -> None:
    arm, control, teacher = ([drawn(10 * n + k) for k in range(3)] for n in range(3))
    told = answers.told(arm, control, teacher)
    gaps = [
        [a - b for a, b in zip(answers.by_class(x), answers.by_class(y), strict=True)]
        for x, y in zip(arm, control, strict=True)
    ]
    for k, gap in enumerate(told["gaps"]):
        column = [seed[k] for seed in gaps]
        assert gap["mean"] == pytest.approx(sum(column) / 3)
        assert gap["sd"] == pytest.approx(np.std(column, ddof=1))
    assert told["agreement"]["mean"] == pytest.approx(
        sum(answers.agreement(s, t) for s, t in zip(arm, teacher, strict=True)) / 3
    )
    assert answers.told(arm, control, [])["agreement"] is None
    assert answers.told(arm[:1], control[:1], [])["gaps"][0]["sd"] is None


# --- samples ---


def say(*classes: int, sure: float = 0.9) -> Tensor:
    """Probabilities that put each row in the class named, with the rest shared out."""
    p = torch.full((len(classes), 3), (1 - sure) / 2)
    p[range(len(classes)), list(classes)] = sure
    return p.log()


Y = torch.tensor([0, 0, 0, 0, 1, 1, 2, IGNORE])
CONTROL = [Answers(say(1, 1, 0, 0, 0, 1, 2, 0), Y), Answers(say(1, 0, 0, 0, 0, 1, 2, 0), Y)]
ARM = [Answers(say(0, 0, 1, 0, 0, 1, 2, 1), Y), Answers(say(0, 0, 1, 2, 0, 1, 2, 1), Y)]
DATA = Data(torch.arange(8 * 4, dtype=torch.uint8).reshape(8, 1, 2, 2), Y, ("a", "b", "c"), 1 / 31)


def kinds(told: dict[str, Any]) -> dict[str, list[int]]:
    return {group["kind"]: [one["row"] for one in group["samples"]] for group in told["groups"]}


def test_samples_are_shown_both_ways_the_steadiest_first() -> None:
    told = answers.samples(ARM, CONTROL, [], DATA)
    assert kinds(told) == {"won": [0, 1], "lost": [2, 3]}  # in both seeds, then in one; the unlabelled never
    assert (told["won"], told["lost"]) == (2, 2)
    first = told["groups"][0]["samples"][0]
    assert first["right"] == {"arm": 2, "control": 0} and first["label"] == 0
    assert first["said"]["arm"][0] == [0, pytest.approx(0.9)]
    assert first["said"]["control"][0] == [1, pytest.approx(0.9)]
    assert len(first["said"]["control"]) == 3


def test_probabilities_are_means_over_the_seeds() -> None:
    row = answers.samples(ARM, CONTROL, [], DATA)["groups"][1]["samples"][1]  # 0 in one seed, 2 in the other
    assert row["row"] == 3
    said = dict(map(tuple, row["said"]["arm"]))
    assert said[0] == pytest.approx((0.9 + 0.05) / 2, abs=1e-4) and said[0] == said[2]


def test_where_the_teacher_is_least_sure_comes_from_the_whole_of_what_it_said() -> None:
    z = say(0, 0, 0, 0, 1, 1, 2, 2)
    z[5] = torch.tensor([0.34, 0.33, 0.33]).log()
    z[6] = torch.tensor([0.1, 0.3, 0.6]).log()
    z[7] = 0.0  # least sure of all, and nobody labelled it
    told = answers.samples(ARM, CONTROL, [Answers(z, Y)] * 2, DATA)
    assert kinds(told)["doubted"][:2] == [5, 6]
    shown = [row for rows in kinds(told).values() for row in rows]
    assert len(shown) == len(set(shown)) and 7 not in shown  # each once
    assert "teacher" in told["groups"][0]["samples"][0]["said"]


def test_only_a_few_are_shown_of_each_class_and_all_are_counted() -> None:
    y = torch.arange(50) // 10 % 4 // 2  # zeros, ones, zeros again
    data = Data(torch.zeros(50, 1, 2, 2, dtype=torch.uint8), y, ("a", "b", "c"))
    right, wrong = [Answers(say(*y.tolist()), y)], [Answers(say(*[2] * 50), y)]
    told = answers.samples(right, wrong, right, data)
    assert (told["won"], told["lost"]) == (50, 0)
    assert kinds(told) == {"won": [0, 1, 20, 21], "lost": [], "doubted": [2, 3, 22, 23]}
    many = Data(data.x, torch.arange(50), tuple(map(str, range(50))))
    z = torch.eye(50)
    told = answers.samples([Answers(z, many.y)], [Answers(-z, many.y)], [], many)
    assert kinds(told)["won"] == [0, 1, 2, 3, 4, 5] and told["won"] == 50


# --- pictures ---


def opened(uri: str | None) -> np.ndarray:
    assert uri is not None and uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))) / 255


def test_a_grey_picture_is_the_sample() -> None:
    x = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4)
    np.testing.assert_allclose(opened(answers.picture(x, 1 / 11)), x[0] / 11, atol=1 / 255)


def test_a_colour_picture_is_the_sample() -> None:
    x = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(opened(answers.picture(x, 1 / 255)), x.permute(1, 2, 0) / 255, atol=1e-6)


def test_a_large_picture_is_made_small_and_its_proportions_stay() -> None:
    x = torch.zeros(1, 256, 128)
    x[:, :128] = 1.0
    small = opened(answers.picture(x))
    assert small.shape == (64, 32) and (small[:32] == 1).all() and (small[32:] == 0).all()


def test_values_beyond_the_range_are_stretched_into_it() -> None:
    x = torch.tensor([[[-3.0, 0.0, 5.0]]])
    np.testing.assert_allclose(opened(answers.picture(x)), [[0, 3 / 8, 1]], atol=1 / 255)
    assert (opened(answers.picture(torch.full((1, 2, 2), 7.0))) == 0).all()


@pytest.mark.parametrize("x", [torch.zeros(12), torch.zeros(4, 3, 3), torch.zeros(2, 3)])
def test_what_is_no_picture_has_none(x: Tensor) -> None:
    assert answers.picture(x) is None
