"""The same answers sooner, for a model that answers in eval, without gradient, and does not change.

`shortcut` looks for what is exact to rounding, and finds None where there is nothing to gain:

- A BatchNorm in eval is a factor and an offset for each channel, so it folds into the convolution before it.
  Which convolution that is, is seen in a run of the model: the BatchNorm is given the convolution's very
  output, nothing else reads it, and no tap looks at it. (A tap may look at what the BatchNorm gives.) A model
  that decides by the values it computes may go another way next time, so there nothing is folded.
- Convolutions take `channels_last` tensors without the reordering that the default layout costs them.

`learns_last` says whether a learner may go the second way, with gradient and its own weights.

It happens on a twin that shares all that is not changed with the model, so the model, its `state_dict`, flags
and hooks stay untouched. A model with hooks of others, which a twin would not call, has no shortcut.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from limbeck.core.keyed import forked
from limbeck.core.taps import Seen, Tapped, ours

# Exactly these: a subclass may compute something else.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
ROUNDING = 100
"""How many units of rounding, of the largest value, an answer may be away from the plain one."""
APART = 10_000
"""The same for a learner, which is compared in training."""

Folds = Sequence[tuple[str, str]]
"""Names of a convolution and of the BatchNorm that it takes in."""


class Fast:
    """A model's answers by a shorter way.

    Args:
        tapped: the model and what it is looked at by. It is in eval.
        folds: which BatchNorms fold into which convolutions.
        channels_last: whether it computes in that layout. Answers come back in the usual one.

    It follows the model's weights: after a change of any tensor it is made anew from what they are then.
    (Torch cannot tell when a value is written through `.data`.)
    """

    def __init__(self, tapped: Tapped, folds: Folds, channels_last: bool) -> None:
        self.tapped, self.folds, self.channels_last = tapped, folds, channels_last
        self._modules = list(tapped.model.modules())
        self._twin: Tapped | None = None
        self._tensors: list[Tensor] = []
        self._state: list[tuple[int, int, int]] = []

    def __call__(self, x: Any, until_seen: bool = False) -> Seen:
        """As `Tapped`, without gradient; `until_seen` leaves the model after its last tap."""
        if list(self.tapped.model.modules()) != self._modules or not unhooked(self._modules):
            return self.tapped(x)  # not the model that was looked at
        twin = self._current()
        seen = twin.until_seen(x) if until_seen else twin(x)
        return replace(seen, model=self.tapped.model, modules=self.tapped.modules)

    def __str__(self) -> str:
        folded = [f"{len(self.folds)} BatchNorms folded into convolutions"] if self.folds else []
        return ", ".join(folded + ["channels_last"] * self.channels_last)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own twin, of the copied model."""
        return {**vars(self), "_twin": None, "_tensors": [], "_state": []}

    def _current(self) -> Tapped:
        """The twin of the model as it is now."""
        tensors = list(_tensors(self._modules))
        # They are kept, so that no other tensor can come to have their place in memory.
        state = [(id(t), t.data_ptr(), t._version) for t in tensors]
        if self._twin is None or state != self._state:
            self._twin = _made(self.tapped, self.folds, self.channels_last)
            self._tensors, self._state = tensors, state
        return self._twin


def shortcut(tapped: Tapped, x: Any, *, fold: bool = True, channels_last: bool = True) -> Fast | None:
    """The shorter way that gives the plain answer to rounding on the first rows of x, or None. Nothing of the
    model moves, and no draw is used up."""
    modules = list(tapped.model.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in modules)
    channels_last = channels_last and convolutions > 1  # one alone cuts patches for a transformer
    fold = fold and any(isinstance(m, _NORMS) for m in modules)
    if not (fold or channels_last) or not _plain(modules):
        return None
    few = _few(x)
    first = next(iter(few.values())) if isinstance(few, Mapping) else few
    in_full = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    full = torch.autocast(first.device.type, enabled=False)
    with torch.no_grad(), forked("shortcut"), full, in_full:
        watched = _watched(tapped, few)
        if watched is None:
            return None
        plain, folds = watched
        folds = folds if fold else []
        for some, last in ((folds, channels_last), (folds, False), ([], channels_last)):
            if some or last:
                fast = Fast(tapped, some, last)
                try:
                    if _same(plain, fast(few)):
                        return fast
                except Exception:  # somebody's forward wants the layout, or a module, that it knows
                    continue
    return None


def learns_last(tapped: Tapped, x: Any) -> bool:
    """Whether a learner on a CPU shows the same in `channels_last`, to rounding, on the first rows of x: its
    convolutions then learn sooner. One that draws for each place of a map would draw something else in that
    layout, one that looks at how its tensors lie shows something else, and one that changes what it is given
    may change a copy. (For images of one channel both layouts are one.) Nothing of it moves, and no draw is
    used up."""
    modules, few = list(tapped.model.modules()), _few(x)
    images = [v for v in tree_leaves(few) if isinstance(v, Tensor) and v.ndim == 4 and v.device.type == "cpu"]
    gains = torch.backends.mkldnn.is_available() and any(v.shape[1] > 1 for v in images)
    if not gains or sum(isinstance(m, nn.Conv2d) for m in modules) < 2 or not _plain(modules):
        return False
    shown = []
    try:
        for channels_last in (False, True):
            twin, given, draws = _stand_in(tapped), tree_map(torch.clone, few), _Draws()
            twin.channels_last = channels_last
            full = torch.autocast("cpu", enabled=False)
            with full, torch.no_grad(), forked("learns last"), draws:
                shown.append(twin(given))
            pairs = zip(tree_leaves(given), tree_leaves(few), strict=True)
            if draws.on_maps or not all(torch.equal(a, b) for a, b in pairs):
                return False
        return _same(shown[0], shown[1], APART)
    except Exception:  # the usual way says what is wrong, if it is not the layout
        return False


class _Draws(TorchDispatchMode):
    """Whether something is drawn for each place of a map, whatever it is worth as the weights are now."""

    on_maps = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            maps = (v for v in tree_leaves(out) if isinstance(v, Tensor) and v.ndim == 4)
            self.on_maps |= any(v.shape[2] * v.shape[3] > 1 for v in maps)
        return out


def _watched(tapped: Tapped, x: Any) -> tuple[Seen, Folds] | None:
    """What the model shows for x, and (convolution, BatchNorm) wherever the second alone reads what the first
    gives; None for a model that cannot be watched, or that moves."""
    twin, watch = _stand_in(tapped), _Watch()
    for name, module in twin.model.named_modules():
        if type(module) in _CONVOLUTIONS:
            module.register_forward_hook(partial(watch.convolved, name))
        elif type(module) in _NORMS and module.running_mean is not None and module.running_var is not None:
            module.register_forward_hook(partial(watch.normed, name))
    buffers = list(twin.model.buffers())
    before = [b._version for b in buffers]
    try:
        with watch:
            seen = twin(x)
    except Exception:  # the plain way says what is wrong, if it is not the watching
        return None
    if before != [b._version for b in buffers]:
        return None
    shown = {id(v) for v in tree_leaves((seen.out, seen.at))}
    folds = [
        (conv, norm)
        for norm, y in watch.read.items()
        if (conv := watch.made.get(id(y))) is not None
        and watch.calls[conv] == watch.calls[norm] == 1
        and watch.uses[id(y)] == watch.uses[id(twin.model.get_submodule(conv).weight)] == 1
        and id(y) not in shown
    ]
    return seen, [] if watch.decided else folds


class _Watch(TorchDispatchMode):
    """Who made and who read which tensor in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.uses: Counter[int] = Counter()
        self.made: dict[int, str] = {}
        self.read: dict[str, Tensor] = {}
        self.decided = False
        self._kept: list[Tensor] = []  # so that each id is one tensor's

    def convolved(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self.calls[name] += 1
        if y.ndim == module.weight.ndim:  # not a sample without its batch
            self.made[id(y)] = name
            self._kept.append(y)

    def normed(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        self.calls[name] += 1
        if args:
            self.read[name] = args[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        out = func(*args, **(kwargs or {}))
        self._kept += [*given, *(v for v in tree_leaves(out) if isinstance(v, Tensor))]
        self.uses.update(map(id, given))
        self.decided |= isinstance(out, bool | int | float | complex)
        return out


def _made(tapped: Tapped, folds: Folds, channels_last: bool) -> Tapped:
    """A twin of the model, folded and in that layout, looked at as the model is."""
    modules = dict(tapped.model.named_modules())
    memo: dict[nn.Module, nn.Module] = {modules[norm]: nn.Identity().eval() for _, norm in folds}
    model = _twin(tapped.model, memo)
    with torch.no_grad():
        for conv, norm in folds:
            c, n, own = modules[conv], modules[norm], memo[modules[conv]]._parameters
            own["weight"], own["bias"] = fuse_conv_bn_weights(
                c.weight, c.bias, n.running_mean, n.running_var, n.eps, n.weight, n.bias
            )
        for module in model.modules() if channels_last else ():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Conv2d) and weight is not None:
                last = weight.contiguous(memory_format=torch.channels_last)
                module._parameters["weight"] = nn.Parameter(last, requires_grad=False)
    twin = Tapped(model, tapped.table, tapped.called)
    twin.channels_last = channels_last
    twin.look(tapped.names)
    return twin


def _stand_in(tapped: Tapped) -> Tapped:
    """A twin with buffers of its own, so that a run moves nothing."""
    twin = _made(tapped, [], channels_last=False)
    for module in twin.model.modules():
        module._buffers = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    return twin


def _few(x: Any) -> Any:
    return {k: v[:2] for k, v in x.items()} if isinstance(x, Mapping) else x[:2]


def _twin(module: nn.Module, memo: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with places of its own for tensors, submodules and hooks, of which it has none; what is in
    these places is shared. `memo` says what takes the place of which."""
    if module not in memo:
        twin = memo[module] = module.__new__(type(module))
        vars(twin).update(
            vars(module),
            _parameters=dict(module._parameters),
            _buffers=dict(module._buffers),
            _modules={k: m if m is None else _twin(m, memo) for k, m in module._modules.items()},
            **{hooks: OrderedDict() for hooks in _HOOKS},
        )
    return memo[module]


def _plain(modules: Sequence[nn.Module]) -> bool:
    """Whether a twin would do all that the model does, and what is in it can be told to have changed."""
    return (
        not any("forward" in vars(m) or isinstance(m, torch.jit.ScriptModule) for m in modules)
        and all(m._compiled_call_impl is None for m in modules)
        and unhooked(modules)
        and all(
            type(t) in (Tensor, nn.Parameter)
            and not t.is_inference()
            and (not t.is_floating_point() or t.dtype in (torch.float32, torch.float64))
            for t in _tensors(modules)
        )
    )


def unhooked(modules: Sequence[nn.Module]) -> bool:
    """Whether nobody but a Tapped listens: who else does is to hear the whole forward of the model itself."""
    return all(
        ours(hook)
        for m in modules
        if m._forward_hooks or m._forward_pre_hooks
        for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    for m in modules:
        yield from (t for t in m._parameters.values() if t is not None)
        yield from (t for t in m._buffers.values() if t is not None)


def agree(ones: Iterable[Any], others: Iterable[Any], units: float = ROUNDING) -> bool:
    """Whether tensors are the same to rounding. What cannot be compared is not the same."""
    return all(
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and bool((a - b).abs().max() <= units * torch.finfo(a.dtype).eps * a.abs().max())
        for a, b in zip(ones, others, strict=True)
    )


def _same(plain: Seen, fast: Seen, units: float = ROUNDING) -> bool:
    return agree(tree_leaves((plain.out, plain.at)), tree_leaves((fast.out, fast.at)), units)
