"""A board's page says what was shown and no more, shows every arm, trusts no name, and fetches nothing."""

import html
import io
import json
import re
import shutil
import statistics
import subprocess
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from limbeck import answers, recipe, report
from limbeck import board as boards
from limbeck.data.loader import Data

HOSTILE = """<script>alert('x')</script>"><img src=x onerror=alert(1)>&amp;[red]"""
CONTROL = [80.0, 81.0, 82.0]
HELPS, HURTS, UNSURE = (7.0, 10.0, 13.0), (-7.0, -10.0, -13.0), (-1.0, 2.0, 4.0)


def plan(stages: int = 2) -> dict[str, Any]:
    """A recipe of one stage or two, written out as a board's result has it."""
    content: dict[str, Any] = {
        "data": "digits",
        "models": {"teacher": {"name": "cnn", "widths": [16, 32]}, "student": "cnn"},
        "stages": [
            {"learner": "teacher", "epochs": 2},
            {"learner": "student", "epochs": 3, "labels": 100, "optim": {"student": {"lr": 0.05}}},
        ][-stages:],
    }
    return recipe.parse(content).model_dump(mode="json", by_alias=True)


def curve(*scores: float, name: str = "accuracy") -> list[dict[str, Any]]:
    return [
        {
            "stage": 1,
            "epoch": n,
            "steps": 10 * (n + 1),
            "losses": {"task": 1 / (n + 1)},
            "figures": {},
            "scores": {name: score},
            "seconds": 1,
        }
        for n, score in enumerate(scores)
    ]


def at(scores: list[float], epochs: list[int]) -> dict[str, Any]:
    sd = statistics.stdev(scores) if len(scores) > 1 else None
    return {"scores": scores, "epochs": epochs, "mean": statistics.fmean(scores), "sd": sd}


def arm(name: str, scores: list[float], control: list[float] | None) -> dict[str, Any]:
    return {
        "name": name,
        "changes": {"terms": [] if control is None else [{"method": "rkd", "weight": 0.5}]},
        "scores": scores,
        "all": [{"valid.accuracy": score, "test.accuracy": score} for score in scores],
        "stages": [],
        "hints": [None for _ in scores],
        "pictures": [],
        "mean": statistics.fmean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "difference": None if control is None else boards.paired(scores, control),
        "last": at(list(scores), [2] * len(scores)),
        "best": at([score + 1 for score in scores], [1, 2, 0][: len(scores)]),
        "seconds": 3.25,
        "asking": 0.0 if control is None else 1.5,
        "how": [] if control is None else ["live, channels_last"],
        "learned": ["channels_last"],
        "parameters": 5290,
        "curves": [curve(10.0, score - 5, score) for score in scores],
    }


def board(gaps: dict[str, tuple[float, ...]], *, seeds: int = 3, teacher: bool = True) -> dict[str, Any]:
    """A finished board: what each arm gained on the control, seed by seed."""
    control = CONTROL[:seeds]
    gained = {name: [c + g for c, g in zip(control, gap, strict=False)] for name, gap in gaps.items()}
    arms = [arm(name, scores, control) for name, scores in gained.items()]
    scores = [97.0, 98.0, 97.5][:seeds]
    taught = {"name": "teacher", "scores": scores, "mean": statistics.fmean(scores), "parameters": 317_034}
    taught["sd"] = statistics.stdev(scores) if seeds > 1 else None
    return {
        "title": "Few labels",
        "data": "digits",
        "metric": "test.accuracy",
        "seeds": list(range(seeds)),
        "control": "control",
        "begin": 1,
        "curve": "accuracy",
        "arms": [arm("control", control, None), *arms],
        "diverged": [],
        "teachers": [taught] if teacher else [],
        "answers": answered(["control", *gaps], seeds, teacher),
        "cost": {"wall": 75.0, "cpu": 71.5},
        "recipe": plan(2 if teacher else 1),
        "environment": {"python": "3.13.5", "torch": "2.13.0", "device": "cpu"},
    }


CLASSES = ("cat", "dog", "owl")
ROWS = 30


def answered(
    names: list[str], seeds: int, teacher: bool, classes: tuple[str, ...] = CLASSES
) -> dict[str, Any]:
    """What networks of random opinions said of 30 samples, as a board's result has it."""
    y = torch.arange(ROWS) % len(classes)
    draw = torch.Generator().manual_seed(0)
    said = {
        name: [answers.Answers(torch.randn(ROWS, len(classes), generator=draw), y) for _ in range(seeds)]
        for name in [*names, "teacher"]
    }
    control, taught = said["control"], said["teacher"] if teacher else []
    data = Data(torch.randint(0, 256, (ROWS, 3, 4, 4), generator=draw).byte(), y, classes, 1 / 255)
    shown = names[1] if len(names) > 1 else None
    return {
        "classes": list(classes),
        "rows": [int((y == k).sum()) for k in range(len(classes))],
        "teacher": "teacher" if taught else None,
        "taught": answers.told(taught, taught, taught) if taught else None,
        "arms": {name: answers.told(said[name], control, taught) for name in names},
        "shown": shown,
        "samples": answers.samples(said[shown], control, taught, data) if shown else None,
    }


class Page(HTMLParser):
    """A page as a browser reads it: elements, attributes, text, the rows of its tables, and the lines of its
    curves by what they show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: dict[str, list[str]] = {}
        self.plot = ""
        self.images: list[str] = []
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.text = self.headline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "svg":
            self.plot = dict(attributes)["aria-label"] or ""
        elif tag == "polyline":
            self.lines.setdefault(self.plot, []).append(dict(attributes)["points"] or "")
        elif tag == "img":
            self.images.append(dict(attributes)["src"] or "")

    @property
    def points(self) -> list[str]:
        """The lines of the score, panel after panel."""
        return next((lines for plot, lines in self.lines.items() if plot.startswith("validation")), [])

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "h1" in self.open:
            self.headline += data
        if {"th", "td"} & {*self.open}:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:  # such as <meta> have no end
            pass


def page(folder: Path, result: dict[str, Any]) -> Page:
    return Page(report.write(folder, result).read_text(encoding="utf-8"))


def printed(result: dict[str, Any], width: int = 80, **how: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **how).print(report.table(result))
    return out.getvalue()


# --- what is said ---


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        # With two degrees of freedom p = 1 - t / sqrt(t² + 2), so these can be checked by hand.
        (
            HELPS,
            "kd helped: +10.0 ± 3.0 points over the control, better in 3 of 3 seeds "
            "(paired t-test, p = 0.029)",
        ),
        (
            HURTS,
            "kd hurt: −10.0 ± 3.0 points against the control, better in 0 of 3 seeds "
            "(paired t-test, p = 0.029)",
        ),
        (
            UNSURE,
            "kd: no difference shown (+1.7 ± 2.5 points over the control, better in 2 of 3 seeds; "
            "paired t-test, p = 0.37)",
        ),
        (
            (10.0, 10.01, 10.02),
            "kd helped: +10.01 ± 0.01 points over the control, better in 3 of 3 seeds "
            "(paired t-test, p < 0.001)",
        ),
        (
            (-1.0, 0.0, 0.97),
            "kd: no difference shown (+0.0 ± 1.0 points against the control, better in 1 of 3 seeds; "
            "paired t-test, p = 0.99)",
        ),
        (
            (7.0, 13.0),
            "kd: too few seeds to say (+10.0 ± 4.2 points over the control, better in 2 of 2 seeds; "
            "not tested with fewer than 3)",
        ),
        (
            (-7.0,),
            "kd: too few seeds to say (−7.0 points against the control, better in 0 of 1 seed; "
            "not tested with fewer than 3)",
        ),
    ],
)
def test_a_sentence_says_what_was_shown_and_on_what_grounds(
    tmp_path: Path, gaps: tuple[float, ...], said: str
) -> None:
    shown = page(tmp_path, board({"kd": gaps}, seeds=len(gaps)))
    assert shown.headline == said + "."


def test_equal_differences_are_not_blamed_on_the_number_of_seeds() -> None:
    result = board({"kd": (5.0, 5.0, 5.0)})
    said = report.sentence(result["arms"][1], report.Metric.of(result))
    assert "a t-test has no answer to equal differences" in said and "fewer" not in said


def test_rounding_is_no_spread_to_write_digits_for(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    result["arms"][1]["difference"] |= {"mean": 10 / 3, "sd": 8e-15, "p": None}
    assert page(tmp_path, result).tables[0][-1][3] == "+3.3 ± 0.0"


def test_the_headline_gathers_arms_by_what_they_showed(tmp_path: Path) -> None:
    few = page(tmp_path, board({"kd": HELPS, "fitnet": UNSURE, "at": HURTS, "rkd": HELPS}))
    told = "kd and rkd helped; at hurt; no difference shown for fitnet."
    assert few.headline == f"Against the same network trained without a teacher: {told}"
    assert "fitnet: no difference shown (+1.7 ± 2.5 points" in few.text
    many = page(tmp_path, board({f"kd{n}": HELPS if n % 3 else UNSURE for n in range(20)}))
    assert many.headline.endswith("13 of 20 arms helped; no difference shown for 7 of 20 arms.")


def test_a_control_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    alone = page(tmp_path, board({}))
    assert alone.headline == "Only the control was run, so there is nothing to compare it with."
    assert len(alone.points) == 4  # its own panel: three seeds and their mean


def test_the_limits_of_what_was_shown_are_said(tmp_path: Path) -> None:
    text = " ".join(page(tmp_path, board({"kd": HELPS, "fitnet": UNSURE})).text.split())
    assert "It is not corrected for the number of arms (2 here)" in text
    assert "The test split was scored once, at the end of every run (its last epoch and its best)" in text
    assert "and limbeck used it for no choice" in text
    assert "difference is the arm minus the control of the same seed" in text
    assert "Nothing here was tested" in text and "they illustrate and prove nothing" in text
    assert "No difference shown does not say that there is none" in text


@pytest.mark.parametrize("p", [0.0496, 0.04996, 0.05, 0.0502])
def test_rounding_never_carries_p_across_the_line_of_the_verdict(p: float) -> None:
    result = board({"kd": HELPS})
    result["arms"][1]["difference"]["p"] = p
    said = report.sentence(result["arms"][1], report.Metric.of(result))
    assert (float(said.split("p = ")[1].rstrip(")")) < 0.05) == ("helped" in said) == (p < 0.05)


# --- rows and numbers ---


@pytest.mark.parametrize("count", [1, 20])
def test_every_arm_has_its_row_in_both_tables(tmp_path: Path, count: int) -> None:
    names = [f"method-{n}" for n in range(count)]
    path = report.write(tmp_path, board(dict.fromkeys(names, HELPS)))
    assert path.stat().st_size < 400_000
    results, seeds, *_ = Page(path.read_text(encoding="utf-8")).tables
    expected = ["teacher taught the arms", "control without a teacher", *names]
    for rows in (results, seeds):
        assert [row[0] for row in rows[1:]] == expected
    assert results[0][1] == "test accuracy (%)"
    assert results[1][1:] == ["97.5 ± 0.5", "–", "–", "–", "–", "the teacher", "–", "317,034"]
    best = ["82.0 ± 1.0 2, 3, 1", "92.0 ± 4.0 2, 3, 1"]  # and under it the epochs, counted from 1
    assert results[2][1:] == ["81.0 ± 1.0", best[0], "–", "–", "–", "the control", "3.2", "5,290"]
    assert results[-1][1:] == ["91.0 ± 4.0", best[1], "+10.0 ± 3.0", "0.029", "3/3", "helped", "3.2", "5,290"]
    assert seeds[-1][2:] == ["87.0", "91.0", "95.0"]


def test_the_dots_of_the_seeds_lie_in_the_order_of_their_scores(tmp_path: Path) -> None:
    text = report.write(tmp_path, board({"kd": (-7.0, 0.0, 30.0)})).read_text(encoding="utf-8")
    dots = [float(left) for left in re.findall(r'<i style="left:([\d.]+)%"', text)]
    scores = [97.0, 98.0, 97.5, *CONTROL, 73.0, 81.0, 112.0]  # teacher, control, kd
    assert [scores.index(s) for s in sorted(scores)] == [dots.index(d) for d in sorted(dots)]
    assert min(dots) >= 0 and max(dots) <= 100
    assert re.findall(r'<u style="left:([\d.]+)%"', text) == [str(dots[scores.index(81.0)])] * 3


def test_one_seed_and_one_stage_make_a_page_without_spreads_and_teachers(tmp_path: Path) -> None:
    shown = page(tmp_path, board({"kd": (7.0,)}, seeds=1, teacher=False))
    assert [row[0] for row in shown.tables[0][1:]] == ["control without a teacher", "kd"]
    assert shown.tables[0][-1][1:7] == ["87.0", "88.0 2", "+7.0", "–", "1/1", "too few seeds to say"]
    assert not re.search(r"\bNone\b|\bnan\b", shown.text)
    assert "times as many" not in shown.text


def test_a_score_that_is_no_percentage_gets_more_digits_and_its_own_name(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    result["metric"] = "test.miou"
    for one in result["arms"]:
        one["scores"] = [score / 100 for score in one["scores"]]
        one["mean"], one["sd"] = one["mean"] / 100, one["sd"] / 100
        one["curves"] = [curve(0.25, 0.5, name="miou")] * 3
    result["arms"][1]["difference"] = boards.paired(result["arms"][1]["scores"], result["arms"][0]["scores"])
    result["answers"] = None  # such a task has none
    shown = page(tmp_path, result)
    assert shown.headline.startswith("kd helped: +0.100 ± 0.030 miou over the control")
    assert shown.tables[0][0][1] == "test miou" and "accuracy" not in shown.text
    assert "%" not in shown.text.replace("95 %", "").replace("5 %", "")
    assert "miou" in printed(result) and "accuracy" not in printed(result)


# --- curves ---


def coordinates(points: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_a_panel_draws_the_mean_over_seeds_above_the_control_when_it_is_better(tmp_path: Path) -> None:
    result = board({"kd": (1.0, 3.0)}, seeds=2)
    result["arms"][0]["curves"] = [curve(10.0, 20.0)] * 2
    result["arms"][1]["curves"] = [curve(10.0, 30.0, 40.0), curve(10.0, 50.0, 60.0)]
    control, first, second, mean = map(coordinates, page(tmp_path, result).points)
    assert [len(line) for line in (control, first, second, mean)] == [2, 3, 3, 3]
    for a, b, middle in zip(first, second, mean, strict=True):
        assert middle == (a[0], pytest.approx((a[1] + b[1]) / 2, abs=0.1))
    assert mean[1][0] == control[1][0] and mean[1][1] < control[1][1]  # at the same epoch, higher up
    assert mean[0][0] < mean[1][0] < mean[2][0] and mean[0][1] > mean[1][1] > mean[2][1]


def test_without_validation_scores_there_is_no_figure(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    for one in result["arms"]:
        one["curves"] = [curve(50.0, name="another"), curve(60.0), curve(float("nan"))]
    shown = page(tmp_path, result)
    assert not shown.points and list(shown.lines) == ["loss: task by epoch"] and shown.tables
    for one in result["arms"]:
        one["curves"] = []
    assert not page(tmp_path, result).lines


def test_every_loss_has_a_plot_under_the_score_of_its_arm(tmp_path: Path) -> None:
    result = board({"kd": (1.0, 3.0), "rkd": (1.0, 2.0)}, seeds=2)
    for n, curve_ in enumerate(result["arms"][1]["curves"]):
        for record in curve_:
            record["losses"]["kd"] = 4.0 - n - record["epoch"]
    lines = page(tmp_path, result).lines
    assert list(lines) == ["validation accuracy (%) by epoch", "loss: task by epoch", "loss: kd by epoch"]
    assert len(lines["loss: task by epoch"]) == 2 * (1 + 2 + 1)  # in both panels: control, two seeds, mean
    first, second, mean = map(coordinates, lines["loss: kd by epoch"])  # the control has no such loss
    assert [y for _, y in first] < [y for _, y in mean] < [y for _, y in second]  # a larger one is higher up
    assert [y for _, y in mean] == sorted(y for _, y in mean) and len(mean) == 3


def test_long_lines_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    result = board({"kd": (1.0,)}, seeds=1)
    short = coordinates(page(tmp_path, result).points[-1])
    for one in result["arms"]:
        one["curves"] = [curve(*(n / 10 for n in range(1004)))]
    long = coordinates(page(tmp_path, result).points[-1])
    assert 60 < len(long) <= 121 and (long[0][0], long[-1][0]) == (short[0][0], short[-1][0])
    assert [x for x, _ in long] == sorted({x for x, _ in long})


def test_losses_of_one_name_share_their_axis(tmp_path: Path) -> None:
    result = board({"kd": (1.0,), "rkd": (1.0,)}, seeds=1)
    result["arms"][2]["curves"][0][-1]["losses"]["task"] = 50.0
    control, kd, control_again, rkd = map(coordinates, page(tmp_path, result).lines["loss: task by epoch"])
    assert control == control_again == kd and kd[:2] == rkd[:2] and rkd[2][1] < min(y for _, y in kd)


@pytest.mark.parametrize(
    ("low", "high"), [(10.0, 97.3), (0.0, 1.0), (0.912, 0.914), (-3.0, 5.0), (99.9, 100.0), (0.0, 1e6)]
)
def test_ticks_are_few_even_and_span_the_scores(low: float, high: float) -> None:
    ticks = report.ticks(low, high)
    assert 3 <= len(ticks) <= 6 and ticks[0] <= low and ticks[-1] >= high
    steps = [b - a for a, b in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps)) and steps[0] > 0


@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 21, 240])
def test_ticks_of_epochs_are_whole_and_within(epochs: int) -> None:
    ticks = report.ticks(1, epochs, whole=True)
    assert ticks[0] == 1 and ticks[-1] <= epochs and len(ticks) <= 6
    assert all(float(t).is_integer() for t in ticks) and ticks == sorted(set(ticks))


# --- what the answers tell ---


def test_each_class_has_its_gain_in_each_arm(tmp_path: Path) -> None:
    result = board({"kd": HELPS, "rkd": HURTS})
    result["answers"]["arms"]["kd"]["gaps"][1] = {"mean": -12.5, "sd": 3.25}
    result["answers"]["arms"]["rkd"]["gaps"][2] = None  # no such sample
    text = " ".join(page(tmp_path, result).text.split())
    section = text[text.index("Class by class") : text.index("Agreement with")]
    assert section.count("cat") == section.count("dog") == 2 and section.count("owl") == 1
    assert "−12.5 ± 3.2" in section
    assert "A class has 10 test samples, so a single one is up to 10 points" in section


def test_a_bar_starts_in_the_middle_and_ends_at_the_gain(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    gaps = [{"mean": 30.0, "sd": 10.0}, {"mean": -20.0, "sd": None}, {"mean": 0.0, "sd": 0.0}]
    result["answers"]["arms"]["kd"]["gaps"] = gaps
    text = report.write(tmp_path, result).read_text(encoding="utf-8")
    bar = r'<b class="(up)?" style="left:([\d.]+)%;width:([\d.]+)%"></b><s style="left:([\d.]+)%'
    bars = re.findall(bar, text)
    assert bars == [("up", "50.0", "37.5", "75.0"), ("", "25.0", "25.0", "25.0"), ("", "50.0", "0.0", "50.0")]


def test_of_many_classes_the_ends_are_shown_and_said_to_be_ends(tmp_path: Path) -> None:
    names = tuple(f"class-{k:02d}" for k in range(30))
    result = board({"kd": HELPS})
    result["answers"] = answered(["control", "kd"], 3, True, names)
    for k, gap in enumerate(result["answers"]["arms"]["kd"]["gaps"]):
        gap["mean"] = float(k)
    text = " ".join(page(tmp_path, result).text.split())
    section = text[text.index("Class by class") : text.index("Agreement with")]
    ends = [*range(29, 23, -1), *range(5, -1, -1)]
    assert re.findall(r"class-\d\d", section) == [f"class-{k:02d}" for k in ends]
    assert "Of 30 classes the 6 most gained and the 6 most lost are shown" in section


def test_agreement_and_calibration_have_a_row_for_everybody(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    kd = result["answers"]["arms"]["kd"]
    kd["agreement"], kd["divergence"] = {"mean": 91.25, "sd": 1.5}, {"mean": 0.0471, "sd": 0.009}
    kd["calibration_error"] = {"mean": 4.0, "sd": None}
    rows = page(tmp_path, result).tables[-2]
    assert [row[0] for row in rows] == ["arm", "teacher", "control", "kd"]
    assert rows[0][1:3] == ["same class as teacher (%)", "KL from teacher (nats)"]
    assert rows[1][1:3] == ["–", "–"] and rows[3][1:] == ["91.2 ± 1.5", "0.047 ± 0.009", "4.0"]


def test_a_reliability_bar_stands_at_its_confidence_as_high_as_its_accuracy(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    bins = [(0, 0.0, 0.0)] * 15
    bins[3], bins[14] = (25, 0.25, 0.5), (100, 0.99, 0.9)
    result["answers"]["arms"]["kd"]["bins"] = bins
    text = report.write(tmp_path, result).read_text(encoding="utf-8").split("accuracy by confidence")[-1]
    names = ("x", "y", "width", "height", "fill-opacity")
    bars = re.findall(" ".join(rf'{name}="([\d.]+)"' for name in names), text)
    (x, y, wide, high, full), last = (list(map(float, bar)) for bar in bars)
    assert x == pytest.approx(20, abs=1) and x + wide == pytest.approx(100 * 4 / 15, abs=1)
    assert (y, high) == (50, 50) and last[3] == 90 and full < last[4] == 1


def test_samples_are_shown_with_what_everybody_said(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    told = result["answers"]["samples"]
    shown = page(tmp_path, result)
    text = " ".join(shown.text.split())
    count = sum(len(group["samples"]) for group in told["groups"])
    assert len(shown.images) == count > 12
    first = told["groups"][0]["samples"][0]
    assert shown.images[0] == first["image"]
    assert f"test sample {first['row']}" in text and f"right: kd {first['right']['arm']}/3" in text
    assert f"kd is right more often than the control on {told['won']} test samples" in text
    for who in ("teacher", "control", "arm"):
        k, p = first["said"][who][0]
        assert f"{CLASSES[k]}{100 * p:.0f} %" in text
    first["image"], told["groups"][1]["samples"] = None, []
    without = page(tmp_path, result)
    assert len(without.images) < count and "There is none." in without.text


def test_without_answers_their_sections_are_left_out(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    result["answers"] = None
    shown = page(tmp_path, result)
    for title in ("Class by class", "calibration", "Samples to look at"):
        assert title not in shown.text
    assert len(shown.tables) == 4 and "How it was kept fair" in shown.text


def test_without_a_teacher_calibration_is_still_told(tmp_path: Path) -> None:
    rows = page(tmp_path, board({"kd": HELPS}, teacher=False)).tables[-2]
    assert rows[0] == ["arm", "calibration error (points)"]
    assert [row[0] for row in rows[1:]] == ["control", "kd"]


# --- fair, and what it took ---


def test_what_the_teachers_cost_stands_beside_the_arms_that_have_one(tmp_path: Path) -> None:
    rows = page(tmp_path, board({"kd": HELPS})).tables[-1]
    assert rows[1:] == [["kd", "3.2", "1.5", "live, channels_last"]]


def test_it_says_by_which_way_networks_learned(tmp_path: Path) -> None:
    result = board({"kd": HELPS, "at": UNSURE})
    last = "Learned in channels_last, the layout that suits convolutions on a CPU: "
    assert last + "all arms." in page(tmp_path, result).text
    result["arms"][1]["learned"], result["arms"][0]["learned"] = ["compiled, channels_last"], ["compiled"]
    text = page(tmp_path, result).text
    assert last + "at." in text and "Learned under torch.compile: control." in text
    assert "Learned under torch.compile and in channels_last, the layout" in text


def test_chosen_layers_and_reconstructions_are_shown(tmp_path: Path) -> None:
    result = board({"at": HELPS, "kd": UNSURE})
    assert (
        "Layers chosen" not in page(tmp_path, result).text
        and "reconstructed" not in page(tmp_path, result).text
    )
    at = result["arms"][1]
    at["hints"] = [{"1.0": {"stage1": "layer1.3", "stage2": f"layer2.{seed}"}} for seed in range(3)]
    strip = {side: f"data:image/png;base64,{side}" for side in ("original", "masked", "reconstructed")}
    at["pictures"] = [strip, {**strip, "original": None}]
    shown = page(tmp_path, result)
    (table,) = [
        rows for rows in shown.tables if rows[0][1:] == ["seed 0", "seed 1", "seed 2"] and len(rows) == 2
    ]
    assert table[1][:2] == ["at", "stage1 ← layer1.3, stage2 ← layer2.0"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [html.count(f'src="{source}"') for source in strip.values()] == [1, 2, 2]


def test_other_conditions_and_earlier_stages_have_a_table_of_their_own(tmp_path: Path) -> None:
    result = board({"kd": (1.0, 2.0, 3.0), "skipped": UNSURE})
    assert "What else was scored" not in page(tmp_path, result).text
    control, kd, skipped = result["arms"]
    for row, gain in ((control, 0.0), (kd, 2.0), (skipped, 1.0)):
        for seed, scores in enumerate(row["all"]):
            scores["noisy.accuracy"] = 50.0 + seed + gain
            scores["noisy.other"] = 1.0
    for row, score in ((control, 0.5), (kd, 0.75)):
        row["stages"] = [{"name": "student", "metric": "test.psnr", "scores": [score] * 3}]
    shown = page(tmp_path, result)
    (table,) = [rows for rows in shown.tables if "noisy" in rows[0]]
    assert table[0] == ["arm", "student: psnr", "difference", "noisy", "difference"]
    assert table[1] == ["control", "0.500 ± 0.000", "–", "51.0 ± 1.0", "–"]
    assert table[2] == ["kd", "0.750 ± 0.000", "+0.250 ± 0.000", "53.0 ± 1.0", "+2.0 ± 0.0"]
    assert table[3] == ["skipped", "–", "–", "52.0 ± 1.0", "+1.0 ± 0.0"]


def test_what_methods_watch_is_drawn_below_their_losses(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    for records in result["arms"][1]["curves"]:
        for record in records:
            record["figures"] = {"dpk.ratio": 0.5 / (record["epoch"] + 1)}
    lines = page(tmp_path, result).lines
    assert list(lines)[-1] == "dpk.ratio by epoch" and len(lines["dpk.ratio by epoch"]) == 3 + 1


def test_the_tests_in_full_are_corrected_for_the_number_of_arms(tmp_path: Path) -> None:
    rows = page(tmp_path, board({"kd": HELPS, "fitnet": UNSURE, "flat": (5.0, 5.0, 5.0)})).tables[2]
    assert rows[0] == ["arm", "difference", "95 % interval", "p", "p (Holm)"]
    # 10 ± 4.303 × 3 / √3: Student's t with two degrees of freedom.
    assert rows[1] == ["kd", "+10.0 ± 3.0", "+2.5 to +17.5", "0.029", "0.057"]
    assert rows[2][3:] == ["0.37", "0.37"] and rows[3][2:] == ["–", "–", "–"]


def test_what_was_not_alike_is_said(tmp_path: Path) -> None:
    result = board({"kd": HELPS, "long": UNSURE})
    alike = " ".join(page(tmp_path, result).text.split())
    assert "All took the same number of training steps: 30." in alike and "more than its terms" not in alike
    result["arms"][2]["changes"] = {"terms": [], "rows": "labelled", "batch": 8}
    for one in result["arms"][2]["curves"]:
        one[-1]["steps"] = 1234
    text = " ".join(page(tmp_path, result).text.split())
    assert "not all take the same number of training steps: 30 for control and kd; 1,234 for long" in text
    assert "long differs from the control in more than its terms: it sets rows and batch." in text


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_too_few_seeds_are_said_to_be_too_few(tmp_path: Path, seeds: int) -> None:
    text = page(tmp_path, board({"kd": HELPS[:seeds]}, seeds=seeds)).text
    assert (f"Too few seeds: {seeds} of the 3 or more" in text) == (seeds < 3)


def test_what_the_board_took_and_ran_on_is_said(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    result["environment"]["commit"] = "abc123"
    text = page(tmp_path, result).text
    assert "75 s on the clock and 71.5 s of processor time" in text
    assert all(word in text for word in ("3.13.5", "2.13.0", "abc123"))
    result["cost"] = {"wall": 3700.0, "cpu": 600.0}
    assert "1 h 2 min on the clock and 10 min of processor time" in page(tmp_path, result).text


def test_beside_the_epoch_that_is_kept_stands_the_other(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    last = page(tmp_path, result)
    assert last.tables[0][0][2] == "best epoch" and last.tables[0][-1][2] == "92.0 ± 4.0 2, 3, 1"
    assert "hands over, from its last epoch." in last.text
    result["recipe"]["stages"][-1]["keep"] = "best"
    best = page(tmp_path, result)
    assert best.tables[0][0][2] == "last epoch" and best.tables[0][-1][2] == "91.0 ± 4.0 3, 3, 3"
    assert "hands over, from its best epoch on the validation split." in best.text


# --- in a browser ---

MEASURE = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}</style><div></div><script>
const found = {{}};
let left = 2;
for (const wide of [390, 1280]) {{
  const frame = document.createElement("iframe");
  frame.style = `width: ${{wide}}px; height: 800px; border: 0`;
  frame.onload = () => {{
    const page = frame.contentDocument;
    found[wide] = {{
      scroll: page.documentElement.scrollWidth,
      rows: [...page.querySelectorAll("table tbody th")].map((cell) => cell.firstChild.textContent.trim()),
      images: [...page.images].map((image) => image.naturalWidth),
      drawn: [...page.querySelectorAll("polyline")].map((line) => line.getBoundingClientRect().width),
    }};
    if (!--left) document.querySelector("div").textContent = JSON.stringify(found);
  }};
  frame.srcdoc = {page};
  document.body.append(frame);
}}
</script>"""


@pytest.mark.slow
def test_a_browser_shows_it_without_complaint_wide_and_on_a_phone(tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    assert browser, (
        f"This test opens the page in a browser and found none of {', '.join(names)}; install one (on Debian "
        "and Ubuntu: apt install chromium), or leave the slow tests out: make test."
    )
    arms = {"kd": HELPS, "a name rather long for a phone": UNSURE, "a_name_without_any_space_in_it": HURTS}
    result = board(arms)
    result["answers"] = answered(["control", *arms], 3, True, ("cat", "owl", "a_class_of_a_name_without_end"))
    file = report.write(tmp_path, result)
    text = file.read_text(encoding="utf-8")
    measure = tmp_path / "measure.html"
    measure.write_text(MEASURE.format(page=json.dumps(text).replace("</", "<\\/")), encoding="utf-8")

    def opened(path: Path) -> tuple[str, list[str]]:
        """The document as the browser has it in the end, and what it complained of."""
        options = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
        ]
        command = [str(browser), *options, path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    dom, complaints = opened(file)
    assert not complaints and "kd helped" in Page(dom).text
    dom, complaints = opened(measure)
    assert not complaints
    found = json.loads(html.unescape(dom.partition("<div>")[2].partition("</div>")[0]))
    for wide in (390, 1280):
        seen = found[str(wide)]
        assert seen["scroll"] <= wide, "the page can be pushed sideways"
        assert seen["rows"][:5] == ["teacher", "control", *arms]
        assert len(seen["images"]) > 12 and set(seen["images"]) == {4}  # loaded, as wide as they are
        assert len(seen["drawn"]) == sum(map(len, Page(text).lines.values())) and min(seen["drawn"]) > 9


# --- a page to keep ---


def test_a_large_board_is_still_a_small_file(tmp_path: Path) -> None:
    names, classes = ([f"{kind}-{n}" for n in range(many)] for kind, many in (("method", 25), ("class", 100)))
    result = board(dict.fromkeys(names, HELPS))
    result["answers"] = answered(["control", *names], 3, True, tuple(classes))
    long = [curve(*(n / 7 for n in range(240)))] * 3
    for one in result["arms"]:
        one["curves"] = long
    assert 200_000 < report.write(tmp_path, result).stat().st_size < 3_000_000


def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    plain = page(tmp_path, board({"kd": HELPS, "fitnet": UNSURE}))
    result = board({HOSTILE: HELPS, "fitnet": UNSURE})
    result["title"] = result["data"] = result["environment"]["machine"] = HOSTILE
    result["teachers"][0]["name"] = HOSTILE
    result["recipe"]["models"][HOSTILE] = result["recipe"]["models"]["teacher"]
    result["arms"][1]["changes"] = {"terms": [{"method": HOSTILE}]}
    result["arms"][1]["changes"] = {HOSTILE: HOSTILE}
    result["answers"]["classes"][0] = result["answers"]["teacher"] = HOSTILE
    for one in result["arms"][1]["curves"]:
        for record in one:
            record["losses"] = {HOSTILE: record["losses"]["task"]}
    shown = page(tmp_path, result)
    assert (shown.elements, shown.attributes) == (plain.elements, plain.attributes)
    assert "script" not in shown.elements
    assert all(image.startswith("data:image/png;base64,") for image in shown.images)
    results, seeds, *_ = shown.tables
    assert HOSTILE in shown.headline and results[-2][0] == HOSTILE and HOSTILE in seeds[1][0]
    assert HOSTILE in printed(result, 400)


def test_the_page_is_one_file_that_fetches_and_runs_nothing(tmp_path: Path) -> None:
    path = report.write(tmp_path, board({"kd": HELPS, "fitnet": UNSURE}))
    assert path == tmp_path / "report.html" and list(tmp_path.iterdir()) == [path]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    text, images = re.subn(r' src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", text)
    assert images >= 6
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe|\b(src|href|on\w+)=", text)
    assert "default-src 'none'" in text  # and the browser is told so


def test_the_page_is_made_anew_over_an_old_one_in_a_folder_that_may_be_missing(tmp_path: Path) -> None:
    old = report.write(tmp_path / "a" / "board", board({"kd": HELPS}))
    new = report.write(tmp_path / "a" / "board", board({"rkd": HURTS}))
    assert old == new and Page(new.read_text(encoding="utf-8")).headline.startswith("rkd hurt")


def test_the_page_holds_a_board_file_that_gives_the_same_board_again(tmp_path: Path) -> None:
    result = board({"rkd": HELPS, 'odd "name" \\ ü\t\x7f.': UNSURE})
    result["title"] = 'Few "labels"\n\\ × 2 🙂'
    changes: list[dict[str, Any]] = [
        {"terms": [{"method": "rkd", "teacher": ["teacher"], "weight": 1e-07, "through": []}]},
        {"terms": [], "rows": "labelled", "epochs": 33, "optim": {"student": {"lr": 0.5, "nesterov": False}}},
    ]
    for one, change in zip(result["arms"][1:], changes, strict=True):
        one["changes"] = change
    shown = page(tmp_path, result)
    file = tmp_path / "board.toml"
    file.write_text(shown.text[shown.text.index("title = ") :].strip(), encoding="utf-8")
    whole, arms, seeds, how = boards.read(file)
    assert whole.model_dump(mode="json", by_alias=True) == result["recipe"]
    assert arms == dict(zip(["rkd", 'odd "name" \\ ü\t\x7f.'], changes, strict=True))
    assert (seeds, how) == (result["seeds"], {"title": result["title"], "changes": 1})


def test_what_an_arm_changes_is_shown(tmp_path: Path) -> None:
    result = board({"rkd": HELPS, "short": UNSURE})
    result["arms"][2]["changes"] = {"rows": "labelled", "epochs": 33}
    text = page(tmp_path, result).text
    assert 'terms = [{ method = "rkd", weight = 0.5 }]' in text
    assert 'rows = "labelled"\nepochs = 33' in text
    assert tomllib.loads(report.board_toml(result))["arms"]["short"] == {"rows": "labelled", "epochs": 33}


@pytest.mark.parametrize(("device", "option"), [("cpu", ""), ("NVIDIA H200", " --device cuda")])
def test_the_command_to_repeat_it_names_the_device(tmp_path: Path, device: str, option: str) -> None:
    result = board({"kd": HELPS})
    result["environment"]["device"] = device
    assert f"limbeck board board.toml{option}\n" in page(tmp_path, result).text


def test_a_result_read_back_from_its_json_makes_the_same_page(tmp_path: Path) -> None:
    result = board({"kd": HELPS})
    again = report.write(tmp_path / "b", json.loads(json.dumps(result)))
    assert report.write(tmp_path / "a", result).read_bytes() == again.read_bytes()


# --- in the terminal ---


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_fits_80_columns_and_cuts_nothing_off(terminal: bool) -> None:
    names = [f"method-{n}" for n in range(20)]
    longer = {"labelled rows only": HELPS, "a_name_without_any_space_in_it": HURTS}
    result = board({**dict.fromkeys(names, UNSURE), **longer})
    for one in result["arms"]:
        one["seconds"], one["parameters"] = 123_456.0, 25_557_032
    text = printed(result, force_terminal=terminal, no_color=True, soft_wrap=not terminal)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert " ".join(text.split()).endswith("sec: training of the stage that arms change.")
    cells = [line.split() for line in lines if line.strip()]
    firsts = [row[0] for row in cells]
    assert [name for name in firsts if name.startswith("method-")] == names
    assert "a_name_without_any_space_in_it" in "".join(firsts)
    row = " ".join(cells[firsts.index("method-7")])
    assert row == "method-7 82.7 ± 3.5 +1.7 ± 2.5 0.37 2/3 no difference 123,456 25.6M"


@pytest.mark.parametrize("width", [80, 200])
def test_wide_numbers_wrap_and_are_not_cut(width: int) -> None:
    result = board({"kd": (-12.34, 50.5, 4.0), "steady": (4.0, 4.01, 4.02)})
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for piece in ("95.05", "+14.05", "32.60", "0.53", "2/3", "helped", "5.3k"):
        assert piece in text


def test_the_table_sets_the_teacher_apart_and_marks_the_control() -> None:
    lines = printed(board({"kd": HELPS, "[red]x[/red]": HURTS})).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("teacher"))
    assert "the teacher" in lines[start] and "317.0k" in lines[start]
    assert not lines[start + 1].strip()
    assert lines[start + 2].startswith("control") and "the control" in lines[start + 2]
    assert "helped" in lines[start + 3] and "hurt" in lines[start + 4]
    assert lines[start + 4].startswith("[red]x[/red]")
    assert any("not corrected" in line for line in lines)


# --- arms that diverged ---


def with_a_lost_arm(gaps: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    result = board(gaps)
    why = "The loss 'fitnet' of player 'student' became nan in step 6 of stage 1"
    changes = {"terms": [{"method": "fitnet", "weight": 200}]}
    result["diverged"] = [{"name": "fitnet", "changes": changes, "seeds": [0, 2], "why": why}]
    return result


def test_an_arm_that_diverged_is_said_and_not_scored(tmp_path: Path) -> None:
    result = with_a_lost_arm({"kd": HELPS})
    text = report.write(tmp_path, result).read_text(encoding="utf-8")
    assert "kd helped; fitnet diverged." in text
    assert "fitnet diverged in 2 of 3 seeds: The loss &#39;fitnet&#39; of player" in text
    console = Console(width=80, file=io.StringIO())
    console.print(report.table(result))
    (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("fitnet")]  # type: ignore[attr-defined]
    assert "diverged" in line and "%" not in line and not any(c.isdigit() for c in line.split("diverged")[0])


def test_a_board_of_nothing_but_lost_arms_says_so(tmp_path: Path) -> None:
    text = report.write(tmp_path, with_a_lost_arm({})).read_text(encoding="utf-8")
    assert "Against the same network trained without a teacher: fitnet diverged." in text


def test_a_lost_arm_is_in_the_file_that_repeats_the_board() -> None:
    arms = tomllib.loads(report.board_toml(with_a_lost_arm({"kd": HELPS})))["arms"]
    assert arms["fitnet"] == {"terms": [{"method": "fitnet", "weight": 200}]} and "kd" in arms
