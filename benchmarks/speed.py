"""What the house costs: `python -m benchmarks.speed`, a few minutes; `--quick` to see that it runs.

- A step of a method through Engine, scheme and Distiller against the same step written by hand (by_hand.py):
  CPU time, interleaved at one thread in a process of their own, and the most that is allocated. Before, both
  take a step from the same weights, and must come to the same loss and the same weights.
- The loss of every method that is found, forward and backward on fixed features of the same networks: `cakd`
  has a vision transformer teach, `dmae` stands between two autoencoders.
- The whole step of methods with modules, views or turns of their own (`WHOLE`), against the plain step of the
  same networks. There is no bound: they cost what they cost.
- What was promised (`BOUNDS`): steps under a live teacher, under a stored one and under one that stops early,
  losses against the naive ways to compute them, a store that is read shuffled. Each with pass or FAIL.
- What the framework adds to a step of networks so small that nothing else counts, what `import limbeck` adds
  to `import torch`, and how long `limbeck --help` takes.

`--only NAMES` measures some of it: `--only cakd,hssakd`, `--only "whole steps"`. `--only compiled` measures
steps under `torch.compile` instead, which take minutes to compile; the rate of augmentation stands in
benchmarks/augment.py.

Fails when a step is for sure 5 % slower than by hand (the lower end of a 90 % interval of the median ratio is
above 1.05), takes 5 % more memory, or when a figure is beyond its bound. `--keep NAME` writes
benchmarks/results/speed/NAME.json.
"""

import argparse
import copy
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import by_hand, memory
from limbeck import registry
from limbeck.core.batch import Batch, Lesson
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import forked, generator, keyed
from limbeck.core.method import Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme, Term
from limbeck.core.taps import Seen, Tapped
from limbeck.core.task import labelled_cross_entropy
from limbeck.core.teachers import Frozen, Peer
from limbeck.data.loader import Data, Loader
from limbeck.data.store import Store
from limbeck.data.store_write import write
from limbeck.data.stored import Stored
from limbeck.engine import Engine, Pace, Record
from limbeck.knowledge.feature.cakd import CAKD
from limbeck.knowledge.feature.crd import CRD
from limbeck.knowledge.feature.dpk import FEWEST_ROWS
from limbeck.knowledge.relation import rkd
from limbeck.knowledge.response.kd import KD
from limbeck.models.joint import joint
from limbeck.pieces.branch import Joint
from limbeck.schemes.hssakd import HSSAKD
from limbeck.schemes.offline import Offline
from limbeck.schemes.online import Online
from limbeck.tasks.reconstruct import Reconstruct
from limbeck.views.mask import mask

# The methods that have a loop by hand, and the weights of the field.
WEIGHTS = {
    "kd": 1.0,
    "dkd": 1.0,
    "at": 1000.0,
    "fitnet": 200.0,
    "fitnet at stage1": 200.0,
    "rkd": 1.0,
    "crd": 0.8,
    "reviewkd": 5.0,
}
LIMIT = 1.05
ENOUGH = 9  # rounds for a verdict
RESULTS = Path(__file__).parent / "results" / "speed"


@dataclass(frozen=True)
class Scene:
    """What is timed: the networks, and the batch that they are shown. blocks: of a transformer."""

    teacher: str = "resnet32x4"
    student: str = "resnet8x4"
    rows: int = 64
    size: int = 32
    classes: int = 100
    samples: int = 50_000
    negatives: int = 16_384
    blocks: int = 12
    dtype: torch.dtype = torch.float32

    def net(self, name: str, seed: int = 0) -> nn.Module:
        with forked(seed, name):
            return registry.find("model", name)(classes=self.classes).to(self.dtype)

    def pair(self, method: str) -> tuple[nn.Module, nn.Module]:
        """Student and teacher for a method: the two ResNets, unless it is made for transformers."""
        if method == "dmae":
            return self.autoencoder(width=192, heads=3), self.autoencoder(width=384, heads=6)
        student = self.net(self.student)
        return student, self.transformer() if method == "cakd" else self.net(self.teacher)

    def transformer(self) -> nn.Module:
        with forked("a transformer"):
            vit = registry.find("model", "vit_tiny")
            return vit(classes=self.classes, size=self.size, depth=self.blocks).to(self.dtype)

    def autoencoder(self, width: int, heads: int) -> nn.Module:
        """With a light decoder: that of a teacher is never run."""
        with forked("an autoencoder", width):
            mae = registry.find("model", "mae")(
                classes=self.classes,
                size=self.size,
                width=width,
                depth=self.blocks,
                heads=heads,
                decoder_width=128,
                decoder_depth=2,
                decoder_heads=4,
            )
            return mae.to(self.dtype)

    def batch(self) -> Batch:
        draw = generator("a batch to time")
        labels = torch.randint(self.classes, (self.samples,), generator=draw)
        index = torch.randperm(self.samples, generator=draw)[: self.rows]
        x = torch.randn(self.rows, 3, self.size, self.size, generator=draw, dtype=self.dtype)
        lesson = Lesson(samples=self.samples, classes=self.classes, labels=labels)
        return Batch(x, labels[index], index, lesson)

    def method(self, name: str) -> Method:
        name, _, stage = name.partition(" at ")
        knobs: dict[str, Any] = {"tap": stage} if stage else {}
        if name == "crd":
            knobs = {"negatives": self.negatives}
        elif name == "dpk" and self.rows < FEWEST_ROWS:
            knobs = {"ratio": 0.5}
        return registry.find("method", name)(**knobs)


FULL = Scene()
QUICK = Scene("resnet14", "resnet8", rows=16, size=16, classes=10, samples=500, negatives=200, blocks=3)


# --- a step, ours and by hand ---


class Same:
    """A loader that costs nothing: the same batch again and again. The first step is an epoch, which leaves
    a Record; the next one never ends."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.steps = batch, 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield self.batch
        self.steps = sys.maxsize
        while True:
            yield self.batch


@dataclass
class Duel:
    """A step of ours and the same step by hand, from the same weights."""

    ours: Callable[[], Record | None]
    by_hand: Callable[[], Tensor]
    learners: tuple[Sequence[nn.Module], Sequence[nn.Module]]
    """Ours and theirs; their tensors are in one order."""

    def agree(self) -> None:
        """Both take their first step. Raises `AssertionError` when the loss or what it leaves differs."""
        record = self.ours()
        assert record is not None, "this is not the first step"
        mine, theirs = sum(record.losses.values()), float(self.by_hand())
        exact = states(self.learners[0])[0].dtype == torch.float64
        close = 1e-9 if exact else 1e-4
        assert math.isclose(mine, theirs, rel_tol=close), f"the loss is {mine}, by hand {theirs}"
        for a, b in zip(*map(states, self.learners), strict=True):
            torch.testing.assert_close(a, b, rtol=10 * close, atol=0.1 * close)


def states(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [value for module in modules for value in module.state_dict().values()]


def begin_alike(theirs: Sequence[nn.Module], ours: Sequence[nn.Module]) -> None:
    for a, b in zip(states(theirs), states(ours), strict=True):
        a.copy_(b)


def under_teacher(name: str, scene: Scene, compiled: bool = False) -> Duel:
    """A method between a student and a trained teacher; `compiled` is ours alone."""
    batch, student, teacher = scene.batch(), scene.net(scene.student), scene.net(scene.teacher)
    other = copy.deepcopy(student)
    method = scene.method(name)
    distiller = Distiller(student, teacher, Term(method, weight=WEIGHTS[name]), example=batch)

    criterion = _criterion(name, student, teacher, scene, batch).to(scene.dtype)
    begin_alike([criterion], [method])
    if isinstance(method, CRD) and isinstance(criterion, by_hand.CRD):
        # Both take the first step with our negatives. Those that are timed are each with its own.
        assert batch.index is not None
        criterion.dealt = method.pairs(batch.index, batch.lesson)[0][:, 1:]

    step = by_hand.under_teacher(other, teacher, criterion, WEIGHTS[name])
    learners = (student, method), (other, criterion)
    return Duel(_steps(Offline(distiller), batch, compiled), _bound(step, batch), learners)


def _criterion(
    name: str, student: nn.Module, teacher: nn.Module, scene: Scene, batch: Batch
) -> by_hand.Criterion:
    assert batch.lesson.labels is not None
    labels = batch.lesson.labels
    made: dict[str, Callable[[], by_hand.Criterion]] = {
        "kd": by_hand.KD,
        "dkd": by_hand.DKD,
        "fitnet": lambda: by_hand.FitNet(student, teacher),
        "fitnet at stage1": lambda: by_hand.FitNet(student, teacher, "stage1"),
        "at": by_hand.AT,
        "rkd": by_hand.RKD,
        "crd": lambda: by_hand.CRD(student, teacher, labels, scene.negatives),
        "reviewkd": lambda: by_hand.ReviewKD(student, teacher),
    }
    return made[name]()


def two_peers(scene: Scene) -> Duel:
    """Deep mutual learning: both players learn, each from the other."""
    batch = scene.batch()
    nets = {name: scene.net(scene.student, seed) for seed, name in enumerate(("one", "other"))}
    theirs = [copy.deepcopy(net) for net in nets.values()]
    peers = {name: Peer(net, batch) for name, net in nets.items()}
    lessons = {
        name: Distiller(nets[name], peers[other], KD(temperature=1.0), example=batch)
        for name, other in (("one", "other"), ("other", "one"))
    }
    step = by_hand.mutual(*theirs)
    ours = _steps(Online(lessons, peers), batch)
    return Duel(ours, _bound(step, batch), (list(nets.values()), theirs))


def from_a_transformer(scene: Scene) -> Duel:
    """CAKD: its rival has a turn and an optimiser of its own."""
    batch, (student, teacher) = scene.batch(), scene.pair("cakd")
    other, method = copy.deepcopy(student), CAKD()
    distiller = Distiller(student, teacher, method, example=batch)

    between = by_hand.Across(student, teacher).to(scene.dtype)
    ours = method.to_qkv, method.to_tokens, method.critic
    theirs = between.to_qkv, between.to_tokens, between.critic
    begin_alike(theirs, ours)
    # Both take the first step with our draws. Those that are timed are each with its own.
    between.dealt = _draws(method, batch)

    # By hand looks through hooks, which would be called when our teacher is asked.
    step = by_hand.across(other, copy.deepcopy(teacher), between)
    learners = (student, *ours), (other, *theirs)
    return Duel(_steps(Offline(distiller), batch), _bound(step, batch), learners)


def _draws(method: CAKD, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which elements CAKD crosses (3 b heads n d), and what it keeps of the student's map (b c h w)."""
    assert batch.index is not None
    (h, w), channels = method.grid, method.to_qkv.in_channels
    elements = method.to_qkv.out_channels * h * w
    crossing = keyed(batch.lesson, batch.index, "cakd crossing", elements)
    crossing = crossing.view(batch.rows, 3, method.layout.heads, h * w, -1).transpose(0, 1)
    dropout = keyed(batch.lesson, batch.index, "cakd dropout", channels * h * w)
    return crossing < method.cross_prob, dropout.view(-1, channels, h, w) >= method.dropout


def in_four_turns(scene: Scene) -> Duel:
    """HSSAKD under a network that has learned with its branches."""
    scene = quartered(scene)
    batch, (student, teacher) = scene.batch(), scene.pair("kd")
    other, taught = copy.deepcopy(student), with_branches(teacher)
    scheme = turned(student, taught, batch)

    ours, theirs = (by_hand.Branches(net).to(scene.dtype) for net in (student, teacher))
    lessons = scheme.learners["student"].lessons
    mine = _parts(lesson.student for stage, lesson in lessons.items() if stage)
    begin_alike([ours], mine)
    begin_alike([theirs], _parts(taught.branches.values()))
    step = by_hand.hierarchy(other, teacher, ours, theirs)
    return Duel(_steps(scheme, batch), _bound(step, batch), ((student, *mine), (other, ours)))


def quartered(scene: Scene) -> Scene:
    """So few images that in four turns they are as many rows as the others' are."""
    return replace(scene, rows=max(scene.rows // 4, 2))


def with_branches(teacher: nn.Module) -> Joint:
    with forked("branches"):
        return joint(teacher)


def turned(student: nn.Module, teacher: nn.Module, batch: Batch, branches: bool = True) -> HSSAKD:
    term = Term(KD(temperature=3.0), teachers=(Frozen(teacher),))
    cast = Cast({"student": student}, batch, [term], task=labelled_cross_entropy)
    return HSSAKD.staged(cast, branches=branches)


def _parts(branches: Iterable[Any]) -> list[nn.Module]:
    """The tails of them all, then their heads."""
    branches = list(branches)
    return [*(branch.tail for branch in branches), *(branch.head for branch in branches)]


DUELS: dict[str, Callable[[Scene], Duel]] = {
    **{name: partial(under_teacher, name) for name in WEIGHTS},
    "two peers": two_peers,
    "cakd": from_a_transformer,
    "hssakd": in_four_turns,
}


def _steps(scheme: Scheme, batch: Batch, compiled: bool = False) -> Callable[[], Record | None]:
    paces = {
        name: Pace(by_hand.sgd(parameters.values()), lambda step: 1.0)
        for name, parameters in scheme.players().items()
    }
    lessons = Engine(scheme, Same(batch), paces, epochs=2, compile=compiled).lessons()
    return lambda: next(lessons)


def _bound(step: by_hand.Step, batch: Batch) -> Callable[[], Tensor]:
    assert batch.y is not None and batch.index is not None
    x, y, index = batch.x, batch.y, batch.index
    return lambda: step(x, y, index)


@dataclass
class Step:
    """Milliseconds of CPU time (medians over rounds), ours in units of by hand, megabytes at the peak."""

    ours_ms: float
    by_hand_ms: float
    ratio: float
    low: float
    high: float
    ours_mb: float
    by_hand_mb: float
    ratios: list[float]

    @property
    def slower(self) -> bool:
        return self.low > LIMIT

    @property
    def bigger(self) -> bool:
        return self.ours_mb > LIMIT * self.by_hand_mb


def step_cost(duel: Duel, rounds: int) -> Step:
    duel.agree()
    ours, theirs = race((duel.ours, duel.by_hand), rounds)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(ratios)
    for module in (*duel.learners[0], *duel.learners[1]):
        module.zero_grad()
    # Of two steps, so that what one leaves behind for the next counts.
    ours_mb, by_hand_mb = (memory.peak(again(step, 2)) / 1e6 for step in (duel.ours, duel.by_hand))
    return Step(
        1e3 * statistics.median(ours),
        1e3 * statistics.median(theirs),
        statistics.median(ratios),
        low,
        high,
        ours_mb,
        by_hand_mb,
        ratios,
    )


def by_itself(make: Callable[[Scene], Duel], scene: Scene, rounds: int) -> Step:
    """What a step costs in a process of its own: how an earlier one has left the memory decides for the whole
    of a later one how often its pages are cleared anew, on either side."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(_step_cost, make, scene, rounds).result()


def _step_cost(make: Callable[[Scene], Duel], scene: Scene, rounds: int) -> Step:
    return step_cost(make(scene), rounds)


def race(arms: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of CPU time of each arm in each round, those of a process it waits for too. Arms take turns in
    being first, and one untimed round warms up."""
    times: list[list[float]] = [[] for _ in arms]
    for round_ in range(-1, rounds):
        for place in range(len(arms)):
            arm = (round_ + place) % len(arms)
            began = cpu_seconds()
            arms[arm]()
            if round_ >= 0:
                times[arm].append(cpu_seconds() - began)
    return times


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def again(call: Callable[[], object], often: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(often)]


def interval(values: Sequence[float], share: float = 0.9) -> tuple[float, float]:
    """A bootstrap interval of the median, by percentiles."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


# --- every method's loss ---


@dataclass
class Loss:
    """Milliseconds of CPU time of forward and backward, and megabytes at their peak beyond what was there."""

    ms: float
    mb: float


def loss_costs(scene: Scene, rounds: int, only: Sequence[str] = ()) -> dict[str, Loss | str]:
    """By method, and `kd through LENS` for every lens; or only of some names, and KD. A sentence is why a
    method refuses this pair."""
    costs: dict[str, Loss | str] = {}
    methods = registry.names("method")
    arms: dict[str, tuple[Method, Any]] = {name: (scene.method(name), None) for name in methods}
    for name in registry.names("lens"):
        lens = registry.find("lens", name)
        arms[f"kd through {name}"] = scene.method("kd"), lens() if isinstance(lens, type) else lens
    for name, (method, lens) in arms.items():
        if only and name not in (*only, "kd"):
            continue
        try:
            call = _loss(method, lens, *scene.pair(name), _shown(name, scene))
        except Refused as error:
            costs[name] = str(error)
            continue
        ((warm,),) = race([call], 1)
        often = 1 + int(0.02 / warm)  # a short one is timed many at a time
        (times,) = race([again(call, often)], rounds)
        costs[name] = Loss(1e3 * statistics.median(times) / often, memory.peak(call) / 1e6)
    return costs


def _loss(
    method: Method, lens: Any, student: nn.Module, teacher: nn.Module, batch: Batch
) -> Callable[[], object]:
    """Forward and backward of a method's loss on what the pair shows, down to that and to its own modules;
    of its rivals' losses too."""
    tapped, frozen = Tapped(student.train(), called="student"), Frozen(teacher)
    tapped.look(method.looks())
    frozen.look(method.teacher_looks())
    with torch.no_grad():
        s, t = tapped(batch.x), frozen(batch)
    shown = [v.requires_grad_() for v in (s.out, *s.at.values())]

    def look() -> tuple[Seen, Seen, Any]:
        return (s, t, 1.0) if lens is None else lens(s, t)

    with forked(0, "build"):
        method.build(*look()[:2], batch)
        method.to(s.out.dtype)
    rivals = {name: list(module.parameters()) for name, module in method.rivals().items()}
    theirs = {id(p) for parameters in rivals.values() for p in parameters}
    leaves = [*shown, *(p for p in method.parameters() if p.requires_grad and id(p) not in theirs)]

    def call() -> object:
        s, t, factor = look()
        for name, parameters in rivals.items():
            torch.autograd.grad(method.rival_loss(name, s.detach(), t.detach(), batch), parameters)
        return torch.autograd.grad(factor * method.loss(s, t, batch), leaves, allow_unused=True)

    return call


def _shown(method: str, scene: Scene) -> Batch:
    """The batch, for autoencoders with most of its patches hidden."""
    batch = scene.batch()
    return mask(batch) if method == "dmae" else batch


# --- whole steps ---

WHOLE = ("dpk", "rtk", "afd", "cakd", "dmae", "hssakd", "hssakd, no branches")
"""Methods with modules, views or turns of their own. Without branches HSSAKD is KD on four turns."""


@dataclass
class Whole:
    """Milliseconds of CPU time (medians over rounds) and megabytes at the peak, of a method's step and of the
    plain one; and the median of their ratio."""

    ms: float
    plain_ms: float
    ratio: float
    mb: float
    plain_mb: float


def whole_cost(name: str, scene: Scene, rounds: int) -> Whole:
    """A step of ours beside the plain step of the same networks on the same images: under KD, or for
    autoencoders without a teacher."""
    arms = beside(name, scene)
    mine, plain = race(arms, rounds)
    mb, plain_mb = (memory.peak(again(arm, 2)) / 1e6 for arm in arms)
    median = statistics.median
    return Whole(1e3 * median(mine), 1e3 * median(plain), _ratio(mine, plain), mb, plain_mb)


def beside(name: str, scene: Scene) -> tuple[Callable[[], object], Callable[[], object]]:
    """The step of one of `WHOLE`, and the plain one."""
    if name.startswith("hssakd"):
        scene = quartered(scene)
        batch, (student, teacher), branches = scene.batch(), scene.pair("kd"), name == "hssakd"
        wide = turned(student, with_branches(teacher) if branches else teacher, batch, branches)
        return _steps(wide, batch), _steps(Offline(_lesson("kd", scene, KD())), batch)
    plain = None if name == "dmae" else KD()
    own, other = (Offline(_lesson(name, scene, method)) for method in (scene.method(name), plain))
    return _steps(own, scene.batch()), _steps(other, scene.batch())


def _lesson(networks: str, scene: Scene, method: Method | None) -> Distiller:
    """A method, or none, between the networks of `Scene.pair`."""
    batch, (student, teacher) = scene.batch(), scene.pair(networks)
    terms = [] if method is None else [method]
    if networks != "dmae":
        return Distiller(student, teacher, terms, example=batch)
    shown = Frozen(teacher, view=mask)
    return Distiller(student, shown, terms, example=batch, task=Reconstruct(), view=mask)


# --- what was promised ---

EVERYDAY = ("kd", "dkd", "at", "fitnet", "rkd", "reviewkd")
BOUNDS = {
    **dict.fromkeys(EVERYDAY, 0.87),
    "fitnet at stage1": 0.75,
    "compiled": 0.80,
    "stored / by hand": 0.38,
    "stored / student alone": 1.05,
    "crd loss / gathered": 0.06,
    "crd loss (MB)": 60.0,
    "angles of 256 / naive": 0.15,
    "angles of 256 (MB)": 80.0,
    "angles of 512 (MB)": 350.0,
    "read float16 (ms)": 20.0,
    "read top (ms)": 20.0,
    "top (B a sample)": 30.0,
}
"""The most that a figure may be: of a step, its CPU time in units of by hand."""
AIMS = {**dict.fromkeys(EVERYDAY, 0.82), "compiled": 0.75, "stored / by hand": 0.33}
GROUPS = ("stored", "crd loss", "angles", "read")
READ = 50_000
"""Samples that are read of a store, in batches of the scene's rows."""


def promised(group: str, scene: Scene, rounds: int) -> dict[str, float]:
    """The figures of one of `GROUPS`, each by its name in `BOUNDS`."""
    if group == "stored":
        return stored_step(scene, rounds)
    if group == "crd loss":
        return crd_loss(scene, rounds)
    return angles(rounds) if group == "angles" else store_read(scene, rounds)


def stored_step(scene: Scene, rounds: int) -> dict[str, float]:
    """KD under stored answers, against by hand under the live teacher and against the student alone."""
    batch, student, teacher = scene.batch(), scene.net(scene.student), scene.net(scene.teacher)
    others = [copy.deepcopy(student) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        answers = Stored(stored(folder, scene, scene.samples, "float16"))
        distiller = Distiller(student, answers, KD(), example=batch)
        arms = (
            _steps(Offline(distiller), batch),
            _bound(by_hand.under_teacher(others[0], teacher, by_hand.KD(), 1.0), batch),
            _bound(by_hand.alone(others[1]), batch),
        )
        ours, live, alone = race(arms, rounds)
    return {"stored / by hand": _ratio(ours, live), "stored / student alone": _ratio(ours, alone)}


def stored(folder: str, scene: Scene, samples: int, kind: str) -> Store:
    """The answers of a teacher that costs nothing: who reads them cannot tell."""
    images = Data(
        torch.arange(samples).remainder(256).to(torch.uint8)[:, None],
        torch.zeros(samples, dtype=torch.long),
        tuple(map(str, range(scene.classes))),
    )
    with forked("who answers"):
        teacher = Frozen(nn.Linear(1, scene.classes))
    loader = Loader(images, min(samples, 5000), seed=scene.batch().lesson.seed)
    for _ in write(folder, teacher, loader, [0], kind=kind):
        pass
    return Store(folder)


def crd_loss(scene: Scene, rounds: int) -> dict[str, float]:
    """Forward, backward and what is remembered, on pooled features."""
    batch = scene.batch()
    nets = scene.net(scene.student), scene.net(scene.teacher)
    draw = generator("pooled")
    s, t = (
        torch.randn(scene.rows, by_hand.widths(net)["pooled"], generator=draw, dtype=scene.dtype)
        for net in nets
    )
    seen, shown = Seen(None, {"pooled": s.requires_grad_()}), Seen(None, {"pooled": t})
    method = scene.method("crd")
    with forked(0, "build"):
        method.build(seen, shown, batch)
    method.to(scene.dtype)
    assert batch.lesson.labels is not None and batch.index is not None
    index = batch.index
    gathered = by_hand.GatheredCRD(*nets, batch.lesson.labels, scene.negatives).to(scene.dtype)

    def ours() -> object:
        return torch.autograd.grad(method.loss(seen, shown, batch), [s, *method.parameters()])

    def theirs() -> object:
        loss = gathered(seen.at, shown.at, index)
        grads = torch.autograd.grad(loss, [s, *gathered.parameters()])
        gathered.after_step()
        return grads

    ratio = _ratio(*race((ours, theirs), rounds))
    return {"crd loss / gathered": ratio, "crd loss (MB)": memory.peak(ours) / 1e6}


def angles(rounds: int, sizes: tuple[int, int] = (256, 512)) -> dict[str, float]:
    """RKD's angle loss, 256 wide, against the angles of all arms at once."""

    def by_gram(s: Tensor, t: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(rkd.angle(s, t), s)
        return grad

    def naive(s: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            there = by_hand.RKD.angles(t)
        (grad,) = torch.autograd.grad(nn.functional.smooth_l1_loss(by_hand.RKD.angles(s), there), s)
        return grad

    def rows(b: int) -> tuple[Tensor, Tensor]:
        s, t = torch.randn(2, b, 256, generator=generator("rows"))
        return s.requires_grad_(), t

    few, many = map(rows, sizes)
    torch.testing.assert_close(by_gram(*few), naive(*few), rtol=1e-4, atol=1e-8)
    ours, theirs = race((lambda: by_gram(*few), lambda: naive(*few)), rounds)
    return {
        f"angles of {sizes[0]} / naive": _ratio(ours, theirs),
        f"angles of {sizes[0]} (MB)": memory.peak(lambda: by_gram(*few)) / 1e6,
        f"angles of {sizes[1]} (MB)": memory.peak(lambda: by_gram(*many)) / 1e6,
    }


def store_read(scene: Scene, rounds: int) -> dict[str, float]:
    """All samples of an epoch, shuffled, a batch at a time, as float32 tensors."""
    order = torch.randperm(READ, generator=generator("order")).split(scene.rows)
    figures = {}
    for kind in ("float16", "top"):
        with tempfile.TemporaryDirectory() as folder:
            store = stored(folder, scene, READ, kind)
            (times,) = race([lambda store=store: [store.read(0, index) for index in order]], rounds)  # type: ignore[misc]
            figures[f"read {kind} (ms)"] = 1e3 * statistics.median(times)
    return {**figures, "top (B a sample)": float(store.header.record.itemsize)}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# --- the framework by itself ---

TINY_STEPS, TINY_ROUNDS = 200, 15


def framework_cost(steps: int = TINY_STEPS, rounds: int = TINY_ROUNDS) -> tuple[float, float]:
    """Median milliseconds of a step of KD with networks that cost nothing: (ours, by hand)."""
    draw = generator("tiny")
    x, y = torch.randn(16, 8, generator=draw), torch.randint(4, (16,), generator=draw)
    batch = Batch(x, y, torch.arange(16))
    with forked("tiny"):
        student, teacher = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
    other = copy.deepcopy(student)
    distiller = Distiller(student, teacher, KD(), example=batch)
    ours = _steps(Offline(distiller), batch)
    theirs = _bound(by_hand.under_teacher(other, teacher, by_hand.KD(), 1.0), batch)
    times = race([again(ours, steps), again(theirs, steps)], rounds)
    mine, hand = (1e3 * statistics.median(each) / steps for each in times)
    return mine, hand


def command(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)


HOUSE = {
    "framework cost of a tiny step (ms over a hand-written loop)": 0.5,
    "`from limbeck import Distiller` over `import torch` (s)": 0.2,
    "`limbeck --help` (s)": 0.4,
}


def house(rounds: int) -> dict[str, float]:
    mine, hand = framework_cost()
    commands = (
        ("-c", "import torch"),
        ("-c", "from limbeck import Distiller"),
        ("-m", "limbeck.cli", "--help"),
    )
    times = race([command(*words) for words in commands], rounds)
    torch_, limbeck, help_ = (statistics.median(each) for each in times)
    return dict(zip(HOUSE, (mine - hand, limbeck - torch_, help_), strict=True))


# --- all of it ---


@dataclass
class Figures:
    """What a run measured, and where."""

    setting: dict[str, Any]
    steps: dict[str, Step] = field(default_factory=dict)
    losses: dict[str, Loss | str] = field(default_factory=dict)
    whole: dict[str, Whole] = field(default_factory=dict)
    promised: dict[str, float] = field(default_factory=dict)
    house: dict[str, float] = field(default_factory=dict)

    def bounded(self) -> dict[str, tuple[float, float]]:
        """What has a bound, and the bound."""
        found = {name: step.ratio for name, step in self.steps.items()} | self.promised
        return {name: (value, BOUNDS[key]) for name, value in found.items() if (key := _key(name)) in BOUNDS}

    def failures(self) -> list[str]:
        slow = [
            f"a step of {name} takes {step.ratio:.3f} of the time by hand ({step.low:.3f} to {step.high:.3f})"
            for name, step in self.steps.items()
            if step.slower
        ]
        big = [
            f"a step of {name} takes {step.ours_mb:.1f} MB, by hand {step.by_hand_mb:.1f}"
            for name, step in self.steps.items()
            if step.bigger
        ]
        beyond = [
            f"{name} is {value:.3f}, expected {bound} at most"
            for name, (value, bound) in self.bounded().items()
            if value > bound
        ]
        return slow + big + beyond


def _key(name: str) -> str:
    """In `BOUNDS` and `AIMS`, where compiled steps are one."""
    return "compiled" if name.endswith(", compiled") else name


def setting(scene: Scene, rounds: int) -> dict[str, Any]:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    cpu = Path("/proc/cpuinfo")
    names = cpu.read_text(encoding="utf-8").split("model name") if cpu.exists() else []
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": names[1].split("\n")[0].strip(" \t:") if len(names) > 1 else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "scene": {**asdict(scene), "dtype": str(scene.dtype).removeprefix("torch.")},
    }


def measure(scene: Scene, rounds: int, only: Sequence[str] = ()) -> Figures:
    """Everything that is not compiled, printed as it comes; or only the steps, losses and whole steps of some
    names, all `whole steps`, or some of `GROUPS`."""
    figures = Figures(setting(scene, rounds))
    print(", ".join(f"{k} {v}" for k, v in figures.setting.items() if k != "scene"))
    print(f"{scene.teacher} → {scene.student}, {scene.rows} x 3 x {scene.size} x {scene.size}\n")
    print(f"{'a step':24s}   ours ms   by hand   ratio            90 %   ours MB   by hand")
    duels = DUELS
    if "compiled" in only:
        names = [name for name in only if name in WEIGHTS] or EVERYDAY
        duels = {f"{name}, compiled": partial(under_teacher, name, compiled=True) for name in names}
        only = ["compiled", *duels]
    for name, make in duels.items():
        if not only or name in only:
            figures.steps[name] = step = by_itself(make, scene, rounds)
            print(
                f"{name:24s} {step.ours_ms:9.1f} {step.by_hand_ms:9.1f} {step.ratio:7.3f} "
                f"{step.low:7.3f} {step.high:7.3f} {step.ours_mb:9.1f} {step.by_hand_mb:9.1f}",
                flush=True,
            )
    figures.losses = loss_costs(scene, rounds, only)
    kd = figures.losses["kd"]
    assert isinstance(kd, Loss), kd
    print(f"\n{'a loss':24s}        ms     of KD        MB     of KD")
    for name, loss in figures.losses.items():
        said = (
            loss
            if isinstance(loss, str)
            else f"{loss.ms:9.2f} {loss.ms / kd.ms:9.1f} {loss.mb:9.3f} {loss.mb / kd.mb:9.1f}"
        )
        print(f"{name:24s} {said}")
    print(f"\n{'a whole step':24s}   ours ms     plain   ratio   ours MB     plain")
    for name in WHOLE:
        if not only or name in only or "whole steps" in only:
            figures.whole[name] = whole = whole_cost(name, scene, rounds)
            print(
                f"{name:24s} {whole.ms:9.1f} {whole.plain_ms:9.1f} {whole.ratio:7.2f} "
                f"{whole.mb:9.1f} {whole.plain_mb:9.1f}",
                flush=True,
            )
    for group in GROUPS:
        if not only or group in only:
            figures.promised |= promised(group, scene, rounds)
    print(f"\n{'what was promised':24s}     found   at most   aim")
    for name, (value, bound) in figures.bounded().items():
        verdict, aim = "pass" if value <= bound else "FAIL", AIMS.get(_key(name), "")
        verdict = verdict if rounds >= ENOUGH and scene == FULL else "too small a run to tell"
        print(f"{name:24s} {value:9.3f} {bound:9.3f}   {aim:4}  {verdict}")
    if not only:
        figures.house = house(5)
        print()
        for what, value in figures.house.items():
            print(f"{what:60s} {value:7.3f}   aim <= {HOUSE[what]}")
    return figures


def keep(figures: Figures, name: str) -> Path:
    kept = RESULTS / f"{name}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    bounds = {name: {"found": value, "at most": bound} for name, (value, bound) in figures.bounded().items()}
    kept.write_text(json.dumps({**asdict(figures), "bounds": bounds}, indent=1) + "\n", encoding="utf-8")
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="What the house costs.")
    parser.add_argument("--quick", action="store_true", help="small networks: does it run? No verdict")
    parser.add_argument("--rounds", type=int, default=None, help=f"{ENOUGH} or more for a verdict (11)")
    parser.add_argument("--only", default="", help="names, with commas: only their steps and losses")
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/speed/NAME.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rounds = given.rounds or (3 if given.quick else 11)
    figures = measure(QUICK if given.quick else FULL, rounds, [n for n in given.only.split(",") if n])
    if given.keep:
        print(f"\nkept in {keep(figures, given.keep)}")
    failures = figures.failures() if rounds >= ENOUGH and not given.quick else []
    for failure in failures:
        print(f"too much: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
