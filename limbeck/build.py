"""The one switchboard: here, and only here, the names of a recipe become objects.

Order of assembly, everywhere: models → mean copies → taps → one eager dry batch → methods' modules → checks →
device → optimisers.
"""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import checkpoint, registry
from limbeck.core.batch import IGNORE, Batch, View
from limbeck.core.cast import Cast
from limbeck.core.distiller import ClassesDiffer
from limbeck.core.keyed import forked
from limbeck.core.refused import Refused
from limbeck.core.scheme import Lens, Ramp, Scheme, Term
from limbeck.core.task import Task
from limbeck.core.teachers import Ensemble, Frozen, MeanOf, Peer, Teacher
from limbeck.data.loader import Data, Loader, Splits
from limbeck.data.outside import as_splits
from limbeck.data.published import shelves
from limbeck.data.unseen import keep_unseen
from limbeck.engine import Engine, Pace
from limbeck.models.choose import choose
from limbeck.recipe import Made, Mean, Named, Net, Optim, Recipe, Source, Stage, Use


@dataclass(frozen=True)
class Lab:
    """A recipe's data, task and models, ready to be put together stage by stage."""

    recipe: Recipe
    seed: int
    splits: Splits
    task: Task
    models: dict[str, nn.Module]
    device: torch.device

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
        learners = self.learners(stage)
        loader = self.loader(stage)
        looks = {name: spec.taps for name, spec in self.recipe.models.items() if isinstance(spec, Net)}
        example, view = loader.at(0).to(self.device), _view(stage.view)
        shown = example if view is None else view(example)
        peers = {name: Peer(net, shown, taps=looks.get(name), called=name) for name, net in learners.items()}
        self._refuse_dressed({name for use in stage.terms for name in use.teachers} & peers.keys())
        asked: dict[str, Teacher] = dict(peers)
        for name in [name for use in stage.terms for name in use.teachers]:
            asked.setdefault(name, self.teacher(name))
        cast = Cast(
            learners,
            example,
            [_term(use, tuple(asked[name] for name in use.teachers)) for use in stage.terms],
            self.task if stage.task_weight and self.task.headline else None,  # the task `none` has no loss
            stage.task_weight,
            view,
            looks,
            peers,
            self.seed,
        )
        scheme: Scheme = registry.find("scheme", stage.scheme.name).staged(cast, **stage.scheme.knobs)
        if stage.ships is not None:
            mean = asked.get(stage.ships) or self.teacher(stage.ships)
            assert isinstance(mean, MeanOf)  # the recipe was checked
            scheme.mean = mean
        steps = stage.epochs * loader.steps
        paces = {
            player: _pace(stage, player, parameters, steps) for player, parameters in scheme.players().items()
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

    def _refuse_dressed(self, names: set[str]) -> None:
        """A learner that teaches answers as it learns: what is said of it as a teacher is not passed over."""
        for name in sorted(names):
            spec = self.recipe.models.get(name)
            said = [key for key in ("view", "columns", "normalise", "precision") if getattr(spec, key, None)]
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
            data,
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
                self.models[made.name] = (origin if change is None else change(origin)).to(self.device)
        return {name: self.model(name) for name in stage.learners}

    def model(self, name: str) -> nn.Module:
        if name not in self.models:
            raise Refused(
                f"'{name}' is a teacher made of other models (a mean or an ensemble); a learner must be a "
                "network."
            )
        return self.models[name]

    def teacher(self, name: str) -> Teacher:
        spec = self.recipe.models.get(name)
        if isinstance(spec, Mean):
            return MeanOf(self.model(spec.mean_of), decay=spec.decay, view=_view(spec.view))
        if spec is not None and not isinstance(spec, Net):
            return Ensemble([self.teacher(other) for other in spec.ensemble], spec.weights)
        if spec is None:  # made by an earlier stage
            return Frozen(self.model(name), called=name)
        return Frozen(
            self.model(name),
            taps=spec.taps,
            view=_view(spec.view),
            normalise=None if spec.normalise is None else self.splits.train.renormalised(*spec.normalise),
            precision=None if spec.precision is None else getattr(torch, spec.precision),
            columns=spec.columns,
            called=name,
        )


def lab(recipe: Recipe, seed: int | None = None, device: str = "cpu") -> Lab:
    """Load the data, make every network with weights fixed by (seed, name). Raises `Refused`."""
    seed = recipe.seed if seed is None else seed
    splits = _splits(recipe.data)
    models = {
        name: _network(name, spec, splits.train, seed).to(device)
        for name, spec in recipe.models.items()
        if isinstance(spec, Net)
    }
    return Lab(recipe, seed, splits, registry.find("task", recipe.task)(), models, torch.device(device))


def _splits(data: Source) -> Splits:
    return _load(data) if ":" in data.name else _ours(data.model_dump_json())


@cache
def _ours(source: str) -> Splits:
    """A data set of ours, read once a process: rehearsals and a board's cells share it, nobody changes it."""
    return _load(Source.model_validate_json(source))


def _load(data: Source) -> Splits:
    load, knobs = registry.find("data", data.name), data.knobs
    own = data.valid is not None and "valid" in registry.knobs(load)
    splits = as_splits(load(**knobs, **({"valid": data.valid} if own else {})))
    if data.valid is not None and not own:
        splits = splits.with_validation(data.valid, data.name)
    return splits if data.seen is None else keep_unseen(splits, data.seen)


def rehearse(recipe: Recipe, seed: int | None = None, device: str = "cpu") -> None:
    """Assemble every stage once with untrained networks, so that what does not fit in the last is said before
    the first step."""
    trial = lab(recipe, seed, device)
    for number in range(len(recipe.stages)):
        trial.engine(number)


def _network(name: str, spec: Net, data: Data, seed: int) -> nn.Module:
    factory = registry.find("model", spec.name)
    given = {"classes": len(data.classes), "channels": data.x.shape[1], "size": data.x.shape[-1]}
    wanted = {k: v for k, v in given.items() if k in registry.knobs(factory)}
    with forked(seed, "model", name):
        try:
            model = factory(**{**wanted, **spec.knobs})
        except Refused:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise Refused(
                f"Model '{name}' ({spec.name}) cannot be made with {spec.knobs}: {error}."
            ) from error
    if not isinstance(model, nn.Module):
        raise Refused(f"Model '{name}' ({spec.name}) is a {type(model).__name__}, expected an nn.Module.")
    if spec.weights is not None:
        _fit(model, checkpoint.load_weights(_file(spec.weights)), f"model '{name}'", spec.weights)
    if not spec.taps and not hasattr(model, "TAPS"):
        batch, view = Loader(data, 2, seed=seed).at(0), _view(spec.view)
        with suppress(Refused):  # what cannot be shown a row has no stages to look at
            model.TAPS = choose(model, (batch if view is None else view(batch)).x)  # type: ignore[assignment]
    return model


def _file(path: str) -> Path:
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
    return Term(
        registry.find("method", use.method)(**use.knobs),
        teachers,
        weight=use.weight,
        ramp=None if use.ramp is None else Ramp(**use.ramp.model_dump()),
        view=_view(use.view),
        through=tuple(_lens(lens) for lens in use.through),
        name=use.method if ":" not in use.method else "",
    )


def _lens(name: str) -> Lens:
    """A lens is a function; one that learns is a class of modules."""
    found = registry.find("lens", name)
    return found() if isinstance(found, type) else found


def _view(chosen: list[Named]) -> View | None:
    return _chain(tuple(view.model_dump_json() for view in chosen)) if chosen else None


@cache
def _chain(chosen: tuple[str, ...]) -> View:
    """Views one after the other. The same ones are one object, so that a student is shown them once."""
    views = [Named.model_validate_json(view) for view in chosen]
    steps: list[View] = [partial(registry.find("view", view.name), **view.knobs) for view in views]
    return steps[0] if len(steps) == 1 else partial(_through, steps)


def _through(steps: list[View], batch: Batch) -> Batch:
    for step in steps:
        batch = step(batch)
    return batch


def _pace(stage: Stage, player: str, parameters: Any, steps: int) -> Pace:
    spec = stage.optim.get(player) or stage.optim.get("student") or Optim()
    values = list(parameters.values())
    if not values:
        raise Refused(
            f"Player '{player}' has no parameter that learns; unfreeze something, or leave the stage out."
        )
    optimiser: torch.optim.Optimizer
    if spec.name == "sgd":
        optimiser = torch.optim.SGD(
            values,
            spec.lr,
            spec.momentum,
            weight_decay=spec.weight_decay,
            nesterov=spec.nesterov and spec.momentum > 0,
        )
    else:
        optimiser = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name](
            values, spec.lr, weight_decay=spec.weight_decay
        )
    return Pace(optimiser, _course(spec, steps))


def _course(spec: Optim, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each of `steps` steps."""
    marks = [math.ceil(m * steps) for m in spec.milestones]
    rise = max(spec.warmup * steps, 1)

    def factor(step: int) -> float:
        risen = min((step + 1) / rise, 1.0)
        match spec.schedule:
            case "cosine":
                return risen * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            case "steps":
                return risen * spec.gamma ** sum(step >= mark for mark in marks)
        return risen

    return factor
