"""Be Your Own Teacher against its formula, and who learns from whom in it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import build, recipe
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.cast import Cast
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped
from limbeck.core.task import labelled_cross_entropy
from limbeck.core.teachers import Peer
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine
from limbeck.pieces.branch import pool
from limbeck.schemes.branches import Branches

NETS: dict[str, dict[str, Any]] = {
    "cnn": {"name": "cnn", "widths": [3, 4, 6]},
    "resnet": {"name": "resnet8"},
    "vit": {"name": "vit_tiny", "patch": 2, "width": 8, "heads": 2, "depth": 3},
}
each_kind = pytest.mark.parametrize("kind", NETS)


def tiny() -> Splits:
    """Grey 8x8 images of three classes, a quarter of them unlabelled."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(16) % 3
    y[::4] = IGNORE
    data = Data(torch.randn(16, 1, 8, 8, generator=draw), y, ("x", "y", "z"))
    return Splits(data, data, data)


class Blunt(nn.Module):
    """Two stages that show maps, and no tail."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)])
        self.head = nn.Linear(2, classes)
        self.TAPS = {"stage1": "stages.0", "stage2": "stages.1"}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages[1](self.stages[0](x)).mean((2, 3)))


def twice(batch: Batch) -> Batch:
    return batch.map(lambda v: v.repeat_interleave(2, 0))


def negative(batch: Batch) -> Batch:
    return batch.replace(x=-batch.x)


def to_itself(**term: Any) -> dict[str, Any]:
    return {"teacher": "net", **term}


KD = to_itself(method="kd", temperature=3, weight=0.1)
HINT = to_itself(method="fitnet", tap="stage3", weight=0.5)


def plan(kind: str = "cnn", terms: list[dict[str, Any]] | None = None, **stage: Any) -> recipe.Recipe:
    return recipe.parse(
        {
            "data": f"{__name__}:tiny",
            "models": {
                "net": NETS.get(kind, {"name": kind}),
                "teacher": {"name": "cnn", "widths": [2, 3]},
                "both": {"ensemble": ["teacher", "net"]},
            },
            "stages": [
                {
                    "learner": "net",
                    "scheme": "branches",
                    "epochs": 1,
                    "batch": 8,
                    "terms": [KD, HINT] if terms is None else terms,
                    **stage,
                }
            ],
        }
    )


def lesson(*args: Any, **stage: Any) -> tuple[build.Lab, Engine, Branches]:
    lab = build.lab(plan(*args, **stage))
    engine = lab.engine(0)
    engine.scheme.train()
    assert isinstance(engine.scheme, Branches)
    return lab, engine, engine.scheme


def losses(engine: Engine) -> dict[str, Tensor]:
    ((player, named),) = engine.scheme.turns(engine.loader.at(0))
    assert player == "student"
    return named


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    rows = [-row.log_softmax(0)[int(k)] for row, k in zip(z, y, strict=True) if k != IGNORE]
    return torch.stack(rows).mean()


def as_map(x: Tensor) -> Tensor:
    """A vit's 16 tokens are a grid of 4x4."""
    return x if x.ndim == 4 else x.mT.unflatten(2, (4, 4))


@each_kind
def test_its_losses_are_the_papers(kind: str) -> None:
    lab, engine, scheme = lesson(kind)
    batch, net = engine.loader.at(0), lab.models["net"]
    tapped = Tapped(net)
    tapped.look(["stage1", "stage2", "stage3"])
    shown = tapped(batch.x)
    expected = {"task": cross_entropy(shown.out, batch.y)}
    answer = (shown.out / 3).softmax(1)
    for stage in ("stage1", "stage2"):
        branch = scheme.branches[stage]
        features = branch.student.tail(shown.at[stage])
        z = branch.student.head(features.mean((2, 3)) if features.ndim == 4 else features.mean(1))
        gap = (answer * (answer.log() - (z / 3).log_softmax(1))).sum(1).mean()
        hint = branch.methods["fitnet"].project(as_map(features)) - as_map(shown.at["stage3"])
        expected |= {
            f"{stage}.task": 0.9 * cross_entropy(z, batch.y),
            f"{stage}.kd": 0.1 * 9 * gap,
            f"{stage}.fitnet": 0.5 * hint.square().mean() / 2,
        }
    torch.testing.assert_close(losses(engine), expected)


def gradients(loss: Tensor, module: nn.Module) -> list[bool]:
    """Whether each parameter's gradient from this loss is anything."""
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [g is not None and bool(g.any()) for g in found]


@each_kind
def test_a_branch_teaches_the_trunk_and_never_what_teaches_it(kind: str) -> None:
    lab, engine, scheme = lesson(kind)
    named, net = losses(engine), lab.models["net"]
    tail: Any = net
    for stage in ("stage1", "stage2"):
        later = [module for n, module in enumerate(tail.stages) if n >= int(stage[-1])]
        deepest = [*later, tail.fc if kind == "resnet" else tail.head]
        for name in ("kd", "fitnet", "task"):
            loss = named[f"{stage}.{name}"]
            assert not any(hit for module in deepest for hit in gradients(loss, module))
            assert any(gradients(loss, tail.stages[0]))
            assert any(gradients(loss, scheme.branches[stage].student.tail))
        assert all(gradients(named[f"{stage}.kd"], scheme.branches[stage].student.head))
    assert any(gradients(named["stage2.kd"], tail.stages[1]))
    assert not any(gradients(named["task"], scheme.branches["stage1"]))


@each_kind
def test_it_trains_and_ships_the_plain_network(kind: str) -> None:
    lab, engine, scheme = lesson(kind)
    plain = build.lab(plan(kind)).models["net"].state_dict()
    before = {name: p.clone() for name, p in scheme.players()["student"].items()}
    list(engine.lessons())
    assert scheme.ships() is lab.models["net"]
    assert {n: v.shape for n, v in scheme.ships().state_dict().items()} == {
        n: v.shape for n, v in plain.items()
    }
    player = scheme.players()["student"]
    assert all(not torch.equal(p, before[name]) for name, p in player.items() if p.ndim > 1)
    owned = {id(p) for p in player.values()}
    assert owned == {id(p) for module in scheme.modules().values() for p in module.parameters()}
    shipped = {id(p) for p in scheme.ships().parameters()}
    branches = [p for branch in scheme.branches.values() for p in branch.parameters()]
    assert shipped < owned and branches and not any(id(p) in shipped for p in branches)


def test_the_network_runs_once_a_batch() -> None:
    lab, engine, _ = lesson()
    calls: list[int] = []
    lab.models["net"].register_forward_hook(lambda *args: calls.append(1))
    list(engine.lessons())
    assert len(calls) == engine.step == 2
    assert int(lab.models["net"].state_dict()["stages.0.1.num_batches_tracked"]) == 2


def test_branches_begin_unlike_and_by_the_seed() -> None:
    first, again, other = (build.lab(plan(), seed).engine(0).scheme for seed in (0, 0, 1))
    weights = [
        scheme.modules()["stage2"].state_dict()["student.tail.0.0.weight"] for scheme in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    heads = [first.modules()[stage].state_dict()["student.head.weight"] for stage in ("stage1", "stage2")]
    assert not torch.equal(*heads)


def test_a_teacher_from_outside_teaches_the_network_itself() -> None:
    _, engine, _ = lesson("cnn", [KD, {"method": "kd", "temperature": 2}])
    named = losses(engine)
    assert named.keys() == {"task", "kd", "stage1.task", "stage1.kd", "stage2.task", "stage2.kd"}


def test_without_terms_it_is_deep_supervision() -> None:
    _, engine, _ = lesson("cnn", [], scheme={"name": "branches", "branch_task": 0.5})
    named = losses(engine)
    assert named.keys() == {"task", "stage1.task", "stage2.task"}
    _, whole, _ = lesson("cnn", [], scheme={"name": "branches", "branch_task": 1.0})
    torch.testing.assert_close(named["stage1.task"], 0.5 * losses(whole)["stage1.task"])


def test_branches_see_what_the_network_sees() -> None:
    """Twice as many rows; means, and BatchNorm's, do not notice."""
    seen, plain = (losses(lesson(view=view)[1]) for view in (f"{__name__}:twice", []))
    torch.testing.assert_close(seen, plain)
    negative = losses(lesson(view=f"{__name__}:negative")[1])
    assert all(not torch.isclose(negative[name], loss) for name, loss in plain.items())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 6, 3)])
def test_pooling_is_the_mean_of_places(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    places = x.flatten(2).mT if x.ndim == 4 else x
    torch.testing.assert_close(pool(x), torch.stack([row.mean(0) for row in places]))


def refusals() -> Iterator[tuple[recipe.Recipe, str]]:
    yield plan(f"{__name__}:Blunt", [KD]), r"a Blunt, which has no `tail\(i\)`"
    yield plan("cnn", [to_itself(method="kd", teacher=["net", "teacher"])]), "names 'net' and other teachers"
    yield plan("cnn", learner=["net", "teacher"]), r"has 1 learner.*names 2 \(net, teacher\)"
    for weight in (-0.1, float("inf")):
        yield plan("cnn", scheme={"name": "branches", "branch_task": weight}), f"`branch_task` is {weight}"


@pytest.mark.parametrize(("bad", "words"), list(refusals()))
def test_what_cannot_be_is_refused_in_a_sentence(bad: recipe.Recipe, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        build.lab(bad).engine(0)
    assert "\n" not in str(caught.value)


def test_a_network_of_one_stage_is_refused() -> None:
    content = plan().model_dump(mode="json", by_alias=True)
    content["models"]["net"]["widths"] = [4]
    content["stages"][0]["terms"] = [KD]
    with pytest.raises(Refused, match="'net' has 1 stage"):
        build.lab(recipe.parse(content)).engine(0)


def test_an_ensemble_that_holds_the_network_is_refused() -> None:
    with pytest.raises(Refused, match="teach itself"):
        plan("cnn", [to_itself(method="kd", teacher="both")])


class Tailed(nn.Module):
    """Three stages; the tails of the first two count on the usual layout if `views`."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.head, self.views = nn.Linear(4, 3), views
        self.TAPS = {"stage1": "stages.0", "stage2": "stages.1", "stage3": "stages.2", "pooled": "head:in"}

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))

    def tail(self, i: int) -> nn.Module:
        return Tail(self.views, 2 - i)


class Tail(nn.Module):
    def __init__(self, views: bool, depth: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(depth + 1)))
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(x.view(len(x), -1).view(x.shape) if self.views else x)


@pytest.mark.parametrize(
    ("views", "layouts", "how"),
    [
        (False, {}, {"network": "channels_last", "stage1": "channels_last", "stage2": "channels_last"}),
        (True, {}, {"network": "channels_last", "stage1": "", "stage2": ""}),
        (False, {"net": False}, {"network": "", "stage1": "", "stage2": ""}),
    ],
)
def test_branches_compute_in_the_layout_that_they_can_and_may(
    views: bool, layouts: dict[str, bool], how: dict[str, str]
) -> None:
    net, example = Tailed(views), Batch(torch.randn(4, 3, 8, 8), torch.arange(4) % 3, torch.arange(4))
    cast = Cast({"net": net}, example, task=labelled_cross_entropy, channels_last=layouts)
    scheme = Branches.staged(replace(cast, peers={"net": Peer(net, example)}))
    assert {"network": scheme.network.how(), **{n: b.how() for n, b in scheme.branches.items()}} == how
    assert sum(len(losses) for _, losses in scheme.turns(example)) == 3
