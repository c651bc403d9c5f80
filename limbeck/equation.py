"""A recipe in words: who learns from whom, and each stage's loss with every default written in."""

from collections.abc import Mapping, Sequence
from typing import Any

from limbeck import registry
from limbeck.recipe import Group, Growth, Kept, Made, Mean, Named, Net, Optim, Recipe, Stage, Use

FILLED_IN: dict[str, tuple[str, ...]] = {
    "data": (),
    "model": ("classes", "channels", "size"),
    "view": ("batch",),
    "scheme": ("cast",),
    "lens": ("s", "t"),
}
"""Parameters that a recipe need not give, or cannot: the house fills them in."""


def told(recipe: Recipe) -> str:
    """The whole recipe: data, models and stages, a few lines each."""
    data = [_called("data", recipe.data)]
    if recipe.data.valid is not None:
        data.append(f"validation split {recipe.data.valid:g} of every class")
    if recipe.data.seen is not None:
        data.append(f"of which the first {recipe.data.seen} classes are seen")
    models = [f"{name} = {_model(spec)}" for name, spec in recipe.models.items()]
    stages = [line for n in range(len(recipe.stages)) for line in stage(recipe, n)]
    head = [f"data {', '.join(data)}; task {_given(recipe.task)}; seed {recipe.seed}"]
    tests = [f"tested too as {name}: {_views(views)}" for name, views in recipe.tests.items()]
    return "\n".join([*head, *tests, *models, "", *stages])


def stage(recipe: Recipe, number: int) -> list[str]:
    """Lines for a stage: what each learner lowers, and below it on what rows and by which steps."""
    it = recipe.stages[number]
    start, scheme = f"stage {number}", registry.find("scheme", it.scheme.name)
    if it.scheme.name == "offline" and len(it.learners) == 1:
        lines = [f"{start} ({it.learns}): L = {_loss(recipe, it, it.learns)}"]
    elif it.scheme.name == "online":
        lines = [f"{start} ({name}): L = {_loss(recipe, it, name)}" for name in it.learners]
    else:  # such a scheme has losses of its own, and deals these out
        parts = _loss(recipe, it, None)
        lines = [f"{start} ({', '.join(it.learners)}): {it.scheme.name} is given {parts}"]
    if it.scheme.name != "offline":
        knobs = _knobs(scheme.staged, it.scheme.knobs, FILLED_IN["scheme"])
        lines.append(f"  scheme {it.scheme.name}{knobs} (limbeck show {it.scheme.name})")
    if isinstance(it.learner, Made):
        how = "a copy" if it.learner.change == "copy" else f"made by {it.learner.change}"
        lines.append(f"  {it.learns} is {how} of {it.learner.origin}")
    return [*lines, f"  {_rows(it)}", *(f"  {line}" for line in _steps(it))]


def _loss(recipe: Recipe, it: Stage, learner: str | None) -> str:
    terms = [f"{it.task_weight:g} · task({_given(recipe.task_in(it))})"] if it.task_weight else []
    for use in it.terms:
        teachers = [name for name in use.teachers if name != learner]
        if use.weight and teachers:
            ramp = "" if use.ramp is None else f"{_ramp(use.ramp)} · "
            terms.append(f"{use.weight:g} · {ramp}{use.method}({', '.join(_inside(use, teachers))})")
    return " + ".join(terms) or "0"


def _inside(use: Use, teachers: Sequence[str]) -> list[str]:
    who = teachers[0] if len(teachers) == 1 else f"mean over {' and '.join(teachers)}"
    knobs = _settings(registry.find("method", use.method), use.knobs)
    view = [f"student shown {_views(use.view)}"] if use.view else []
    lenses = [_called("lens", lens) for lens in use.through]
    through = [f"through {' and '.join(lenses)}"] if lenses else []
    named = {} if use.pairs == "cluster" else use.pairs
    pairs = [f"{name} = the teacher's {tap}" for name, tap in named.items()]
    pairs += ["the teacher's taps by clustering"] if use.pairs == "cluster" else []
    return [who, *knobs, *pairs, *view, *through]


def _ramp(ramp: Growth) -> str:
    after = f" after {ramp.after}" if ramp.after else ""
    return f"ramp({ramp.shape}, {'falling' if ramp.falls else 'rising'} in {ramp.epochs} epochs{after})"


def _rows(it: Stage) -> str:
    labels = "every label" if it.labels is None else f"{it.labels:,} labels"
    rows = "labelled rows only" if it.rows == "labelled" else "all rows"
    whole = f", {it.per_class} rows a class" if it.per_class else ""
    parts = [f"{it.epochs} epoch{'s' if it.epochs > 1 else ''} of batches of {it.batch}{whole}", rows, labels]
    if it.augment:
        parts.append(f"augmented by {_views(it.augment)}")
    if it.view:
        parts.append(f"the learner is shown {_views(it.view)}")
    return ", ".join(parts)


def _steps(it: Stage) -> list[str]:
    """A line for each player's optimiser, then what else there is to say of the steps."""
    players = it.optim or {"student": Optim()}
    lines = [f"{_optim(spec)}{f' for {name}' if len(players) > 1 else ''}" for name, spec in players.items()]
    further = []
    if it.accumulate > 1:
        further.append(f"each step in {it.accumulate} micro-batches")
    if it.clip is not None:
        further.append(f"gradient norm at most {it.clip:g}")
    if it.precision is not None:
        further.append(f"in {it.precision}")
    if it.compile:
        further.append("compiled")
    if it.patience is not None:
        further.append(f"stops after {it.patience} epochs without a better validation score")
    if it.keep == "best":
        further.append("the best epoch is kept")
    if it.ships is not None:
        further.append(f"ships {it.ships}")
    return [*lines, *([", ".join(further)] if further else [])]


def _optim(spec: Optim) -> str:
    momentum = f", momentum {spec.momentum:g}{' (Nesterov)' if spec.nesterov and spec.momentum else ''}"
    betas = "" if spec.betas == Optim().betas else f", betas {_value(spec.betas)}"
    course = f"{spec.schedule} schedule"
    if spec.schedule == "steps":
        course = f"times {spec.gamma:g} at {', '.join(f'{m:g}' for m in spec.milestones)} of the stage"
    elif spec.schedule == "cosine" and spec.floor:
        course += f" down to {spec.floor:g} of it"
    if spec.warmup:
        course += f" after a warm-up over {spec.warmup:g} of the stage"
    lower = f", times {spec.layer_decay:g} a block down from the head" if spec.layer_decay < 1 else ""
    spared = "" if spec.decay_vectors else " but of biases and norms"
    return (
        f"{spec.name}, learning rate {spec.lr:g}{lower}{momentum if spec.name == 'sgd' else betas}, "
        f"weight decay {spec.weight_decay:g}{spared}, {course}"
    )


def _model(spec: Net | Mean | Group | Kept) -> str:
    if isinstance(spec, Kept):
        return f"answers stored in {spec.stored} ({spec.epochs})"
    if isinstance(spec, Mean):
        text = f"running mean of {spec.mean_of}, decay {spec.decay:g}"
    elif isinstance(spec, Group):
        shares = f", weights {_value(spec.weights)}" if spec.weights else ""
        return f"mean probability of {' and '.join(spec.ensemble)}{shares}"
    else:
        text = _called("model", spec)
        text += f", weights from {spec.weights}" if spec.weights else ""
        text += f", columns {_value(spec.columns)}" if spec.columns else ""
        text += f", normalised by {_value(spec.normalise)}" if spec.normalise else ""
        text += f", answers in {spec.precision}" if spec.precision else ""
        text += f", {spec.batch} rows at a time" if spec.batch else ""
        text += ", answers stored as they are given" if spec.store else ""
        without = [key for key in ("fold", "channels_last", "stop") if not getattr(spec, key)]
        text += f", without {' and '.join(without)}" if without else ""
        text += "".join(f", {name} at {tap}" for name, tap in spec.taps.items())
    return text + (f", shown {_views(spec.view)}" if spec.view else "")


def _views(chosen: Sequence[Named]) -> str:
    return " and ".join(_called("view", view) for view in chosen)


def _called(kind: str, spec: Named) -> str:
    """`name(knob=value, …)` with the defaults; what is filled in stands there only if it was given."""
    if kind == "data" and ":" in spec.name:  # may be a data set itself, which has no signature
        return _given(spec)
    return spec.name + _knobs(registry.find(kind, spec.name), spec.knobs, FILLED_IN[kind])


def _given(spec: Named) -> str:
    """`name(knob=value, …)` with the knobs that were given."""
    return spec.name + _listed([f"{name}={_value(value)}" for name, value in spec.knobs.items()])


def _knobs(factory: Any, given: Mapping[str, Any], hidden: Sequence[str] = ()) -> str:
    return _listed(_settings(factory, given, hidden))


def _listed(settings: Sequence[str]) -> str:
    return f"({', '.join(settings)})" if settings else ""


def _settings(factory: Any, given: Mapping[str, Any], hidden: Sequence[str] = ()) -> list[str]:
    defaults = {n: p.default for n, p in registry.knobs(factory).items() if n not in hidden}
    return [f"{name}={_value(value)}" for name, value in {**defaults, **given}.items()]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
