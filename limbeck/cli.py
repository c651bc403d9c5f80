"""The command line. Torch is imported only by commands that need it."""

import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from limbeck.board import Board
    from limbeck.data.store_write import Progress
    from limbeck.run import Moment, Run

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)

Where = Annotated[Path | None, typer.Option("--out", help="The folder to work in (default: runs/NAME).")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Change the recipe: stages.1.epochs=2 (may be repeated).")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def main() -> None:
    """Run the command line. What limbeck refuses is one sentence and exit code 2; an asked-for stop is exit
    code 130."""
    from limbeck.core.refused import Refused

    sys.path.append("")  # modules of yours where you are; anybody else's come first
    try:
        with warnings.catch_warnings():
            # What is to be known is a sentence too, without the line of ours that says it.
            warnings.showwarning = lambda message, *_: print(f"limbeck: {message}", file=sys.stderr)
            app()
    except Refused as error:
        sys.exit(_say(str(error), 2))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.toml).")],
    out: Where = None,
    set_: Sets = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed.")] = None,
    device: Device = "cpu",
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
) -> None:
    """Train what a recipe says, from its first stage to its last."""
    from limbeck import recipe as recipes
    from limbeck.run import Run

    plan = recipes.read(recipe, set_ or ())
    _go(Run(plan, out or Path("runs") / recipe.stem, seed=seed, device=_device(device), every=every))


@app.command()
def distill(
    teacher: Annotated[
        str,
        typer.Option(help="Weights limbeck wrote, NAME=WEIGHTS, or the name of a network to train first."),
    ],
    student: Annotated[str, typer.Option(help="The small network's name (`limbeck list model`).")],
    data: Annotated[str, typer.Option(help="A data set's name, or a folder of images, ROOT/CLASS/IMAGE.")],
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 30,
    labels: Annotated[int | None, typer.Option(min=0, help="Labels the student gets (default: all).")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; 3 or more can be tested.")] = 3,
    out: Where = None,
    device: Device = "cpu",
) -> None:
    """Distil without a recipe: sane defaults, an honest control, and what it will take is said first."""
    from limbeck import checkpoint, doctor, report
    from limbeck import distill as distilling
    from limbeck.board import Board

    plan = distilling.plan(teacher, student, data, epochs=epochs, labels=labels)
    title = "{} under {} on {}".format(*distilling.called(teacher, student, data))
    folder = out or distilling.folder(teacher, student, data)
    chosen = {"kd": {"terms": [distilling.KD]}}
    table = Board(plan, chosen, list(range(seeds)), folder, title=title, device=_device(device))
    written = folder / "board.toml"
    checkpoint.write_atomic(written, report.board_toml(table.said()).encode())
    _print(f"The plan: {written} (run it again: limbeck board {written} --out {folder})")
    _print(f"It will take {doctor.of_board(plan, list(table.plans.values()), seeds, device)}.")
    _watch_board(table)
    arm, seed, kept = distilling.ship(table)
    _print(f"Shipped: {kept} ({arm}, seed {seed}: the best on the validation split)")


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of a run that was stopped.")],
    device: Device = "cpu",
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
) -> None:
    """Go on with a run where it stopped."""
    from limbeck.run import resume as again

    _go(again(folder, device=_device(device), every=every))


@app.command()
def board(
    source: Annotated[Path, typer.Argument(help="A board or a recipe (.toml).")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare, separated by commas: each as the board's arm of that name, or else "
            "with its default weight and knobs (default: the board's own arms)."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds.")] = None,
    out: Where = None,
    set_: Sets = None,
    device: Device = "cpu",
) -> None:
    """Compare methods with an honest control, over seeds; write a table and a report."""
    from limbeck import board as boards
    from limbeck.core.refused import Refused

    chosen = tuple(m.strip() for m in methods.split(",") if m.strip()) if methods else ()
    if methods is not None and not chosen:
        raise Refused(f"`--methods {methods}` names no method; give some, for example --methods kd,rkd.")
    whole, arms, given, how = boards.read(source, tuple(set_ or ()), chosen, seeds)
    table = boards.Board(whole, arms, given, out or Path("runs") / source.stem, device=_device(device), **how)
    _watch_board(table)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="method, lens, scheme, task, view, data or model.")] = "method",
) -> None:
    """What there is of a kind, found by listing its folder."""
    from limbeck import registry
    from limbeck.core.refused import Refused

    if kind not in registry.KINDS:
        kind = next((one for one in registry.KINDS if kind in (f"{one}s", f"{one}es")), kind)
    if kind not in registry.KINDS:
        raise Refused(f"There is no kind '{kind}'; the kinds are {', '.join(registry.KINDS)}.")
    if kind != "method":
        _print("\n".join(registry.names(kind)))
        return
    rows = [("method", "year", "teaches", "paper", "fidelity", "taps", "needs")]
    for name in registry.names("method"):
        card = registry.find("method", name).card
        knowledge, taps, needs = map(", ".join, (card.knowledge, card.taps, sorted(card.needs)))
        rows.append((name, str(card.year), knowledge, card.paper, card.fidelity, taps, needs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A name that `limbeck list KIND` tells, or a recipe (.toml).")],
    json: Annotated[bool, typer.Option("--json", help="A recipe as JSON, with every default.")] = False,
) -> None:
    """The page of a method (paper, equation, departures, knobs) or of anything else that has a name, or who
    learns what in a recipe."""
    from limbeck import equation, registry
    from limbeck import recipe as recipes

    if what.endswith(".toml"):
        plan = recipes.read(Path(what))
        _print(plan.model_dump_json(indent=2, by_alias=True) if json else equation.told(plan))
        return
    kind = next((k for k in registry.KINDS if what in registry.names(k)), "method")
    found = registry.find(kind, what)
    home = registry.names(kind).get(what) or found.__module__
    lines = [(sys.modules[home].__doc__ or "").strip(), ""]
    if kind == "method":
        card = found.card
        lines += [
            f"Teaches: {', '.join(card.knowledge)}. Fidelity: {card.fidelity}. Paper: {card.paper} "
            f"({card.year}).",
            f"Taps: {', '.join(card.taps) or 'none'}. Needs: "
            f"{', '.join(sorted(card.needs)) or 'nothing special'}.",
        ]
    factory = found.staged if kind == "scheme" else found
    filled = equation.FILLED_IN.get(kind, ())
    known = {} if kind in ("lens", "task") else registry.knobs(factory)
    lines += ["Knobs:", *([f"  {knob}" for name, knob in known.items() if name not in filled] or ["  none"])]
    _print("\n".join(lines))


@app.command()
def hints(
    teacher: Annotated[
        str, typer.Argument(help="Weights limbeck wrote, NAME=WEIGHTS, or a recipe (.toml) naming them.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="A data set's name, or a folder, ROOT/CLASS/IMAGE (default: the recipe's)."),
    ] = None,
    name: Annotated[str, typer.Option(help="The network's name in the recipe.")] = "teacher",
    count: Annotated[int, typer.Option(help="How many are chosen: one for each tap of the student.")] = 3,
    metric: Annotated[str, typer.Option(help="r2_cca, cka or cka_rbf.")] = "r2_cca",
    centre: Annotated[bool, typer.Option(help="Of r2_cca; the paper's code does not.")] = True,
    update: Annotated[str, typer.Option(help="A cluster's centre: paper (by place) or medoid.")] = "paper",
    samples: Annotated[int, typer.Option(min=1, help="How many training images are looked at.")] = 10_000,
    out: Annotated[Path, typer.Option(help="The folder to write in.")] = Path("runs/hints"),
    device: Device = "cpu",
) -> None:
    """Which of a teacher's layers give hints: clustered by how alike they are, with a picture."""
    from limbeck import hints as clustered

    found = clustered.find(
        teacher,
        data,
        called=name,
        count=count,
        metric=metric,
        centre=centre,
        update=update,
        samples=samples,
        device=_device(device),
    )
    path = clustered.write(out, found, f"Layers of {teacher} by {metric}")
    _print(clustered.table(found))
    if not found.contiguous:
        _print("A cluster is no run of neighbours, so its middle may lie elsewhere; try --update medoid.")
    pairs = ", ".join(f'stage{n} = "{layer}"' for n, layer in enumerate(found.chosen, start=1))
    _print(f"In a recipe: pairs = {{ {pairs} }}")
    _print(f"Picture: {path}")


@app.command()
def schema(
    board: Annotated[bool, typer.Option("--board", help="Of boards instead.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write (default: print it).")] = None,
) -> None:
    """The JSON schema of recipes, so that an editor completes names and knobs and marks what is misspelt."""
    from limbeck import checkpoint, schema

    text = schema.of_board() if board else schema.of_recipe()
    if out is None:
        print(text)
        return
    checkpoint.write_atomic(out, f"{text}\n".encode())
    _print(f"Written: {out}. In a recipe's first line: #:schema {out}")


@app.command()
def new(
    what: Annotated[str, typer.Argument(help="method")],
    name: Annotated[str, typer.Argument(help="Its name, in small letters: cosine_gap.")],
    kind: Annotated[str, typer.Option(help="What it teaches: response, feature or relation.")],
    outside: Annotated[Path | None, typer.Option(help="A folder of yours, outside this repository.")] = None,
) -> None:
    """Write a method's file and its test from a template; both work at once."""
    from limbeck import new
    from limbeck.core.refused import Refused

    if what != "method":
        raise Refused(f"There is no template of '{what}'; write: limbeck new method {name} --kind {kind}")
    _print("\n".join(new.method(name, kind, outside)))


store = typer.Typer(no_args_is_help=True, help="What a teacher says, asked once and read again.")
app.add_typer(store, name="store")

Source = Annotated[
    Path, typer.Argument(help="A recipe (.toml) whose teacher has weights, or a finished run's folder.")
]
Who = Annotated[str, typer.Option(help="The teacher's name in the recipe.")]
Which = Annotated[int, typer.Option(help="The stage whose lessons are asked about (-1: the last).")]


@store.command("write")
def store_write(
    source: Source,
    folder: Annotated[Path, typer.Option("--out", help="The store's folder.")],
    teacher: Who = "teacher",
    stage: Which = -1,
    epochs: Annotated[int | None, typer.Option(min=1, help="How many (default: the stage's).")] = None,
    kind: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16, top or top-logits (default: by classes).")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest are kept.")] = 10,
    taps: Annotated[str | None, typer.Option(help="Features kept too, as bfloat16: stage2,pooled.")] = None,
    device: Device = "cpu",
) -> None:
    """Ask a teacher about every sample of every epoch of a stage; goes on where it was stopped."""
    from limbeck.data.store_write import plan, write
    from limbeck.doctor import size

    loader, who = _lesson(source, teacher, stage, _device(device))
    count = loader.epochs if epochs is None else epochs
    how = {name.strip(): "bfloat16" for name in (taps or "").split(",") if name.strip()}
    header = plan(who, loader, kind=kind, top=top, taps=how, device=device)
    each = f"{header.record.itemsize} bytes a sample and epoch"
    _print(f"It will take {size(count * header.shard_bytes)} on disk, {each}.")
    _watch_store(write(folder, who, loader, range(count), kind=kind, top=top, taps=how, device=device))
    _print(f'Stored: {folder}; in a recipe: {teacher} = {{ stored = "{folder}" }}')


@store.command("import")
def store_import(
    answers: Annotated[
        Path,
        typer.Argument(help="TinyViT's folder of logits_top…_epoch…, or a served model's JSON lines."),
    ],
    source: Annotated[
        Path, typer.Argument(help="The recipe (.toml), or run, whose samples were asked about.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="The store's folder.")],
    keys: Annotated[
        Path | None,
        typer.Option(help="TinyViT's key of each sample, a line each (default: they are its numbers)."),
    ] = None,
    teacher: Who = "teacher",
    stage: Which = -1,
) -> None:
    """Bring answers that others stored into a store; goes on where it was stopped."""
    from limbeck.data.store_import import bring

    lab, which = _samples(source, stage, "cpu")
    told = None if keys is None else _text(keys).splitlines()
    _watch_store(bring(answers, folder, lab.loader(which), told))
    _print(f'Stored: {folder}; in a recipe: {teacher} = {{ stored = "{folder}", epochs = "cycle" }}')


@store.command("verify")
def store_verify(
    folder: Annotated[Path, typer.Argument(help="The store's folder.")],
    source: Source,
    teacher: Who = "teacher",
    stage: Which = -1,
    sample: Annotated[int, typer.Option(min=1, help="How many rows are asked again.")] = 1000,
    device: Device = "cpu",
) -> None:
    """Ask the teacher again for some rows, and say how far its answers are from those stored."""
    from limbeck.data.store_write import verify

    loader, who = _lesson(source, teacher, stage, _device(device))
    found = verify(folder, who, loader, sample, device=device)
    largest = ", ".join(f"{name} {value:.3g}" for name, value in found.largest.items())
    others = f"{found.other_classes:.2%} of the kept classes are others now"
    _print(f"{found.rows:,} rows: largest difference {largest}; {others}")


@store.command("info")
def store_info(folder: Annotated[Path, typer.Argument(help="The store's folder.")]) -> None:
    """What a store holds, as JSON."""
    import json

    from limbeck.data.store import Store

    _print(json.dumps(Store(folder).info(), indent=2))


def _lesson(source: Path, name: str, stage: int, device: str) -> tuple[Any, Any]:
    """The loader of a stage, and a teacher that is done learning, of a recipe or a finished run."""
    from limbeck.core.refused import Refused

    lab, which = _samples(source, stage, device)
    learns = {name for one in lab.recipe.stages for name in one.learners}
    if not source.is_dir() and learns & {name, *lab.recipe.within(name)}:
        raise Refused(
            f"'{name}' learns in {source}, so it has nothing to say yet; run the recipe, and give the folder "
            "of the finished run."
        )
    return lab.loader(which), lab.teacher(name)


def _samples(source: Path, stage: int, device: str) -> tuple[Any, Any]:
    """The lab of a recipe or a finished run, and one of its stages."""
    from limbeck import build
    from limbeck import recipe as recipes
    from limbeck.core.refused import Refused
    from limbeck.run import resume as again

    if source.is_dir():
        lab = again(source, device=device).lab
    else:
        lab = build.lab(recipes.read(source), device=device)
    count = len(lab.recipe.stages)
    if not -count <= stage < count:
        raise Refused(f"Stage {stage} was asked for, and the recipe has {count} (0 to {count - 1}).")
    return lab, lab.recipe.stages[stage]


def _text(path: Path) -> str:
    from limbeck.core.refused import Refused

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}.") from None


# --- showing progress ---


def _go(work: "Run") -> None:
    if work.result is not None:
        _print(f"This run is finished; its folder is {work.folder}.")
    _tell_stores(work)
    with _progress() as bar, _stoppable(work):
        line = bar.add_task("", total=1.0)
        for moment in _until_stopped(work.moments()):
            bar.update(line, completed=moment.done, description=_place(moment))
            if moment.record is not None:
                bar.console.print(_record(moment), markup=False, highlight=False, soft_wrap=True)
    result = work.result
    assert result is not None
    told = filter(None, [_scores(result["scores"]), f"{result['parameters']:,} parameters"])
    _print(f"{'; '.join(told)}\nShipped: {work.folder / result['shipped']}")


def _watch_board(table: "Board") -> None:
    """Run every cell, then print the table and say where the report is."""
    from limbeck import report

    _tell_stores(table)
    with _progress() as bar, _stoppable(table):
        line = bar.add_task("", total=float(len(table.cells())))
        for cell, moment in _until_stopped(table.moments()):
            name = cell.arm or "shared stages"
            within = 1.0 if moment is None else moment.done
            bar.update(line, completed=cell.number + within, description=f"{name}, seed {cell.seed}")
            if moment is None:
                scores = _scores(table.scores(cell)) or f"diverged ({table.diverged(cell)})"
                done = f"[{cell.number + 1}/{cell.cells}] {name}, seed {cell.seed}: {scores}"
                bar.console.print(done, markup=False, highlight=False, soft_wrap=True)
    result = table.result()
    page = report.write(table.folder, result)
    _print(report.table(result))
    _print(f"Report: {page}")


def _watch_store(steps: Iterator["Progress"]) -> None:
    """Rate and time left as it goes; where no bar can be seen, a line for each epoch."""
    from limbeck.doctor import duration

    epoch, said = None, ""
    with _progress() as bar:
        line = bar.add_task("", total=1.0)
        for now in steps:
            if epoch not in (None, now.epoch) and not bar.console.is_terminal:
                _print(said)
            left = f"{duration(now.seconds_left)} left" if now.rate else "time left unknown"
            left = left if now.done < now.rows else "done"
            epoch, said = now.epoch, f"epoch {now.epoch}, {now.rate:,.0f} samples/s, {left}"
            bar.update(line, completed=now.done / now.rows, description=said)
    _print(said)


def _tell_stores(work: "Run | Board") -> None:
    from limbeck.doctor import size

    for what, bytes in work.takes.items():
        _print(f"{what}, stored as they are given, will take {size(bytes)} in {work.folder / 'stores'}.")


class _stoppable:
    """The first Ctrl-C or SIGTERM asks for a stop between two batches; a second one is the usual
    interruption."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __enter__(self) -> None:
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _ask(self, *_: object) -> None:
        self.work.stop()
        self.__exit__()


def _until_stopped(moments: Iterator[Any]) -> Iterator[Any]:
    from limbeck.run import Stopped

    try:
        yield from moments
    except Stopped as stop:
        sys.exit(_say(str(stop), 130))


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _place(moment: "Moment") -> str:
    return f"stage {moment.stage} ({moment.learner}), epoch {moment.epoch + 1}/{moment.epochs}"


def _record(moment: "Moment") -> str:
    assert moment.record is not None
    losses = "  ".join(f"{name} {value:.4f}" for name, value in moment.record.losses.items())
    scores = _scores(moment.record.scores)
    return f"{_place(moment)}:  {losses}" + (f"  |  valid {scores}" if scores else "")


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def _print(what: Any) -> None:
    from rich.console import Console

    Console(soft_wrap=not sys.stdout.isatty()).print(what, markup=False, highlight=False)


def _say(sentence: str, code: int) -> int:
    print(f"limbeck: {sentence}", file=sys.stderr)
    return code


def _device(name: str) -> str:
    import torch

    from limbeck.core.refused import Refused

    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("limbeck has not been tried on it")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise Refused(
            f"Device '{name}' cannot be used here ({str(error).splitlines()[0]}); expected cpu, or cuda "
            "where there is a GPU."
        ) from None
    return name


if __name__ == "__main__":
    main()
