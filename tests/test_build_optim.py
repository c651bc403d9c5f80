"""What a recipe's `optim` makes: the groups of an optimiser, and the learning rate of each at every step."""

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from limbeck import recipe, registry
from limbeck.build import _fallen, lab
from limbeck.core.refused import Refused
from limbeck.engine import Engine, Pace

VIT = {"name": "vit_tiny", "size": 8, "width": 6, "depth": 4, "stages": 2, "heads": 2}
TINY = {"name": "tiny_vit_32", "dims": [4, 8, 8], "depths": [1, 2, 1], "windows": [2, 2], "head_width": 4}


def engine(student: Any = "cnn", terms: tuple[str, ...] = (), **optim: Any) -> Engine:
    stage: dict[str, Any] = {"learner": "student", "epochs": 2, "batch": 256, "optim": {"student": optim}}
    stage["terms"] = [{"method": name} for name in terms]
    models = {"teacher": "cnn", "student": student}
    return lab(recipe.parse({"data": "digits", "models": models, "stages": [stage]})).engine(0)


def groups(made: Engine) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter by its name."""
    of = {id(p): (g["lr"], g["weight_decay"]) for g in pace(made).optimiser.param_groups for p in g["params"]}
    found = {name: of[id(p)] for name, p in made.scheme.players()["student"].items()}
    assert len(found) == len(of)
    return found


def pace(made: Engine) -> Pace:
    return made.paces["student"]


def test_without_further_words_there_is_one_group_in_the_order_of_the_parameters() -> None:
    made = engine(terms=("fitnet",), lr=0.02, weight_decay=0.01)
    (group,) = pace(made).optimiser.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in made.players["student"]]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.01)


@pytest.mark.parametrize("student", ["cnn", VIT, TINY], ids=["cnn", "vit", "tiny_vit"])
def test_biases_norms_and_vectors_go_without_weight_decay_where_that_is_said(student: Any) -> None:
    made = engine(student, name="adamw", lr=0.02, weight_decay=0.3, decay_vectors=False)
    network = made.scheme.shipped()
    free = {name for name, p in network.named_parameters() if p.ndim == 1}
    free |= {name for name, _ in network.named_parameters() if name.endswith("attention_biases")}
    for name, (lr, decay) in groups(made).items():
        assert (lr, decay) == (0.02, 0.0 if name.removeprefix("student.") in free else 0.3)
    assert {p.ndim for p in network.parameters()} > {1}


def test_the_decay_of_the_others_is_what_torch_makes_of_it() -> None:
    """A step without gradient is the decay alone."""
    made = engine(name="adamw", lr=0.5, weight_decay=0.25, decay_vectors=False, schedule="constant")
    network = made.scheme.shipped()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    pace(made).set(0)
    pace(made).optimiser.step()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 if p.ndim == 1 else 1 - 0.5 * 0.25))


def test_tinyvits_layers_learn_more_slowly_the_farther_they_are_from_the_head() -> None:
    """The official rule: a block is a layer; the patches are with the first, what merges with the block
    before, norm and head with the last."""
    blocks = {"patch_embed": 0, "layers.0.blocks.0": 0, "layers.0.downsample": 0, "layers.1.blocks.0": 1}
    blocks |= {"layers.1.blocks.1": 2, "layers.1.downsample": 2, "layers.2.blocks.0": 3}
    blocks |= {"norm_head": 3, "head": 3}
    found = groups(engine(TINY, terms=("fitnet",), lr=0.1, layer_decay=0.5))
    for name, (lr, _) in found.items():
        layer = next((n for start, n in blocks.items() if name.startswith(f"student.{start}.")), None)
        assert lr == (0.1 if layer is None else 0.1 * 0.5 ** (3 - layer))
        assert name.startswith("methods." if layer is None else "student.")
    assert any(name.startswith("methods.") for name in found)


def test_a_vits_positions_and_patches_are_with_its_first_block() -> None:
    found = groups(engine(VIT, lr=0.1, layer_decay=0.5))
    for name, (lr, _) in found.items():
        part = name.removeprefix("student.").split(".")
        layer = {"stages": lambda p: 2 * int(p[1]) + int(p[2]), "norm": lambda _: 3, "head": lambda _: 3}
        assert lr == 0.1 * 0.5 ** (3 - layer.get(part[0], lambda _: 0)(part))


def test_a_stage_of_plain_layers_is_one() -> None:
    found = groups(engine({"name": "cnn", "widths": [4, 4, 4]}, lr=0.1, layer_decay=0.5))
    for name, (lr, _) in found.items():
        part = name.removeprefix("student.").split(".")
        assert lr == 0.1 * 0.5 ** (0 if part[0] == "head" else 2 - int(part[1]))


@pytest.mark.parametrize(
    "name", ["resnet20", "wrn_16_2", "vgg8", "mobilenetv2_half", "shufflenet_v1", "tiny_vit_5m"]
)
def test_shares_grow_along_a_network_up_to_its_head(name: str) -> None:
    with torch.device("meta"):  # weights are not looked at
        network = registry.find("model", name)(classes=3)
    shares = list(_fallen(0.9, name, network).values())
    layers = len(set(shares))
    assert shares == sorted(shares) and shares[-1] == 1 and layers >= len(network.stages)
    assert shares[0] == pytest.approx(0.9 ** (layers - 1))


class Plain(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def test_a_network_that_does_not_tell_its_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("plain_net")
    theirs.Plain = Plain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plain_net", theirs)
    with pytest.raises(Refused, match=r"`layer_decay` needs the order .* 'student' \(Plain\) does not tell"):
        engine("plain_net:Plain", lr=0.1, layer_decay=0.5)


def test_the_cosine_ends_at_its_floor() -> None:
    made = engine(lr=0.4, floor=0.25, warmup=0.5)
    steps = 2 * made.loader.steps
    rates = []
    for step in range(steps):
        pace(made).set(step)
        rates.append(pace(made).optimiser.param_groups[0]["lr"])
    rise = 0.5 * steps
    for step, lr in enumerate(rates):
        fallen = 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * step / steps))
        assert lr == pytest.approx(0.4 * min((step + 1) / rise, 1) * fallen)
    assert pace(made).factor(steps) == pytest.approx(0.25)


def test_adams_betas_are_those_said() -> None:
    made = engine(name="adamw", betas=[0.8, 0.95])
    assert pace(made).optimiser.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("betas", [0.9, 1.0], r"optim.student.betas is \[0.9, 1.0\]: .*from 0 up to below 1"),
        ("betas", [0.9], "expected two numbers"),
        ("layer_decay", 0.0, "layer_decay is 0.0: expected greater than 0"),
        ("layer_decay", 1.5, "expected less than or equal to 1"),
        ("floor", 1.0, "floor is 1.0: expected less than 1"),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        engine(**{key: value})
