"""A recipe: named models and a list of stages, as data. TOML in, Python out, and back."""

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PydanticUserError,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from limbeck.core.refused import Refused


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Open(BaseModel):
    """Further keys are the knobs of what it names; they are checked against its signature when the recipe is
    read."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def knobs(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Named(Open):
    """Something by its name, in our folders or as `package.module:name`; further keys are its knobs."""

    name: str


def _in_order(value: Any) -> Any:
    return [_named(one) for one in value] if isinstance(value, list) else [_named(value)]


Called = Annotated[Named, BeforeValidator(_named)]
"""A name, or a table with its knobs."""

Views = Annotated[list[Named], BeforeValidator(_in_order)]
"""Views one after the other: a name, a table with the view's knobs, or a list of these."""

Lenses = Annotated[list[Named], BeforeValidator(_in_order)]
"""Lenses one after the other, as views are said."""


class Source(Named):
    """Data, by its name in `data/` or as `package.module:function`.

    valid: draws the validation split anew, this share of every class. seen: the first so many classes are
        learned from and tested on; what the test part has of the others is `unseen`, and scored for itself.
    """

    valid: float | None = Field(None, gt=0, lt=1)
    seen: int | None = Field(None, ge=1)


class Net(Named):
    """A network: its name in `models/` or `package.module:factory`, its knobs, and how it is looked at when
    it teaches.

    weights: a safetensors file, or a .npz of plain arrays. taps: names for looks inside it. view: what it is
        shown when it teaches.
    columns: for each of the student's classes, its output that scores it. precision: of its answers when it
        teaches. batch: as many rows it answers at a time then, so that it takes less memory.
    normalise: the [mean, std] of pixel values in 0 … 1 that it was trained under, where they are not those of
        the data.
    store: `auto` stores its answers as it gives them, and reads those that are there already: the arms of a
        board ask it once.
    fold, channels_last, stop: ways to answer sooner that are taken where they are exact to rounding:
        BatchNorm folded into convolutions, the layout that suits these (on a CPU it learns in that too), no
        forward beyond its last tap.
    """

    weights: str | None = Field(None, min_length=1)
    taps: dict[str, str] = {}
    view: Views = []
    columns: list[int] | None = None
    normalise: Annotated[list[float | list[float]], Field(min_length=2, max_length=2)] | None = None
    precision: Literal["bfloat16", "float16"] | None = None
    batch: int | None = Field(None, ge=1)
    store: Literal["auto"] | None = None
    fold: bool = True
    channels_last: bool = True
    stop: bool = True


class Mean(Strict):
    """A teacher that is the running mean of a learner.

    mean_of: the learner. decay: of the running mean, a step. view: what it is shown.
    """

    mean_of: str
    decay: float = Field(0.999, ge=0, lt=1)
    view: Views = []


class Group(Strict):
    """A teacher that mixes several teachers' probabilities.

    ensemble: the teachers' names. weights: of their probabilities; equal by default.
    """

    ensemble: list[str] = Field(min_length=1)
    weights: list[float] | None = None


class Kept(Strict):
    """A teacher that answers from a store that `limbeck store write` wrote: no network, no memory of one.

    stored: the store's folder. epochs: `exact` for the very lessons it was written for; `cycle` reuses its
        epochs in turn, for views that the teacher has not seen.
    """

    stored: str
    epochs: Literal["exact", "cycle"] = "exact"


class Growth(Strict):
    """A weight's ramp: 0 for `after` epochs, full in the `epochs`-th one after that; or the other way round.

    epochs: until the weight is full. after: epochs at 0 before that. shape: of the way up. falls: from full
        to 0 instead.
    """

    epochs: int = Field(ge=1)
    after: int = Field(0, ge=0)
    shape: Literal["linear", "cosine", "sigmoid"] = "linear"
    falls: bool = False


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Pairs = Annotated[
    Annotated[dict[str, str], Tag("<named>")] | Annotated[Literal["cluster"], Tag("<word>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<named>"),
]
"""The teacher's taps by the names that a method has for them; or `cluster`, which chooses them."""


class Use(Open):
    """A method in use; further keys are its knobs.

    method: its name, or `package.module:Class`. teacher: one name or several, then their mean is taken.
    weight: of the term in the loss. ramp: how the weight grows. pairs: for a name by which the method looks
        at the teacher, the teacher's tap that is meant; `cluster`, which may also be said as `taps`, chooses
        among the teacher's blocks. view: what the student is shown for this term.
    through: lenses, first to last.
    """

    model_config = ConfigDict(populate_by_name=True)

    method: str
    teachers: Annotated[list[str], Field(min_length=1), BeforeValidator(_listed)] = Field(
        ["teacher"], alias="teacher"
    )
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    ramp: Growth | None = None
    pairs: Pairs = {}
    view: Views = []
    through: Lenses = []

    @model_validator(mode="before")
    @classmethod
    def _clustered(cls, value: Any) -> Any:
        """`taps = "cluster"`: the method's own taps of the student, and the teacher's by clustering."""
        if isinstance(value, dict) and value.get("taps") == "cluster":
            if "pairs" in value:
                raise ValueError("`taps = 'cluster'` chooses the taps that `pairs` names; say one of them")
            value = {key: said for key, said in value.items() if key != "taps"} | {"pairs": "cluster"}
        return value


def _method(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


class Made(Strict):
    """A learner made from a trained model when its stage begins. `change` is `copy` or
    `package.module:function` (model → model)."""

    name: str
    origin: str = Field(alias="from")
    change: str = "copy"


def _shares(marks: list[float]) -> list[float]:
    if not all(0 < mark < 1 for mark in marks):
        raise ValueError(
            "expected shares of the stage between 0 and 1, not epochs; epoch 150 of 240 is 0.625"
        )
    return marks


def _two_shares(betas: list[float]) -> list[float]:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError("expected two numbers from 0 up to below 1, such as 0.9 and 0.999")
    return betas


class Optim(Strict):
    """An optimiser and the course of its learning rate over the stage.

    lr: the highest learning rate. momentum: of sgd. nesterov: of sgd's momentum. betas: of adam and adamw.
        weight_decay: of the parameters. decay_vectors: whether of biases, norms and other parameters of one
        axis too. layer_decay: what the learning rate is multiplied by from a block of the network to the one
        before it, from the head down.
    schedule: the learning rate's course over the stage. floor: share of it that `cosine` ends at. milestones:
        shares of the stage at which `steps` multiplies it. gamma: by how much. warmup: share of the stage in
        which it grows from 0.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = True
    betas: Annotated[list[float], AfterValidator(_two_shares)] = [0.9, 0.999]
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False)
    decay_vectors: bool = True
    layer_decay: float = Field(1.0, gt=0, le=1)
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    floor: float = Field(0.0, ge=0, lt=1)
    # Of the stage: epochs 150, 180, 210 of 240.
    milestones: Annotated[list[float], AfterValidator(_shares)] = [0.625, 0.75, 0.875]
    gamma: float = Field(0.1, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.0, ge=0, lt=1)


def _learner_kind(value: Any) -> str:
    kinds: dict[type, str] = {dict: "<made>", Made: "<made>", list: "<several>"}
    return kinds.get(type(value), "<name>")


Learner = Annotated[
    Annotated[str, Tag("<name>")]
    | Annotated[list[str], Field(min_length=1), Tag("<several>")]
    | Annotated[Made, Tag("<made>")],
    Discriminator(_learner_kind),
]


class Stage(Strict):
    """Somebody learns for some epochs. Without terms it is ordinary training.

    learner: one model, several (for a scheme in which several learn: the first is what it ships), or one made
        now. epochs: passes over the rows. batch: rows a step. labels: how many rows keep theirs; all by
        default.
    rows: `labelled` leaves the others out. per_class: batches of whole classes, this many rows of each.
    terms: what is taught beside the task. task_weight: of the ordinary loss. task: where it is another than
        the recipe's. scheme: whose turn it is; `offline` by default. augment: views of the whole batch, which
        everybody sees. view: what only the learner sees.
    ships: the running mean (`mean_of`) of the learner that is taken in its place at the end.
    accumulate: micro-batches a step. clip: largest norm of a player's gradient. precision: of the forward, by
        autocast. compile: the lesson by `torch.compile`.
    patience: epochs without a better validation score before the stage ends. keep: whether the last or the
        best
        epoch's weights are taken.
    optim: an optimiser for each player; the learner's is `student`.
    """

    learner: Learner
    epochs: int = Field(ge=1)
    batch: int = Field(64, ge=1)
    labels: int | None = Field(None, ge=0)
    rows: Literal["all", "labelled"] = "all"
    per_class: int | None = Field(None, ge=1)
    terms: list[Annotated[Use, BeforeValidator(_method)]] = []
    task_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    task: Called | None = None
    scheme: Called = Named(name="offline")
    augment: Views = []
    view: Views = []
    ships: str | None = None
    accumulate: int = Field(1, ge=1)
    clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    precision: Literal["bfloat16", "float16"] | None = None
    compile: bool = False
    patience: int | None = Field(None, ge=1)
    keep: Literal["last", "best"] = "last"
    optim: dict[str, Optim] = {}

    @property
    def learners(self) -> tuple[str, ...]:
        """Who learns, by name."""
        if isinstance(self.learner, Made):
            return (self.learner.name,)
        return (self.learner,) if isinstance(self.learner, str) else tuple(self.learner)

    @property
    def learns(self) -> str:
        """The learner whose network the stage is there for: the first."""
        return self.learners[0]


def _model_kind(value: Any) -> str:
    has = (
        value if isinstance(value, dict) else type(value).model_fields if isinstance(value, BaseModel) else {}
    )
    marks = {"mean_of": "<mean>", "ensemble": "<group>", "stored": "<kept>"}
    return next((kind for mark, kind in marks.items() if mark in has), "<net>")


Model = Annotated[
    Annotated[Net, Tag("<net>")]
    | Annotated[Mean, Tag("<mean>")]
    | Annotated[Group, Tag("<group>")]
    | Annotated[Kept, Tag("<kept>")],
    Discriminator(_model_kind),
    BeforeValidator(_named),
]


class Recipe(Strict):
    """What is to be done, whole.

    data: where rows come from. task: the ordinary loss and score. seed: fixes whatever is random. models: by
        the names that stages use. stages: in order; who learned in one may teach in the next. tests: further
        conditions that the test split is scored under, each a name and the views that make it.
    """

    data: Annotated[Source, BeforeValidator(_named)]
    task: Called = Named(name="classify")
    seed: int = 0
    models: dict[str, Model]
    stages: list[Stage] = Field(min_length=1)
    tests: dict[str, Views] = {}

    def task_in(self, stage: Stage) -> Named:
        """What is done in one of its stages."""
        return stage.task or self.task

    @model_validator(mode="after")
    def _names_are_known(self) -> "Recipe":
        made: set[str] = set()
        for n, stage in enumerate(self.stages):
            known = [*self.models, *made]
            if isinstance(stage.learner, Made):
                _known(f"stages.{n}.learner.from", stage.learner.origin, known)
                if stage.learner.name in known:
                    raise Refused(
                        f"stages.{n}.learner.name is '{stage.learner.name}', which is a model already; give "
                        "what is made a new name."
                    )
                made.add(stage.learner.name)
                known.append(stage.learner.name)
            else:
                for learner in stage.learners:
                    _known(f"stages.{n}.learner", learner, known)
                if len(set(stage.learners)) < len(stage.learners):
                    raise Refused(f"stages.{n}.learner names a model twice: {', '.join(stage.learners)}.")
            if stage.ships is not None:
                _known(f"stages.{n}.ships", stage.ships, known)
                mean = self.models.get(stage.ships)
                if not isinstance(mean, Mean) or mean.mean_of != stage.learns:
                    raise Refused(
                        f"stages.{n}.ships is '{stage.ships}', which is not a running mean of "
                        f"'{stage.learns}'; name a model {{ mean_of = '{stage.learns}' }}."
                    )
            for k, use in enumerate(stage.terms):
                for teacher in use.teachers:
                    _known(f"stages.{n}.terms.{k}.teacher", teacher, known)
        for name in self.tests.keys() & {"train", "valid", "test", "unseen"}:
            raise Refused(f"tests.{name} would be taken for a part of the data; call it something else.")
        for name, model in self.models.items():
            for other in _made_of(model):
                _known(f"models.{name}", other, [*self.models, *made])
            if name in self.within(name):
                raise Refused(f"models.{name} is made of itself; an ensemble's members must be others.")
        return self

    def within(self, name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """The models that an ensemble holds, at any depth. A mean is a copy: it holds nobody."""
        model = self.models.get(name)
        if not isinstance(model, Group) or name in seen:
            return set()
        deeper = (self.within(other, seen | {name}) for other in model.ensemble)
        return set(model.ensemble).union(*deeper)

    @property
    def fingerprint(self) -> str:
        """sha256 of the recipe's content, defaults written out."""
        return sha256(self.as_json().encode()).hexdigest()

    def as_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)


def _made_of(model: Net | Mean | Group | Kept) -> list[str]:
    return [model.mean_of] if isinstance(model, Mean) else model.ensemble if isinstance(model, Group) else []


def read(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a TOML file, with `--set` changes such as `stages.1.epochs=2`. Raises `Refused`, naming
    file and field."""
    content = read_toml(path)
    if "arms" in content:
        raise Refused(f"{path} is a board, expected a recipe; run it with: limbeck board {path}")
    return parse(apply(content, changes), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.is_dir():
            resume = f"go on with its run: limbeck resume {path}" if (path / "run.json").exists() else ""
            raise Refused(f"{path} is a folder; {resume or 'give the path of a recipe (.toml)'}.")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"There is no file {path}; give the path of a recipe (.toml).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is not TOML: {error}.") from None


def parse(content: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A recipe from plain data, its names and knobs checked against what there is. Raises `Refused`."""
    return checked(Recipe, content, source, _check_knobs)


def checked(model: Any, content: Any, source: str, *checks: Any) -> Any:
    """`content` as a `model`; the first thing wrong in one sentence."""
    try:
        whole = TypeAdapter(model).validate_python(content)
        for check in checks:
            check(whole)
        return whole
    except ValidationError as error:
        raise Refused(f"In {source}: {_sentence(model, error)}") from None
    except Refused as error:
        raise Refused(f"In {source}: {error}") from None


def apply(content: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """`a.0.b=value` changes on plain data; a name with a dot in it is quoted, as in TOML; the value is TOML,
    or else a string. Raises `Refused` for a place that is not there."""
    content = copy.deepcopy(content)
    for change in changes:
        path, equals, text = change.partition("=")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        place: Any = content
        try:
            *way, last = [quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|([^.\s"]+)', path)]
            for step in way:
                place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
            if isinstance(place, list):
                place[int(last)] = value
            else:
                place[last] = value
        except (ValueError, IndexError, TypeError, AttributeError):
            equals = ""
        if not equals:
            raise Refused(
                f"The change '{change}' cannot be made; expected KEY=VALUE with a place that is there, for "
                "example stages.1.epochs=2."
            )
    return content


def _known(where: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise Refused(
            f"{where} names '{name}', which is no model of this "
            f"recipe{f' (did you mean {near[0]!r}?)' if near else ''}; "
            f"{'its models are ' + ', '.join(known) if known else 'it has none'}."
        )


def _check_knobs(recipe: Recipe) -> None:
    from limbeck import registry

    def views(where: str, chosen: Sequence[Named]) -> None:
        for view in chosen:
            _fit_knobs(where, registry.find("view", view.name), view, ours=("batch",))

    _fit_knobs("task", registry.find("task", recipe.task.name), recipe.task)
    _fit_knobs("data", registry.find("data", recipe.data.name), recipe.data)
    for name, model in recipe.models.items():
        if isinstance(model, Net):
            factory = registry.find("model", model.name)
            _fit_knobs(f"models.{name}", factory, model, given=("classes", "channels", "size"))
        if isinstance(model, Net | Mean):
            views(f"models.{name}.view", model.view)
    for name, chosen in recipe.tests.items():
        views(f"tests.{name}", chosen)
    for n, stage in enumerate(recipe.stages):
        scheme = registry.find("scheme", stage.scheme.name)
        if isinstance(stage.learner, Made) and stage.learner.change != "copy":
            registry.find("model", stage.learner.change)
        _fit_knobs(f"stages.{n}.scheme", scheme.staged, stage.scheme, ours=("cast",))
        if stage.task is not None:
            _fit_knobs(f"stages.{n}.task", registry.find("task", stage.task.name), stage.task)
        views(f"stages.{n}.augment", stage.augment)
        views(f"stages.{n}.view", stage.view)
        for k, use in enumerate(stage.terms):
            where = f"stages.{n}.terms.{k}"
            _refuse_own_teacher(where, recipe, stage, use, peers=getattr(scheme, "learners_teach", False))
            _fit_knobs(where, registry.find("method", use.method), use)
            for lens in use.through:
                _fit_knobs(f"{where}.through", registry.find("lens", lens.name), lens, ours=("s", "t"))
            views(f"{where}.view", use.view)


def _refuse_own_teacher(where: str, recipe: Recipe, stage: Stage, use: Use, peers: bool) -> None:
    """Peers teach each other by name; an ensemble, which is in eval, would stop the learners in it."""
    if any({*stage.learners} & {*([] if peers else [t]), *recipe.within(t)} for t in use.teachers):
        raise Refused(
            f"{where} would let '{stage.learns}' teach itself; name another teacher, its running mean "
            "(`mean_of`), or a learner made from it."
        )


def _fit_knobs(
    where: str, factory: Any, spec: Open, given: Sequence[str] = (), ours: Sequence[str] = ()
) -> None:
    """given: what the house fills in where the recipe does not. ours: what it alone can give."""
    from limbeck import registry

    known = {name: knob for name, knob in registry.knobs(factory).items() if name not in ours}
    for knob, value in spec.knobs.items():
        if knob not in known:
            names = [*known, *type(spec).model_fields]
            raise Refused(
                f"unknown key `{knob}` at {where}{_meant(knob, names)}; "
                f"{'its knobs are ' + ', '.join(known) if known else 'it has no knobs'}."
            )
        annotation = known[knob].annotation
        if annotation is not known[knob].empty:
            try:
                TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
            except ValidationError as error:
                first = error.errors()[0]
                raise Refused(f"{where}.{knob} is {value!r}: {_expected(first)}.") from None
            except (PydanticUserError, NameError):
                pass  # a type that no recipe can say; what it names will tell
    missing = [n for n, p in known.items() if p.default is p.empty and n not in spec.knobs and n not in given]
    if missing:
        raise Refused(f"{where} lacks `{missing[0]}`, which {getattr(factory, '__name__', factory)} needs.")


def _sentence(model: Any, error: ValidationError) -> str:
    # A misspelt key also makes one missing; the misspelling is what to say.
    first = max(error.errors(), key=lambda e: e["type"] == "extra_forbidden")
    loc = [str(part) for part in first["loc"] if not str(part).startswith("<")]
    where = ".".join(loc)
    if first["type"] == "extra_forbidden":
        fields = getattr(_table(model, first["loc"][:-1]), "model_fields", {})
        names = [field.alias or name for name, field in fields.items()]
        place = f" at {'.'.join(loc[:-1])}" if loc[:-1] else ""
        return f"unknown key `{loc[-1]}`{place}{_meant(loc[-1], names)}."
    if first["type"] == "missing":
        return f"`{where}` is missing; it is required."
    if first["type"] == "value_error":
        why = first["ctx"]["error"]
        return f"{where} is {first['input']!r}: {why}." if where else str(why)
    return f"{where or 'it'} is {first['input']!r}: {_expected(first)}."


def _table(model: Any, loc: Sequence[int | str]) -> Any:
    """The model of the table at `loc`, of those that take no further keys."""
    match loc:
        case [*_, "<made>" | "<mean>" | "<group>" | "<kept>" as tag]:
            return {"<made>": Made, "<mean>": Mean, "<group>": Group, "<kept>": Kept}[tag]
        case [*_, "optim", str()]:
            return Optim
        case [*_, "ramp"]:
            return Growth
        case ["stages", int()]:
            return Stage
    return model


def _meant(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def _expected(error: Any) -> str:
    """Pydantic's message in the words of TOML."""
    match error["type"]:
        case "model_type" if error["ctx"]["class_name"] in ("Net", "Source", "Named", "Use"):
            return "expected a name or a table"
        case "model_type" | "dict_type" | "mapping_type":
            return "expected a table"
        case "list_type" | "tuple_type" | "sequence_type":
            return "expected a list"
        case "too_short" | "too_long":
            short = error["type"] == "too_short"
            count = error["ctx"]["min_length" if short else "max_length"]
            entries = "entry" if count == 1 else "entries"
            return f"expected at {'least' if short else 'most'} {count} {entries}"
        case "string_too_short":
            return "expected some text"
    return "expected " + error["msg"].removeprefix("Input should be ").rstrip(".")
