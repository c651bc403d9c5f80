"""Looking inside a model: Tapped runs it once and returns what was Seen.

A tap names a tensor inside any `nn.Module`:

    layer3                the output of the submodule `layer3`
    fc:in                 the first input of the submodule `fc`
    encoder[0]            the first element of a tuple output
    encoder[hidden][2]    the third element of entry `hidden` of a mapping or a ModelOutput
    [logits]              entry `logits` of the model's own output

A model may carry a table `TAPS = {"stage1": "layer1", ...}`, so that methods can ask for the field's own
words.
"""

import difflib
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from limbeck.core.refused import Refused

_TAP = re.compile(r"(?P<path>[^:\[\]]*)(?P<side>:in|:out)?(?P<keys>(\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class Seen:
    """What one forward showed.

    out: the model's answer (logits, embedding, map …). at: the tapped tensors by name.
    mask: for token inputs, True where a token counts (`b n`); None means all do. model: who answered; None
        when stored. modules: the submodule that each tap looks at, so that `build` can read it.
    """

    out: Any
    at: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    model: nn.Module | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def detach(self) -> "Seen":
        out = self.out.detach() if isinstance(self.out, Tensor) else self.out
        at = {name: v.detach() for name, v in self.at.items()}
        return Seen(out, at, self.mask, self.model, self.modules)


class Tapped:
    """A model and the names it is looked at by.

    `taps` maps a name to a tap; names that it lacks are looked up in the model's `TAPS`, then taken as taps
    themselves. The entry `out` says where in the model's output the answer is (`"[logits]"`); without it a
    tensor is itself, a mapping answers with its entry `logits`, anything else is passed on as it is.

    The model is not rewritten: hooks are put on for as long as this object lives, and are deaf except during
    its own call.

    With `channels_last` images (b c h w) are shown in that layout, which suits convolutions; the answer comes
    back in the usual one, and maps as they lie.
    """

    def __init__(
        self, model: nn.Module, taps: Mapping[str, str] | None = None, called: str = "model"
    ) -> None:
        self.model = model
        self.table = {**getattr(model, "TAPS", {}), **(taps or {})}
        self.called = called
        self.names: tuple[str, ...] = ()
        self.modules: dict[str, nn.Module] = {}
        self.channels_last = False
        self._ear = _Ear()
        self._out_keys = self._keys_of_out() if "out" in self.table else None

    def look(self, names: Iterable[str]) -> None:
        """Look at these too from now on. Raises `Refused` for a tap that does not exist, naming the near
        ones."""
        for name in names:
            if name in self.names:
                continue
            path, side, keys = _parse(name, self.table.get(name, name))
            hook = _Hook(self._ear, name, keys)
            module = self._module(name, path)
            if side == ":in":
                handle = module.register_forward_pre_hook(hook.hear_input, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook.hear_output)
            weakref.finalize(self, handle.remove)
            self.names = (*self.names, name)
            self.modules[name] = module

    def __call__(self, x: Any) -> Seen:
        x = laid(x) if self.channels_last else x
        at: dict[str, Tensor] = {}
        self._ear.caught = at
        self._ear.open = True
        try:
            out = self._answer(self.model(**x) if isinstance(x, Mapping) else self.model(x))
        except _Enough as left:
            if left.ear is not self._ear:  # another one's, in whose model this one is called
                raise
            out = None
        finally:
            self._ear.open = False
            self._ear.caught = {}
        if self.channels_last:
            out = tree_map(usual, out)
        if len(at) < len(self.names):
            missing = next(n for n in self.names if n not in at)
            raise Refused(
                f"Tap '{missing}' of the {self.called} showed nothing: its module was not called in this "
                "forward (a copy or a wrapper of the model was called, or it was compiled before it was "
                "tapped); tap a module that runs."
            )
        mask = x["attention_mask"].bool() if isinstance(x, Mapping) and "attention_mask" in x else None
        return Seen(out, at, mask, self.model, self.modules)

    def until_seen(self, x: Any) -> Seen:
        """The taps without the answer: the model is left as soon as all of them are caught. (A compiler drops
        by itself what nobody reads.)"""
        self._ear.enough = len(self.names)
        try:
            return replace(self(x), out=None)
        finally:
            self._ear.enough = None

    def check(self, x: Any) -> Seen:
        """One call that also notices what a traced call cannot: a tap changed in place afterwards, or caught
        more than once."""
        self._ear.versions, self._ear.counts = {}, {}
        seen = self(x)
        versions, counts = self._ear.versions, self._ear.counts
        self._ear.versions = self._ear.counts = None
        for name, tensor in seen.at.items():
            if tensor._version != versions[name]:
                raise Refused(
                    f"Tap '{name}' of the {self.called} is changed in place after it is read (often by an "
                    "activation with inplace=True), so a loss on it would see other values; tap the layer "
                    "that follows, or set inplace=False."
                )
            if counts[name] > 1:
                raise Refused(
                    f"Tap '{name}' of the {self.called} is called {counts[name]} times in one forward, so "
                    "it does not name one tensor; tap a module that runs once."
                )
        return seen

    def _keys_of_out(self) -> tuple[str, ...]:
        path, side, keys = _parse("out", self.table["out"])
        if path or side:
            raise Refused(
                f"The tap 'out' of the {self.called} is '{self.table['out']}', which names a module, "
                f"expected entries of the model's own output; write it as '[{path}]'."
            )
        return keys

    def _module(self, name: str, path: str) -> nn.Module:
        modules = dict(self.model.named_modules())
        if path not in modules:
            known = [*self.table, *(m for m in modules if m)]
            near = difflib.get_close_matches(path, known, n=5, cutoff=0.5) or [
                *self.table,
                *(n for n, _ in self.model.named_children()),
            ]
            raise Refused(
                f"Tap '{name}' does not exist in the {self.called} ({type(self.model).__name__}); near "
                f"names are: {', '.join(near[:8])}."
            )
        return modules[path]

    def _answer(self, out: Any) -> Any:
        if self._out_keys is not None:
            return _choose(out, self._out_keys, "out")
        if isinstance(out, Mapping) and "logits" in out:
            return out["logits"]
        return out


def laid(x: Any) -> Any:
    """Images in `channels_last`; any other input as it is."""
    if isinstance(x, Mapping):
        return {name: laid(v) for name, v in x.items()}
    image = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if image else x


def usual(v: Any) -> Any:
    """A tensor in the usual layout, on which `view` counts; anything else as it is."""
    return v.contiguous() if isinstance(v, Tensor) else v


def lying(seen: Seen, channels_last: bool) -> Seen:
    """The same with every map (b c h w) in that layout, and all else in the usual one."""
    at = {k: laid(v) if channels_last and v.ndim == 4 else usual(v) for k, v in seen.at.items()}
    return replace(seen, at=at)


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """What the module remembers (BatchNorm statistics, banks) is afterwards what it was before."""
    before = {name: b.clone() for name, b in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, b in module.named_buffers():
                b.copy_(before[name])


class _Ear:
    """What one call caught. `versions` and `counts` are kept only during `check`: they cannot be traced."""

    def __init__(self) -> None:
        self.open = False
        self.caught: dict[str, Tensor] = {}
        self.versions: dict[str, int] | None = None
        self.counts: dict[str, int] | None = None
        self.enough: int | None = None
        """How many taps are all that is asked for; None asks for the answer too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ear":
        return _Ear()  # a copied model keeps its hooks, but nobody ever opens the copied ear


class _Hook:
    def __init__(self, ear: _Ear, name: str, keys: tuple[str, ...]) -> None:
        self.ear, self.name, self.keys = ear, name, keys

    def hear_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.ear.open:
            self._catch(args[0] if args else next(iter(kwargs.values())))

    def hear_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.ear.open:
            self._catch(output)

    def _catch(self, value: Any) -> None:
        value = _choose(value, self.keys, self.name)
        if not isinstance(value, Tensor):
            raise Refused(
                f"Tap '{self.name}' shows {_describe(value)}, expected one tensor; choose an element, as in "
                f"'{_example(self.name, value)}'."
            )
        self.ear.caught[self.name] = value
        if self.ear.versions is not None and self.ear.counts is not None:
            self.ear.versions[self.name] = value._version
            self.ear.counts[self.name] = self.ear.counts.get(self.name, 0) + 1
        if len(self.ear.caught) == self.ear.enough and not torch.compiler.is_compiling():
            raise _Enough(self.ear)


class _Enough(BaseException):
    """Leaves a model once its ear has caught all; no `except Exception` of its own may stop that."""

    def __init__(self, ear: _Ear) -> None:
        super().__init__()
        self.ear = ear


def ours(hook: Any) -> bool:
    """Whether a module's hook is a Tapped's: then it is deaf except during that one's own call."""
    return isinstance(getattr(hook, "__self__", None), _Hook)


def _parse(name: str, tap: str) -> tuple[str, str | None, tuple[str, ...]]:
    found = _TAP.fullmatch(tap)
    if found is None:
        raise Refused(
            f"Tap '{name}' = '{tap}' cannot be read; expected PATH, PATH:in or PATH[key], for example "
            "'layer3', 'fc:in' or 'encoder[0]'."
        )
    return found["path"], found["side"], tuple(re.findall(r"\[([^\[\]]+)\]", found["keys"]))


def _choose(value: Any, keys: tuple[str, ...], name: str) -> Any:
    for key in keys:
        number = int(key) if key.lstrip("-").isdigit() else None
        named = isinstance(value, Mapping) and (key in value or number is None)
        try:
            value = value[key if named or number is None else number]
        except (KeyError, IndexError, TypeError):
            raise Refused(f"Tap '{name}' asks for [{key}], found {_describe(value)}.") from None
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with entries {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" + (
        f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    )


def _example(name: str, value: Any) -> str:
    return f"{name}[{next(iter(value), 0) if isinstance(value, Mapping) else 0}]"
