"""The one switchboard: here, and only here, the names of a recipe become objects.

Order of assembly, everywhere: models → mean copies → taps → one eager dry batch → methods' modules → checks →
device → optimisers.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import checkpoint, registry
from limbeck.core.batch import IGNORE, Batch, View
from limbeck.core.cast import Cast
from limbeck.core.distiller import ClassesDiffer
from limbeck.core.keyed import forked, generator
from limbeck.core.refused import Refused
from limbeck.core.scheme import Lens, Ramp, Scheme, Term
from limbeck.core.taps import Tapped
from limbeck.core.task import Task
from limbeck.core.teachers import Ensemble, Frozen, MeanOf, Peer, Teacher
from limbeck.data.keeping import Keeping
from limbeck.data.loader import Data, Loader, Splits
from limbeck.data.outside import as_splits
from limbeck.data.published import shelves
from limbeck.data.store_write import refuse_more
from limbeck.data.stored import Stored
from limbeck.data.unseen import keep_unseen
from limbeck.engine import Engine, Pace
from limbeck.models.choose import choose
from limbeck.models.hints import paired, unasked
from limbeck.recipe import Kept, Made, Mean, Named, Net, Optim, Recipe, Source, Stage, Use


@dataclass(frozen=True)
class Lab:
    """A recipe's data, the task of each stage and the models, ready to be put together stage by stage."""

    recipe: Recipe
    seed: int
    splits: Splits
    tasks: list[Task]
    models: dict[str, nn.Module]
    device: torch.device
    stores: Path | None = None
    """Where answers are kept as they are given; None, in a rehearsal, keeps none."""
    keeping: list[Keeping] = field(default_factory=list)
    """Teachers that keep their answers, as they were asked for."""
    rehearsal: bool = False
    hints: dict[str, dict[str, str]] = field(default_factory=dict)
    """The teacher's taps that clustering chose, by stage and term: `1.0` is stage 1's first term."""

    def engine(self, number: int) -> Engine:
        """Assemble a stage: the learner and its teachers as they are now."""
        stage = self.recipe.stages[number]
        try:
            return self._engine(number, stage)
        except ClassesDiffer as error:
            blind = [
                name
                for name in registry.names("method")
                if "same_classes" not in registry.find("method", name).card.needs
            ]
            raise Refused(
                f"In stage {number}: {ClassesDiffer(error.method, error.s, error.t, blind)}"
            ) from None
        except Refused as error:
            raise Refused(f"In stage {number}: {error}") from error.__cause__

    def _engine(self, number: int, stage: Stage) -> Engine:
        learners, task = self.learners(stage), self.tasks[number]
        loader = self.loader(stage)
        nets = {name: spec for name, spec in self.recipe.models.items() if isinstance(spec, Net)}
        looks = {name: net.taps for name, net in nets.items()}
        example, view = self._example(loader, stage), _view(stage.view)
        shown = dict.fromkeys(learners, _shown(stage.view, example))
        peers = {who: Peer(net, shown[who], taps=looks.get(who), called=who) for who, net in learners.items()}
        self._refuse_dressed({name for use in stage.terms for name in use.teachers} & peers.keys())
        asked: dict[str, Teacher] = dict(peers)
        for use in stage.terms:
            _shown(use.view, example)
            for name in use.teachers:
                asked.setdefault(name, self.teacher(name, loader))
        for name in [who for who in asked if who not in learners]:
            for one in (name, *self.recipe.within(name)):
                spec = self.recipe.models.get(one)
                if isinstance(spec, Net | Mean):
                    shown[one] = _shown(spec.view, example)
        for teacher in _each(asked.values()):
            if isinstance(teacher, Stored):
                teacher.store.check(loader, views=teacher.exact)
        cast = Cast(
            learners,
            example,
            [
                self._hinted(f"{number}.{k}", use, _term(use, tuple(asked[name] for name in use.teachers)))
                for k, use in enumerate(stage.terms)
            ],
            task=task if stage.task_weight and task.headline else None,  # the task `none` has no loss
            task_weight=stage.task_weight,
            view=view,
            taps=looks,
            channels_last={name: net.channels_last for name, net in nets.items()},
            peers=peers,
            seed=self.seed,
        )
        try:
            with _theirs(f"The scheme '{stage.scheme.name}'", "be set up"):
                scheme: Scheme = registry.find("scheme", stage.scheme.name).staged(cast, **stage.scheme.knobs)
        except Refused:
            self._refuse_other_images(shown)
            raise
        if stage.ships is not None:
            mean = asked.get(stage.ships) or self.teacher(stage.ships)
            assert isinstance(mean, MeanOf)  # the recipe was checked
            scheme.mean = mean
        steps = stage.epochs * loader.steps
        paces = {
            player: _pace(stage, player, parameters, steps, learners)
            for player, parameters in scheme.players().items()
        }
        unknown = set(stage.optim) - {*paces, "student"}  # the student's is everybody's who has none
        if unknown:
            raise Refused(f"`optim.{min(unknown)}` names no player; the players are {', '.join(paces)}.")
        return Engine(
            scheme,
            loader,
            paces,
            epochs=stage.epochs,
            seed=self.seed,
            accumulate=stage.accumulate,
            clip=stage.clip,
            precision=None if stage.precision is None else getattr(torch, stage.precision),
            compile=stage.compile,
            device=self.device,
            stage=number,
        )

    def _hinted(self, place: str, use: Use, term: Term) -> Term:
        """A term with its teacher's taps chosen, where the recipe leaves that to clustering: once."""
        if use.pairs != "cluster" or use.weight == 0:
            return term
        alone = self.teacher(use.teachers[0])  # its own: the lesson's need not show all blocks
        if len(term.teachers) > 1 or isinstance(term.teachers[0], Peer) or not isinstance(alone, Frozen):
            raise Refused(
                f"The layers of {' and '.join(use.teachers)} cannot be clustered for method '{use.method}': "
                "that takes one network, which is done learning; name such a teacher, or its taps in `pairs`."
            )
        if place not in self.hints:
            names = term.method.teacher_looks()
            with _theirs(f"The layers of '{use.teachers[0]}'", f"be clustered for method '{use.method}'"):
                if self.rehearsal:
                    self.hints[place] = unasked(alone, next(self.images()), names, len(self.splits.train))
                else:
                    self.hints[place] = paired(alone, self.images(), names)
        return replace(term, pairs=self.hints[place])

    def images(self) -> Iterator[Batch]:
        """The training images as they are, without labels, in an order that is every run's."""
        data = self.splits.train
        loader = Loader(replace(data, y=torch.full_like(data.y, IGNORE)), 64, seed=0)
        for index in torch.randperm(len(data), generator=generator("images")).split(64):
            yield loader.rows(index, loader.lesson(0, 0)).to(self.device)

    def _example(self, loader: Loader, stage: Stage) -> Batch:
        """The first batch, once it is known that every batch can be used."""
        if stage.accumulate > loader.batch:
            raise Refused(
                f"A batch of {loader.batch} rows cannot be cut into {stage.accumulate} micro-batches; set "
                f"`accumulate` to {loader.batch} or less, or a larger `batch`."
            )
        data, rows = loader.data, loader.batch
        first = Batch(data.x[:rows], data.y[:rows], torch.arange(rows), loader.lesson(0, 0))
        _shown(stage.augment, first.to(data.x.device))
        example, classes = loader.at(0), len(data.classes)
        if example.y is not None and int(example.y.max()) >= classes:
            raise Refused(
                f"`augment` makes label {int(example.y.max())} of {classes} classes; a view that makes new "
                "labels is for a `view` of the stage or of a term."
            )
        return example.to(self.device)

    def _refuse_other_images(self, shown: Mapping[str, Batch]) -> None:
        """Why a stage cannot be assembled, where a recipe makes a network for other images than it is
        shown."""
        for name, batch in shown.items():
            spec = self.recipe.models.get(name)
            if not isinstance(spec, Net) or not isinstance(batch.x, torch.Tensor) or batch.x.ndim != 4:
                continue
            if "classes" not in registry.knobs(registry.find("model", spec.name)):
                continue  # a generator makes images
            for knob, axis in (("channels", 1), ("size", -1)):
                found = batch.x.shape[axis]
                if spec.knobs.get(knob, found) != found:
                    raise Refused(
                        f"Model '{name}' ({spec.name}) is made for images of {knob} = {spec.knobs[knob]}, "
                        f"and those it is shown have {knob} = {found}; leave `{knob}` out, or let a `view` "
                        "show it others."
                    )

    def _refuse_dressed(self, names: set[str]) -> None:
        """A learner that teaches answers as it learns: what is said of it as a teacher is not passed over."""
        for name in sorted(names):
            spec = self.recipe.models.get(name)
            keys = ("view", "columns", "normalise", "precision", "batch", "store")
            said = [key for key in keys if getattr(spec, key, None)]
            if said:
                raise Refused(
                    f"'{name}' teaches while it learns, so its `{said[0]}` would change nothing; leave it "
                    "out, or give the stage a `view`."
                )

    def loader(self, stage: Stage) -> Loader:
        data = self.splits.train
        if stage.labels is not None:
            data = data.with_labels(stage.labels, self.seed)
        if stage.rows == "labelled":
            kept = (data.y != IGNORE).nonzero()[:, 0]
            data = replace(data, x=data.x[kept], y=data.y[kept])
        augment = _view(stage.augment)
        return Loader(
            data.on(self.device),
            stage.batch,
            seed=self.seed,
            epochs=stage.epochs,
            per_class=stage.per_class,
            augment=() if augment is None else (augment,),
        )

    def learners(self, stage: Stage) -> dict[str, nn.Module]:
        """The networks that learn, by name; one made from another is made now, from what that is now."""
        made = stage.learner
        if isinstance(made, Made):
            # Whatever a change does, the origin stays as it is.
            origin = copy.deepcopy(self.model(made.origin))
            with forked(self.seed, "made", made.name):
                change = registry.find("model", made.change) if made.change != "copy" else None
                if change is not None:
                    with _theirs(f"The change '{made.change}'", f"make '{made.name}' of '{made.origin}'"):
                        origin = change(origin)
                if not isinstance(origin, nn.Module):
                    raise Refused(
                        f"The change '{made.change}' gives a {type(origin).__name__}, expected an nn.Module; "
                        "let it return the model."
                    )
            self.models[made.name] = origin.to(self.device)
        return {name: self.model(name) for name in stage.learners}

    def test_view(self, name: str) -> View | None:
        """What makes a further condition of the test split."""
        return _view(self.recipe.tests[name])

    def model(self, name: str) -> nn.Module:
        if name not in self.models:
            raise Refused(
                f"'{name}' is a teacher without a network of its own (a mean, an ensemble or a store), and a "
                "learner must be a network."
            )
        return self.models[name]

    def teacher(self, name: str, loader: Loader | None = None) -> Teacher:
        """Who teaches by that name, a lesson over `loader` if it is for one."""
        spec = self.recipe.models.get(name)
        if isinstance(spec, Mean):
            return MeanOf(self.model(spec.mean_of), decay=spec.decay, view=_view(spec.view))
        if isinstance(spec, Kept):
            return Stored(file(spec.stored), epochs=spec.epochs, called=name)
        if spec is not None and not isinstance(spec, Net):
            return Ensemble([self.teacher(other, loader) for other in spec.ensemble], spec.weights)
        if spec is None:  # made by an earlier stage
            return Frozen(self.model(name), called=name)
        frozen = Frozen(
            self.model(name),
            taps=spec.taps,
            view=_view(spec.view),
            normalise=None if spec.normalise is None else self.splits.train.renormalised(*spec.normalise),
            precision=None if spec.precision is None else getattr(torch, spec.precision),
            batch=spec.batch,
            columns=spec.columns,
            called=name,
            fold=spec.fold,
            channels_last=spec.channels_last,
            stop=spec.stop,
        )
        if spec.store is None or loader is None:
            return frozen
        self.keeping.append(Keeping(frozen, loader, self.stores, name))
        return self.keeping[-1]


def lab(recipe: Recipe, seed: int | None = None, device: str = "cpu", stores: Path | None = None) -> Lab:
    """Load the data, make every network with weights fixed by (seed, name). Raises `Refused`."""
    seed = recipe.seed if seed is None else seed
    data = splits(recipe.data)
    models = {
        name: _network(name, spec, data.train, seed).to(device)
        for name, spec in recipe.models.items()
        if isinstance(spec, Net)
    }
    tasks = [_task(recipe.task_in(stage)) for stage in recipe.stages]
    return Lab(recipe, seed, data, tasks, models, torch.device(device), stores)


def _task(spec: Named) -> Task:
    with _theirs(f"The task '{spec.name}'", "be set up"):
        made: Task = registry.find("task", spec.name)(**spec.knobs)
    return made


@contextmanager
def _theirs(who: str, what: str) -> Iterator[None]:
    """Code that may be a user's own: what fails inside is said in a sentence."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{who} cannot {what}: {registry.in_a_line(error)}.") from error


def splits(data: Source) -> Splits:
    """The data set that a recipe names. Raises `Refused`."""
    return _load(data) if ":" in data.name else _ours(data.model_dump_json())


@cache
def _ours(source: str) -> Splits:
    """A data set of ours, read once a process: rehearsals and a board's cells share it, nobody changes it."""
    return _load(Source.model_validate_json(source))


def _load(data: Source) -> Splits:
    load, knobs = registry.find("data", data.name), data.knobs
    own = data.valid is not None and "valid" in registry.knobs(load)
    with _theirs(f"The data '{data.name}'", "be loaded"):
        parts = as_splits(load(**knobs, **({"valid": data.valid} if own else {})))
    if data.valid is not None and not own:
        parts = parts.with_validation(data.valid, data.name)
    return parts if data.seen is None else keep_unseen(parts, data.seen)


def headline(recipe: Recipe, stage: Stage) -> str:
    """The score of a stage's task that is compared; empty where nothing is scored."""
    return str(registry.find("task", recipe.task_in(stage).name).headline)


def rehearse(
    recipe: Recipe, seed: int | None = None, device: str = "cpu", stores: Path | None = None
) -> list[Keeping]:
    """Assemble every stage once with untrained networks, so that what does not fit in the last is said before
    the first step. Gives the teachers that will keep their answers."""
    trial = replace(lab(recipe, seed, device, stores), rehearsal=True)
    for number in range(len(recipe.stages)):
        trial.engine(number)
    few = Loader(trial.splits.test, 2, seed=trial.seed).at(0)
    for views in recipe.tests.values():
        _shown(views, few)
    return trial.keeping


def takes(keeping: Iterable[Keeping], places: Sequence[Path]) -> dict[str, int]:
    """The bytes that answers will take at all of these places, one for each seed, by what is kept of whom.
    Raises `Refused` where that is too much, of which what is there already is no part."""
    # Lessons may share a store; the longest of them tells how large it will be.
    stores = {one.folder: one for one in sorted(keeping, key=lambda one: one.bytes)}
    total: dict[str, int] = {}
    for one in stores.values():
        total[one.kept] = total.get(one.kept, 0) + len(places) * one.bytes
    there = sum(file.stat().st_size for place in places for file in place.glob("*/*.bin"))
    less = "leave `store` out for a teacher, take fewer seeds or epochs, or name a folder on another disk"
    refuse_more("What teachers answer", sum(total.values()) - there, places[0], less)
    return total


def _each(teachers: Iterable[Teacher]) -> Iterator[Teacher]:
    """Teachers, and those that an ensemble mixes."""
    for teacher in teachers:
        yield teacher
        if isinstance(teacher, Ensemble):
            yield from _each(teacher.teachers)


def _network(name: str, spec: Net, data: Data, seed: int) -> nn.Module:
    factory = registry.find("model", spec.name)
    given = {"classes": len(data.classes), "channels": data.x.shape[1], "size": data.x.shape[-1]}
    wanted = {k: v for k, v in given.items() if k in registry.knobs(factory)}
    how = f"be made with {spec.knobs}" if spec.knobs else "be made"
    try:
        with forked(seed, "model", name), _theirs(f"Model '{name}' ({spec.name})", how):
            model = factory(**{**wanted, **spec.knobs})
    except Refused as error:
        said = str(error)
        raise Refused(said if f"'{name}'" in said else f"Model '{name}': {said}") from error.__cause__
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise Refused(f"Model '{name}' ({spec.name}) is of type {found}, expected an nn.Module.")
    _refuse_statistics(name, spec, data)
    Tapped(model, spec.taps, f"model '{name}'").look(spec.taps.keys() - {"out"})
    if spec.weights is not None:
        _fit(model, checkpoint.load_weights(file(spec.weights)), f"model '{name}'", spec.weights)
    if not spec.taps and not hasattr(model, "TAPS"):
        batch = Loader(data, 2, seed=seed).at(0)
        with suppress(Refused):  # what cannot be shown a row has no stages to look at
            model.TAPS = choose(model, _shown(spec.view, batch).x)  # type: ignore[assignment]
    return model


def _refuse_statistics(name: str, spec: Net, data: Data) -> None:
    channels = data.x.shape[1]
    for figure in spec.normalise or ():
        if isinstance(figure, list) and len(figure) not in (1, channels) and not spec.view:
            raise Refused(
                f"`normalise` of model '{name}' has {len(figure)} figures {figure}, and the data has "
                f"{channels} channel{'s' if channels > 1 else ''}; give one number, or one for each channel."
            )


def file(path: str) -> Path:
    """A file where it is said to be, or on a shelf of data sets, where what came with them lies."""
    places = [Path(path), *(shelf / path for shelf in shelves())]
    return next((place for place in places if place.exists()), places[0])


def _fit(model: nn.Module, weights: dict[str, torch.Tensor], called: str, source: str) -> None:
    """Load weights, naming the first tensor that does not fit."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights and name.endswith(".num_batches_tracked"):
            continue  # older files lack it, and torch counts from 0
        if name not in weights:
            raise Refused(f"{source} does not fit {called}: it lacks '{name}' {tuple(tensor.shape)}.")
        if weights[name].shape != tensor.shape:
            raise Refused(
                f"{source} does not fit {called}: '{name}' is {tuple(weights[name].shape)}, expected "
                f"{tuple(tensor.shape)}."
            )
    extra = weights.keys() - own.keys()
    if extra:
        raise Refused(f"{source} does not fit {called}: it has '{min(extra)}', which the model has not.")
    model.load_state_dict(weights)


def _term(use: Use, teachers: tuple[Teacher, ...]) -> Term:
    with _theirs(f"Method '{use.method}'", f"be made with {use.knobs}" if use.knobs else "be made"):
        method = registry.find("method", use.method)(**use.knobs)
    return Term(
        method,
        teachers,
        weight=use.weight,
        ramp=None if use.ramp is None else Ramp(**use.ramp.model_dump()),
        pairs={} if use.pairs == "cluster" else use.pairs,
        view=_view(use.view),
        through=tuple(_lens(lens) for lens in use.through),
        name=use.method if ":" not in use.method else "",
    )


def _lens(spec: Named) -> Lens:
    """A lens is a function; one that learns is a class of modules."""
    found = registry.find("lens", spec.name)
    with _theirs(f"The lens '{spec.name}'", "be made"):
        return found(**spec.knobs) if isinstance(found, type) else partial(found, **spec.knobs)


def _shown(chosen: list[Named], batch: Batch) -> Batch:
    """What views show of a batch, each tried by its name."""
    for view in chosen:
        with _theirs(f"The view '{view.name}'", f"show a batch of {batch.rows} rows"):
            shown = registry.find("view", view.name)(batch, **view.knobs)
        if not isinstance(shown, Batch):
            raise Refused(
                f"The view '{view.name}' gives a {type(shown).__name__}, expected a Batch; let it return "
                "batch.replace(x=...)."
            )
        batch = shown
    return batch


def _view(chosen: list[Named]) -> View | None:
    return _chain(tuple(view.model_dump_json() for view in chosen)) if chosen else None


@cache
def _chain(chosen: tuple[str, ...]) -> View:
    """Views one after the other. The same ones are one object, so that a student is shown them once."""
    views = [Named.model_validate_json(view) for view in chosen]
    steps: list[View] = [partial(registry.find("view", view.name), **view.knobs) for view in views]
    return steps[0] if len(steps) == 1 else partial(_through, steps)


def _through(steps: list[View], batch: Batch) -> Batch:
    shown = batch
    for step in steps:
        shown = step(shown)
    return shown.replace(lesson=batch.lesson)  # a view that draws anew winds no ramp back


def _pace(stage: Stage, player: str, parameters: Any, steps: int, learners: Mapping[str, nn.Module]) -> Pace:
    spec = stage.optim.get(player) or stage.optim.get("student") or Optim()
    if not parameters:
        raise Refused(
            f"Player '{player}' has no parameter that learns; unfreeze something, or leave the stage out."
        )
    groups = _groups(spec, player, parameters, learners)
    optimiser: torch.optim.Optimizer
    if spec.name == "sgd":
        nesterov = spec.nesterov and spec.momentum > 0
        optimiser = torch.optim.SGD(groups, spec.lr, spec.momentum, nesterov=nesterov)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name]
        optimiser = kind(groups, spec.lr, (spec.betas[0], spec.betas[1]))
    return Pace(optimiser, _course(spec, steps))


def _groups(
    spec: Optim, player: str, parameters: Mapping[str, nn.Parameter], learners: Mapping[str, nn.Module]
) -> list[dict[str, Any]]:
    """A player's parameters, those together that have one learning rate and one weight decay."""
    share: dict[int, float] = {}
    if spec.layer_decay < 1:
        mine = {id(parameter) for parameter in parameters.values()}
        for name, network in learners.items():
            if any(id(parameter) in mine for parameter in network.parameters()):
                share |= _fallen(spec.layer_decay, name, network)
        if not share:
            raise Refused(
                f"`layer_decay` is for the layers of a network, and player '{player}' is none; leave it out."
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        # An attention's biases have an axis for its heads.
        vector = parameter.ndim < 2 or "bias" in name.rpartition(".")[2]
        decay = 0.0 if vector and not spec.decay_vectors else spec.weight_decay
        groups.setdefault((spec.lr * share.get(id(parameter), 1.0), decay), []).append(parameter)
    return [{"params": some, "lr": lr, "weight_decay": decay} for (lr, decay), some in groups.items()]


def _fallen(decay: float, called: str, network: nn.Module) -> dict[int, float]:
    """For each parameter (by id) its share of the learning rate: 1 in the last block and the head, `decay`
    in the block before, and so on. What lies before the first block counts as the first, and what leads from
    one to the next as the former, as in TinyViT's code."""
    stages = getattr(network, "stages", None)
    if not stages:
        raise Refused(
            f"`layer_decay` needs the order of a network's blocks, and '{called}' "
            f"({type(network).__name__}) does not tell; leave it out, or give the network `stages`, its "
            "parts from input to output."
        )
    blocks: list[nn.Module] = []
    for stage in stages:
        parts = list(stage.children()) if isinstance(stage, nn.Sequential) else []
        made_of_blocks = bool(parts) and all(any(part.children()) for part in parts)
        blocks += parts if made_of_blocks else [stage]
    place = {id(p): n for n, block in enumerate(blocks) for p in block.parameters()}
    share, at = {}, 0
    for parameter in network.parameters():
        at = place.get(id(parameter), at)
        share[id(parameter)] = decay ** (len(blocks) - 1 - at)
    return share


def _course(spec: Optim, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each of `steps` steps."""
    marks = [math.ceil(m * steps) for m in spec.milestones]
    rise = max(spec.warmup * steps, 1)

    def factor(step: int) -> float:
        risen = min((step + 1) / rise, 1.0)
        match spec.schedule:
            case "cosine":
                fallen = 0.5 + 0.5 * math.cos(math.pi * step / steps)
                return risen * (spec.floor + (1 - spec.floor) * fallen)
            case "steps":
                return risen * spec.gamma ** sum(step >= mark for mark in marks)
        return risen

    return factor
