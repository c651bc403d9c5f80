"""The fair board: arms that differ in nothing but what is said, over seeds, against an honest control.

Arms share data, label budget, initial weights and order of batches; whatever comes before the stage that
they change (training the teacher) is done once a seed and used by all. Every cell is a run of its own, so a
stopped board goes on where it was.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import Field
from scipy import stats

from limbeck import answers, build, checkpoint, recipe
from limbeck import run as runs
from limbeck.core.refused import Refused
from limbeck.data.keeping import Keeping
from limbeck.data.loader import Loader
from limbeck.engine import Diverged
from limbeck.run import Moment, Run, Stopped

CONTROL = "control"


class Arms(recipe.Strict):
    """A board as data: a recipe, seeds, and for each arm what one stage does differently (`skip = true`: it
    is left out), or the file whose arms are taken. `control` (no terms) is always there.

    changes: which stage that is, by its number; the last if not said. What follows it is the same for all.
    """

    recipe: str | dict[str, Any]
    changes: int | None = Field(None, ge=0)
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    arms: dict[str, dict[str, Any]] | str
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of the board: an arm (None: what all arms share) under a seed."""

    arm: str | None
    seed: int
    number: int
    cells: int


class Board:
    """Raises `Refused` at construction when any arm does not fit, or the folder holds something else; nothing
    is written then."""

    def __init__(
        self,
        whole: recipe.Recipe,
        arms: Mapping[str, Mapping[str, Any]],
        seeds: list[int],
        folder: Path,
        *,
        changes: int | None = None,
        title: str = "",
        device: str = "cpu",
    ) -> None:
        self.folder, self.seeds, self.device = folder, seeds, device
        self.begin = len(whole.stages) - 1 if changes is None else changes
        if self.begin >= len(whole.stages):
            raise Refused(
                f"`changes` says that the arms change stage {changes}, and the recipe has stages 0 to "
                f"{len(whole.stages) - 1}."
            )
        self.title = title or folder.name
        if CONTROL in arms:
            raise Refused(
                f"An arm is called '{CONTROL}', which is the recipe without a teacher and always there; "
                "call it something else."
            )
        if "" in arms:
            raise Refused("An arm is called '', and its cells need a folder; give it a name.")
        self.changes = {CONTROL: _alone(whole.stages[self.begin]), **arms}
        self.plans = {name: _arm(whole, self.begin, name, said) for name, said in self.changes.items()}
        if len(set(seeds)) < len(seeds):
            raise Refused(f"The seeds {seeds} repeat; give each once.")
        self.headline = build.headline(whole, whole.stages[-1])
        if not self.headline:
            raise Refused(
                f"A board compares scores, and the task '{whole.task_in(whole.stages[-1]).name}' has none; "
                "choose a task that scores, or run the recipe alone: limbeck run."
            )
        self.whole = whole
        self._refuse_others()
        self._stop = False
        self._run: Run | None = None
        keeping: list[Keeping] = []
        for name, plan in self.plans.items():
            try:
                keeping += build.rehearse(plan, seeds[0], device, self.folder / "stores")
            except Refused as error:
                raise Refused(f"Arm '{name}': {error}") from error.__cause__
        self.takes = build.takes(keeping, [self.folder / "stores" / str(seed) for seed in seeds])
        """Bytes that teachers' answers will take, by what is kept of whom, all seeds together."""

    def _refuse_others(self) -> None:
        """A cell of another recipe, or of weights that have changed, is not to be found after hours."""
        if (self.folder / "run.json").exists():
            raise Refused(f"{self.folder} holds a run, and a board has a folder of its own; choose another.")
        for cell in self.cells():
            runs.begun(self.cell_folder(cell.arm, cell.seed), self._plan(cell), cell.seed)

    def stop(self) -> None:
        """Ask for a stop at the next batch; `Stopped` is raised and the board can be started again."""
        self._stop = True
        if self._run is not None:
            self._run.stop()

    def cells(self) -> list[Cell]:
        arms: list[str | None] = [None] if self.begin else []
        arms += list(self.plans)
        every = [(seed, arm) for seed in self.seeds for arm in arms]
        return [Cell(arm, seed, n, len(every)) for n, (seed, arm) in enumerate(every)]

    def moments(self) -> Iterator[tuple[Cell, Moment | None]]:
        """Compute what is missing, yielding between batches, and (cell, None) when a cell is finished."""
        for cell in self.cells():
            if self.diverged(cell) is not None:
                yield cell, None
                continue
            began = time.perf_counter(), time.process_time()
            run = self._run = self._cell_run(cell)
            if self._stop:
                run.stop()
            try:
                for moment in run.moments():
                    yield cell, moment
                self._ask_teacher(cell, run)
            except Diverged as error:
                self._set_aside(cell, error)
            except Stopped:
                where = f"in arm '{cell.arm}'" if cell.arm else "before the arms"
                raise Stopped(f"Stopped {where}, seed {cell.seed}; the same command goes on.") from None
            finally:
                self._add_cost(time.perf_counter() - began[0], time.process_time() - began[1])
            yield cell, None

    def scores(self, cell: Cell) -> dict[str, float]:
        """The final scores of a finished cell; none of one that diverged."""
        return {} if self.diverged(cell) else self._finished(self.cell_folder(cell.arm, cell.seed))["scores"]

    def diverged(self, cell: Cell) -> str | None:
        """Why an arm came to no end under this seed, in a sentence; None when it did, or may yet."""
        said = runs.read(self.cell_folder(cell.arm, cell.seed) / "diverged.json", "why")
        return None if said is None else said["why"]

    def _set_aside(self, cell: Cell, error: Diverged) -> None:
        """An arm that diverges is a finding, and the others go on. Without a control there is no board."""
        if cell.arm in (None, CONTROL):
            who = "The control" if cell.arm else "What comes before the arms"
            raise Refused(f"{who} diverged under seed {cell.seed}: {error}") from error
        path = self.cell_folder(cell.arm, cell.seed) / "diverged.json"
        checkpoint.write_atomic(path, json.dumps({"why": str(error)}).encode())

    def _cell_run(self, cell: Cell) -> Run:
        builds = cell.arm is not None and self.begin
        return Run(
            self._plan(cell),
            self.cell_folder(cell.arm, cell.seed),
            seed=cell.seed,
            device=self.device,
            after=self.cell_folder(None, cell.seed) if builds else None,
            stores=self.folder / "stores" / str(cell.seed),
            rehearsed=True,  # all arms were, before the first
        )

    def _plan(self, cell: Cell) -> recipe.Recipe:
        if cell.arm is None:
            return self.whole.model_copy(update={"stages": self.whole.stages[: self.begin]})
        return self.plans[cell.arm]

    def cell_folder(self, arm: str | None, seed: int) -> Path:
        """Where a cell's run lies."""
        if arm is None:
            return self.folder / "shared" / str(seed)
        return self.folder / "cells" / quote(arm, safe=" ") / str(seed)

    def _finished(self, folder: Path) -> dict[str, Any]:
        result = runs.result(folder)
        if result is None:
            raise Refused(f"{folder} holds no finished run; compute the board first.")
        return result

    def _add_cost(self, wall: float, cpu: float) -> None:
        """Seconds of all sittings so far; a finished board that is only looked at again adds next to none."""
        before = self._cost() or {"wall": 0.0, "cpu": 0.0}
        total = {"wall": before["wall"] + wall, "cpu": before["cpu"] + cpu}
        checkpoint.write_atomic(self.folder / "cost.json", json.dumps(total).encode())

    def _cost(self) -> dict[str, float] | None:
        """None where it was not kept or is damaged: that is no reason to lose the board."""
        try:
            return runs.read(self.folder / "cost.json", "wall", "cpu")
        except Refused:
            return None

    def said(self) -> dict[str, Any]:
        """What the board compares, as plain data, before anything is computed."""
        return {
            "title": self.title,
            "seeds": self.seeds,
            "control": CONTROL,
            "begin": self.begin,
            "recipe": self.whole.model_dump(mode="json", by_alias=True),
            "arms": [{"name": name, "changes": dict(changes)} for name, changes in self.changes.items()],
            "diverged": [],
        }

    def result(self) -> dict[str, Any]:
        """The finished board as plain data; also written to `board.json`."""
        metric = f"test.{self.headline}"
        rows, control = [], None
        for name, plan in self.ended.items():
            folders = [self.cell_folder(name, seed) for seed in self.seeds]
            results = [self._finished(folder) for folder in folders]
            scores = [r["scores"][metric] for r in results]
            # The stage that arms change, where this one has it.
            ends = [] if self._skips(plan) else [r["stages"][self.begin] for r in results]
            control = scores if name == CONTROL else control
            assert control is not None
            rows.append(
                {
                    "name": name,
                    "changes": dict(self.changes[name]),
                    "scores": scores,
                    "all": [r["scores"] for r in results],
                    "mean": statistics.fmean(scores),
                    "sd": _sd(scores),
                    "difference": None if name == CONTROL else paired(scores, control),
                    "last": _at("last", results, metric),
                    "best": _at("best", results, metric),
                    "seconds": statistics.fmean(_sum("seconds", r, self.begin) for r in results),
                    "asking": statistics.fmean(_sum("asking", r, self.begin) for r in results),
                    "how": ends[0]["teachers"] if ends else [],
                    "learned": ends[0].get("learned", []) if ends else [],
                    "parameters": results[0]["parameters"],
                    "hints": [end.get("hints") for end in ends],
                    "pictures": ends[0].get("pictures", []) if ends else [],
                    "stages": self._stages(plan, results),
                    "curves": [
                        _curve(folder, self.begin, end) for folder, end in zip(folders, ends, strict=False)
                    ],
                }
            )
        board = {
            "title": self.title,
            "data": self.whole.data.name,
            "metric": metric,
            "seeds": self.seeds,
            "control": CONTROL,
            "begin": self.begin,
            "curve": build.headline(self.whole, self.whole.stages[self.begin]),
            "arms": rows,
            "diverged": self._lost(),
            "teachers": self._teachers(metric),
            "answers": self._answers(metric.replace("test", "valid", 1)),
            "recipe": self.whole.model_dump(mode="json", by_alias=True),
            "environment": self._environments(),
            "cost": self._cost(),
        }
        checkpoint.write_atomic(self.folder / "board.json", json.dumps(board, indent=1).encode())
        return board

    @property
    def ended(self) -> dict[str, recipe.Recipe]:
        """The arms that came to an end under every seed. The mean of those seeds that survived would flatter
        the others."""
        return {name: plan for name, plan in self.plans.items() if not self._whys(name)}

    def _whys(self, arm: str) -> dict[int, str]:
        whys = {seed: self.diverged(Cell(arm, seed, 0, 0)) for seed in self.seeds}
        return {seed: why for seed, why in whys.items() if why is not None}

    def _lost(self) -> list[dict[str, Any]]:
        """The arms that diverged: under which seeds, and how it is said of the first."""
        lost = {name: self._whys(name) for name in self.plans}
        return [
            {
                "name": name,
                "changes": dict(self.changes[name]),
                "seeds": list(whys),
                "why": next(iter(whys.values())),
            }
            for name, whys in lost.items()
            if whys
        ]

    def _environments(self) -> dict[str, Any]:
        """What the cells were computed with. Where they differ, all there is: a board may have been begun
        elsewhere, or before an update."""
        folders = [self.cell_folder(name, seed) for seed in self.seeds for name in self.plans]
        each = [(runs.read(folder / "run.json", "environment") or {})["environment"] for folder in folders]
        found = {key: [one.get(key) for one in each] for key in each[0]}
        return {
            key: values[0] if len(set(values)) == 1 else ", ".join(dict.fromkeys(map(str, values)))
            for key, values in found.items()
        }

    # --- answers to the test split ---

    @property
    def _teacher(self) -> str | None:
        """The one that everybody's answers are compared with: the first that teaches an arm and stays as it
        is. Running means and peers move while they teach, and a store knows what it was asked."""
        if self.begin < len(self.whole.stages) - 1:
            return None  # it teaches something else than what is scored in the end
        for plan in self.plans.values():
            stage = plan.stages[-1]
            for name in (name for use in stage.terms for name in use.teachers):
                inside = {name, *plan.within(name)}
                kinds = [plan.models.get(one) for one in inside]
                moves = any(isinstance(kind, recipe.Mean | recipe.Kept) for kind in kinds)
                if not moves and not inside & set(stage.learners):
                    return name
        return None

    def _ask_teacher(self, cell: Cell, run: Run) -> None:
        """Once a seed, what a teacher says of the test split that was not trained, and so scored, here."""
        name = self._teacher
        if cell.arm is None or name is None:
            return
        terms = self.plans[cell.arm].stages[-1].terms
        path = answers.place(self.cell_folder(None, cell.seed), name)
        if path.exists() or all(name not in use.teachers for use in terms):
            return
        teacher, task = run.lab.teacher(name), answers.Kept(run.lab.tasks[-1])
        batches = Loader(run.lab.splits.test, 256, seed=cell.seed).once(256)
        task.score((teacher(batch), batch) for batch in (one.to(run.lab.device) for one in batches))
        answers.write(path, task.answers(), {"learner": name, "seed": cell.seed})

    def _answers(self, metric: str) -> dict[str, Any] | None:
        """What the arms' answers say beyond their score; None where a cell kept none. `metric` chooses the
        arm whose samples are shown: on the validation split."""
        ended = self.ended
        learner = {name: plan.stages[-1].learns for name, plan in ended.items()}

        def kept(arm: str | None, name: str) -> list[answers.Answers]:
            places = [answers.place(self.cell_folder(arm, seed), name) for seed in self.seeds]
            found = [one for one in map(answers.read, places) if one is not None]
            return found if len(found) == len(places) else []

        def alike(some: Sequence[answers.Answers], others: Sequence[answers.Answers]) -> bool:
            return len(some) == len(others) and all(
                a.z.shape == b.z.shape and a.y.equal(b.y) for a, b in zip(some, others, strict=True)
            )

        control = kept(CONTROL, learner[CONTROL])
        if not control:
            return None
        taught = kept(None, self._teacher) if self._teacher else []
        taught = taught if alike(control, taught) else []
        arms, best = {}, ("", -math.inf, control)
        for name, plan in ended.items():
            mine = kept(name, learner[name])
            if not alike(control, mine):
                return None
            arms[name] = answers.told(mine, control, taught)
            folders = (self.cell_folder(name, seed) for seed in self.seeds)
            chosen_on = statistics.fmean(self._finished(folder)["scores"][metric] for folder in folders)
            if name != CONTROL and self._terms(plan) and chosen_on > best[1]:
                best = (name, chosen_on, mine)
        data = build.splits(self.whole.data).test
        rows = {k: int((control[0].y == k).sum()) for k in range(control[0].z.shape[1])}
        return {
            "classes": [data.classes[k] if k < len(data.classes) else f"class {k}" for k in rows],
            "rows": list(rows.values()),
            "teacher": self._teacher if taught else None,
            "taught": answers.told(taught, taught, taught) if taught else None,
            "arms": arms,
            "shown": best[0] or None,
            "samples": answers.samples(best[2], control, taught, data) if best[0] else None,
        }

    def _terms(self, plan: recipe.Recipe) -> list[recipe.Use]:
        """What teaches in the stage that arms change; nothing in an arm that leaves it out."""
        return [] if self._skips(plan) else plan.stages[self.begin].terms

    def _skips(self, plan: recipe.Recipe) -> bool:
        return len(plan.stages) < len(self.whole.stages)

    def _stages(self, plan: recipe.Recipe, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """How each stage from the one that arms change to the one before the last ended."""
        rows = []
        for number, stage in enumerate(plan.stages[self.begin : -1], self.begin):
            if headline := build.headline(plan, stage):
                scores = [result["stages"][number]["scores"][f"test.{headline}"] for result in results]
                row = {"name": stage.learns, "metric": f"test.{headline}", "scores": scores}
                rows.append({**row, "mean": statistics.fmean(scores), "sd": _sd(scores)})
        return rows

    def _teachers(self, metric: str) -> list[dict[str, Any]]:
        """What the arms learned from, where the stages before theirs trained it."""
        taught = {t for plan in self.plans.values() for use in self._terms(plan) for t in use.teachers}
        results = [self._finished(self.cell_folder(CONTROL, seed)) for seed in self.seeds]
        rows = []
        for stage, plan in enumerate(self.whole.stages[: self.begin]):
            if plan.learns in taught and build.headline(self.whole, plan) == self.headline:
                finals = [result["stages"][stage] for result in results]
                scores = [final["scores"][metric] for final in finals]
                row = {"name": plan.learns, "scores": scores, "parameters": finals[0]["parameters"]}
                rows.append({**row, "mean": statistics.fmean(scores), "sd": _sd(scores)})
        return rows


def read(
    path: Path, changes: tuple[str, ...] = (), methods: tuple[str, ...] = (), seeds: int | None = None
) -> tuple[recipe.Recipe, dict[str, dict[str, Any]], list[int], dict[str, Any]]:
    """A board from a board file, or from a recipe and the names of methods to put in place of its last
    stage's: with their default weight and knobs, unless the board has an arm of that name. Last, `Board`'s
    keywords `title` and `changes`."""
    content, begin = recipe.read_toml(path), None
    if "arms" in content:
        arms: Arms = recipe.checked(Arms, content, str(path))
        whole = (
            recipe.read(path.parent / arms.recipe, changes)
            if isinstance(arms.recipe, str)
            else recipe.parse(recipe.apply(arms.recipe, changes), str(path))
        )
        chosen, title, given, begin = _listed(arms.arms, path), arms.title, arms.seeds, arms.changes
    else:
        whole = recipe.read(path, changes)
        last = whole.stages[-1].terms
        chosen, title, given = {"as written": {}} if last and not methods else {}, "", [0, 1, 2]
    if methods:
        chosen = {name: chosen.get(name, {"terms": [{"method": name}]}) for name in methods}
    how = {"title": title, "changes": begin}
    return whole, chosen, given if seeds is None else list(range(seeds)), how


def _listed(arms: dict[str, dict[str, Any]] | str, board: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(arms, str):
        return arms
    path = board.parent / arms
    found = recipe.read_toml(path).get("arms")
    return recipe.checked(dict[str, dict[str, Any]], found, f"{path}, [arms]")


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


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p corrected for the number of tests (Holm 1979), in the order given. A test that could not be made
    (None) is none."""
    order = sorted((p, n) for n, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    highest = 0.0
    for done, (p, n) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - done) * p))
        corrected[n] = highest
    return corrected


def _at(which: str, results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The scores at the last epoch, or at the best on the validation split; a run keeps either."""
    scores = [result[which]["scores"][metric] for result in results]
    epochs = [result[which]["epoch"] for result in results]
    return {"scores": scores, "epochs": epochs, "mean": statistics.fmean(scores), "sd": _sd(scores)}


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


def _alone(stage: recipe.Stage) -> dict[str, Any]:
    """What makes a stage plain training of its first learner: the control."""
    changes: dict[str, Any] = {"terms": []}
    if stage.scheme.name != "offline":
        changes["scheme"] = "offline"
    if len(stage.learners) > 1:
        changes["learner"] = stage.learns
    if stage.ships is not None:
        changes["ships"] = None
    if stage.task_weight != 1:
        changes["task_weight"] = 1.0  # how the task is weighed against the terms says nothing without them
    if stage.optim.keys() - {"student"}:
        own = stage.optim.get("student")
        changes["optim"] = {} if own is None else {"student": own.model_dump()}
    return changes


def _arm(whole: recipe.Recipe, begin: int, name: str, changes: Mapping[str, Any]) -> recipe.Recipe:
    content = whole.model_dump(mode="json", by_alias=True)
    if changes == {"skip": True} and begin < len(whole.stages) - 1:
        del content["stages"][begin]
        return recipe.parse(content, f"arm '{name}'")
    content["stages"][begin] = {**content["stages"][begin], **changes}
    arm = recipe.parse(content, f"arm '{name}'")
    mine, theirs = arm.stages[begin].learns, whole.stages[begin].learns
    if mine != theirs:
        raise Refused(
            f"In arm '{name}': '{mine}' learns first and ships, and in the control '{theirs}' does, so their "
            f"difference would be that of two networks; begin `learner` with '{theirs}', or write another "
            "board."
        )
    return arm


def _sum(of: str, result: Mapping[str, Any], begin: int) -> float:
    """Over the stage that arms change and what follows it."""
    return sum(final[of] for final in result["stages"][begin:])


def _curve(folder: Path, stage: int, end: Mapping[str, Any]) -> list[dict[str, Any]]:
    noted = runs.records(folder, stage)
    epochs = end["last"]["epoch"] + 1
    if len(noted) != epochs:
        raise Refused(
            f"{folder / 'metrics.jsonl'} tells of {len(noted)} epochs, expected the {epochs} of the run; "
            "restore it from a copy, or remove its folder to start again."
        )
    return noted
