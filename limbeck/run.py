"""The life of one run: a recipe, a folder, and whatever it takes to get from one to the other, in as many
sittings as needed.

run.json        what is done, with what, since when        metrics.jsonl   a line per epoch
checkpoint.*    where we are, between two batches          NAME.safetensors, NAME.json   what ships
result.json     scores, seconds, parameters: there when the run is finished
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import limbeck
from limbeck import build, checkpoint, recipe
from limbeck.core.refused import Refused
from limbeck.data.loader import Loader
from limbeck.engine import Engine, Record, evaluate

_RUN = ("fingerprint", "recipe", "seed")
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
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise Refused(
                f"`limbeck run` was started as {os.environ['WORLD_SIZE']} processes and runs in one; start "
                "it without torchrun."
            )
        self.plan, self.folder, self.every, self.device = plan, folder, every, device
        self.seed = plan.seed if seed is None else seed
        self.fingerprint = _fingerprint(plan, self.seed)
        self._stop = False
        self._started = _read(folder / "run.json", *_RUN)
        if self._started is not None and self._started["fingerprint"] != self.fingerprint:
            raise Refused(_other_run(folder, self._started, plan, self.seed))
        if self._started is None:
            build.rehearse(plan, self.seed, device)
        self.lab = build.lab(plan, self.seed, device)
        self.records: list[dict[str, Any]] = []
        self.finals: list[dict[str, Any]] = []  # of the stages that are finished
        self.stage = 0
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
        return _read(self.folder / "result.json")

    def stop(self) -> None:
        """Ask for a stop at the next batch: the state is saved and `Stopped` raised."""
        self._stop = True

    def moments(self) -> Iterator[Moment]:
        """Do what is left to do, yielding between batches."""
        if self.result is not None:
            return
        if self._started is None:
            self._write("run.json", self._about())
        self._write_metrics()
        saved = time.monotonic()
        while self.stage < len(self.plan.stages):
            engine = self.lab.engine(self.stage)
            if self._halfway is not None:
                engine.load_state_dict(self._halfway)
                self._halfway = None
            for record in engine.lessons():
                if record is not None:
                    record.scores = self._scores(engine, "valid")
                    self.records.append(record.as_dict())
                    self._write_metrics()
                yield self._moment(engine, record)
                if self._stop or time.monotonic() - saved >= self.every:
                    engine.refuse_diverged()
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

    # --- state ---

    def _save(self, engine: Engine | None) -> None:
        trained = {stage.learns for stage in self.plan.stages[: self.stage]}
        state = {
            "stage": self.stage,
            "models": {name: self.lab.models[name].state_dict() for name in sorted(trained)},
            "engine": None if engine is None else engine.state_dict(),
            "records": self.records,
            "finals": self.finals,
        }
        checkpoint.save(self.folder, state, fingerprint=self.fingerprint)

    def _take(self, state: dict[str, Any]) -> None:
        self.stage, self._halfway = state["stage"], state["engine"]
        self.records, self.finals = list(state["records"]), list(state["finals"])
        for stage in self.plan.stages[: self.stage]:
            # In order: what was made from another is made again from its trained weights, then gets its own.
            self.lab.learner(stage).load_state_dict(state["models"][stage.learns])

    def _end_stage(self, engine: Engine) -> None:
        """Score what the stage ships, the test split too, this once; the last stage's is also written."""
        shipped, learner = engine.scheme.shipped(), self.plan.stages[self.stage].learns
        final = {
            "learner": learner,
            "scores": {
                f"{split}.{name}": value
                for split in ("valid", "test")
                for name, value in self._scores(engine, split).items()
            },
            "parameters": sum(p.numel() for p in shipped.parameters()),
            "seconds": sum(r["seconds"] for r in self.records if r["stage"] == self.stage),
        }
        self.finals.append(final)
        if self.stage + 1 == len(self.plan.stages):
            file = self.folder / f"{learner}.safetensors"
            checkpoint.save_weights(file, shipped.state_dict(), {**final, **self._about()})

    def _scores(self, engine: Engine, split: str) -> dict[str, float]:
        loader = Loader(getattr(self.lab.splits, split), 256, seed=self.seed)
        return evaluate(
            engine.scheme.shipped(),
            self.lab.task,
            loader.once(256),
            taps=self._taps(),
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

    def _about(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "recipe": self.plan.model_dump(mode="json", by_alias=True),
            "environment": environment(self.device),
        }

    def _write(self, name: str, content: dict[str, Any]) -> None:
        checkpoint.write_atomic(self.folder / name, json.dumps(content, indent=1).encode())

    def _write_metrics(self) -> None:
        checkpoint.write_atomic(
            self.folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in self.records).encode()
        )


def resume(folder: Path, *, device: str = "cpu", every: float = 60.0) -> Run:
    """The run that a folder holds, where it stopped. Raises `Refused` when there is none."""
    started = _read(folder / "run.json", *_RUN)
    if started is None:
        raise Refused(
            f"{folder} holds no run (it has no run.json); give the folder of a run that was started, for "
            "example runs/NAME."
        )
    plan = recipe.parse(started["recipe"], str(folder / "run.json"))
    return Run(plan, folder, seed=started["seed"], device=device, every=every)


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
    }


def _fingerprint(plan: recipe.Recipe, seed: int) -> str:
    return sha256(plan.model_copy(update={"seed": seed}).as_json().encode()).hexdigest()


def _first_stages(plan: recipe.Recipe, after: Path) -> list[recipe.Stage]:
    started = _read(after / "run.json", *_RUN)
    if started is None:
        raise Refused(f"{after} holds no run to go on from (it has no run.json).")
    return plan.stages[: len(started["recipe"]["stages"])]


def _read(path: Path, *keys: str) -> dict[str, Any] | None:
    """A JSON file of ours, None when it is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}); {_RESTORE}.") from None
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise Refused(f"{path} is not a run's: it lacks {' or '.join(keys) or 'entries'}; {_RESTORE}.")
    return content


def _other_run(folder: Path, started: dict[str, Any], plan: recipe.Recipe, seed: int) -> str:
    mine = {"seed": seed, "recipe": plan.model_dump(mode="json", by_alias=True)}
    where, found, wanted = next(_differences({"seed": started["seed"], "recipe": started["recipe"]}, mine))
    return (
        f"{folder} holds a run of another recipe: {where} is {found!r} there and {wanted!r} here; choose "
        "another folder, or resume that run as it is."
    )


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
