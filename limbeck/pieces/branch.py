"""Branches: from what a network shows at a stage, on through layers like those that follow, to an answer of
their own."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from limbeck.core.refused import Refused


def pool(x: Float[Tensor, "b c h w"] | Float[Tensor, "b n d"]) -> Float[Tensor, "b width"]:
    """Mean over a map's places or over tokens."""
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1)


class Branch(nn.Module):
    """From a stage's map (b c h w) or tokens (b n d) to logits (b k), by a network's own `tail` and a linear
    head. `last` is the name of the network's last stage: what the tail shows stands beside it."""

    def __init__(self, tail: nn.Module, width: int, classes: int, last: str) -> None:
        super().__init__()
        self.tail = tail
        self.head = nn.Linear(width, classes)
        self.TAPS = {last: "tail", "pooled": "head:in"}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pool(self.tail(x)))


class Joint(nn.Module):
    """A network with a branch at every stage. It answers as the network does; what the branches answer is
    seen at the taps `joint1`, `joint2`, …, and one that nobody looks at is not run.

    Args: network; branches, by the stage they grow from.
    """

    def __init__(self, network: nn.Module, branches: Mapping[str, Branch]) -> None:
        super().__init__()
        self.network = network
        self.branches = nn.ModuleDict(branches)
        within: dict[str, str] = dict(getattr(network, "TAPS", {}))
        # A tap that begins with a bracket is an entry of the answer, which is the network's.
        self.TAPS = {
            **{name: tap if tap.startswith("[") else f"network.{tap}" for name, tap in within.items()},
            **{joint(stage): f"branches.{stage}" for stage in branches},
        }
        self._stages = {stage: within[stage] for stage in branches}

    def forward(self, x: Tensor) -> Any:
        shown: dict[str, Tensor] = {}
        # For this call alone: a hook that stays would bar the network from the shorter ways of core/fast.py.
        hooks = [
            self.network.get_submodule(self._stages[stage]).register_forward_hook(
                partial(_keep, shown, stage)
            )
            for stage, branch in self.branches.items()
            if branch._forward_hooks
        ]
        try:
            out = self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        for stage, there in shown.items():
            self.branches[stage](there)
        return out


def joint(stage: str) -> str:
    """The tap of a `Joint` that shows what the branch of this stage answers: `joint2` for `stage2`."""
    return stage.replace("stage", "joint")


def stages(network: nn.Module, called: str, taps: Mapping[str, str] | None = None) -> list[str]:
    """The names of a network's stages, in order. Raises `Refused` for one without `tail`."""
    if not callable(getattr(network, "tail", None)):
        raise Refused(
            f"'{called}' is a {type(network).__name__}, which has no `tail(i)` to grow branches from; choose "
            "a network of limbeck's, or give yours `TAPS` with stage1, stage2, … and a method `tail(i)`."
        )
    table = {**getattr(network, "TAPS", {}), **(taps or {})}
    return [stage for stage in (f"stage{n}" for n in range(1, 100)) if stage in table]


def grown(
    network: nn.Module, called: str, ways: int, taps: Mapping[str, str] | None = None
) -> dict[str, Branch]:
    """A branch for every stage, with `ways` answers for each of the network's classes. Raises `Refused` for a
    network that does not say where its stages and its linear head are."""
    names = stages(network, called, taps)
    table = {**getattr(network, "TAPS", {}), **(taps or {})}
    modules = dict(network.named_modules())
    head = modules.get(table.get("pooled", "").removesuffix(":in"))
    if not isinstance(head, nn.Linear) or not table["pooled"].endswith(":in"):
        raise Refused(
            f"The `TAPS` of '{called}' have pooled = '{table.get('pooled', '')}', and joint branches are as "
            "wide as what a linear head reads there; write 'HEAD:in' with the name of that layer."
        )
    lost = [stage for stage in names if table[stage] not in modules]
    if lost or not names:
        raise Refused(
            f"The `TAPS` of '{called}' have {f'{lost[0]} = {table[lost[0]]!r}' if lost else 'no stage1'}, "
            "and branches grow from what a module gives; write the name of that module."
        )
    return {
        stage: Branch(
            network.tail(i),  # type: ignore[operator]
            head.in_features,
            ways * head.out_features,
            names[-1],
        ).to(head.weight)  # to its device and precision
        for i, stage in enumerate(names)
    }


def _keep(shown: dict[str, Tensor], stage: str, module: nn.Module, args: Any, output: Tensor) -> None:
    shown[stage] = output
