"""The offline lesson as one `nn.Module`: a student and its methods, told by teachers what to do.

The student and the methods' modules are its children; teachers are not (they follow the batch's device). So
an optimiser over `distiller.parameters()` trains all that should learn, and DDP, FSDP2 or `torch.compile`
wrap it whole.

    distiller = Distiller(student, teacher, [KD(temperature=4)], example=(x, y))
    for x, y in loader:
        loss = distiller(x, y)["loss"]
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Lesson, View
from limbeck.core.fast import APART, agree, learns_last
from limbeck.core.keyed import forked
from limbeck.core.method import Method
from limbeck.core.refused import Refused, said
from limbeck.core.scheme import Term, Turn, to_work
from limbeck.core.taps import Seen, Tapped, lying, unmoved
from limbeck.core.task import Task, labelled_cross_entropy
from limbeck.core.teachers import Frozen, Teacher

TaskLoss = Callable[[Seen, Batch], Tensor]
_TRACED = ("show", "_heard", "losses")


@dataclass(frozen=True)
class Sight:
    """What everybody showed for one batch: the student (and the batch it saw) per view, and each teacher."""

    students: list[tuple[Seen, Batch]]
    teachers: list[Seen]


@dataclass(frozen=True)
class _Use:
    """One method under one teacher; `view` and `teacher` count in the Distiller's lists."""

    name: str
    key: str
    term: Term
    weight: float
    view: int
    teacher: int


class Distiller(nn.Module):
    """A student under its teachers.

    Args:
        student: the network that learns. It is used as it is; its `state_dict` stays the plain model's.
        teacher: an `nn.Module` (then it is `Frozen`), a `Teacher`, or None when every term names its own.
        methods: methods and terms, in any mix. A term of weight 0 is not built.
        example: a batch `(x, y)` or `Batch` to take shapes from. Nothing learns or moves while it is looked
            at.
        task: the ordinary job beside the methods, a `Task` or its loss `(seen, batch) → scalar`; None trains
            without labels.
        task_weight: its weight.
        view: what the student is shown instead of the batch (teachers own their views).
        taps: names for looks inside the student, as in `Tapped`.
        channels_last: the student computes in the layout that suits convolutions, where it is on a CPU and
            that changes nothing but rounding (see `limbeck.core.fast.learns_last`); its weights stay as they
            are. A method is shown maps in that layout too if its losses and their gradients are the same.
        seed: fixes the initial weights of the methods' modules.
        called: the student's name in what is refused.

    `forward` returns the named losses, their sum `loss` and the student's `logits`; in eval mode the
    student's output alone. A method with a rival learns in turns, so `forward` refuses to train it. Raises
    `Refused` at construction when the pair, the taps, the methods or the example do not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        methods: Method | Term | Sequence[Method | Term],
        *,
        example: Batch | tuple[Any, Tensor | None],
        task: Task | TaskLoss | None = labelled_cross_entropy,
        task_weight: float = 1.0,
        view: View | None = None,
        taps: Mapping[str, str] | None = None,
        channels_last: bool = True,
        seed: int = 0,
        called: str = "student",
    ) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict()
        self.lenses = nn.ModuleList()
        self.task, self.task_weight = task.loss if isinstance(task, Task) else task, task_weight
        self._whole = ["task"] if isinstance(task, Task) and not task.per_sample else []
        self.seed = seed
        self.asking = 0.0
        """Seconds spent on asking the teachers; on an accelerator, which works on by itself, too few."""
        self._tapped, self._plain = Tapped(student, taps, called), Tapped(student, taps, called)
        self._views: list[View | None] = [view]
        self._teachers: list[Teacher] = []
        self._uses: list[_Use] = []
        self._lies_last: set[str] = set()
        """Who is shown maps in `channels_last`: methods, and `task`."""

        only = Frozen(teacher) if isinstance(teacher, nn.Module) else teacher
        for item in methods if isinstance(methods, Sequence) else [methods]:
            self._enlist(item if isinstance(item, Term) else Term(item), only)
        for use in self._uses:
            method, pairs = self._method(use), use.term.pairs
            if lost := pairs.keys() - set(method.teacher_looks()):
                looks = ", ".join(method.teacher_looks()) or "no taps"
                raise Refused(
                    f"The pairs of method '{use.name}' name '{min(lost)}', and of the teacher it looks at "
                    f"{looks}; pair one of these."
                )
            self._tapped.look(method.looks())
            try:
                self._teachers[use.teacher].look(pairs.get(name, name) for name in method.teacher_looks())
            except Refused as error:
                raise Refused(f"Method '{use.name}' cannot look at its teacher: {error}") from error
        read = {u.teacher for u in self._uses if u.term.through or self._method(u).card.reads_out}
        self._asked = [(teacher, place in read) for place, teacher in enumerate(self._teachers)]
        if task is None and not self._uses:
            raise Refused(
                "There is nothing to learn from: no task loss and no method of weight above 0; give at "
                "least one."
            )

        like = next((p for p in student.parameters() if p.is_floating_point()), torch.empty(0))
        self.lenses.to(like.device, like.dtype)
        batch = (example if isinstance(example, Batch) else Batch(example[0], example[1])).to(like.device)
        sight = self._dry_run(batch, channels_last)
        if isinstance(task, Task):
            task.check(*self._for_task(sight))
        if self.task is not None:
            with said("The task", "be done with the example"):
                self.task(*self._for_task(sight))
            self._lay("task", sight, 0, lambda: [self._task_loss(sight)])
        with unmoved(self.lenses):
            for use in self._uses:
                self._build(use, sight, like)
                self._lay(use.key, sight, use.view, partial(self._tried, use, sight))
        self._judged = next((use.name for use in self._uses if self._method(use).rivals()), None)

    # --- one batch ---

    def forward(
        self, x: Any, y: Tensor | None = None, index: Tensor | None = None, lesson: Lesson | None = None
    ) -> Any:
        batch = x if isinstance(x, Batch) else Batch(x, y, index, lesson or Lesson())
        if not self.training:
            return self._plain(batch.x).out
        if self._judged is not None:
            raise Refused(
                f"Method '{self._judged}' brings a rival that learns against the student, so one sum of "
                "losses cannot train both; use the offline scheme, or take turns as it does."
            )
        sight = self.see(batch)
        losses = self.losses(sight)
        return {**losses, "loss": sum(losses.values()), "logits": sight.students[0][0].out}

    def see(self, batch: Batch) -> Sight:
        """One student forward per view and one call per teacher, whatever the number of terms."""
        return self.ask(batch, self.show(batch))

    def show(self, batch: Batch) -> list[tuple[Seen, Batch]]:
        """What the student shows, and the batch it was shown, for each view; the first is everybody's."""
        viewed = [batch if view is None else view(batch) for view in self._views]
        return [(self._tapped(b.x), b) for b in viewed]

    def ask(self, batch: Batch, shown: list[tuple[Seen, Batch]]) -> Sight:
        """What the student has shown beside what the teachers say, or show where nobody reads what they
        say."""
        if torch.compiler.is_compiling():  # who traces the whole lesson has no clock
            return Sight(shown, self._heard(batch))
        began = time.perf_counter()
        sight = Sight(shown, self._heard(batch))
        self.asking += time.perf_counter() - began
        return sight

    def look(self, names: Iterable[str]) -> None:
        """Show these taps of the student too: somebody else learns from them."""
        self._tapped.look(names)

    def losses(self, sight: Sight) -> dict[str, Tensor]:
        """The student's losses by name, each times its weight and ramp (a ramp at 0 multiplies, it never
        skips)."""
        losses: dict[str, Tensor] = {}
        if self.task is not None:
            losses["task"] = self.task_weight * self._task_loss(sight)
        for use in self._uses:
            s, t, batch, factor = self._shown(use, sight)
            weight = use.weight * (1.0 if use.term.ramp is None else use.term.ramp(batch.lesson))
            loss = weight * factor * self._method(use).loss(s, t, batch)
            losses[use.name] = losses[use.name] + loss if use.name in losses else loss
        return losses

    def rival_losses(self, sight: Sight) -> Iterator[tuple[str, Tensor]]:
        """(player, loss) of every rival, with the student and the teachers detached."""
        for use in self._uses:
            method = self._method(use)
            for name in method.rivals():
                s, t, batch, _ = self._shown(use, sight)
                yield f"{use.key}.{name}", method.rival_loss(name, s.detach(), t.detach(), batch)

    def turns(self, sight: Sight) -> Iterator[Turn]:
        """The lesson's turns: every rival's, then the student's."""
        for rival, loss in self.rival_losses(sight):
            yield rival, {rival: loss}
        yield "student", self.losses(sight)

    def figures(self) -> dict[str, float]:
        """What the methods found worth watching in the last batch, by name."""
        return {
            f"{use.key}.{name}": value
            for use in self._uses
            for name, value in self._method(use).figures().items()
        }

    def players(self) -> dict[str, dict[str, nn.Parameter]]:
        """What learns: each rival by `method.rival`, and `student` (the student and the methods' own
        modules)."""
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        players: dict[str, dict[str, nn.Parameter]] = {}
        for use in self._uses:
            for rival, module in self._method(use).rivals().items():
                theirs = {id(p) for p in module.parameters()}
                players[f"{use.key}.{rival}"] = {name: p for name, p in named.items() if id(p) in theirs}
        taken = {name for player in players.values() for name in player}
        return {"student": {name: p for name, p in named.items() if name not in taken}, **players}

    def teachers(self) -> tuple[Teacher, ...]:
        return tuple(self._teachers)

    @property
    def channels_last(self) -> bool:
        """Whether the student computes in that layout."""
        return self._tapped.channels_last

    @property
    def layout(self) -> dict[str, Any]:
        """What was found out about layouts at construction. A resumed lesson is given what was found then: by
        the weights of its example it might be found otherwise."""
        return {"student": self.channels_last, "lies_last": sorted(self._lies_last)}

    @layout.setter
    def layout(self, found: Mapping[str, Any]) -> None:
        self._tapped.channels_last, self._lies_last = found["student"], set(found["lies_last"])

    def how(self) -> str:
        """By which way the student learns, in words; none for the usual one."""
        ways = {"compiled": _TRACED[0] in vars(self), "channels_last": self.channels_last}
        return ", ".join(name for name, taken in ways.items() if taken)

    def refuse_cut(self) -> str | None:
        whole = [use.name for use in self._uses if not self._method(use).card.per_sample]
        return next(iter(self._whole + whole), None)

    def train(self, mode: bool = True) -> "Distiller":
        """Learners to work; what the user froze stays in eval."""
        if mode:
            self.training = True
            for child in self.children():
                to_work(child)
        else:
            super().train(False)
        return self

    def compile(self, backend: str = "inductor") -> None:  # type: ignore[override]
        """Have `torch.compile` trace what the student shows, what the teachers say and the losses.

        The networks stay as they are, so that evaluation, a later stage and their `state_dict` know nothing
        of it. One trace does for all lessons.
        """
        for name in _TRACED:
            method = getattr(type(self), name).__get__(self)
            # Else every Distiller of the process would count towards one limit of traces.
            traced = torch.compile(method, backend=backend, isolate_recompiles=True)  # type: ignore[call-overload]
            setattr(self, name, traced)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not compiled: its traces would still train the original."""
        return {name: value for name, value in self.__dict__.items() if name not in _TRACED}

    def _heard(self, batch: Batch) -> list[Seen]:
        return [t(batch) if read else t.at_taps(batch) for t, read in self._asked]

    # --- assembly ---

    def _enlist(self, term: Term, only: Teacher | None) -> None:
        if not math.isfinite(term.weight) or term.weight < 0:
            raise Refused(f"The weight of '{_name(term)}' is {term.weight}, expected a finite number >= 0.")
        if term.weight == 0:
            return
        teachers = term.teachers or ((only,) if only is not None else ())
        if not teachers:
            raise Refused(
                f"Method '{_name(term)}' has no teacher; give the Distiller a teacher or the term its "
                "`teachers`."
            )
        for lens in term.through:
            if isinstance(lens, nn.Module):
                self.lenses.append(lens)
        taken = {use.name for use in self._uses}
        name = next(n for n in _numbered(_name(term)) if n not in taken)
        if name in ("task", "loss", "logits") or "." in name:
            raise Refused(
                f"A term is called '{name}', which is not free for a loss's name; call it something else."
            )
        for place, teacher in enumerate(teachers):
            lacks = term.method.card.needs & {"teacher_model", "teacher_gradient"} - teacher.offers
            if lacks:
                raise Refused(
                    f"Method '{name}' needs {' and '.join(sorted(lacks))}, which a {type(teacher).__name__} "
                    "teacher cannot give; use a live single teacher."
                )
            key = next(n for n in _numbered(name) if n not in self.methods)
            self.methods[key] = term.method if place == 0 else copy.deepcopy(term.method)
            view = 0 if term.view is None else _seat(self._views, term.view)
            weight = term.weight / len(teachers)
            self._uses.append(_Use(name, key, term, weight, view, _seat(self._teachers, teacher)))

    def _method(self, use: _Use) -> Method:
        return self.methods[use.key]  # type: ignore[return-value]

    def _shown(self, use: _Use, sight: Sight) -> tuple[Seen, Seen, Batch, float | Tensor]:
        """What a method is shown: the student, its teacher, the student's batch and the lenses' factor."""
        s, batch = sight.students[use.view]
        t = _paired(sight.teachers[use.teacher], use.term.pairs)
        s, t = self._lain(use.key, s), lying(t, use.key in self._lies_last)
        factor: float | Tensor = 1.0
        for lens in use.term.through:
            s, t, more = lens(s, t)
            factor = factor * more
        return s, t, batch, factor

    def _for_task(self, sight: Sight) -> tuple[Seen, Batch]:
        seen, batch = sight.students[0]
        return self._lain("task", seen), batch

    def _lain(self, who: str, seen: Seen) -> Seen:
        """What the student showed as `who` can use it; in a layout of the user's own it is left as it is."""
        return lying(seen, who in self._lies_last) if self.channels_last else seen

    def _task_loss(self, sight: Sight) -> Tensor:
        assert self.task is not None
        return self.task(*self._for_task(sight))

    def _dry_run(self, batch: Batch, channels_last: bool) -> Sight:
        """One eager look at the example, the student in train mode as it will be. Nothing of it stays."""
        to_work(self.student)
        runs = said(f"The {self._tapped.called}", "be run on the example")
        with unmoved(self.student), forked(self.seed, "dry run"), runs:
            viewed = [batch if view is None else view(batch) for view in self._views]
            each = (learns_last(self._tapped, b.x) for b in viewed)
            self._tapped.channels_last = channels_last and all(each)
            students = [(_as_leaves(self._tapped.check(b.x)), b) for b in viewed]
        with said("The teacher", "be run on the example"):
            return Sight(students, [teacher.check(batch) for teacher in self._teachers])

    def _build(self, use: _Use, sight: Sight, like: Tensor) -> None:
        """Make the method's modules, once what it is shown is what it can use, and try its losses."""
        method = self._method(use)
        with said(f"The lens of method '{use.name}'", "look at this pair"):
            s, t, batch, factor = self._shown(use, sight)
        if isinstance(s.out, Tensor) and isinstance(t.out, Tensor):
            if len(s.out) != len(t.out):
                raise Refused(
                    f"Method '{use.name}' would compare {len(s.out)} rows of the student with {len(t.out)} "
                    "of the teacher; give both the same view, or views that keep the number of rows."
                )
            if "same_classes" in method.card.needs and s.out.shape[1:2] != t.out.shape[1:2]:
                raise ClassesDiffer(use.name, s.out.shape[1], t.out.shape[1])
        for need in ("labels", "index"):
            if need in method.card.needs and (batch.y if need == "labels" else batch.index) is None:
                raise Refused(
                    f"Method '{use.name}' needs {need}, and the example has none; give the batch its "
                    f"`{'y' if need == 'labels' else 'index'}`."
                )
        here, there = _shapes(s, method.looks()), _shapes(t, method.teacher_looks())
        pair = f"compare this pair (the student shows {here}, the teacher {there})"
        with said(f"Method '{use.name}'", pair), forked(self.seed, "build", use.key):
            method.build(s, t, batch)
            method.to(like.device, like.dtype)
            with unmoved(method):
                loss = factor * method.loss(s, t, batch)
                if loss.ndim or not torch.isfinite(loss):
                    raise Refused(
                        f"The loss of '{use.name}' on the example is {loss.detach()}, expected one finite "
                        "number; look at the data and the taps."
                    )
                if not _reaches(loss, sight.students[use.view][0]):
                    raise Refused(
                        f"The loss of '{use.name}' does not depend on the student's weights, so it would "
                        "teach nothing; check its taps."
                    )
                for rival in method.rivals():
                    method.rival_loss(rival, s.detach(), t.detach(), batch)

    def _lay(self, who: str, sight: Sight, view: int, tried: Callable[[], list[Tensor]]) -> None:
        """Show somebody maps in `channels_last` if what they make of them does not change by it."""
        if not self.channels_last or all(v.ndim != 4 for v in sight.students[view][0].at.values()):
            return
        with suppress(Exception):  # it counts on the usual layout, as `view` does
            usual = tried()
            self._lies_last.add(who)
            if agree(usual, tried(), APART):
                return
        self._lies_last.discard(who)

    def _tried(self, use: _Use, sight: Sight) -> list[Tensor]:
        """Every loss of a method, and the gradients of the first in what the student showed."""
        method, (seen, _) = self._method(use), sight.students[use.view]
        with unmoved(method), forked(self.seed, "layout", use.key):
            s, t, batch, factor = self._shown(use, sight)
            loss = factor * method.loss(s, t, batch)
            own = [method.rival_loss(rival, s.detach(), t.detach(), batch) for rival in method.rivals()]
            slopes = torch.autograd.grad(loss, _with_gradient(seen), allow_unused=True)
        return [loss, *own, *(v for v in slopes if v is not None)]


class ClassesDiffer(Refused):
    """A method that compares class scores was given a pair with different classes."""

    def __init__(self, method: str, s: int, t: int, still: Sequence[str] = ()) -> None:
        self.method, self.s, self.t = method, s, t
        works = f"methods that do not read class scores still work: {', '.join(still)}"
        super().__init__(
            f"Method '{method}' compares class scores, and the student has {s} classes where the teacher "
            f"has {t}; {works if still else 'feature and relation methods still work'}; or say with "
            "`columns` which of the teacher's outputs scores each class."
        )


def _shapes(seen: Seen, taps: Sequence[str]) -> str:
    return ", ".join(f"'{tap}' {tuple(seen.at[tap].shape)}" for tap in taps if tap in seen.at) or "no taps"


def _paired(t: Seen, pairs: Mapping[str, str]) -> Seen:
    """The teacher's taps under the names by which a method asks for them."""
    at = {name: t.at[tap] for name, tap in pairs.items()}
    modules = {name: t.modules[tap] for name, tap in pairs.items() if tap in t.modules}
    return replace(t, at={**t.at, **at}, modules={**t.modules, **modules}) if pairs else t


def _as_leaves(seen: Seen) -> Seen:
    """The same, cut off from the model: a loss can be asked for its gradient here, and no further."""

    def leaf(v: Any) -> Any:
        return v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v

    at = {name: leaf(v) for name, v in seen.at.items()}
    return Seen(leaf(seen.out), at, seen.mask, seen.model, seen.modules)


def _reaches(loss: Tensor, seen: Seen) -> bool:
    """Whether the loss has a gradient in anything the student showed."""
    shown = _with_gradient(seen)
    if not loss.requires_grad or not shown:
        return False
    return any(g is not None for g in torch.autograd.grad(loss, shown, retain_graph=True, allow_unused=True))


def _with_gradient(seen: Seen) -> list[Tensor]:
    return [v for v in (seen.out, *seen.at.values()) if isinstance(v, Tensor) and v.requires_grad]


def _seat(row: list[Any], item: Any) -> int:
    """The place of `item` in `row`, taken at its end if it has none yet: who is in the row once is asked
    once."""
    if not any(x is item for x in row):
        row.append(item)
    return next(i for i, x in enumerate(row) if x is item)


def _numbered(name: str) -> Iterator[str]:
    """name, name_2, name_3, …"""
    yield name
    yield from (f"{name}_{n}" for n in itertools.count(2))


def _name(term: Term) -> str:
    """The term's own name, else its method's: the file it lives in, for ours, the class for others'."""
    home = type(term.method).__module__
    return term.name or (
        home.rpartition(".")[2] if home.startswith("limbeck.") else type(term.method).__name__.lower()
    )
