"""A finished board as a page to keep and as a table in the terminal.

The page is one plain HTML file that needs neither network nor scripts. It says first what was shown and what
was not; the numbers, the curves and all it takes to repeat the board follow.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

import limbeck
from limbeck import checkpoint
from limbeck.board import verdict

NONE = "–"
COLOURS = {"helped": "green", "hurt": "red"}
NOTE = (
    "difference: arm minus the control of the same seed. ±: standard deviation over seeds. p: paired "
    "t-test, one per arm, not corrected for their number. sec: training of the last stage."
)


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write a board's page to `folder/report.html`; `result` is what `Board.result()` gives."""
    metric = Metric.of(result)
    rivals = [arm for arm in result["arms"] if arm["name"] != result["control"]]
    page = _template().render(
        board=result,
        metric=metric,
        headline=headline(result["arms"], metric),
        sentences=[(verdict(arm), sentence(arm, metric)) for arm in rivals],
        rivals=rivals,
        rows=_rows(result, metric),
        strip=_strip(result),
        curves=_curves(result, metric),
        control=_control(result),
        changes=[(arm["name"], _toml_lines(arm["changes"])) for arm in result["arms"]],
        toml=board_toml(result),
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
            Text(row.verdict, style=COLOURS.get(row.verdict, "")), row.seconds, _short(row.parameters),
            end_section=below is not None and below.teacher != row.teacher,
        )  # fmt: skip
    return grid


# --- words ---


def headline(arms: Sequence[Mapping[str, Any]], metric: "Metric") -> str:
    """What the whole board showed, in one sentence."""
    rivals = [arm for arm in arms if arm["difference"] is not None]
    if not rivals:
        return "Only the control was run, so there is nothing to compare it with."
    if len(rivals) == 1:
        return sentence(rivals[0], metric) + "."
    groups: dict[str, list[str]] = {"helped": [], "hurt": [], "no difference shown": []}
    for arm in rivals:
        groups.setdefault(verdict(arm), []).append(arm["name"])
    parts = []
    for said, names in groups.items():
        if names:
            who = _and(names) if len(rivals) <= 6 else f"{len(names)} of {len(rivals)} arms"
            parts.append(f"{who} {said}" if said in COLOURS else f"{said} for {who}")
    return f"Against the same network trained without a teacher: {'; '.join(parts)}."


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
    parameters: int
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
        gap, seconds = arm["difference"], arm["seconds"]
        row = Row(
            arm["name"],
            metric.spread(arm["mean"], arm["sd"]),
            arm["parameters"],
            verdict=verdict(arm),
            seconds=f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}",
        )
        if gap is not None:
            row = replace(
                row,
                difference=metric.spread(gap["mean"], gap["sd"], signed=True),
                p=NONE if gap["p"] is None else _p(gap["p"]).removeprefix("p = ").replace("p < ", "<"),
                wins=f"{gap['wins']}/{gap['of']}",
            )
        rows.append(row)
    return rows


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


WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 38, 308, 10, 152  # a panel, and the box of its axes within


def _curves(result: Mapping[str, Any], metric: Metric) -> dict[str, Any] | None:
    """A panel an arm: its validation score by epoch, each seed and the mean, over the control's mean."""
    seeds = {arm["name"]: [_scores(one, metric.name) for one in arm["curves"]] for arm in result["arms"]}
    values = [score for lines in seeds.values() for line in lines for score in line]
    if not values:
        return None
    last = max(len(line) for lines in seeds.values() for line in lines)
    across, up = ticks(1, last, whole=True), ticks(min(values), max(values))
    low, high = min(up[0], min(values)), max(up[-1], max(values))

    def points(line: Iterable[float]) -> list[tuple[float, float]]:
        return [(x(epoch), y(score)) for epoch, score in enumerate(line, 1)]

    def x(epoch: float) -> float:
        return round(_between(epoch, 1, last, LEFT, RIGHT), 1)

    def y(score: float) -> float:
        return round(_between(score, low, high, BOTTOM, TOP), 1)

    mean = {name: points(map(statistics.fmean, zip(*lines, strict=False))) for name, lines in seeds.items()}
    shown = [name for name in seeds if name != result["control"]] or [result["control"]]
    return {
        "across": [(x(t), f"{t:g}") for t in across],
        "up": [(y(t), f"{t:g}") for t in up],
        "control": mean[result["control"]],
        "panels": [(name, mean[name], [points(line) for line in seeds[name]]) for name in shown],
        "box": {"wide": WIDE, "high": HIGH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
    }


def _scores(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    scores = [record["scores"].get(name, math.nan) for record in records]
    return scores if all(map(math.isfinite, scores)) else []


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


# --- TOML: what a person saves to run the board again ---


def board_toml(result: Mapping[str, Any]) -> str:
    """The board as a file that `limbeck board` reads: recipe, seeds and arms, every default written out."""
    plan = result["recipe"]
    arms = {arm["name"]: arm["changes"] for arm in result["arms"] if arm["name"] != result["control"]}
    parts = [
        _toml_lines({"title": result["title"], "seeds": result["seeds"]}),
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
