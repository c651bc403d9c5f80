"""The fair board: arms that differ in nothing but what is said, over seeds, against an honest control.

Arms share data, label budget, initial weights and order of batches; whatever comes before the last stage
(training the teacher) is done once a seed and used by all. Every cell is a run of its own, so a stopped board
goes on where it was.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import Field
from scipy import stats

from limbeck import build, checkpoint, recipe, registry
from limbeck.core.refused import Refused
from limbeck.run import Moment, Run, Stopped, environment

CONTROL = "control"


class Arms(recipe.Strict):
    """A board as data: a recipe, seeds, and for each arm what its last stage does differently. `control` (no
    terms) is always there."""

    recipe: str | dict[str, Any]
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    arms: dict[str, dict[str, Any]]
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of the board: an arm (None: what all arms share) under a seed."""

    arm: str | None
    seed: int
    number: int
    cells: int


class Board:
    """Raises `Refused` at construction when any arm does not fit; nothing is written then."""

    def __init__(
        self,
        whole: recipe.Recipe,
        arms: Mapping[str, Mapping[str, Any]],
        seeds: list[int],
        folder: Path,
        *,
        title: str = "",
        device: str = "cpu",
    ) -> None:
        self.folder, self.seeds, self.device = folder, seeds, device
        self.title = title or folder.name
        if CONTROL in arms:
            raise Refused(
                f"An arm is called '{CONTROL}', which is the recipe without a teacher and always there; "
                "call it something else."
            )
        self.changes = {CONTROL: {"terms": []}, **arms}
        self.plans = {name: _arm(whole, name, changes) for name, changes in self.changes.items()}
        if len(set(seeds)) < len(seeds):
            raise Refused(f"The seeds {seeds} repeat; give each once.")
        self.whole = whole
        self._stop = False
        self._run: Run | None = None
        for name, plan in self.plans.items():
            try:
                build.rehearse(plan, seeds[0], device)
            except Refused as error:
                raise Refused(f"Arm '{name}': {error}") from error.__cause__

    def stop(self) -> None:
        """Ask for a stop at the next batch; `Stopped` is raised and the board can be started again."""
        self._stop = True
        if self._run is not None:
            self._run.stop()

    def cells(self) -> list[Cell]:
        arms: list[str | None] = [None] if len(self.whole.stages) > 1 else []
        arms += list(self.plans)
        every = [(seed, arm) for seed in self.seeds for arm in arms]
        return [Cell(arm, seed, n, len(every)) for n, (seed, arm) in enumerate(every)]

    def moments(self) -> Iterator[tuple[Cell, Moment | None]]:
        """Compute what is missing, yielding between batches, and (cell, None) when a cell is finished."""
        for cell in self.cells():
            run = self._run = self._cell_run(cell)
            if self._stop:
                run.stop()
            try:
                for moment in run.moments():
                    yield cell, moment
            except Stopped:
                where = f"in arm '{cell.arm}'" if cell.arm else "before the arms"
                raise Stopped(
                    f"Stopped {where}, seed {cell.seed}; the same `limbeck board` goes on."
                ) from None
            yield cell, None

    def scores(self, cell: Cell) -> dict[str, float]:
        """The final scores of a finished cell."""
        return self._finished(self._cell_folder(cell.arm, cell.seed))["scores"]

    def _cell_run(self, cell: Cell) -> Run:
        shared = self._cell_folder(None, cell.seed)
        if cell.arm is None:
            first = self.whole.model_copy(update={"stages": self.whole.stages[:-1]})
            return Run(first, shared, seed=cell.seed, device=self.device)
        after = shared if len(self.whole.stages) > 1 else None
        return Run(
            self.plans[cell.arm],
            self._cell_folder(cell.arm, cell.seed),
            seed=cell.seed,
            device=self.device,
            after=after,
        )

    def _cell_folder(self, arm: str | None, seed: int) -> Path:
        if arm is None:
            return self.folder / "shared" / str(seed)
        return self.folder / "cells" / quote(arm, safe=" ") / str(seed)

    def _finished(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))

    def result(self) -> dict[str, Any]:
        """The finished board as plain data; also written to `board.json`."""
        metric = f"test.{registry.find('task', self.whole.task).headline}"
        rows, control = [], None
        for name, plan in self.plans.items():
            folders = [self._cell_folder(name, seed) for seed in self.seeds]
            results = [self._finished(folder) for folder in folders]
            scores = [r["scores"][metric] for r in results]
            control = scores if name == CONTROL else control
            assert control is not None
            rows.append(
                {
                    "name": name,
                    "changes": dict(self.changes[name]),
                    "scores": scores,
                    "mean": statistics.fmean(scores),
                    "sd": _sd(scores),
                    "difference": None if name == CONTROL else paired(scores, control),
                    "seconds": statistics.fmean(r["seconds"] for r in results),
                    "parameters": results[0]["parameters"],
                    "curves": [_curve(folder, len(plan.stages) - 1) for folder in folders],
                }
            )
        board = {
            "title": self.title,
            "data": self.whole.data,
            "metric": metric,
            "seeds": self.seeds,
            "control": CONTROL,
            "arms": rows,
            "teachers": self._teachers(metric),
            "recipe": self.whole.model_dump(mode="json", by_alias=True),
            "environment": environment(self.device),
        }
        checkpoint.write_atomic(self.folder / "board.json", json.dumps(board, indent=1).encode())
        return board

    def _teachers(self, metric: str) -> list[dict[str, Any]]:
        """What the arms learned from, where the stages before theirs trained it."""
        taught = {t for plan in self.plans.values() for use in plan.stages[-1].terms for t in use.teachers}
        results = [self._finished(self._cell_folder(CONTROL, seed)) for seed in self.seeds]
        rows = []
        for stage, plan in enumerate(self.whole.stages[:-1]):
            if plan.learns in taught:
                finals = [result["stages"][stage] for result in results]
                scores = [final["scores"][metric] for final in finals]
                row = {"name": plan.learns, "scores": scores, "parameters": finals[0]["parameters"]}
                rows.append({**row, "mean": statistics.fmean(scores), "sd": _sd(scores)})
        return rows


def read(
    path: Path, changes: tuple[str, ...] = (), methods: tuple[str, ...] = (), seeds: int | None = None
) -> tuple[recipe.Recipe, dict[str, dict[str, Any]], list[int], str]:
    """A board from a board file, or from a recipe and the names of methods to put in place of its last
    stage's."""
    content = recipe.read_toml(path)
    if "arms" in content:
        arms: Arms = recipe.checked(Arms, content, str(path))
        whole = (
            recipe.read(path.parent / arms.recipe, changes)
            if isinstance(arms.recipe, str)
            else recipe.parse(recipe.apply(arms.recipe, changes), str(path))
        )
        chosen, title, given = arms.arms, arms.title, arms.seeds
    else:
        whole = recipe.read(path, changes)
        last = whole.stages[-1].terms
        chosen, title, given = {"as written": {}} if last and not methods else {}, "", [0, 1, 2]
    if methods:
        chosen = {name: chosen.get(name, {"terms": [{"method": name}]}) for name in methods}
    return whole, chosen, given if seeds is None else list(range(seeds)), title


def paired(scores: list[float], control: list[float]) -> dict[str, Any]:
    """Difference to the control, seed by seed: mean, sd, wins, and the two-sided p of a paired t-test.

    p is None with fewer than 3 seeds or when all differences are equal (the test then has no answer).
    """
    gaps = [a - b for a, b in zip(scores, control, strict=True)]
    sd = _sd(gaps)
    p = float(stats.ttest_rel(scores, control).pvalue) if len(gaps) >= 3 and sd else None
    return {
        "mean": statistics.fmean(gaps),
        "sd": sd,
        "wins": sum(g > 0 for g in gaps),
        "of": len(gaps),
        "p": None if p is None or math.isnan(p) else p,
    }


def _sd(values: list[float]) -> float | None:
    """Standard deviation; 0 for values that are equal but for rounding, None for fewer than two."""
    if len(values) < 2:
        return None
    sd = statistics.stdev(values)
    return sd if sd > 1e-9 else 0.0


def verdict(arm: Mapping[str, Any]) -> str:
    """What the difference to the control says, in words a reader may quote."""
    gap = arm["difference"]
    if gap is None:
        return "the control"
    if gap["p"] is None:
        return "too few seeds to say" if gap["of"] < 3 else "cannot be tested"
    if gap["p"] >= 0.05:
        return "no difference shown"
    return "helped" if gap["mean"] > 0 else "hurt"


def _arm(whole: recipe.Recipe, name: str, changes: Mapping[str, Any]) -> recipe.Recipe:
    content = whole.model_dump(mode="json", by_alias=True)
    content["stages"][-1] = {**content["stages"][-1], **changes}
    return recipe.parse(content, f"arm '{name}'")


def _curve(folder: Path, stage: int) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["stage"] == stage]
