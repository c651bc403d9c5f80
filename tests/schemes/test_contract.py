"""The contract every scheme passes. Schemes are found by listing their folder; a new one adds its stage here.

A stage is what a recipe says of it: who learns, from whom. Learners have BatchNorm, which shows what moved,
and no dropout, so that whatever draws from torch's global generator is the scheme.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import build, checkpoint, recipe, registry
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.keyed import reseed
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine

ROWS, EPOCHS = 12, 2
KD = {"method": "kd", "temperature": 2}

STAGES: dict[str, dict[str, Any]] = {
    "offline": {"learner": "student", "terms": [KD]},
    "online": {
        "learner": ["student", "peer", "third"],
        "terms": [
            {**KD, "teacher": ["student", "peer", "third", "teacher"]},
            {"method": "fitnet", "tap": "stage2", "teacher": ["student", "peer", "third"]},
        ],
    },
    "branches": {
        "learner": "student",
        "terms": [
            {**KD, "teacher": "student"},
            {"method": "fitnet", "tap": "stage2", "teacher": "student"},
            {**KD, "teacher": "teacher"},
        ],
    },
    "dafl": {"learner": ["student", "generator"], "terms": [KD]},
    "hssakd": {
        "learner": ["student", "peer", "third"],
        "terms": [
            {**KD, "teacher": ["student", "peer", "third"]},
            {"method": "fitnet", "tap": "stage2", "teacher": ["student", "teacher"]},
        ],
    },
}
# One learner too many, and where a scheme has more than one, one too few.
MISCAST: dict[str, list[list[str]]] = {
    "offline": [["student", "peer"]],
    "online": [["student"]],
    "branches": [["student", "peer"]],
    "dafl": [["student"], ["student", "generator", "peer"]],
    "hssakd": [],  # one or several
}
each_scheme = pytest.mark.parametrize("name", registry.names("scheme"))


def tiny() -> Splits:
    """Grey 8x8 images of three classes, a third of them unlabelled."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(3 * ROWS) % 3
    y[torch.randperm(len(y), generator=draw)[:ROWS]] = IGNORE
    data = Data(torch.randn(3 * ROWS, 1, 8, 8, generator=draw), y, ("x", "y", "z"))
    return Splits(data, data, data)


CNNS = {
    "teacher": {"name": "cnn", "widths": [4, 6]},
    "student": {"name": "cnn", "widths": [3, 4]},
    "peer": {"name": "cnn", "widths": [2, 5]},
    "third": {"name": "cnn", "widths": [3, 4]},
    "generator": {"name": "invent", "width": 4, "codes": 5},
}
VIT = {"name": "vit_tiny", "patch": 2, "width": 8, "heads": 2, "depth": 2, "stages": 2}


def plan(name: str, models: dict[str, Any] | None = None, **stage: Any) -> recipe.Recipe:
    return recipe.parse(
        {
            "data": f"{__name__}:tiny",
            "models": CNNS | (models or {}),
            "stages": [{"scheme": name, "epochs": EPOCHS, "batch": ROWS, **STAGES[name], **stage}],
        }
    )


def learners(name: str) -> tuple[str, ...]:
    return plan(name).stages[0].learners


def lesson(name: str, seed: int = 0, **stage: Any) -> tuple[build.Lab, Engine]:
    lab = build.lab(plan(name, **stage), seed)
    return lab, lab.engine(0)


def everything(lab: build.Lab, engine: Engine) -> dict[str, Any]:
    """Whatever a run knows, but for the clock on the wall."""
    state = {key: value for key, value in engine.state_dict().items() if key != "seconds"}
    return copy.deepcopy({**state, "models": {name: net.state_dict() for name, net in lab.models.items()}})


def same(a: Any, b: Any) -> bool:
    """Bit for bit, in whatever they are nested."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_every_scheme_has_its_stage_here() -> None:
    assert registry.names("scheme").keys() == STAGES.keys() == MISCAST.keys()


@each_scheme
def test_assembly_leaves_no_trace(name: str) -> None:
    lab = build.lab(plan(name))
    before = copy.deepcopy({who: net.state_dict() for who, net in lab.models.items()})
    lab.engine(0)
    assert same({who: net.state_dict() for who, net in lab.models.items()}, before)


@each_scheme
def test_it_trains_and_stays_finite(name: str) -> None:
    _, engine = lesson(name)
    records = [record for record in engine.lessons() if record is not None]
    assert [record.epoch for record in records] == list(range(EPOCHS))
    values = [value for record in records for value in record.losses.values()]
    assert values and all(torch.isfinite(torch.tensor(values)))
    state = engine.scheme.state_dict()["modules"]
    assert all(bool(v.isfinite().all()) for module in state.values() for v in module.values())


@each_scheme
def test_a_turn_moves_its_player_and_nobody_else(name: str) -> None:
    _, engine = lesson(name)
    players = engine.scheme.players()
    parameters = {player: list(own.values()) for player, own in players.items()}
    counted = [id(p) for own in parameters.values() for p in own]
    assert counted and len(set(counted)) == len(counted), "a parameter belongs to two players"
    learning = [p for m in engine.scheme.modules().values() for p in m.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == set(counted), "what learns belongs to a player"
    turns: list[str] = []
    before: dict[str, list[Tensor]] = {}

    def remember(*_: Any) -> None:
        before.update({who: [p.detach().clone() for p in own] for who, own in parameters.items()})

    def moved(player: str) -> Callable[..., None]:
        def compare(*_: Any) -> None:
            for who, own in parameters.items():
                stayed = [torch.equal(p, then) for p, then in zip(own, before[who], strict=True)]
                assert all(stayed) if who != player else not any(stayed), f"{player}'s turn, {who}"
            turns.append(player)

        return compare

    for player, pace in engine.paces.items():
        pace.optimiser.register_step_pre_hook(remember)
        pace.optimiser.register_step_post_hook(moved(player))
    next(engine.lessons())
    assert sorted(turns) == sorted(players), "each player has one turn a step"


@each_scheme
def test_who_does_not_learn_stays_as_it_is(name: str) -> None:
    lab, engine = lesson(name)
    idle = {who: net for who, net in lab.models.items() if who not in learners(name)}
    before = copy.deepcopy({who: net.state_dict() for who, net in idle.items()})
    list(engine.lessons())
    assert "teacher" in idle and not any(m.training for m in idle["teacher"].modules())
    assert same({who: net.state_dict() for who, net in idle.items()}, before)
    assert all(p.grad is None and p.requires_grad for net in idle.values() for p in net.parameters())


@each_scheme
def test_what_ships_is_the_plain_model(name: str) -> None:
    lab, engine = lesson(name)
    list(engine.lessons())
    shipped, plain = engine.scheme.ships(), build.lab(plan(name)).models["student"]
    assert shipped is lab.models["student"] and type(shipped) is type(plain)
    shapes = [{key: v.shape for key, v in model.state_dict().items()} for model in (shipped, plain)]
    assert shapes[0] == shapes[1]
    plain.load_state_dict(shipped.state_dict())
    x = tiny().test.x
    assert torch.equal(plain.eval()(x), shipped.eval()(x))


@each_scheme
@pytest.mark.parametrize("ships", [False, True])
def test_it_saves_and_resumes_bit_for_bit(name: str, ships: bool) -> None:
    models = {"mean": {"mean_of": "student", "decay": 0.9}} if ships else {}
    stage: dict[str, Any] = {"models": models, **({"ships": "mean"} if ships else {})}
    lab, engine = lesson(name, **stage)
    lessons, steps = engine.lessons(), EPOCHS * engine.loader.steps
    for _ in range(steps - 2):
        next(lessons)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), engine.state_dict(), fingerprint="")
        saved = checkpoint.load(Path(folder), fingerprint="")
    again_lab, again = lesson(name, **stage)
    for who in learners(name):  # what is not loaded shows
        for p in again_lab.models[who].parameters():
            p.data.add_(1.0)
    again.load_state_dict(saved)
    for one in (lessons, again.lessons()):
        list(one)
    assert engine.step == again.step == steps
    assert same(everything(lab, engine), everything(again_lab, again))


@each_scheme
def test_the_seed_decides_everything(name: str) -> None:
    ends = []
    for seed, elsewhere in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(elsewhere)
        lab, engine = lesson(name, seed)
        list(engine.lessons())
        ends.append(everything(lab, engine))
    assert same(ends[0], ends[1])
    for player in ends[0]["sums"]:
        assert not same(ends[0]["sums"][player], ends[2]["sums"][player])
    assert not same(ends[0]["models"]["student"], ends[2]["models"]["student"])


@each_scheme
def test_it_leaves_the_global_generator_alone(name: str) -> None:
    """Assembly does not draw from it, nor does a step: after one it is as the engine's reseeding left it."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    _, engine = lesson(name)
    assert torch.equal(torch.get_rng_state(), before), "assembly draws from everybody's generator"
    next(engine.lessons())
    after = torch.get_rng_state()
    reseed(engine.device, engine.seed, "step", engine.stage, 0)
    assert torch.equal(torch.get_rng_state(), after), "a step draws from everybody's generator"


class Few:
    """One batch."""

    steps = 1

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        yield from [self.batch][start:]


def fresh(name: str, batch: Batch, accumulate: int = 1) -> tuple[nn.Module, Engine]:
    """A stage of vits, in which rows do not meet (no BatchNorm), on one batch."""
    vits = dict.fromkeys(("student", "peer", "third"), VIT)
    lab, whole = lesson(name, models=vits)
    return lab.models["student"], Engine(
        whole.scheme, Few(batch), whole.paces, epochs=1, accumulate=accumulate
    )


@each_scheme
def test_micro_batches_are_the_whole_batch_or_refused_by_name(name: str) -> None:
    batch = lesson(name)[1].loader.at(0)
    whole, engine = fresh(name, batch)
    next(engine.lessons())
    if (loss := engine.scheme.refuse_cut()) is not None:
        with pytest.raises(Refused, match=f"'{loss}' compares the rows of a batch.*accumulate = 1"):
            fresh(name, batch, accumulate=3)
        return
    cut, engine = fresh(name, batch, accumulate=3)
    next(engine.lessons())
    torch.testing.assert_close(cut.state_dict(), whole.state_dict(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["offline", "online", "branches"])
def test_a_term_that_compares_rows_is_found_among_the_lessons(name: str) -> None:
    terms = STAGES[name]["terms"]
    pairwise = {"method": "rkd", "teacher": terms[0].get("teacher", "teacher")}
    with pytest.raises(Refused, match="'rkd' compares the rows of a batch"):
        lesson(name, terms=[terms[0], pairwise], accumulate=2)


@each_scheme
@pytest.mark.parametrize("labelled", [0, 1, ROWS // 2])
def test_batches_with_few_labels_or_none_work(name: str, labelled: int) -> None:
    _, engine = lesson(name)
    batch = engine.loader.at(0)
    y = torch.arange(ROWS) % 3
    y[labelled:] = IGNORE
    few = Engine(engine.scheme, Few(batch.replace(y=y)), engine.paces, epochs=1)
    (record,) = few.lessons()
    assert record is not None and all(torch.isfinite(torch.tensor(list(record.losses.values()))))
    tasks = [value for loss, value in record.losses.items() if loss.endswith("task")]
    assert all((value > 0) is (labelled > 0) for value in tasks)


@each_scheme
def test_it_is_finite_in_bfloat16(name: str) -> None:
    _, engine = lesson(name)
    engine.scheme.train()
    players = engine.scheme.players()
    with torch.autocast("cpu", torch.bfloat16):
        for player, losses in engine.scheme.turns(engine.loader.at(0)):
            total = engine.scheme.combine(player, losses)
            assert total.isfinite()
            with torch.autocast("cpu", enabled=False):
                grads = torch.autograd.grad(total, list(players[player].values()), allow_unused=True)
            assert all(g is None or bool(g.isfinite().all()) for g in grads)


@each_scheme
def test_a_learner_too_many_or_too_few_is_refused_in_a_sentence(name: str) -> None:
    for wrong in MISCAST[name]:
        terms = [{**KD, "teacher": "teacher"}]
        with pytest.raises(Refused, match=rf"'{name}' has .* names .*; write learner = ") as caught:
            lesson(name, learner=wrong, terms=terms)
        assert "\n" not in str(caught.value)


@each_scheme
def test_a_batch_asked_again_gives_the_same_losses(name: str) -> None:
    """The batch's lesson is the only clock; a scheme has none of its own."""
    _, engine = lesson(name)
    engine.scheme.train()
    batch = engine.loader.at(0)
    first, second = (next(engine.scheme.turns(batch))[1] for _ in range(2))
    assert first and same(
        {k: v.detach() for k, v in first.items()}, {k: v.detach() for k, v in second.items()}
    )
