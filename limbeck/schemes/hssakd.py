r"""HSSAKD: Knowledge Distillation Using Hierarchical Self-Supervision Augmented Distribution (Yang, An, Cai,
Xu; TNNLS 2022; arXiv:2109.03075; first at IJCAI 2021, arXiv:2107.13715).

Every image is shown in four quarter turns $t_0 \dots t_3$, and from every stage $l$ of a network grows a
branch that says which class *and* which turn it sees. What a teacher's branches say of both is taught to the
student's, stage by stage, beside its plain answer $p$. With $q_l$ the joint answer at stage $l$ and $4y + j$
the joint label of class $y$ in turn $j$, a teacher learns by

$$L_T = \mathrm{CE}(y, p(x)) + \sum_l \tfrac14 \sum_j \mathrm{CE}\big(4y + j,\ q_l(t_j x)\big)$$

and its student, whose branches never see a joint label, by

$$L_S = \mathrm{CE}(y, p^S(x))
  + \sum_l \tfrac14 \sum_j \mathrm{KL}_\tau\big(q_l^T(t_j x) \,\|\, q_l^S(t_j x)\big)
  + \tfrac14 \sum_j \mathrm{KL}_\tau\big(p^T(t_j x) \,\|\, p^S(t_j x)\big)$$

Only upright images have a class for the plain answer. In a recipe every stage has `scheme = "hssakd"`:

- A teacher with its branches is made of a network: `learner = { name = "taught", from = "net", change =
  "limbeck.models.joint:joint" }`. Both learn, the stronger "Teacher*" of the code; with `…:frozen` of a
  trained network the branches alone.
- The student: `learner = "student"`, `terms = [{ method = "kd", temperature = 3, teacher = "taught" }]`.
  The scheme grows its branches; the plain network is scored and ships.
- Online: `learner = ["a", "b"]` and `teacher = ["a", "b"]`. Each learns by $L_T$ and, with the weight
  $1/(K-1)$, from what each of the $K-1$ others says.

A term that compares answers compares those of all branches too; one that looks at taps looks at the
network's. Without branches (`branches = false`) it is that method on turned images, and without turns too
(`rotations = false`) it is the scheme `offline`.

Departures from the paper: none known. From the authors' code: more than two networks learn online as well.
Batches are four times as large, and where BatchNorm learns, its statistics are of all four turns.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.batch import IGNORE, Batch
from limbeck.core.cast import Cast
from limbeck.core.distiller import Distiller, Sight
from limbeck.core.keyed import forked
from limbeck.core.refused import Refused
from limbeck.core.scheme import Scheme, Term, Turn
from limbeck.core.taps import Seen, Tapped, lying, unmoved
from limbeck.core.task import labelled_cross_entropy
from limbeck.core.teachers import Peer, Teacher, each_once
from limbeck.pieces.branch import Branch, Joint, grown, joint
from limbeck.pieces.images import TURNS, joint_labels, square, turned

DOUBT, ENOUGH = 1 / 3, 100
"""A share of a class' turns mistaken that is worth a warning (a class that looks the same upside down has a
half), and of how many of its rows it is to be measured."""

Shown = dict[str, list[tuple[Seen, Batch]]]
"""What a learner shows, and what it was shown: its network under "", its branches under their stages."""


def of_class(q: Float[Tensor, "b joint"], ways: int = TURNS) -> Float[Tensor, "b k"]:
    """Of joint logits, the log-probability of each class, turned in whatever way."""
    return q.log_softmax(1).unflatten(1, (-1, ways)).logsumexp(2)


def in_turns(batch: Batch, ways: int = TURNS) -> Batch:
    """b rows become `ways * b`, and only the upright ones, `0::ways`, keep their label."""
    if ways == 1:
        return batch
    y = batch.y
    if y is not None:
        y = torch.stack([y, *[torch.full_like(y, IGNORE)] * (ways - 1)], 1).flatten()
    index = None if batch.index is None else batch.index.repeat_interleave(ways)
    return batch.replace(x=turned(square(batch)), y=y, index=index, labelled=batch.labelled)


def at_branch(viewed: Batch, x: Tensor, ways: int) -> Batch:
    """What a branch is shown: the map `x` for the rows of `viewed`, and for every row its joint label."""
    y = None if viewed.y is None else joint_labels(viewed.y[::ways], ways)
    labelled = None if viewed.labelled is None else ways * viewed.labelled
    return viewed.replace(x=x, y=y, labelled=labelled)


class Said(Teacher):
    """What a teacher says at one of its branches; the scheme passes it on, so that the teacher is asked
    once."""

    offers = frozenset[str]()

    def __init__(self, teacher: Teacher, tap: str, example: Batch) -> None:
        self.teacher, self.tap, self.example = teacher, tap, example
        self.answer: Seen | None = None
        teacher.look((tap,))

    def told(self, shown: Seen) -> None:
        self.answer = Seen(shown.at[self.tap])

    def __call__(self, batch: Batch) -> Seen:
        assert self.answer is not None, "the teacher has not been asked yet"
        return self.answer

    def through(self, x: Any) -> Seen:
        raise Refused("A branch's answer was heard of somebody else, so no gradient passes through it.")

    def look(self, names: Iterable[str]) -> None:
        if names := list(names):
            raise Refused(f"A branch's answer has no tap '{names[0]}'; let the network itself be looked at.")

    def check(self, batch: Batch) -> Seen:
        return Seen(self.teacher.check(self.example).at[self.tap])


@dataclass(frozen=True)
class Learner:
    """One who learns: the lessons of its network and of its branches by stage, and what it is to others, also
    as a network ("") and by stage."""

    lessons: dict[str, Distiller]
    peers: dict[str, Peer]
    ships: nn.Module

    def show(self, batch: Batch, ways: int) -> Shown:
        shown = {"": self.lessons[""].show(batch)}
        whole, viewed = shown[""][0]
        for stage, lesson in list(self.lessons.items())[1:]:
            x = lying(whole, lesson.channels_last).at[stage]
            shown[stage] = lesson.show(at_branch(viewed, x, ways))
        return shown

    def tell(self, shown: Shown) -> None:
        """Let the others know what it showed."""
        for stage, peer in self.peers.items():
            peer.told(shown[stage][0][0])

    def ask(self, batch: Batch, shown: Shown, voices: Sequence[Said]) -> dict[str, Sight]:
        sights = {"": self.lessons[""].ask(batch, shown[""])}
        for teacher, seen in zip(self.lessons[""].teachers(), sights[""].teachers, strict=True):
            for voice in voices:
                if voice.teacher is teacher:
                    voice.told(seen)
        for stage in list(self.lessons)[1:]:
            sights[stage] = self.lessons[stage].ask(shown[stage][0][1], shown[stage])
        return sights


class HSSAKD(Scheme):
    """Args: learners, by name; voices, what trained teachers say at their branches; ways, how many turns an
    image is shown in; labelled, whether branches learn joint labels."""

    learners_teach = True

    def __init__(
        self, learners: Mapping[str, Learner], voices: Sequence[Said], ways: int, labelled: bool
    ) -> None:
        self.learners, self.voices, self.ways, self.labelled = dict(learners), list(voices), ways, labelled
        for learner in self.learners.values():
            learner.lessons[""].look([*list(learner.lessons)[1:], *learner.peers[""].names])
        self._figures: dict[str, Tensor] = {}
        self._mistaken: dict[str, Tensor] = {}  # by class (k 2), of the last epoch: rows, turns mistaken

    @classmethod
    def staged(
        cls, cast: Cast, branches: bool = True, rotations: bool = True, branch_task: float | None = None
    ) -> "HSSAKD":
        """branches: whether there are any. rotations: whether images are turned. branch_task: weight of the
        joint labels; by default 1, and 0 for the students of a trained teacher."""
        if branch_task is not None and not 0 <= branch_task < math.inf:
            raise Refused(f"The weight `branch_task` is {branch_task}, expected a number >= 0; try 1.")
        ways = TURNS if rotations else 1
        example = in_turns(cast.example, ways)
        shown = example if cast.view is None else cast.view(example)
        networks = {
            n: model.network if isinstance(model, Joint) else model for n, model in cast.learners.items()
        }
        grew = {n: _branches(model, n, cast, ways) if branches else {} for n, model in cast.learners.items()}
        _refuse_unlike(grew)
        stages = list(next(iter(grew.values())))
        peers = {n: _peers(network, n, grew[n], cast, shown, ways) for n, network in networks.items()}

        now: dict[Teacher, Teacher] = {then: peers[n][""] for n, then in cast.peers.items()}
        terms = [replace(term, teachers=tuple(now.get(t, t) for t in term.teachers)) for term in cast.terms]
        answers = [t for t in terms if branches and not (t.method.looks() or t.method.teacher_looks())]
        _refuse_views(answers)
        heard: dict[Teacher, Mapping[str, Teacher]] = {mine[""]: mine for mine in peers.values()}
        voices: list[Said] = []
        for teacher in (t for term in answers for t in term.teachers):
            if teacher not in heard:
                heard[teacher] = said = _voices(teacher, stages, example)
                voices += said.values()
        if branch_task is None:
            branch_task = 0.0 if voices or cast.task is None else 1.0

        first = replace(
            cast, learners=networks, example=example, peers={n: p[""] for n, p in peers.items()}, terms=terms
        )
        learners = {}
        for name, mine in peers.items():
            lessons = {"": first.distiller(name)}
            for stage in stages:
                taught = [
                    replace(term, teachers=tuple(heard[t][stage] for t in term.teachers if t is not mine[""]))
                    for term in answers
                ]
                if not taught and not branch_task:
                    raise Refused(
                        f"The branches of '{name}' have nothing to learn: no term compares answers, and they "
                        "see no joint label; add the method kd, or set branches = false."
                    )
                lessons[stage] = Cast(
                    {stage: grew[name][stage]},
                    mine[stage].example,
                    taught,
                    labelled_cross_entropy if branch_task else None,
                    branch_task,
                    channels_last={stage: cast.channels_last.get(name, True)},
                    seed=cast.seed,
                ).distiller(stage)
            learners[name] = Learner(lessons, mine, cast.learners[name])
        return cls(learners, voices, ways, labelled=branch_task > 0)

    def turns(self, batch: Batch) -> Iterator[Turn]:
        wide = in_turns(batch, self.ways)
        shown = {name: learner.show(wide, self.ways) for name, learner in self.learners.items()}
        for name, learner in self.learners.items():
            for other, peer in self.learners.items():  # now: another micro-batch may have told them since
                peer.tell(shown[other])
            sights = learner.ask(wide, shown[name], self.voices)
            self._note(name, shown[name], batch)
            for stage, lesson in learner.lessons.items():
                for rival, loss in lesson.rival_losses(sights[stage]):
                    whose = self._called(name, stage, rival)
                    yield whose, {whose: loss}
            yield (
                self._player(name),
                {
                    self._called(name, stage, loss): value
                    for stage, lesson in learner.lessons.items()
                    for loss, value in lesson.losses(sights[stage]).items()
                },
            )

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        players: dict[str, dict[str, nn.Parameter]] = {self._player(name): {} for name in self.learners}
        for name, stage, lesson in self._lessons():
            for player, theirs in lesson.players().items():
                if player == "student":
                    players[self._player(name)] |= {self._called("", stage, n): p for n, p in theirs.items()}
                else:
                    players[self._called(name, stage, player)] = theirs
        return players

    def shipped(self) -> nn.Module:
        """The first learner as the recipe named it: a plain network, or one made with its branches."""
        return next(iter(self.learners.values())).ships

    def modules(self) -> Mapping[str, nn.Module]:
        return {self._called(name, stage, "lesson"): lesson for name, stage, lesson in self._lessons()}

    def teachers(self) -> tuple[Teacher, ...]:
        each = [teacher for learner in self.learners.values() for teacher in learner.lessons[""].teachers()]
        return each_once(each)

    def refuse_cut(self) -> str | None:
        return next(filter(None, (lesson.refuse_cut() for _, _, lesson in self._lessons())), None)

    def figures(self) -> dict[str, float]:
        """Of the last batch, at the deepest branch: shares of turns mistaken, and of labelled rows whose
        class is right. After the last epoch it warns where turns cannot be told apart."""
        self._warn()
        own = {
            self._called(name, stage, figure): value
            for name, stage, lesson in self._lessons()
            for figure, value in lesson.figures().items()
        }
        return own | {name: float(value) for name, value in self._figures.items()}

    def _note(self, name: str, shown: Shown, batch: Batch) -> None:
        """What the deepest branch makes of the batch."""
        stage = next(reversed(shown))
        if not stage:
            return
        seen, viewed = shown[stage][0]
        with torch.no_grad():
            missed = _missed(seen.out, self.ways)
            self._figures[self._called(name, "", "turns mistaken")] = missed.mean()
            for voice in self.voices:
                if voice.tap == joint(stage) and voice.answer is not None:
                    self._figures["teacher's turns mistaken"] = _missed(voice.answer.out, self.ways).mean()
            if viewed.y is None:
                return
            some = viewed.y != IGNORE
            right = some & (of_class(seen.out, self.ways).argmax(1) == viewed.y // self.ways)
            self._figures[self._called(name, "", "joint accuracy")] = right.sum() / some.sum().clamp(min=1)
            if self.labelled and self.ways > 1 and batch.lesson.epoch == batch.lesson.epochs - 1:
                counts = missed.new_zeros(seen.out.shape[1] // self.ways, 2)
                each = torch.stack([torch.ones_like(missed), missed], 1)
                counts.index_add_(0, viewed.y[some] // self.ways, each[some])
                self._mistaken[name] = self._mistaken.get(name, 0) + counts

    def _warn(self) -> None:
        """Of training rows, so what is learned by heart goes unnoticed."""
        for name, counts in self._mistaken.items():
            rows, missed = counts.T
            share = torch.where(rows < ENOUGH, 0.0, missed / rows.clamp(min=1))
            worst = int(share.argmax())
            if share[worst] > DOUBT:
                warnings.warn(
                    f"The branches of '{name}' mistake how an image of class {worst} is turned in "
                    f"{float(share[worst]):.0%} of the last epoch's rows, and of any class in "
                    f"{float(missed.sum() / rows.sum()):.0%}; where a class looks the same when it is "
                    "turned, joint labels contradict each other, so learn longer or set rotations = false.",
                    stacklevel=2,
                )
        self._mistaken = {}

    def _player(self, name: str) -> str:
        return name if len(self.learners) > 1 else "student"

    def _called(self, name: str, stage: str, what: str) -> str:
        """`task`, `stage1.task`; with several learners `a.task`, `a.stage1.task`."""
        return ".".join(part for part in (name if len(self.learners) > 1 else "", stage, what) if part)

    def _lessons(self) -> list[tuple[str, str, Distiller]]:
        return [
            (name, stage, lesson)
            for name, learner in self.learners.items()
            for stage, lesson in learner.lessons.items()
        ]


def _missed(q: Tensor, ways: int) -> Tensor:
    """1 for each row whose turn the joint logits mistake, else 0."""
    turn = torch.arange(len(q), device=q.device) % ways
    return (q.argmax(1) % ways != turn).float()


def _branches(model: nn.Module, name: str, cast: Cast, ways: int) -> dict[str, Branch]:
    if isinstance(model, Joint):
        return {stage: branch for stage, branch in model.branches.items() if isinstance(branch, Branch)}
    with forked(cast.seed, "branch", name):
        return grown(model, name, ways, cast.taps.get(name))


def _peers(
    network: nn.Module, name: str, branches: Mapping[str, Branch], cast: Cast, shown: Batch, ways: int
) -> dict[str, Peer]:
    """A learner as a teacher of others: its network under "", its branches under their stages."""
    tapped = Tapped(network, cast.taps.get(name), name)
    tapped.look(branches)
    with torch.no_grad(), unmoved(network), forked(cast.seed, "dry run"):
        maps = tapped(shown.x).at
    return {
        "": Peer(network, shown, taps=cast.taps.get(name), called=name),
        **{
            stage: Peer(branch, at_branch(shown, maps[stage], ways), called=f"{name}.{stage}")
            for stage, branch in branches.items()
        },
    }


def _voices(teacher: Teacher, stages: list[str], example: Batch) -> dict[str, Said]:
    model = getattr(teacher, "model", None)
    if isinstance(model, Joint) and len(model.branches) != len(stages):
        raise Refused(
            f"The teacher has {len(model.branches)} branches and the student {len(stages)}, one for each "
            "stage, and each teaches its like; choose two networks of as many stages."
        )
    try:
        return {stage: Said(teacher, joint(stage), example) for stage in stages}
    except Refused as error:
        raise Refused(
            f"A teacher of the scheme 'hssakd' gives joint answers, and this one does not "
            f"({str(error).rstrip('.')}); make it with change = 'limbeck.models.joint:joint' and train it in "
            "a stage of this scheme, or set branches = false."
        ) from error


def _refuse_views(answers: Sequence[Term]) -> None:
    for term in answers:
        if term.view is not None:
            raise Refused(
                f"'{term.name or type(term.method).__name__}' has a view of its own, and the branches see "
                "what the network sees; give the view to the stage."
            )


def _refuse_unlike(grew: Mapping[str, Mapping[str, Branch]]) -> None:
    (first, mine), *others = grew.items()
    for name, theirs in others:
        if theirs.keys() != mine.keys():
            raise Refused(
                f"'{first}' has {len(mine)} stages and '{name}' {len(theirs)}, and a branch teaches that "
                "of the same stage; choose networks of as many stages."
            )
