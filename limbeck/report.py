"""A finished board as a page to keep and as a table in the terminal.

The page is one plain HTML file that needs neither network nor scripts. It says first what was shown and what
was not; the numbers, the curves and all it takes to repeat the board follow.
"""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

import limbeck
from limbeck import checkpoint
from limbeck.board import holm, verdict

NONE = "–"
COLOURS = {"helped": "green", "hurt": "red"}
NOTE = (
    "difference: arm minus the control of the same seed. ±: standard deviation over seeds. p: paired "
    "t-test, one per arm, not corrected for their number. sec: training of the stage that arms change."
)


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write a board's page to `folder/report.html`; `result` is what `Board.result()` gives."""
    metric = Metric.of(result)
    rivals = [arm for arm in result["arms"] if arm["name"] != result["control"]]
    lost = [("diverged", f"{one['name']} {_lost(one, result)}: {one['why']}") for one in result["diverged"]]
    page = _template().render(
        board=result,
        metric=metric,
        headline=headline(result, metric),
        sentences=[*((verdict(arm), sentence(arm, metric)) for arm in rivals), *lost],
        rivals=rivals,
        rows=_rows(result, metric),
        other=_other(result),
        tests=_tests(rivals, metric),
        strip=_strip(result),
        curves=_curves(result),
        conditions=_conditions(result),
        fair=_fair(result),
        classes=_classes(result),
        trust=_trust(result),
        samples=_samples(result),
        asking=_asking(result),
        learned=_learned(result),
        pictures=[(arm["name"], arm["pictures"]) for arm in result["arms"] if arm["pictures"]],
        hints=[
            (arm["name"], list(map(_layers, arm["hints"]))) for arm in result["arms"] if any(arm["hints"])
        ],
        control=_control(result),
        changes=[(arm["name"], _toml_lines(arm["changes"])) for arm in _all(result)],
        toml=board_toml(result),
        seconds=_time,
        version=limbeck.__version__,
    )
    path = folder / "report.html"
    checkpoint.write_atomic(path, page.encode())
    return path


def table(result: Mapping[str, Any]) -> Table:
    """A board for the terminal; readable at 80 columns."""
    metric = Metric.of(result)
    grid = Table(
        title=Text(f"{result['title']} ({_seeds(len(result['seeds']))})", no_wrap=False, overflow="fold"),
        caption=Text(NOTE, no_wrap=False, overflow="fold"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    grid.add_column("arm", overflow="fold")
    grid.add_column(metric.label.replace(" ", "\n"), justify="right", overflow="fold")
    grid.add_column("difference", justify="right", overflow="fold")
    grid.add_column("p", justify="right", no_wrap=True)
    grid.add_column("wins", justify="right", no_wrap=True)
    grid.add_column("verdict", width=len("no difference"))  # fixed, so that rich narrows the names instead
    grid.add_column("sec", justify="right", no_wrap=True)
    grid.add_column("params", justify="right", no_wrap=True)
    rows = _rows(result, metric)
    for row, below in zip(rows, [*rows[1:], None], strict=True):
        grid.add_row(
            Text(row.name), row.score, row.difference, row.p, row.wins,
            Text(row.verdict, style=COLOURS.get(row.verdict, "")), row.seconds,
            NONE if row.parameters is None else _short(row.parameters),
            end_section=below is not None and below.teacher != row.teacher,
        )  # fmt: skip
    return grid


# --- words ---


def headline(result: Mapping[str, Any], metric: "Metric") -> str:
    """What the whole board showed, in one sentence."""
    rivals = [arm for arm in result["arms"] if arm["difference"] is not None]
    lost = result["diverged"]
    if not rivals and not lost:
        return "Only the control was run, so there is nothing to compare it with."
    if len(rivals) == 1 and not lost:
        return sentence(rivals[0], metric) + "."
    groups: dict[str, list[str]] = {"helped": [], "hurt": [], "no difference shown": []}
    for arm in rivals:
        groups.setdefault(verdict(arm), []).append(arm["name"])
    groups["diverged"] = [one["name"] for one in lost]
    count, parts = len(rivals) + len(lost), []
    for said, names in groups.items():
        if names:
            who = _and(names) if count <= 6 else f"{len(names)} of {count} arms"
            parts.append(f"{who} {said}" if said in (*COLOURS, "diverged") else f"{said} for {who}")
    return f"Against the same network trained without a teacher: {'; '.join(parts)}."


def _lost(one: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return f"diverged in {len(one['seeds'])} of {_seeds(len(result['seeds']))}"


def _all(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every arm that was asked for, those that diverged last."""
    return [*result["arms"], *result["diverged"]]


def sentence(arm: Mapping[str, Any], metric: "Metric") -> str:
    """What one arm showed against the control, fit to be quoted alone."""
    gap, said = arm["difference"], verdict(arm)
    much = f"{metric.spread(gap['mean'], gap['sd'], signed=True)} {metric.unit}"
    much += " over the control" if gap["mean"] > 0 else " against the control"
    wins = f"{gap['wins']} of {_seeds(gap['of'])}"
    if said in COLOURS:
        return f"{arm['name']} {said}: {much}, better in {wins} (paired t-test, {_p(gap['p'])})"
    if gap["p"] is not None:
        return f"{arm['name']}: {said} ({much}, better in {wins}; paired t-test, {_p(gap['p'])})"
    why = "not tested with fewer than 3" if gap["of"] < 3 else "a t-test has no answer to equal differences"
    return f"{arm['name']}: {said} ({much}, better in {wins}; {why})"


@dataclass(frozen=True)
class Metric:
    """How a board writes its score: accuracy in percent and points, anything else as a plain number."""

    split: str
    name: str
    digits: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Metric":
        split, _, name = result["metric"].rpartition(".")
        arms = result["arms"]
        spreads = [arm["sd"] for arm in arms] + [arm["difference"]["sd"] for arm in arms if arm["difference"]]
        # Enough digits for the smallest spread not to read 0.0; what rounding leaves of no spread is none.
        least = min((sd for sd in spreads if sd and sd > 1e-9), default=1.0)
        needed = -int(f"{least:.0e}".partition("e")[2])
        return cls(split, name, min(max(1 if name == "accuracy" else 3, needed), 6))

    @property
    def label(self) -> str:
        return f"{self.name} (%)" if self.name == "accuracy" else self.name

    @property
    def unit(self) -> str:
        return "points" if self.name == "accuracy" else self.name

    def spread(self, mean: float, sd: float | None = None, *, signed: bool = False) -> str:
        """`92.3 ± 0.4`, or without a spread `92.3`."""
        sign = "+" if signed else ""
        text = f"{round(mean, self.digits) + 0.0:{sign}.{self.digits}f}".replace("-", "−")
        return text if sd is None else f"{text} ± {sd:.{self.digits}f}"


def _p(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    if abs(p - 0.05) < 0.001:  # rounding must not carry p across the line that the verdict draws
        p = math.floor(p * 10**4) / 10**4
        return f"p = {p:.3g}"
    return f"p = {p:.2g}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


PERCENT, NATS = Metric("test", "accuracy", 1), Metric("test", "KL", 3)


def _bare(p: str) -> str:
    return p.removeprefix("p = ").replace("p < ", "<")


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _short(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


# --- rows and pictures ---


@dataclass(frozen=True)
class Row:
    """A line of the table, written out. A teacher has no difference, no verdict and no seconds of its own."""

    name: str
    score: str
    parameters: int | None
    other: str = NONE
    epochs: str = ""
    teacher: bool = False
    verdict: str = "the teacher"
    seconds: str = NONE
    difference: str = NONE
    p: str = NONE
    wins: str = NONE


def _rows(result: Mapping[str, Any], metric: Metric) -> list[Row]:
    rows = [
        Row(one["name"], metric.spread(one["mean"], one["sd"]), one["parameters"], teacher=True)
        for one in result["teachers"]
    ]
    for arm in result["arms"]:
        gap, seconds, other = arm["difference"], arm["seconds"], arm[_other(result)]
        row = Row(
            arm["name"],
            metric.spread(arm["mean"], arm["sd"]),
            arm["parameters"],
            verdict=verdict(arm),
            seconds=f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}",
            other=metric.spread(other["mean"], other["sd"]),
            epochs=", ".join(str(epoch + 1) for epoch in other["epochs"]),
        )
        if gap is not None:
            row = replace(
                row,
                difference=metric.spread(gap["mean"], gap["sd"], signed=True),
                p=NONE if gap["p"] is None else _bare(_p(gap["p"])),
                wins=f"{gap['wins']}/{gap['of']}",
            )
        rows.append(row)
    return rows + [Row(one["name"], NONE, None, verdict=_lost(one, result)) for one in result["diverged"]]


def _layers(hints: Mapping[str, Mapping[str, str]] | None) -> str:
    """`stage1 ← layer1.2, stage2 ← layer3.0`, for each term that asked."""
    terms = (hints or {}).values()
    return "; ".join(", ".join(f"{name} ← {tap}" for name, tap in taps.items()) for taps in terms)


def _asking(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What the teachers cost each arm that has some, and by which way they answered."""
    return [
        (arm["name"], f"{arm['seconds']:.1f}", f"{arm['asking']:.1f}", "; ".join(arm["how"]))
        for arm in result["arms"]
        if arm["how"]
    ]


WAYS = {
    "compiled": "under torch.compile",
    "channels_last": "in channels_last, the layout that suits convolutions on a CPU",
}


def _learned(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """By which ways networks learned, in words, and the arms that went so."""
    arms: dict[str, list[str]] = {}
    for arm in result["arms"]:
        for way in arm["learned"]:
            arms.setdefault(_and([WAYS[one] for one in way.split(", ")]), []).append(arm["name"])
    every = len([arm for arm in result["arms"] if arm["curves"]])
    return [(way, "all arms" if len(names) == every else _and(names)) for way, names in arms.items()]


def _other(result: Mapping[str, Any]) -> str:
    """The epoch that is given beside the one whose network is kept."""
    return "last" if result["recipe"]["stages"][-1]["keep"] == "best" else "best"


def _control(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(arm for arm in result["arms"] if arm["name"] == result["control"])


def _strip(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every seed's score as a place between 0 and 100 on one common line, and the control's mean on it."""
    everyone = [*((one, True) for one in result["teachers"]), *((one, False) for one in result["arms"])]
    scores = [score for one, _ in everyone for score in one["scores"]]

    def place(score: float) -> float:
        return round(_between(score, min(scores), max(scores), 4, 96), 2)

    rows = [(one["name"], teacher, one["scores"], map(place, one["scores"])) for one, teacher in everyone]
    return {"rows": rows, "control": place(_control(result)["mean"])}


def _tests(rivals: Sequence[Mapping[str, Any]], metric: Metric) -> list[tuple[str, str, str, str, str]]:
    """The differences in full: with a 95 % interval, p, and p corrected for the number of arms."""
    corrected = holm([arm["difference"]["p"] for arm in rivals])
    rows = []
    for arm, p_holm in zip(rivals, corrected, strict=True):
        gap, interval = arm["difference"], NONE
        if gap["p"] is not None:
            reach = float(stats.t.ppf(0.975, gap["of"] - 1)) * gap["sd"] / math.sqrt(gap["of"])
            ends = (metric.spread(gap["mean"] + end, signed=True) for end in (-reach, reach))
            interval = " to ".join(ends)
        ps = (NONE if p is None else _bare(_p(p)) for p in (gap["p"], p_holm))
        rows.append((arm["name"], metric.spread(gap["mean"], gap["sd"], signed=True), interval, *ps))
    return rows


def _fair(result: Mapping[str, Any]) -> dict[str, Any]:
    """What sets arms apart besides their terms: keys that they change, and how many steps they took."""
    steps: dict[int, list[str]] = {}
    for arm in result["arms"]:
        taken = {curve[-1]["steps"] for curve in arm["curves"] if curve}
        for count in sorted(taken):
            steps.setdefault(count, []).append(arm["name"])
    more = [(arm["name"], [key for key in arm["changes"] if key != "terms"]) for arm in _all(result)]
    return {
        "steps": [(f"{count:,}", _and(names)) for count, names in steps.items()],
        "more": [(name, _and(keys)) for name, keys in more if keys],
    }


def _conditions(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What else was scored: the same score on other parts of the data or under other views, and how each
    earlier stage ended. A row an arm: mean and spread, and the difference to the control."""
    headline = result["metric"].partition(".")[2]
    found: dict[str, dict[str, list[float]]] = {}
    for arm in result["arms"]:
        for stage in arm["stages"]:
            title = f"{stage['name']}: {stage['metric'].partition('.')[2]}"
            found.setdefault(title, {})[arm["name"]] = stage["scores"]
        for key in arm["all"][0]:
            part, _, name = key.partition(".")
            if name == headline and part not in ("valid", "test"):
                found.setdefault(part, {})[arm["name"]] = [scores[key] for scores in arm["all"]]
    if not found:
        return None

    def told(scores: Sequence[float] | None, control: Sequence[float] | None, name: str) -> tuple[str, str]:
        if scores is None:
            return NONE, NONE
        percent = name.rpartition(" ")[2] == "accuracy" or (headline == "accuracy" and ":" not in name)
        way = Metric("", name, 1 if percent else 2 if max(scores) > 10 else 3)
        gaps = [] if control is None else [a - b for a, b in zip(scores, control, strict=True)]
        mean = way.spread(statistics.fmean(scores), _spread(scores))
        return mean, way.spread(statistics.fmean(gaps), _spread(gaps), signed=True) if gaps else NONE

    def control_of(title: str, arm: str) -> Sequence[float] | None:
        return None if arm == result["control"] else found[title].get(result["control"])

    arms = [arm["name"] for arm in result["arms"]]
    rows = [
        (arm, [told(found[title].get(arm), control_of(title, arm), title) for title in found]) for arm in arms
    ]
    return {"titles": list(found), "rows": rows}


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


# --- curves ---

WIDE, LEFT, RIGHT, TOP = 320, 42, 308, 10  # a plot, and the box of its axes within
TALL, LOW = 142, 62  # how high that box is: for the score, and for a loss
POINTS = 120  # on a line; a pixel has no room for more


def _curves(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card an arm: its validation score by epoch, each of its losses and what its methods watched, over the
    control's mean."""
    drawn: dict[str, dict[str, list[list[float]]]] = {}
    for arm in result["arms"]:
        named = {"": [_line(one, "scores", result["curve"]) for one in arm["curves"]]}
        for kind, title in (("losses", "loss: {}"), ("figures", "{}")):
            names = [name for one in arm["curves"] for record in one for name in record[kind]]
            for name in dict.fromkeys(names):
                named[title.format(name)] = [_line(one, kind, name) for one in arm["curves"]]
        drawn[arm["name"]] = {name: lines for name, lines in named.items() if lines and all(lines)}
    every = [line for named in drawn.values() for lines in named.values() for line in lines]
    last = max(map(len, every), default=0)
    control = drawn[result["control"]]
    shown = [name for name in drawn if name != result["control"]] or [result["control"]]
    cards = []
    for arm in shown:
        plots = []
        for name, lines in drawn[arm].items():
            alike = [line for named in drawn.values() for line in named.get(name, [])]
            beside = control.get(name, []) if arm != result["control"] else []
            plots.append(_plot(name, lines, beside, alike, last))
        if plots:
            cards.append({"name": arm, "plots": plots})
    return cards


def _plot(
    name: str,
    lines: Sequence[Sequence[float]],
    control: Sequence[Sequence[float]],
    alike: Sequence[Sequence[float]],
    last: int,
) -> dict[str, Any]:
    """Lines over `last` epochs, each seed's and the mean, and the control's mean. `alike` is all that shares
    the vertical axis: what is called the same looks the same in every card."""
    values = [value for line in alike for value in line]
    bottom = TOP + (LOW if name else TALL)
    up = ticks(min(values), max(values))
    low, high = min(up[0], min(values)), max(up[-1], max(values))
    up = [up[0], up[-1]] if name else up

    def place(epoch: int, value: float) -> tuple[float, float]:
        across = _between(epoch, 1, last, LEFT, RIGHT)
        return round(across, 1), round(_between(value, low, high, bottom, TOP), 1)

    def points(line: Sequence[float]) -> list[tuple[float, float]]:
        stride = math.ceil(len(line) / POINTS)
        kept = {0, *range((len(line) - 1) % stride, len(line), stride)}  # with both ends
        return [place(n + 1, line[n]) for n in sorted(kept)]

    def mean(several: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        return points([statistics.fmean(values) for values in zip(*several, strict=False)])

    return {
        "name": name,
        "seeds": [points(line) for line in lines] if len(lines) > 1 else [],
        "mean": mean(lines),
        "control": mean(control) if control else [],
        "up": [(place(1, t)[1], f"{t:g}") for t in up],
        "across": [(place(int(t), low)[0], f"{t:g}") for t in ticks(1, last, whole=True)],
        "box": {"wide": WIDE, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": bottom},
    }


def _line(records: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[float]:
    """A number of every epoch; empty where one is missing or not finite."""
    values = [record[kind].get(name, math.nan) for record in records]
    return values if all(map(math.isfinite, values)) else []


def _between(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where `value` of low … high lies on start … end; the middle when there is only one value."""
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """A few round numbers that span low … high. Whole ones count from `low` and stay within."""
    if not high > low:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        return [low, *(n * step for n in range(1, math.floor(high / step) + 1) if n * step > low)]
    return [round(n * step, 9) for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


# --- answers ---

FEW = 6  # of many classes, as many of the most gained and of the most lost are shown
MANY = 20


def _classes(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """A card an arm: for each class the gain on the control in points, as a bar from the middle."""
    told = result["answers"]
    if told is None or len(told["arms"]) < 2:
        return None
    rivals = {name: arm["gaps"] for name, arm in told["arms"].items() if name != result["control"]}
    before = told["arms"][result["control"]]["by_class"]
    gaps = [gap for arm in rivals.values() for gap in arm if gap is not None]
    reach = max((abs(gap["mean"]) + (gap["sd"] or 0.0) for gap in gaps), default=0.0) or 1.0
    cards = []
    for name, arm in rivals.items():
        known = [k for k, gap in enumerate(arm) if gap is not None]
        if len(known) > MANY:
            by_gain = sorted(known, key=lambda k: -arm[k]["mean"])
            known = by_gain[:FEW] + by_gain[-FEW:]
        cards.append((name, [_bar(told["classes"][k], before[k], arm[k], reach) for k in known]))
    rows = [count for count in told["rows"] if count]
    return {
        "cards": cards,
        "least": min(rows),
        "most": max(rows),
        "row": f"{100 / min(rows):.2g}",
        "of": len(told["classes"]) if len(told["classes"]) > MANY else None,
        "few": FEW,
    }


def _bar(label: str, before: Mapping[str, Any], gap: Mapping[str, Any], reach: float) -> dict[str, Any]:
    sd = gap["sd"] or 0.0
    start, end, low, high = (
        round(_between(v, -reach, reach, 0, 100), 1)
        for v in (min(0.0, gap["mean"]), max(0.0, gap["mean"]), gap["mean"] - sd, gap["mean"] + sd)
    )
    return {
        "label": label,
        "before": PERCENT.spread(before["mean"]),
        "gap": PERCENT.spread(gap["mean"], gap["sd"], signed=True),
        "better": gap["mean"] > 0,
        "bar": (start, round(end - start, 1)),
        "sd": (low, round(high - low, 1)),
    }


def _trust(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """How far answers agree with the teacher's, and how far their confidence can be trusted."""
    told = result["answers"]
    if told is None:
        return None
    everyone = [*([(told["teacher"], True, told["taught"])] if told["taught"] else [])]
    everyone += [(name, False, arm) for name, arm in told["arms"].items()]
    rows, cards = [], []
    for name, teacher, one in everyone:
        with_itself = teacher or one["agreement"] is None
        rows.append(
            {
                "name": name,
                "teacher": teacher,
                "agreement": NONE if with_itself else PERCENT.spread(**one["agreement"]),
                "divergence": NONE if with_itself else NATS.spread(**one["divergence"]),
                "error": PERCENT.spread(**one["calibration_error"]),
            }
        )
        cards.append((name, teacher, _reliability(one["bins"])))
    return {"rows": rows, "cards": cards, "teacher": told["teacher"]}


def _reliability(bins: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """The bins that hold answers, in percent of a square: where one stands, how high, how full it is."""
    most = max(count for count, _, _ in bins)
    wide = 100 / len(bins)
    return [
        {
            "x": round(n * wide + 0.4, 2),
            "wide": round(wide - 0.8, 2),
            "high": round(100 * right, 1),
            "full": round(0.25 + 0.75 * math.sqrt(count / most), 2),
        }
        for n, (count, _, right) in enumerate(bins)
        if count
    ]


KINDS = {
    "won": "{arm} is right in more seeds than the control",
    "lost": "{arm} is right in fewer seeds than the control",
    "doubted": "Dark knowledge: where the teacher is least sure",
}


def _samples(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Test samples with their pictures, and what teacher, control and arm thought of them."""
    told = result["answers"]
    if told is None or told["samples"] is None:
        return None
    arm, classes = told["shown"], told["classes"]
    called = {"teacher": told["teacher"], "control": result["control"], "arm": arm}
    groups = []
    for group in told["samples"]["groups"]:
        cards = [
            {
                "image": one["image"],
                "label": NONE if one["label"] < 0 else classes[one["label"]],
                "row": one["row"],
                "right": one["right"],
                "said": [
                    (name, [(classes[k], k == one["label"], p) for k, p in one["said"][who]])
                    for who, name in called.items()
                    if who in one["said"]
                ],
            }
            for one in group["samples"]
        ]
        groups.append((KINDS[group["kind"]].format(arm=arm), told["samples"].get(group["kind"]), cards))
    return {"groups": groups, "arm": arm, "won": told["samples"]["won"], "lost": told["samples"]["lost"]}


# --- TOML: what a person saves to run the board again ---


def board_toml(result: Mapping[str, Any]) -> str:
    """The board as a file that `limbeck board` reads: recipe, seeds and arms, every default written out."""
    plan = result["recipe"]
    arms = {arm["name"]: arm["changes"] for arm in _all(result) if arm["name"] != result["control"]}
    parts = [
        _toml_lines({"title": result["title"], "seeds": result["seeds"], "changes": result["begin"]}),
        "[recipe]\n" + _toml_lines({k: v for k, v in plan.items() if k not in ("models", "stages")}),
        "[recipe.models]\n" + _toml_lines(plan["models"]),
        *("[[recipe.stages]]\n" + _toml_lines(stage) for stage in plan["stages"]),
        "[arms]\n" + _toml_lines(arms),
    ]
    return "\n\n".join(parts) + "\n"


def _toml_lines(content: Mapping[str, Any]) -> str:
    return "\n".join(f"{_toml_key(key)} = {_toml(v)}" for key, v in content.items() if v is not None)


def _toml(value: Any) -> str:
    """A value on one line; TOML has no null, so a key whose value is None is left out."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_toml_key(key)} = {_toml(v)}" for key, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)  # JSON has NaN and Infinity where TOML has nan and inf
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _template() -> jinja2.Template:
    house = jinja2.Environment(
        loader=jinja2.PackageLoader("limbeck", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return house.get_template("report.html.j2")
