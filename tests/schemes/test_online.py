"""Deep mutual learning against a loop written by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import build, recipe
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits

STEPS, ROWS = 3, 8
WIDTHS = {"a": [3, 4], "b": [2, 5], "c": [3, 4], "trained": [4, 4]}


def tiny() -> Splits:
    """Grey 8x8 images of three classes, a quarter of them unlabelled."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(STEPS * ROWS) % 3
    y[::4] = IGNORE
    data = Data(torch.randn(STEPS * ROWS, 1, 8, 8, generator=draw), y, ("x", "y", "z"))
    return Splits(data, data, data)


def plan(peers: str, teachers: list[str] | None = None, **stage: Any) -> recipe.Recipe:
    term = {"method": "kd", "temperature": 1, "teacher": teachers or list(peers)}
    return recipe.parse(
        {
            "data": f"{__name__}:tiny",
            "models": {name: {"name": "cnn", "widths": widths} for name, widths in WIDTHS.items()},
            "stages": [
                {
                    "learner": list(peers),
                    "scheme": "online",
                    "epochs": 1,
                    "batch": ROWS,
                    "terms": [term],
                    "optim": {"student": {"lr": 0.1, "schedule": "constant"}},
                    **stage,
                }
            ],
        }
    )


def mutual(net: nn.Module, x: Tensor, y: Tensor, others: list[Tensor]) -> Tensor:
    """One network's loss, one row at a time: cross-entropy, and the mean divergence from the others."""
    z, total = net(x).log_softmax(1), torch.zeros(())
    labelled = [(row, int(label)) for row, label in zip(z, y, strict=True) if label != IGNORE]
    total = total - sum(row[label] for row, label in labelled) / len(labelled)
    for other in others:
        p = other.softmax(1)
        total = total + (p * (p.log() - z)).sum(1).mean() / len(others)
    return total


def anew(net: nn.Module, x: Tensor) -> Tensor:
    """The answer of a network in training whose BatchNorm statistics stay as they are."""
    with torch.no_grad():
        return copy.deepcopy(net)(x)


def by_hand(
    nets: dict[str, nn.Module], batches: list[Batch], in_turn: bool, trained: nn.Module | None
) -> None:
    paces = {
        name: torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
        for name, net in nets.items()
    }
    for batch in batches:
        answers = {name: anew(net, batch.x) for name, net in nets.items()}
        extra = [] if trained is None else [trained.eval()(batch.x).detach()]
        for name, net in nets.items():
            others = [answer for other, answer in answers.items() if other != name]
            paces[name].zero_grad()
            mutual(net, batch.x, batch.y, others + extra).backward()
            paces[name].step()
            if in_turn:
                answers[name] = anew(net, batch.x)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("peers", ["ab", "abc"])
@pytest.mark.parametrize("extra", [False, True])
def test_it_is_the_loop(peers: str, in_turn: bool, extra: bool) -> None:
    teachers = [*peers, *(["trained"] if extra else [])]
    lab = build.lab(plan(peers, teachers, scheme={"name": "online", "in_turn": in_turn}))
    nets = {name: copy.deepcopy(lab.models[name]) for name in peers}
    engine = lab.engine(0)
    assert len(list(engine.lessons())) == STEPS
    batches = [engine.loader.at(step) for step in range(STEPS)]
    by_hand(nets, batches, in_turn, lab.models["trained"] if extra else None)
    for name, net in nets.items():
        assert int(net.state_dict()["stages.0.1.num_batches_tracked"]) == STEPS
        torch.testing.assert_close(lab.models[name].state_dict(), net.state_dict(), rtol=0, atol=1e-6)


def test_asking_anew_is_another_plan() -> None:
    ends = []
    for in_turn in (False, True):
        lab = build.lab(plan("ab", scheme={"name": "online", "in_turn": in_turn}))
        list(lab.engine(0).lessons())
        ends.append([lab.models[name].head.weight for name in "ab"])
    assert not torch.equal(ends[0][1], ends[1][1])  # b saw what a had learned


def test_peers_of_one_kind_begin_unlike() -> None:
    lab = build.lab(plan("ac"))
    a, c = lab.models["a"].state_dict(), lab.models["c"].state_dict()
    assert a.keys() == c.keys()
    assert not torch.equal(a["stages.0.0.weight"], c["stages.0.0.weight"])


def test_the_first_one_ships() -> None:
    for peers in ("ab", "ba"):
        lab = build.lab(plan(peers))
        assert lab.engine(0).scheme.ships() is lab.models[peers[0]]


def test_each_peer_may_have_an_optimiser_of_its_own() -> None:
    engine = build.lab(plan("ab", optim={"student": {"lr": 0.1}, "b": {"name": "adam", "lr": 0.01}})).engine(
        0
    )
    optimisers = [engine.paces[name].optimiser for name in "ab"]
    assert [type(o).__name__ for o in optimisers] == ["SGD", "Adam"]
    assert [o.param_groups[0]["lr"] for o in optimisers] == [0.1, 0.01]


def test_losses_are_said_for_each() -> None:
    *_, record = build.lab(plan("ab")).engine(0).lessons()
    assert record is not None and record.losses.keys() == {"a.task", "a.kd", "b.task", "b.kd"}


def test_features_are_taught_through_projectors_that_are_each_ones_own() -> None:
    terms = [{"method": "fitnet", "tap": "stage2", "teacher": ["a", "b"]}]
    lab = build.lab(plan("ab", terms=terms))
    engine = lab.engine(0)
    list(engine.lessons())
    a, b = (lesson.methods["fitnet"].project for lesson in engine.scheme.modules().values())
    assert (a.weight.shape, b.weight.shape) == ((5, 4, 1, 1), (4, 5, 1, 1))
    assert not any("project" in name for name in engine.scheme.ships().state_dict())


def test_peers_teach_what_they_see_also_when_a_view_changes_the_number_of_rows() -> None:
    engine = build.lab(plan("ab", view="rotations", task_weight=0.0)).engine(0)
    *_, record = engine.lessons()
    assert record is not None and 0 < record.losses["a.kd"] < 1


def test_a_network_alone_is_refused() -> None:
    with pytest.raises(Refused, match=r"two or more networks .* the stage names a alone"):
        build.lab(plan("a", ["a", "trained"])).engine(0)


def test_a_term_that_only_names_one_peer_is_refused() -> None:
    with pytest.raises(Refused, match="'kd' would let 'a' teach itself"):
        build.lab(plan("ab", ["a"])).engine(0)


@pytest.mark.parametrize(
    "said", [{"view": "flip"}, {"columns": [1, 0]}, {"normalise": [0.5, 0.5]}, {"precision": "bfloat16"}]
)
def test_what_is_said_of_a_peer_as_a_teacher_is_not_passed_over(said: dict[str, Any]) -> None:
    content = plan("ab").model_dump(mode="json", by_alias=True)
    content["models"]["b"].update(said)
    with pytest.raises(Refused, match=rf"'b' teaches while it learns, so its `{next(iter(said))}`"):
        build.lab(recipe.parse(content)).engine(0)


def test_an_ensemble_that_holds_a_learner_is_refused() -> None:
    """It would be asked in eval, in the middle of its own lesson."""
    content = plan("ab").model_dump(mode="json", by_alias=True)
    content["models"]["both"] = {"ensemble": ["trained", "b"]}
    content["stages"][0]["terms"][0]["teacher"] = ["both"]
    with pytest.raises(Refused, match="teach itself"):
        recipe.parse(content)
