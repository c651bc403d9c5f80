"""The life of one run: a recipe, a folder, and whatever it takes to get from one to the other, in as many
sittings as needed.

run.json        what is done, with what, since when        metrics.jsonl   a line per epoch
checkpoint.*    where we are, between two batches          NAME.safetensors, NAME.json   a learner, trained
answers-NAME.*  what NAME said of the test split
result.json     scores, seconds, parameters: there when the run is finished
PID-TIME.lock   which process is writing here: there while it does
"""

import copy
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch

import limbeck
from limbeck import answers, build, checkpoint, recipe
from limbeck.core.batch import View
from limbeck.core.refused import Refused
from limbeck.core.task import Task
from limbeck.data.loader import Loader
from limbeck.engine import Engine, Record, evaluate
from limbeck.pictures import reconstructions
from limbeck.tasks.reconstruct import Reconstruct

_RUN = ("fingerprint", "recipe", "seed", "environment")
_RESULT = ("shipped", "scores", "last", "best", "parameters", "seconds", "stages")
_BOARD = ("cells", "shared", "board.json")
_RESTORE = "restore it from a copy, or remove its folder to start again"


@dataclass(frozen=True)
class Moment:
    """Between two batches: where the run is, and the record of an epoch that just ended."""

    stage: int
    learner: str
    epoch: int
    epochs: int
    done: float
    record: Record | None


class Stopped(Exception):
    """The run was asked to stop, has saved its state and can be resumed."""


class Run:
    """One recipe under one seed in one folder.

    Args:
        after: the folder of a finished run of this recipe's first stages under the same seed; they are taken
            from there.
        every: seconds between checkpoints; 0 saves after every batch.
        rehearsed: somebody has assembled every stage already, so that is not tried again.
        stores: where teachers that keep their answers (`store`) do so; in the run's folder if not said.

    Raises `Refused` when the recipe does not fit its models and data, or the folder belongs to another run;
    nothing is written then.
    """

    def __init__(
        self,
        plan: recipe.Recipe,
        folder: Path,
        *,
        seed: int | None = None,
        device: str = "cpu",
        after: Path | None = None,
        every: float = 60.0,
        rehearsed: bool = False,
        stores: Path | None = None,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Refused(
                f"`limbeck run` was started as {os.environ['WORLD_SIZE']} processes and runs in one; start "
                "it without torchrun."
            )
        stores = stores or folder / "stores"
        self.takes: dict[str, int] = {}
        """Bytes that teachers' answers will take, by what is kept of whom, before a run begins."""
        self.plan, self.folder, self.every, self.device = plan, folder, every, device
        self.seed = plan.seed if seed is None else seed
        self._started = begun(folder, plan, self.seed)
        self.fingerprint = _fingerprint(plan, self.seed)
        self._stop = False
        if self._started is None and not rehearsed:
            self.takes = build.takes(build.rehearse(plan, self.seed, device, stores), [stores])
        self.lab = build.lab(plan, self.seed, device, stores)
        files = self.lab.splits.train.files
        if self._started is not None and self._started.get("data", files) != files:
            raise Refused(
                f"{folder} was begun with other files of data than there are now; put them back, or choose "
                "another folder."
            )
        for n, stage in enumerate(plan.stages):
            if not self.lab.tasks[n].headline and (stage.patience is not None or stage.keep == "best"):
                raise Refused(
                    f"In stage {n}: patience and keep = 'best' compare validation scores, and the task "
                    f"'{plan.task_in(stage).name}' has none; leave them out."
                )
        self.records: list[dict[str, Any]] = []
        self.finals: list[dict[str, Any]] = []  # of the stages that are finished
        self.stage = 0
        self.best: dict[str, Any] | None = None  # epoch of the stage at hand: its number, score and weights
        self._halfway: dict[str, Any] | None = None
        if (folder / "checkpoint.json").exists():
            self._take(checkpoint.load(folder, fingerprint=self.fingerprint))
        elif after is not None:
            first = plan.model_copy(update={"stages": _first_stages(plan, after)})
            self._take(checkpoint.load(after, fingerprint=_fingerprint(first, self.seed)))
            self.records = []

    @property
    def result(self) -> dict[str, Any] | None:
        """Scores, seconds and parameters of a finished run."""
        return result(self.folder)

    def stop(self) -> None:
        """Ask for a stop at the next batch: the state is saved and `Stopped` raised."""
        self._stop = True

    def moments(self) -> Iterator[Moment]:
        """Do what is left to do, yielding between batches. Raises `Refused` when another process is at it."""
        if self.result is not None:
            return
        lock = self._lock()
        try:
            yield from self._moments()
        finally:
            lock.unlink(missing_ok=True)

    def _moments(self) -> Iterator[Moment]:
        if self._started is None:
            self._write("run.json", self._about())
        self._write_metrics()
        saved = time.monotonic()
        while self.stage < len(self.plan.stages):
            engine = self.lab.engine(self.stage)
            if self._halfway is not None:
                engine.load_state_dict(self._halfway)
                self._halfway = None
            lessons = engine.lessons()
            while not self._over(engine):
                record = next(lessons)
                if record is not None:
                    record.scores = self._scores(engine, "valid")
                    self._compare(engine, record)
                    self.records.append(record.as_dict())
                    self._write_metrics()
                yield self._moment(engine, record)
                if self._stop or time.monotonic() - saved >= self.every:
                    self._save(engine)
                    saved = time.monotonic()
                if self._stop:
                    raise Stopped(
                        f"Stopped in stage {self.stage} after step {engine.step}; go on with: limbeck "
                        f"resume {self.folder}"
                    )
            self._end_stage(engine)
            self.stage += 1
            self._save(None)
        # Last: whoever finds a result also finds the weights and the checkpoint it speaks of.
        shipped = f"{self.finals[-1]['learner']}.safetensors"
        self._write("result.json", {"shipped": shipped, **self.finals[-1], "stages": self.finals})

    # --- the best epoch ---

    def _compare(self, engine: Engine, record: Record) -> None:
        """Keep the weights of what ships if its validation score is the best so far, the first of equals."""
        score = record.scores.get(self.lab.tasks[self.stage].headline, math.nan)
        if score > (-math.inf if self.best is None else self.best["score"]):
            weights = copy.deepcopy(engine.scheme.ships().state_dict())
            self.best = {"epoch": record.epoch, "score": score, "weights": weights}

    def _over(self, engine: Engine) -> bool:
        """Whether the stage took its last step, or waited for a better score as long as its patience."""
        patience = self.plan.stages[self.stage].patience
        if patience is None or self.best is None:
            return engine.done
        return engine.done or engine.step // engine.loader.steps - 1 - self.best["epoch"] >= patience

    # --- state ---

    def _save(self, engine: Engine | None) -> None:
        if engine is not None:
            engine.refuse_diverged()
        trained = {name for stage in self.plan.stages[: self.stage] for name in stage.learners}
        state = {
            "stage": self.stage,
            "models": {name: self.lab.models[name].state_dict() for name in sorted(trained)},
            "engine": None if engine is None else engine.state_dict(),
            "best": self.best,
            "records": self.records,
            "finals": self.finals,
            "hints": self.lab.hints,
        }
        checkpoint.save(self.folder, state, fingerprint=self.fingerprint)

    def _take(self, state: dict[str, Any]) -> None:
        self.stage, self.best, self._halfway = state["stage"], state["best"], state["engine"]
        self.records, self.finals = list(state["records"]), list(state["finals"])
        self.lab.hints.update(state.get("hints", {}))
        for stage in self.plan.stages[: self.stage]:
            # In order: what was made from another is made again from its trained weights, then gets its own.
            for name, net in self.lab.learners(stage).items():
                net.load_state_dict(state["models"][name])

    def _end_stage(self, engine: Engine) -> None:
        """Score the last and the best epoch, the test split too, each this once, and take and write the one
        that the stage keeps."""
        stage, shipped = self.plan.stages[self.stage], engine.scheme.ships()
        last = (engine.step // engine.loader.steps - 1, copy.deepcopy(shipped.state_dict()))
        best = last if self.best is None else (self.best["epoch"], self.best["weights"])
        scores, heard = {}, {}
        for epoch, weights in dict((last, best)).items():
            shipped.load_state_dict(weights)
            kept = answers.Kept(self.lab.tasks[self.stage])
            scores[epoch] = self._all_scores(engine, kept)
            heard[epoch] = kept.answers()
        epoch, weights = best if stage.keep == "best" else last
        shipped.load_state_dict(weights)
        learner = self.lab.model(stage.learns)
        if learner is not shipped and learner.state_dict().keys() == weights.keys():
            learner.load_state_dict(weights)  # its running mean shipped: a later stage goes on from that
        final = {
            "learner": stage.learns,
            "scores": scores[epoch],
            "last": {"epoch": last[0], "scores": scores[last[0]]},
            "best": {"epoch": best[0], "scores": scores[best[0]]},
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "seconds": sum(r["seconds"] for r in self.records if r["stage"] == self.stage),
            "asking": sum(r["asking"] for r in self.records if r["stage"] == self.stage),
            "learned": engine.scheme.how(),
            "teachers": list(dict.fromkeys(teacher.how() for teacher in engine.scheme.teachers())),
        }
        hints = {place: taps for place, taps in self.lab.hints.items() if place.startswith(f"{self.stage}.")}
        if hints:
            final["hints"] = hints
        self.finals.append(final)
        self.best = None
        place = answers.place(self.folder, stage.learns)
        answers.write(place, heard[epoch], {**final, "seed": self.seed})
        file = self.folder / f"{stage.learns}.safetensors"
        checkpoint.save_weights(file, shipped.state_dict(), {**final, **self._about()})
        if isinstance(task := self.lab.tasks[self.stage], Reconstruct):  # for a page, not beside the weights
            final["pictures"] = reconstructions(shipped, task, self.lab.splits.test)

    def _all_scores(self, engine: Engine, kept: Task) -> dict[str, float]:
        """Of every part of the data but the one that was learned from, and of the test split under further
        conditions; `kept` is the task that keeps the answers to the test split."""
        parts = {"valid": self._scores(engine, "valid"), "test": self._scores(engine, "test", kept)}
        if self.lab.splits.unseen is not None:
            parts["unseen"] = self._scores(engine, "unseen")
        for name in self.plan.tests:
            parts[name] = self._scores(engine, "test", view=self.lab.test_view(name))
        return {f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()}

    def _scores(
        self, engine: Engine, split: str, task: Task | None = None, view: View | None = None
    ) -> dict[str, float]:
        loader = Loader(getattr(self.lab.splits, split), 256, seed=self.seed)
        return evaluate(
            engine.scheme.ships(),
            task or self.lab.tasks[self.stage],
            loader.once(256),
            taps=self._taps(),
            view=view,
            device=self.lab.device,
        )

    def _taps(self) -> dict[str, str] | None:
        spec = self.plan.models.get(self.plan.stages[min(self.stage, len(self.plan.stages) - 1)].learns)
        return spec.taps if isinstance(spec, recipe.Net) else None

    def _moment(self, engine: Engine, record: Record | None) -> Moment:
        stage = self.plan.stages[self.stage]
        total = engine.epochs * engine.loader.steps
        return Moment(
            self.stage,
            stage.learns,
            max(engine.step - 1, 0) // engine.loader.steps,
            stage.epochs,
            engine.step / total,
            record,
        )

    # --- files ---

    def _lock(self) -> Path:
        """Say that this process writes here, unless another does. What a killed process left is removed."""
        mine = self.folder / f"{_process(os.getpid())}.lock"
        checkpoint.write_atomic(mine, b"")
        for other in sorted(self.folder.glob("*.lock")):
            found = re.fullmatch(r"(\d+)-\d+", other.stem)
            if found is None or other == mine:
                continue
            if _process(int(found[1])) == other.stem:
                mine.unlink()
                raise Refused(
                    f"{self.folder} is being written by process {found[1]}; wait for it, stop it, or choose "
                    "another folder."
                )
            other.unlink(missing_ok=True)
        return mine

    def _about(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "recipe": self.plan.model_dump(mode="json", by_alias=True),
            "files": _files(self.plan),
            "data": self.lab.splits.train.files,
            "environment": environment(self.device),
        }

    def _write(self, name: str, content: dict[str, Any]) -> None:
        checkpoint.write_atomic(self.folder / name, json.dumps(content, indent=1).encode())

    def _write_metrics(self) -> None:
        checkpoint.write_atomic(
            self.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.records).encode()
        )


def _process(pid: int) -> str | None:
    """A living process by a name that no later process of the same number has; None when it is dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, and is somebody else's
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return f"{pid}-0"  # this system does not tell when a process began
    return None if state in "ZX" else f"{pid}-{facts[18]}"


def resume(folder: Path, *, device: str = "cpu", every: float = 60.0) -> Run:
    """The run that a folder holds, where it stopped. Raises `Refused` when there is none."""
    _refuse_file(folder)
    started = read(folder / "run.json", *_RUN)
    if started is None:
        raise Refused(
            f"{folder} holds no run (it has no run.json); give the folder of a run that was started, for "
            "example runs/NAME."
        )
    plan = recipe.parse(started["recipe"], str(folder / "run.json"))
    return Run(plan, folder, seed=started["seed"], device=device, every=every)


def begun(folder: Path, plan: recipe.Recipe, seed: int) -> dict[str, Any] | None:
    """What `run.json` says of this very run; None where it has not begun. Raises `Refused` when the folder is
    somebody else's: of another recipe, of a board, or no folder."""
    _refuse_file(folder)
    if any((folder / name).exists() for name in _BOARD):
        raise Refused(f"{folder} holds a board, whose runs have folders of their own; choose another folder.")
    started = read(folder / "run.json", *_RUN)
    if started is not None and started["fingerprint"] != _fingerprint(plan, seed):
        raise Refused(_other_run(folder, started, plan, seed))
    return started


def result(folder: Path) -> dict[str, Any] | None:
    """Scores, seconds and parameters of the run in a folder; None when it is not finished."""
    return read(folder / "result.json", *_RESULT)


def records(folder: Path, stage: int) -> list[dict[str, Any]]:
    """What was noted of every epoch of a run's stage. Raises `Refused` when that cannot be read."""
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["stage"] == stage]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({error}); {_RESTORE}.") from None


def environment(device: str) -> dict[str, Any]:
    """What a number depends on besides the recipe."""
    return {
        "limbeck": limbeck.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **({} if (commit := _commit()) is None else {"commit": commit}),
    }


@cache
def _commit() -> str | None:
    """The commit this limbeck was imported from, where it is a git checkout of its own."""
    root = Path(limbeck.__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root.resolve():
            return None  # installed somewhere below another project
        changed = git("status", "--porcelain", "--", "limbeck")
        return git("rev-parse", "HEAD") + (", with changes since" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _fingerprint(plan: recipe.Recipe, seed: int) -> str:
    """Of all that the run begins with: the recipe, and the files that it names by their paths only."""
    files = _files(plan)
    content = plan.model_copy(update={"seed": seed}).as_json() + (json.dumps(files) if files else "")
    return sha256(content.encode()).hexdigest()


def _files(plan: recipe.Recipe) -> dict[str, str]:
    """sha256 of the weights, or of the store's note, of each model that has them from a file."""
    paths = {}
    for name, spec in sorted(plan.models.items()):
        if isinstance(spec, recipe.Net) and spec.weights is not None:
            paths[name] = build.file(spec.weights)
        elif isinstance(spec, recipe.Kept):
            paths[name] = build.file(spec.stored) / "store.json"
    return {name: _sha256(name, path) for name, path in paths.items()}


def _sha256(name: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(
            f"Model '{name}': {path} cannot be read ({error.strerror}); correct the path in models.{name}."
        ) from None


def _first_stages(plan: recipe.Recipe, after: Path) -> list[recipe.Stage]:
    started = read(after / "run.json", *_RUN)
    if started is None:
        raise Refused(f"{after} holds no run to go on from (it has no run.json).")
    return plan.stages[: len(started["recipe"]["stages"])]


def read(path: Path, *keys: str) -> dict[str, Any] | None:
    """A JSON file of ours, None when it is not there. Raises `Refused` when it is damaged or lacks a key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}); {_RESTORE}.") from None
    lacks = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacks or not isinstance(content, dict):
        raise Refused(f"{path} is not as it was written: it lacks {', '.join(lacks)}; {_RESTORE}.")
    return content


def _refuse_file(folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise Refused(f"{there} is a file, expected a folder for a run; choose another place.")


def _other_run(folder: Path, started: dict[str, Any], plan: recipe.Recipe, seed: int) -> str:
    mine = {"seed": seed, "recipe": plan.model_dump(mode="json", by_alias=True)}
    differences = _differences({"seed": started["seed"], "recipe": started["recipe"]}, mine)
    for where, found, wanted in differences:
        return (
            f"{folder} holds a run of another recipe: {where} is {found!r} there and {wanted!r} here; choose "
            "another folder, or resume that run as it is."
        )
    noted = started.get("files") or {}
    for name, digest in _files(plan).items():
        if noted.get(name) != digest:
            return (
                f"{folder} holds a run of this recipe, and the weights of '{name}' have changed since; "
                "choose another folder, or put back the file it began with."
            )
    return f"{folder / 'run.json'} is not as it was written; {_RESTORE}."


def _differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ, deepest place first."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from _differences(a.get(key), b.get(key), f"{where}.{key}".strip("."))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(x, y, f"{where}.{n}")
    elif a != b:
        yield where, a, b
