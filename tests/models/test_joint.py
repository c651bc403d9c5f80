"""Every staged network grows joint branches, and answers as it did."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped
from limbeck.core.teachers import Frozen
from limbeck.models.joint import frozen, joint
from limbeck.pieces.branch import Joint, pool

CLASSES, SIZE = 3, 16
# One a file, small: name, knobs.
NETS: dict[str, dict[str, Any]] = {
    "cnn": {"widths": [4, 6], "channels": 3},
    "resnet8": {},
    "wrn_16_1": {},
    "vgg8": {},
    "mobilenetv2_half": {},
    "shufflenet_v1": {},
    "shufflenet_v2": {},
    "vit_tiny": {"size": SIZE, "patch": 4, "width": 8, "heads": 2, "depth": 2, "stages": 2},
    "tiny_vit_32": {"dims": (32, 64), "depths": (1, 2), "windows": (4,), "strides": (2, 1)},
}
each_net = pytest.mark.parametrize("name", NETS)


def made(name: str) -> Any:
    torch.manual_seed(0)
    return registry.find("model", name)(classes=CLASSES, **NETS[name])


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def staged() -> set[str]:
    """Files of models/ in which something has a `tail`."""
    folder = Path(__file__).parents[2] / "limbeck" / "models"
    trees = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")}
    return {
        stem
        for stem, tree in trees.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "tail" for node in ast.walk(tree))
    }


def test_every_file_with_a_tail_is_here() -> None:
    homes = {registry.names("model")[name].rpartition(".")[2] for name in NETS}
    assert homes == staged()


@each_net
@pytest.mark.parametrize("change", [joint, frozen])
def test_it_answers_as_its_network_and_shows_a_joint_answer_at_each_stage(
    name: str, change: Callable[[nn.Module], Joint]
) -> None:
    network = made(name)
    plain = network.eval()(images())
    whole = change(network).eval()
    count = sum(tap.startswith("stage") and tap[5:].isdigit() for tap in network.TAPS)
    tapped = Tapped(whole)
    tapped.look([f"joint{n + 1}" for n in range(count)])
    seen = tapped(images())
    assert torch.equal(seen.out, plain) and torch.equal(whole(images()), plain)
    assert len(whole.branches) == count >= 2
    assert {tuple(v.shape) for v in seen.at.values()} == {(4, 4 * CLASSES)}


@each_net
def test_each_branch_starts_at_its_stage_and_ends_as_the_network_does(name: str) -> None:
    """At the width, and after the last stage at the grid, that the network pools."""
    network = made(name).eval()
    stages = [f"stage{n}" for n in range(1, 9) if f"stage{n}" in network.TAPS]
    whole, tapped = joint(network).eval(), Tapped(network)
    tapped.look([*stages, "pooled"])
    at = tapped(images()).at
    last = whole.branches[stages[-1]].tail(at[stages[-1]])
    assert last.shape[2:] == at[stages[-1]].shape[2:] or last.ndim == 3
    assert pool(last).shape == at["pooled"].shape
    looked = Tapped(whole)
    looked.look([f"joint{stage[5:]}" for stage in stages])
    shown = looked(images()).at
    for stage in stages:
        assert torch.equal(shown[f"joint{stage[5:]}"], whole.branches[stage](at[stage])), stage


@each_net
def test_all_of_a_branch_learns_and_of_a_frozen_network_nothing(name: str) -> None:
    whole = frozen(made(name)).train()
    tapped = Tapped(whole)
    names = [f"joint{stage[5:]}" for stage in whole.branches]
    tapped.look(names)
    sum(v.square().mean() for v in tapped(images()).at.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None and not p.requires_grad for p in whole.network.parameters())
    lazy = [n for n, p in whole.branches.named_parameters() if p.grad is None]
    assert not lazy


def test_a_branch_that_nobody_looks_at_is_not_run() -> None:
    whole, ran = joint(made("cnn")), []
    for stage, branch in whole.branches.items():
        branch.tail.register_forward_hook(lambda *_, stage=stage: ran.append(stage))
    whole(images())
    assert not ran
    tapped = Tapped(whole)
    tapped.look(["joint2"])
    tapped(images())
    assert ran == ["stage2"]


def test_taps_of_the_network_are_found_under_their_names() -> None:
    network = made("resnet8").eval()
    inside, outside = Tapped(network), Tapped(joint(network).eval())
    for one in (inside, outside):
        one.look(["stage1", "stage2_pre", "pooled"])
    torch.testing.assert_close(outside(images()).at, inside(images()).at, rtol=0, atol=0)


def test_a_teacher_of_it_takes_the_shorter_way_and_may_stop_early() -> None:
    whole = joint(made("cnn")).eval()
    teacher, plain = Frozen(whole), Tapped(whole)
    for one in (teacher, plain):
        one.look(["stage1", "joint1"])
    batch = Batch(images())
    expected = plain(images())
    shown = [teacher(batch), teacher.at_taps(batch)]
    assert teacher.fast is not None and "folded" in str(teacher.fast)
    for seen in shown:
        torch.testing.assert_close(seen.at, expected.at)
    torch.testing.assert_close(shown[0].out, expected.out)
    assert not any(m._forward_hooks for m in whole.network.modules() if m is not whole.network.stages[0])


def test_who_has_no_linear_head_to_measure_is_refused() -> None:
    network = made("cnn")
    network.TAPS = {**network.TAPS, "pooled": "stages.0:in"}
    with pytest.raises(Refused, match=r"pooled = 'stages.0:in'.*write 'HEAD:in'"):
        joint(network)
    with pytest.raises(Refused, match=r"'Joint' is a Joint, which has no `tail\(i\)`"):
        joint(joint(made("cnn")))


def test_it_is_found_where_recipes_look() -> None:
    for change in ("joint", "frozen"):
        home = importlib.import_module("limbeck.models.joint")
        found = registry.find("model", f"limbeck.models.joint:{change}")
        assert isinstance(found(made("cnn")), Joint) and getattr(home, change)
