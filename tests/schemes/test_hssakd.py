"""HSSAKD against its formula, row by row, and what its paper says of it."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import build, recipe
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine, Pace
from limbeck.pieces.branch import Joint, pool
from limbeck.run import Run, Stopped, resume
from limbeck.schemes import hssakd
from limbeck.schemes.hssakd import HSSAKD, of_class

TAU, ROWS = 3, 6
STAGES = ("stage1", "stage2")
VIT = {"name": "vit_tiny", "patch": 2, "width": 8, "heads": 2, "depth": 2, "stages": 2}


def tiny() -> Splits:
    """Grey 8x8 images of three classes, a quarter of them unlabelled."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(3 * ROWS) % 3
    y[::4] = IGNORE
    data = Data(torch.randn(3 * ROWS, 1, 8, 8, generator=draw), y, ("x", "y", "z"))
    return Splits(data, data, data)


def oblong() -> Splits:
    data = Data(torch.zeros(ROWS, 1, 8, 6), torch.arange(ROWS) % 3, ("x", "y", "z"))
    return Splits(data, data, data)


def clocks(hands: int) -> Splits:
    """320 images of three classes, of which the first so many say where up is."""
    y = torch.arange(320) % 3
    x = torch.zeros(320, 1, 8, 8)
    x[:, :, 3:5, 3:5] = 1.0 + y[:, None, None, None].float()
    x[y < hands, :, :3, 2:6] = 3.0
    data = Data(x, y, ("x", "y", "z"))
    return Splits(data, data, data)


def faceless() -> Splits:
    return clocks(hands=2)


def pointing() -> Splits:
    return clocks(hands=3)


def negative(batch: Batch) -> Batch:
    return batch.replace(x=-batch.x)


class Mine(nn.Module):
    """A network from outside: a table of stages, and tails."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.answer = nn.Linear(4, classes)
        self.TAPS = {"stage1": "first", "stage2": "second", "pooled": "answer:in"}

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.second(self.first(x).relu()).mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        return nn.Conv2d(3, 4, 3, stride=2, padding=1) if i == 0 else nn.Conv2d(4, 4, 3, padding=1)


MODELS: dict[str, Any] = {
    "net": {"name": "cnn", "widths": [4, 5]},
    "a": {"name": "cnn", "widths": [3, 4]},
    "b": {"name": "cnn", "widths": [2, 5]},
    "c": {"name": "cnn", "widths": [3, 4]},
    "deep": {"name": "cnn", "widths": [2, 3, 4]},
    "both": {"ensemble": ["net", "b"]},
    "mine": f"{__name__}:Mine",
}
KD = {"method": "kd", "temperature": TAU}
TEACHER = {
    "learner": {"name": "taught", "from": "net", "change": "limbeck.models.joint:joint"},
    "scheme": "hssakd",
}


def plan(*stages: dict[str, Any], data: str = "tiny", models: dict[str, Any] | None = None) -> recipe.Recipe:
    each = [{"scheme": "hssakd", "epochs": 1, "batch": ROWS, **stage} for stage in stages]
    return recipe.parse(
        {"data": f"{__name__}:{data}", "models": MODELS | (models or {}), "stages": each}, "the test"
    )


def student(**stage: Any) -> recipe.Recipe:
    return plan(TEACHER, {"learner": "a", "terms": [{**KD, "teacher": "taught"}], **stage})


def online(*names: str, models: dict[str, Any] | None = None, **stage: Any) -> recipe.Recipe:
    peers = {"learner": list(names), "terms": [{**KD, "teacher": list(names)}]}
    return plan({**peers, **stage}, models=models)


def lesson(whole: recipe.Recipe, number: int = -1, seed: int = 0) -> tuple[build.Lab, Engine, HSSAKD]:
    """The stage of that number, with what the ones before it make, untrained."""
    lab = build.lab(whole, seed)
    for n in range(len(whole.stages)):
        engine = lab.engine(n)
        if n == number % len(whole.stages):
            break
    engine.scheme.train()
    assert isinstance(engine.scheme, HSSAKD)
    return lab, engine, engine.scheme


def losses(engine: Engine, batch: Batch | None = None) -> dict[str, Tensor]:
    batch = engine.loader.at(0) if batch is None else batch
    return {name: loss for _, named in engine.scheme.turns(batch) for name, loss in named.items()}


# --- the slow reference ---


def wide(x: Tensor) -> Tensor:
    return torch.stack([image.rot90(turn, (1, 2)) for image in x for turn in range(4)])


def answers(network: Any, branches: Any, x: Tensor) -> dict[str, Tensor]:
    """The network's logits under "", the branches' under their stages, for every turn of every image."""
    network, branches = copy.deepcopy((network, branches))  # BatchNorm remembers
    found, x = {}, wide(x)
    for stage, module in zip(STAGES, network.stages, strict=True):
        x = module(x)
        found[stage] = branches[stage].head(pool(branches[stage].tail(x)))
    return {"": network.head(x.mean((2, 3))), **found}


def apart(t: Tensor, s: Tensor) -> float:
    """KL at temperature 3, one probability at a time."""
    total = 0.0
    for row_t, row_s in zip(t.tolist(), s.tolist(), strict=True):
        p, q = ([math.exp(z / TAU) for z in row] for row in (row_t, row_s))
        p, q = ([v / sum(each) for v in each] for each in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return TAU**2 * total / len(t)


def surprise(z: Tensor, y: list[int]) -> float:
    """Cross-entropy over the rows that have a label."""
    rows = [
        math.log(sum(map(math.exp, row))) - row[k] for row, k in zip(z.tolist(), y, strict=True) if k >= 0
    ]
    return sum(rows) / len(rows)


def labelled(found: dict[str, Tensor], y: Tensor) -> dict[str, float]:
    """L_T of the paper."""
    joint = [4 * k + turn if k >= 0 else IGNORE for k in y.tolist() for turn in range(4)]
    return {
        "task": surprise(found[""][::4], y.tolist()),
        **{f"{stage}.task": surprise(found[stage], joint) for stage in STAGES},
    }


def close(named: dict[str, Tensor], expected: dict[str, float]) -> None:
    assert named.keys() == expected.keys()
    for name, value in expected.items():
        assert named[name].item() == pytest.approx(value, rel=2e-5, abs=1e-6), name


def grew(scheme: HSSAKD, name: str) -> dict[str, nn.Module]:
    return {stage: one.student for stage, one in scheme.learners[name].lessons.items() if stage}


def test_a_teacher_learns_classes_and_turns() -> None:
    lab, engine, _ = lesson(student(), 0)
    batch, taught = engine.loader.at(0), lab.models["taught"]
    close(losses(engine), labelled(answers(taught.network, taught.branches, batch.x), batch.y))


def test_a_student_learns_what_the_teacher_says_of_every_turn() -> None:
    lab, engine, scheme = lesson(student())
    batch, taught = engine.loader.at(0), lab.models["taught"]
    s = answers(lab.models["a"], grew(scheme, "a"), batch.x)
    t = answers(taught.network.eval(), taught.branches.eval(), batch.x)
    expected = {"task": surprise(s[""][::4], batch.y.tolist()), "kd": apart(t[""], s[""])}
    expected |= {f"{stage}.kd": apart(t[stage], s[stage]) for stage in STAGES}
    assert min(expected.values()) > 0
    close(losses(engine), expected)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_peers_learn_the_labels_and_each_other(names: str) -> None:
    lab, engine, scheme = lesson(online(*names))
    batch = engine.loader.at(0)
    found = {name: answers(lab.models[name], grew(scheme, name), batch.x) for name in names}
    expected = {}
    for name in names:
        others = [found[other] for other in names if other != name]
        each = labelled(found[name], batch.y)
        for stage in ("", *STAGES):
            said = [apart(t[stage], found[name][stage]) for t in others]
            each[f"{stage}.kd".lstrip(".")] = sum(said) / (len(names) - 1)
        expected |= {f"{name}.{loss}": value for loss, value in each.items()}
    close(losses(engine), expected)


# --- the paper's properties ---


def test_what_a_student_shares_with_its_teacher_costs_nothing() -> None:
    """A student with the teacher's answers but for a constant a row has no divergence; else it has some."""
    lab, engine, scheme = lesson(plan(TEACHER, {"learner": "net", "terms": [{**KD, "teacher": "taught"}]}))
    taught = lab.models["taught"]
    lab.models["net"].load_state_dict(taught.network.state_dict())
    for stage, branch in grew(scheme, "net").items():
        branch.load_state_dict(taught.branches[stage].state_dict())
        branch.head.bias.data.add_(2.5)
    for one in scheme.modules().values():
        one.eval()
    named = losses(engine)
    assert all(named[name].abs() < 1e-5 for name in ("kd", "stage1.kd", "stage2.kd"))
    grew(scheme, "net")["stage2"].head.bias.data[0] += 1
    assert losses(engine)["stage2.kd"] > 1e-3 and losses(engine)["stage1.kd"].abs() < 1e-5


def test_no_gradient_reaches_the_teacher() -> None:
    lab, engine, _ = lesson(student())
    sum(losses(engine).values()).backward()
    assert all(p.grad is None for p in lab.models["taught"].parameters())
    assert all(p.grad is not None for p in lab.models["a"].parameters())


def test_a_class_has_what_its_turns_have() -> None:
    q = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = of_class(q).exp()
    for row, classes in zip(q.softmax(1).tolist(), p.tolist(), strict=True):
        assert classes == pytest.approx([sum(row[4 * k : 4 * k + 4]) for k in range(3)])
    assert p.min() >= 0
    torch.testing.assert_close(p.sum(1), torch.ones(5, dtype=torch.float64))


def permuted(branch: Any, order: list[int]) -> None:
    rows = torch.tensor([4 * k + turn for k in range(3) for turn in order])
    for p in branch.head.parameters():
        p.data = p[rows].data


@pytest.mark.parametrize("number", [0, 1])
def test_in_which_order_the_turns_come_makes_no_difference(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upright one is first; the columns follow."""
    order = [0, 3, 1, 2]
    lab, engine, scheme = lesson(student(), number)
    plain, turned = losses(engine), hssakd.turned
    monkeypatch.setattr(hssakd, "turned", lambda x: turned(x).unflatten(0, (-1, 4))[:, order].flatten(0, 1))
    assert not torch.isclose(losses(engine)["stage1.task" if number == 0 else "stage1.kd"], plain["task"])
    for branch in lab.models["taught"].branches.values():
        permuted(branch, order)
    if number == 1:
        for branch in grew(scheme, "a").values():
            permuted(branch, order)
    torch.testing.assert_close(losses(engine), plain)


@pytest.mark.parametrize("number", [0, 1])
def test_in_which_order_the_images_come_makes_no_difference(number: int) -> None:
    _, engine, _ = lesson(student(), number)
    batch, order = engine.loader.at(0), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(losses(engine, batch.map(lambda v: v[order])), losses(engine))


def test_without_branches_and_turns_it_is_hintons() -> None:
    plain = {"learner": "a", "terms": [{**KD, "teacher": "net"}]}
    bare = {"name": "hssakd", "branches": False, "rotations": False}
    ends = []
    for scheme in (bare, "offline"):
        lab = build.lab(plan({**plain, "scheme": scheme, "epochs": 2}))
        records = [record.losses for record in lab.engine(0).lessons() if record is not None]
        ends.append((records, lab.models["a"].state_dict()))
    assert ends[0][0] == ends[1][0] and ends[0][0][0].keys() == {"task", "kd"}
    assert all(torch.equal(v, ends[1][1][name]) for name, v in ends[0][1].items())


def test_without_branches_it_is_the_answer_on_every_turn() -> None:
    lab, engine, scheme = lesson(student(scheme={"name": "hssakd", "branches": False}))
    _, whole, _ = lesson(student())
    named, full = losses(engine), losses(whole)
    assert named.keys() == {"task", "kd"} and all(torch.equal(named[name], full[name]) for name in named)
    assert {id(p) for p in scheme.players()["student"].values()} == {
        id(p) for p in lab.models["a"].parameters()
    }


def test_without_turns_branches_learn_classes() -> None:
    """Deep mutual learning with a hierarchy and nothing more."""
    lab, engine, scheme = lesson(online("a", "b", scheme={"name": "hssakd", "rotations": False}))
    batch = engine.loader.at(0)
    network, branches = copy.deepcopy((lab.models["a"], grew(scheme, "a")))
    shown: Any = network.stages[0](batch.x)
    z = branches["stage1"](shown)
    assert z.shape == (ROWS, 3)
    assert losses(engine)["a.stage1.task"].item() == pytest.approx(surprise(z, batch.y.tolist()), rel=1e-5)


def test_peers_are_alike_to_each_other() -> None:
    _, ab, _ = lesson(online("a", "b"))
    _, ba, _ = lesson(online("b", "a"))
    there, back = losses(ab), losses(ba)
    assert there.keys() == back.keys()
    torch.testing.assert_close(there, {name: back[name] for name in there})


def test_equal_peers_have_nothing_to_say_to_each_other() -> None:
    lab, engine, scheme = lesson(online("a", "c"))
    lab.models["c"].load_state_dict(lab.models["a"].state_dict())
    for stage, branch in grew(scheme, "c").items():
        branch.load_state_dict(grew(scheme, "a")[stage].state_dict())
    named = losses(engine)
    for loss in ("kd", "stage1.kd", "stage2.kd"):
        assert named[f"a.{loss}"].abs() < 1e-6 and named[f"c.{loss}"].abs() < 1e-6
    assert named["a.task"] == named["c.task"] > 0


def test_no_gradient_reaches_the_peer_that_speaks() -> None:
    _, engine, scheme = lesson(online("a", "b"))
    players = scheme.players()
    named = losses(engine)
    for mine, other in ("ab", "ba"):
        for stage in ("", "stage1.", "stage2."):
            loss = named[f"{mine}.{stage}kd"]
            across = torch.autograd.grad(
                loss, list(players[other].values()), retain_graph=True, allow_unused=True
            )
            own = torch.autograd.grad(
                loss, list(players[mine].values()), retain_graph=True, allow_unused=True
            )
            assert all(g is None for g in across) and any(g is not None for g in own)


# --- who sees what ---


def test_only_upright_images_have_a_class_and_students_branches_no_label_at_all() -> None:
    _, engine, _ = lesson(student())
    batch = engine.loader.at(0)
    other = batch.replace(y=torch.where(batch.y == IGNORE, IGNORE, (batch.y + 1) % 3))
    plain, changed = losses(engine), losses(engine, other)
    assert plain["task"] != changed["task"]
    assert all(plain[name] == changed[name] for name in plain if name != "task")


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_how_much_joint_labels_count_can_be_said(weight: float) -> None:
    _, engine, _ = lesson(student(scheme={"name": "hssakd", "branch_task": weight}))
    named = losses(engine)
    assert ("stage1.task" in named) is (weight > 0)
    if weight:
        _, whole, _ = lesson(student(scheme={"name": "hssakd", "branch_task": 1.0}))
        torch.testing.assert_close(named["stage2.task"], weight * losses(whole)["stage2.task"])


def test_without_a_task_nobody_sees_a_label() -> None:
    _, engine, _ = lesson(online("a", "b", task_weight=0))
    assert all(name.endswith("kd") for name in losses(engine))


def test_a_view_is_of_the_turned_images_and_teachers_have_their_own() -> None:
    plain = losses(lesson(student())[1])
    named = losses(lesson(student(view=f"{__name__}:negative"))[1])
    assert named.keys() == plain.keys()
    assert all(not torch.isclose(named[name], plain[name]) for name in plain)


def test_taps_are_the_networks_and_looked_at_once() -> None:
    hint = {"method": "fitnet", "tap": "stage2", "teacher": "net"}
    terms = [{**KD, "teacher": "taught"}, hint, {**hint, "teacher": "taught"}]
    named = losses(lesson(student(terms=terms))[1])
    assert named.keys() == {"task", "kd", "fitnet", "fitnet_2", "stage1.kd", "stage2.kd"}


def test_everybody_is_asked_once_a_batch() -> None:
    lab, engine, _ = lesson(student())
    calls: list[str] = []
    for name in ("a", "taught"):
        lab.models[name].register_forward_hook(lambda *_, name=name: calls.append(name))
    list(engine.lessons())
    assert sorted(calls) == ["a"] * 3 + ["taught"] * 3
    assert int(lab.models["a"].state_dict()["stages.0.1.num_batches_tracked"]) == 3


# --- what learns, what ships ---


@pytest.mark.parametrize("change", ["joint", "frozen"])
def test_a_frozen_network_stays_bit_for_bit_and_its_branches_learn(change: str) -> None:
    made = {**TEACHER["learner"], "change": f"limbeck.models.joint:{change}"}  # type: ignore[dict-item]
    lab, engine, scheme = lesson(plan({**TEACHER, "learner": made, "epochs": 2}))
    taught = lab.models["taught"]
    before = copy.deepcopy(taught.state_dict())
    list(engine.lessons())
    moved = {name for name, v in taught.state_dict().items() if not torch.equal(v, before[name])}
    network = {name for name in before if name.startswith("network.")}
    assert before.keys() - network <= moved
    assert moved & network == (network if change == "joint" else set())
    assert taught.network.training is (change == "joint") and taught.branches.training
    assert scheme.ships() is taught
    for name, v in lab.models["net"].state_dict().items():
        assert torch.equal(v, before[f"network.{name}"]), "what it was made from stays as it is"


def test_the_plain_student_ships() -> None:
    lab, engine, scheme = lesson(student())
    list(engine.lessons())
    x = tiny().test.x
    shipped, fresh = scheme.ships(), build.lab(student()).models["a"]
    assert shipped is lab.models["a"]
    fresh.load_state_dict(shipped.state_dict())
    inside = scheme.learners["a"].lessons[""].eval()
    assert torch.equal(fresh.eval()(x), inside(x))
    assert sum(p.numel() for p in shipped.parameters()) == sum(p.numel() for p in fresh.parameters())


def test_a_network_from_outside_grows_branches() -> None:
    made = {**TEACHER["learner"], "from": "mine"}  # type: ignore[dict-item]
    terms = [{**KD, "teacher": "taught"}]
    named = losses(lesson(plan({**TEACHER, "learner": made}, {"learner": "mine", "terms": terms}))[1])
    assert named.keys() == {"task", "kd", "stage1.kd", "stage2.kd"}


def test_branches_begin_by_the_seed_and_unlike() -> None:
    first, again, other = (grew(lesson(online("a", "c"), seed=seed)[2], "a") for seed in (0, 0, 1))
    weights = [each["stage2"].head.weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    peer = grew(lesson(online("a", "c"))[2], "c")
    assert not torch.equal(weights[0], peer["stage2"].head.weight)


class Once:
    """One batch."""

    steps = 1

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield self.batch


@pytest.mark.parametrize("who", ["the teacher", "the student", "peers"])
def test_micro_batches_add_up(who: str) -> None:
    """In vits, whose rows do not meet."""
    vits = dict.fromkeys(("net", "a", "b"), VIT)
    offline = plan(TEACHER, {"learner": "a", "terms": [{**KD, "teacher": "taught"}]}, models=vits)
    ends = []
    for parts in (1, 3):
        whole = online("a", "b", models=vits) if who == "peers" else offline
        _, engine, scheme = lesson(whole, 0 if who == "the teacher" else -1)
        assert scheme.refuse_cut() is None
        paces = {
            player: Pace(torch.optim.SGD(own.values(), lr=1.0), lambda step: 1.0)
            for player, own in scheme.players().items()
        }
        cut = Engine(scheme, Once(engine.loader.at(0)), paces, epochs=1, accumulate=parts)
        (record,) = cut.lessons()
        assert record is not None
        ends.append((record.losses, scheme.modules()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, module in ends[0][1].items():
        torch.testing.assert_close(module.state_dict(), ends[1][1][name].state_dict(), rtol=0, atol=1e-5)


def test_a_stopped_run_of_both_stages_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = Run(student(), tmp_path / "whole")
    for _ in whole.moments():
        pass
    cut, batches = Run(student(), tmp_path / "cut", every=0), 0
    with pytest.raises(Stopped):
        for moment in cut.moments():
            batches += moment.stage == 1
            if batches == 2:
                cut.stop()
    again = resume(tmp_path / "cut", every=0)
    for _ in again.moments():
        pass
    for name in ("taught", "a"):
        there = whole.lab.models[name].state_dict()
        assert all(torch.equal(v, there[key]) for key, v in again.lab.models[name].state_dict().items())
    figures = [[record["figures"] for record in run.records] for run in (whole, again)]
    assert figures[0] == figures[1]


# --- what it measures ---


def test_its_figures_are_of_the_deepest_branch() -> None:
    lab, engine, scheme = lesson(student())
    batch, taught = engine.loader.at(0), lab.models["taught"]
    losses(engine)
    s = answers(lab.models["a"], grew(scheme, "a"), batch.x)["stage2"]
    t = answers(taught.network.eval(), taught.branches.eval(), batch.x)["stage2"]
    shares = [sum(int(row.argmax()) % 4 != n % 4 for n, row in enumerate(q)) / len(q) for q in (s, t)]
    right = [
        int(row.softmax(0).view(3, 4).sum(1).argmax()) == k
        for n, row in enumerate(s)
        if (k := int(batch.y[n // 4])) != IGNORE
    ]
    expected = {
        "turns mistaken": shares[0],
        "teacher's turns mistaken": shares[1],
        "joint accuracy": sum(right) / len(right),
    }
    assert scheme.figures() == pytest.approx(expected)


FAST: dict[str, Any] = {"optim": {"student": {"name": "adam", "lr": 0.02}}, "batch": 32, "epochs": 4}


def learned(data: str, **stage: Any) -> None:
    list(lesson(plan({**TEACHER, **FAST, **stage}, data=data))[1].lessons())


def test_branches_learn_from_the_teacher_alone_what_nobody_labels_for_them() -> None:
    pupil = {"learner": "a", "terms": [{**KD, "teacher": "taught"}], **FAST}
    lab = build.lab(plan({**TEACHER, **FAST}, pupil, data="pointing"))
    first, second = (
        [record.figures["turns mistaken"] for record in lab.engine(n).lessons() if record is not None]
        for n in (0, 1)
    )
    assert first[-1] < 0.1 and second[-1] < 0.3, "by chance it would be 0.75"


def test_a_class_that_looks_the_same_from_every_side_is_warned_of() -> None:
    found = r"'taught' mistake how an image of class 2 is turned in (\d\d)% .* of any class in (\d\d)%;"
    with pytest.warns(UserWarning, match=found) as said:
        learned("faceless")
    assert len(said) == 1 and "\n" not in str(said[0].message)
    one, all_of_them = map(int, re.search(found, str(said[0].message)).groups())  # type: ignore[union-attr]
    assert 70 <= one <= 80 and abs(all_of_them - one / 3) < 10


def test_data_that_say_where_up_is_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned("pointing")
        learned("faceless", scheme={"name": "hssakd", "branches": False})


# --- refusals ---


def refusals() -> Iterator[tuple[recipe.Recipe, str]]:
    taught = [{**KD, "teacher": "taught"}]
    yield plan({"learner": "a"}, data="oblong"), r"turn square images, and x has shape \(6, 1, 8, 6\)"
    yield (
        plan({"learner": "a", "terms": [{**KD, "teacher": "net"}]}),
        "joint answers.*Tap 'joint1' does not exist",
    )
    yield (
        plan({"learner": "a", "terms": [{**KD, "teacher": "both"}]}),
        "joint answers.*ensemble.*no tap 'joint1'",
    )
    yield plan(TEACHER, {"learner": "deep", "terms": taught}), "teacher has 2 branches and the student 3"
    yield online("a", "deep"), "'a' has 2 stages and 'deep' 3"
    yield online("a"), "would let 'a' teach itself"
    yield plan({"learner": "plain"}, models={"plain": f"{__name__}:Plain"}), r"has no `tail\(i\)`"
    yield plan({"learner": "a", "scheme": {"name": "hssakd", "branch_task": 0}}), "have nothing to learn"
    for weight in (-1, float("inf")):
        yield plan({"learner": "a", "scheme": {"name": "hssakd", "branch_task": weight}}), f"is {weight}"
    viewed = [{**taught[0], "view": f"{__name__}:negative"}]
    yield plan(TEACHER, {"learner": "a", "terms": viewed}), "'kd' has a view of its own"
    for tap in ("pooled", "stage1"):
        mine = {"name": f"{__name__}:Mine", "taps": {tap: "first:in"}}
        yield plan({"learner": "mine"}, models={"mine": mine}), f"{tap} = 'first:in'"
    flat = {"learner": "a", "terms": taught, "scheme": {"name": "hssakd", "rotations": False}}
    yield plan(TEACHER, flat), "3 classes where the teacher has 12"


class Plain(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, classes)
        self.TAPS = {"stage1": "head", "pooled": "head:in"}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize(("bad", "words"), list(refusals()))
def test_what_cannot_be_is_refused_in_a_sentence(bad: recipe.Recipe, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        lesson(bad)
    assert "\n" not in str(caught.value)


def test_a_joint_network_is_one() -> None:
    lab, _, _ = lesson(student(), 0)
    assert isinstance(lab.models["taught"], Joint)
