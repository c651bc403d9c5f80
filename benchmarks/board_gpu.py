"""The field's table on CIFAR-100, as many rows as the time allows: `python -m benchmarks.board_gpu`.

It has not been run on a GPU yet: none was lent. What is tested is that it runs, in small, on a CPU.

A row is a teacher and a student of Tian, Krishnan & Isola (Contrastive Representation Distillation; ICLR
2020; arXiv:1910.10699; tables 1 and 2). The teacher is trained once, then every arm learns from it under each
seed, all by the recipe of that table: 240 epochs, batches of 64, learning rate 0.05 (0.01 for MobileNet and
ShuffleNet) divided by 10 at epochs 150, 180 and 210. On a GPU the data is kept there and networks compute in
bfloat16, compiled. In the first row `kd` stores the teacher's answers, and `kd, from the store` is the same
lesson with nobody asked: its minutes are those of a student under a stored teacher.

Published accuracies stand beside ours, marked as theirs: from the README of HobbitLong/RepDistiller. Theirs
are of all 50,000 training images; ours of 45,000, for 5,000 are the validation split. `minutes` are wall time
of a run, with its scores after every epoch.

What is done is not done again: started once more, it goes on where it was. `--keep NAME` writes
benchmarks/results/gpu/NAME.json: every score and minute, seeds, the machine, the commit.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck import checkpoint, recipe, registry
from limbeck import run as runs
from limbeck.board import CONTROL, Board
from limbeck.core.refused import Refused
from limbeck.run import Run, Stopped

RESULTS = Path(__file__).parent / "results" / "gpu"
WEIGHTS = Path(__file__).parent.parent / "recipes" / "published_weights.toml"
DATA = "cifar100"
SOURCE = "README of HobbitLong/RepDistiller, read at commit 0eb3a95; Tian et al. 2020, tables 1 and 2"

METHODS = ("kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "nst", "crd")
PUBLISHED = """
    wrn_40_2   wrn_16_2         75.61 73.26 74.92 73.58 74.08 73.83 73.56 74.11 73.35 74.54 73.68 75.48
    wrn_40_2   wrn_40_1         75.61 71.98 73.54 72.24 72.77 72.43 72.21 73.30 72.22 73.45 72.24 74.14
    resnet56   resnet20         72.34 69.06 70.66 69.21 70.55 69.67 69.63 70.38 69.61 70.34 69.60 71.16
    resnet110  resnet20         74.31 69.06 70.67 68.99 70.22 70.04 69.48 70.16 69.25 70.25 69.53 71.46
    resnet110  resnet32         74.31 71.14 73.08 71.06 72.31 72.69 71.48 72.61 71.82 72.61 71.96 73.48
    resnet32x4 resnet8x4        79.42 72.50 73.33 73.50 73.44 72.94 72.97 73.09 71.90 73.64 73.30 75.51
    vgg13      vgg8             74.64 70.36 72.98 71.02 71.43 72.68 70.71 71.23 71.48 72.88 71.53 73.94
    vgg13      mobilenetv2_half 74.64 64.60 67.37 64.14 59.40 66.30 64.86 65.56 64.52 67.13 58.16 69.73
    ResNet50   mobilenetv2_half 79.34 64.60 67.35 63.16 58.58 68.08 65.43 67.57 64.43 66.52 64.96 69.11
    ResNet50   vgg8             79.34 70.36 73.81 70.69 71.84 73.34 70.25 70.30 71.50 73.01 71.28 74.30
    resnet32x4 shufflenet_v1    79.42 70.50 74.07 73.59 71.73 73.48 71.14 73.38 72.28 74.10 74.12 75.11
    resnet32x4 shufflenet_v2    79.42 71.82 74.45 73.54 72.73 74.56 71.29 73.40 73.21 74.69 74.68 75.65
    wrn_40_2   shufflenet_v1    75.61 70.50 74.83 73.73 73.32 74.52 71.38 73.61 72.21 73.89 74.89 76.05
"""
"""Theirs: teacher, student, the accuracy of each alone, and of the student under each of `METHODS`."""

FIRST = ("resnet32x4", "resnet8x4")
AGAIN = "kd, from the store"
NOTED = 5.0
SLOW = ("mobilenetv2_half", "shufflenet_v1", "shufflenet_v2")

Pair = tuple[str, str]


@dataclass
class Table:
    """What is asked for, and where it is worked on."""

    folder: Path
    epochs: int
    device: str
    methods: Sequence[str]
    seeds: list[int]
    deadline: float
    """By `time.monotonic`."""

    @property
    def fast(self) -> dict[str, Any]:
        return {"precision": "bfloat16", "compile": True} if self.device.startswith("cuda") else {}

    def stage(self, learner: str, network: str) -> dict[str, Any]:
        rate = 0.01 if network in SLOW else 0.05
        optim = {"student": {"lr": rate, "schedule": "steps", "nesterov": False}}
        whole = {"learner": learner, "epochs": self.epochs, "augment": ["crop", "flip"], "optim": optim}
        return {**whole, **self.fast}

    def teacher(self, name: str) -> Path:
        """The folder of a teacher, trained once for all its rows."""
        plan = {"data": DATA, "models": {name: name}, "stages": [self.stage(name, name)]}
        folder = self.folder / "teachers" / name
        run, clock = Run(recipe.parse(plan), folder, device=self.device), Clock(folder.with_suffix(".json"))
        if run.result is None:
            for moment in run.moments():
                clock.tick("teacher", ends=moment.record is not None)
                if time.monotonic() > self.deadline:
                    run.stop()
            clock.tick("teacher", ends=True)
        return folder

    def board(self, pair: Pair) -> Board:
        name, student = pair
        weights = str(self.folder / "teachers" / name / f"{name}.safetensors")
        net = {"name": name, "weights": weights, **{k: v for k, v in self.fast.items() if k == "precision"}}
        models = {"teacher": {**net, "store": "auto"}, "live": net, "student": student}
        plan = {"data": DATA, "models": models, "stages": [self.stage("student", student)]}
        arms = {method: _arm(method) for method in self.methods}
        if pair == FIRST and "kd" in arms:
            arms[AGAIN] = arms["kd"]
        folder = self.folder / "-".join(pair)
        return Board(recipe.parse(plan), arms, self.seeds, folder, device=self.device)

    def row(self, pair: Pair) -> dict[str, Any]:
        """A finished row, from what lies in its folder or is worked out now. Raises `Stopped` when the time
        is up first."""
        taught = runs.result(self.teacher(pair[0]))
        assert taught is not None
        table = self.board(pair)
        clock, begun = Clock(table.folder / "minutes.json"), False
        for cell, moment in table.moments():
            if begun or moment is not None:
                clock.tick(f"{cell.arm} {cell.seed}", ends=moment is None)
            else:
                clock.start()  # an earlier sitting's
            begun = moment is not None
            if time.monotonic() > self.deadline:
                table.stop()
        found, theirs = table.result(), published().get(pair, {})
        trained = Clock(self.folder / "teachers" / f"{pair[0]}.json")
        return {
            "teacher": {
                "accuracy": taught["scores"]["test.accuracy"],
                "minutes": trained.minutes["teacher"],
                "theirs": theirs.get("teacher"),
            },
            "arms": {
                arm["name"]: {
                    "accuracy": arm["mean"],
                    "sd": arm["sd"],
                    "scores": arm["scores"],
                    "minutes": [clock.minutes[f"{arm['name']} {seed}"] for seed in self.seeds],
                    "teacher answered": arm["how"],
                    "theirs": theirs.get("kd" if arm["name"] == AGAIN else arm["name"]),
                }
                for arm in found["arms"]
            },
            "diverged": found["diverged"],
            "environment": found["environment"],
        }


class Clock:
    """Minutes that things took, over all sittings; a kill loses seconds of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.minutes: dict[str, float] = runs.read(path) or {}
        self.start()

    def start(self) -> None:
        self._last = time.monotonic()

    def tick(self, what: str, ends: bool) -> None:
        """The time since the last tick that counted goes to `what`: at its end, and every few seconds."""
        now = time.monotonic()
        if ends or now - self._last > NOTED:
            self.minutes[what] = self.minutes.get(what, 0.0) + (now - self._last) / 60
            self._last = now
            checkpoint.write_atomic(self.path, json.dumps(self.minutes, indent=1).encode())


def _arm(method: str) -> dict[str, Any]:
    """A method at its published weight. Maps of every epoch fill a disk, so who looks at them asks live."""
    if method == "kd":  # -r 0.1 -a 0.9, where the house's table leaves the task its weight
        return {"task_weight": 0.1, "terms": [{"method": "kd", "temperature": 4, "weight": 0.9}]}
    said: dict[str, Any] = recipe.read_toml(WEIGHTS)["arms"][method]
    looks = registry.find("method", method)().teacher_looks()
    if set(looks) <= {"pooled"}:
        return said
    return {**said, "terms": [{**term, "teacher": "live"} for term in said["terms"]]}


def published() -> dict[Pair, dict[str, float]]:
    """Their accuracies, by pair and by arm; `teacher` and `control` are the networks alone."""
    lines = [line.split() for line in PUBLISHED.strip().splitlines()]
    names = ("teacher", CONTROL, *METHODS)
    return {
        (teacher, student): dict(zip(names, map(float, scores), strict=True))
        for teacher, student, *scores in lines
    }


def pairs(asked: str = "") -> list[Pair]:
    """`resnet32x4-resnet8x4` and others, with commas; all if nothing is asked for, the first first."""
    every = sorted(published(), key=lambda pair: pair != FIRST)
    named = {"-".join(pair): pair for pair in every}
    wanted = [name.strip() for name in asked.split(",") if name.strip()] or list(named)
    for name in wanted:
        if name not in named:
            raise Refused(f"There is no pair '{name}' in the table; its pairs are {', '.join(named)}.")
    return [named[name] for name in wanted]


def lacking(pair: Pair) -> str:
    """Why a row cannot be made here; empty when it can."""
    absent = [name for name in pair if name not in registry.names("model")]
    return f"there is no model '{absent[0]}' in limbeck/models" if absent else ""


def shown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':36}{'ours':>14}{'minutes':>9}{'theirs':>8}"]
    for name, row in rows.items():
        lines.append(name)
        alone = {**row["teacher"], "sd": None, "minutes": [row["teacher"]["minutes"]]}
        for arm, found in {"teacher": alone, **row["arms"]}.items():
            sd = "" if found["sd"] is None else f" ± {found['sd']:.2f}"
            theirs = "" if found["theirs"] is None else f"{found['theirs']:.2f}"
            ours = f"{found['accuracy']:.2f}{sd}"
            lines.append(f"  {arm:34}{ours:>14}{statistics.fmean(found['minutes']):>9.1f}{theirs:>8}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.board_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30.0, help="when to stop; it can be started again")
    parser.add_argument("--pairs", default="", help="TEACHER-STUDENT, with commas (all)")
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", default="kd", help=f"with commas: {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=1, help="how many students of each arm")
    parser.add_argument("--out", type=Path, default=Path("runs/board_gpu"), help="the folder to work in")
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/gpu/NAME.json")
    said = parser.parse_args(arguments)
    methods = [name.strip() for name in said.methods.split(",") if name.strip()]
    if odd := [name for name in methods if name not in METHODS]:
        parser.error(f"there is no published row of '{odd[0]}'; there is of {', '.join(METHODS)}")

    if said.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"there is no GPU here for --device {said.device}; --device cpu shows that it runs")
    deadline = time.monotonic() + 60 * said.minutes
    table = Table(said.out, said.epochs, said.device, methods, list(range(said.seeds)), deadline)
    rows: dict[str, dict[str, Any]] = {}
    left: dict[str, str] = {}
    try:
        for pair in pairs(said.pairs):
            name = "-".join(pair)
            left[name] = lacking(pair) or ("the time was up" if time.monotonic() > deadline else "")
            if left[name]:
                continue
            try:
                rows[name] = table.row(pair)
                del left[name]
            except Stopped:
                left[name] = "the time was up"
            except Refused as error:
                left[name] = str(error)
    except Refused as error:
        print(f"board_gpu: {error}", file=sys.stderr)
        return 2
    print(shown(rows))
    for name, why in left.items():
        print(f"{name}: not here, {why}")
    if said.keep and rows:
        setting = {"data": DATA, "epochs": said.epochs, "methods": methods, "seeds": table.seeds}
        kept = {"setting": setting, "theirs": SOURCE, "rows": rows, "left out": left}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{said.keep}.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"Kept: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
