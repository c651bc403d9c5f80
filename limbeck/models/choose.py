"""Which taps to look at in a model that has no table of its own, read off its stages.

    taps = choose(teacher, x)
    Distiller(student, Frozen(teacher, taps=taps), [AT()], example=(x, y), taps=choose(student, x))

No name is translated between two models: a method that reads `stage2` reads the second stage of each. Where
two networks have unlike numbers of stages, or another layer is meant, a table says so: in a recipe
`taps = { stage2 = "layer3" }`, in Python `{**choose(teacher, x), "stage2": "layer3"}`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.refused import Refused, said
from limbeck.core.taps import unmoved

STAGES = 4
"""At most so many, the deepest: finer grids, of networks for large images, cost much and say little."""

GROUPS = 3
"""Blocks that all show as many tokens are looked at in so many groups, as in `vit.py`."""


@torch.no_grad()
def choose(model: nn.Module, x: Any) -> dict[str, str]:
    """Taps of a model: `stage1` … `stageN` and `pooled`, what there is of them; its own `TAPS` if it has any.

    x: a few rows as the model is shown them: a tensor, or a mapping of tensors by keyword. It is run once, in
    eval mode and without gradient; modes, buffers, hooks and random generators are left as they were.

    - Maps (b c h w): a stage is what is last shown at a grid, named by the outermost module that shows it. A
      single layer behind blocks of several (a neck, a transition) is no end of a stage, nor is what lies in a
      block that goes on to the next grid. The first grid is a stem, and no stage, if no block of several
      layers works at it and three grids follow. A grid of one position is no map.
    - Tokens (b n d): the last block at each number of tokens; where that stays the same, the last block of
      each third. Blocks are modules of one class and of several layers that hand tokens on to each other.
    - `pooled` (b d): what the last linear layer is given, if what it shows has the shape of the answer.

    Left out are modules that run more than once, outputs that are changed in place afterwards, and maps with
    channels last (b h w c), which methods would misread. Raises `Refused` when the model cannot be run on x.
    """
    table = getattr(model, "TAPS", None)
    if table is not None:
        return dict(table)
    look = _look(model, x)
    last = next((show.layout for show in reversed(look.shows) if show.layout and show.layers), "")
    ends = _map_stages(look) if last == "map" else _token_stages(look) if last == "tokens" else []
    taps = {f"stage{n}": end.tap for n, end in enumerate(ends, start=1)}
    head = _head(look)
    return taps if head is None else {**taps, "pooled": f"{head.path}:in"}


@torch.no_grad()
def blocks(model: nn.Module, x: Any) -> tuple[str, ...]:
    """The blocks that a model is made of, first to last, each as the tap of what it shows: the residual units
    of a ResNet, the layers of a transformer; in a plain network each convolution with the norm and activation
    beside it. x: as in `choose`.

    A block has several layers and hands on what it is given, maps or tokens; those of the class that makes
    the longest chain are taken, and between them what else there is (convolutional blocks before a
    transformer's). A stem, given the image itself, is no block. Left out are modules that run more than once
    and outputs that are changed in place afterwards. Raises `Refused` when fewer than two are found, or the
    model cannot be run on x.
    """
    look = _look(model, x)
    calls = Counter(show.path for show in look.shows)
    several = [show for show in look.shows if show.layers > 1 and _hands_on(show, look)]
    chain = _chained(several)
    whole = {show.path for show in chain}
    beside = [s for s in several if not any(s.path in _around(p) for p in whole) and not _inside(s, whole)]
    found = [s for s in look.shows if any(s is other for other in [*chain, *_spread(beside)])] or _units(look)
    taps = tuple(s.tap for s in found if calls[s.path] == 1 and s.tensor._version == s.version)
    if len(taps) < 2:
        raise Refused(
            f"A {type(model).__name__} shows {len(taps)} block(s) that can be tapped, expected two or more; "
            "name its layers yourself."
        )
    return taps


# --- one look ---


@dataclass(frozen=True)
class _Show:
    """What one call of a module showed, at `tap`.

    layers: how many with weights are in the module. layout: `map`, `channels last`, `tokens` or none of them.
    grid: (h, w), or (n,) for tokens.
    """

    path: str
    tap: str
    module: nn.Module
    layers: int
    given: Any
    tensor: Tensor
    version: int
    layout: str
    grid: tuple[int, ...]

    @property
    def positions(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class _Look:
    """All that was shown, in the order in which calls ended, for these inputs."""

    shows: list[_Show]
    inputs: list[Any]
    answer: Any

    def works(self, show: _Show) -> int:
        """How many layers with weights a module has at the grid that it shows."""
        inside = (s for s in self.shows if s.path == show.path or show.path in _around(s.path))
        layers = (s for s in inside if isinstance(s.module, nn.Conv2d | nn.Linear))
        return sum(bool(s.layout) and s.positions == show.positions for s in layers)

    def usable(self) -> list[_Show]:
        """Each tensor that can be tapped, once: where it was made, or at a module around that shows it."""
        calls = Counter(show.path for show in self.shows)
        found: dict[int, _Show] = {}
        for show in self.shows:
            if calls[show.path] > 1 or show.tensor._version != show.version:
                continue
            within = found.setdefault(id(show.tensor), show)
            # A whole output rather than an element of one, even when that one is further out.
            if show.path in _around(within.path) and (show.tap == show.path or within.tap != within.path):
                found[id(show.tensor)] = show
        return list(found.values())


def _look(model: nn.Module, x: Any) -> _Look:
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = {k: v.to(home) for k, v in x.items()} if isinstance(x, Mapping) else x.to(home)
    inputs = list(x.values()) if isinstance(x, Mapping) else [x]
    size = next((tuple(v.shape[2:]) for v in inputs if v.ndim == 4), (1, 1))  # no image: grids are square
    shows: list[_Show] = []

    def listen(path: str, module: nn.Module) -> Any:
        layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())

        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            key, tensor = _first_tensor(output)
            if tensor is not None:
                given = args[0] if args else next(iter(kwargs.values()), None)
                laid = _laid_out(tensor, len(inputs[0]), size)
                shows.append(_Show(path, path + key, module, layers, given, tensor, tensor._version, *laid))

        return module.register_forward_hook(hear, with_kwargs=True)

    modes = [(module, module.training) for module in model.modules()]
    hooks = [listen(path, module) for path, module in model.named_modules() if path]
    try:
        model.eval()
        runs = said(f"A {type(model).__name__}", "be run on the example that its taps would be chosen by")
        with runs, unmoved(model), torch.random.fork_rng(devices=[home] if home.type == "cuda" else []):
            answer = model(**x) if isinstance(x, Mapping) else model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return _Look(shows, inputs, answer)


def _first_tensor(output: Any) -> tuple[str, Tensor | None]:
    """The tensor that an output is, or begins with, and its key there."""
    if isinstance(output, Tensor):
        return "", output
    if isinstance(output, Mapping):
        key, value = next(iter(output.items()), ("", None))
    else:
        key, value = "0", output[0] if isinstance(output, tuple | list) and output else None
    return f"[{key}]", value if isinstance(value, Tensor) else None


def _laid_out(x: Tensor, rows: int, size: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A tensor's layout and grid: the axes with the image's proportions, up to rounding, are the grid."""
    if x.ndim == 3 and len(x) == rows and x.shape[1] > 1:
        return "tokens", (x.shape[1],)
    if x.ndim == 4 and len(x) == rows:
        for layout, (h, w) in (("map", x.shape[2:]), ("channels last", x.shape[1:3])):
            if h * w > 1 and abs(h * size[1] - w * size[0]) < max(size):
                return layout, (h, w)
    return "", ()


def _around(path: str) -> list[str]:
    """The modules that a module is in: `a` and `a.b` of `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _outermost(shows: Sequence[_Show]) -> list[_Show]:
    paths = {show.path for show in shows}
    return [show for show in shows if not paths.intersection(_around(show.path))]


# --- stages ---


def _map_stages(look: _Look) -> list[_Show]:
    ends = [_end_of(shows, look) for shows in _by_grid(look)]
    if len(ends) > 3 and look.works(ends[0]) < 2:
        ends = ends[1:]
    return ends[-STAGES:]


def _by_grid(look: _Look) -> Iterator[list[_Show]]:
    """What is shown at each grid that a convolution works at, the finest grid first.

    A grid that a larger one comes after is a branch beside the stages, as in squeeze and excitation.
    """
    leaving = _leaving(look)
    staying = [
        show
        for show in look.shows
        if show.layout == "map" and (show.grid not in map(leaving.get, _around(show.path)))
    ]
    convolved = [show.grid for show in staying if isinstance(show.module, nn.Conv2d)]
    last = {grid: place for place, grid in enumerate(convolved)}
    usable = [show for show in look.usable() if any(show is other for other in staying)]
    for grid in sorted(last, key=math.prod, reverse=True):
        here = _outermost([show for show in usable if show.grid == grid])
        if here and all(last[other] <= last[grid] for other in last if math.prod(other) >= math.prod(grid)):
            yield here


def _leaving(look: _Look) -> dict[str, tuple[int, ...]]:
    """Blocks that take a map to the next grid and work on it there, and the grid that they leave."""
    maps = [show for show in look.shows if show.layout == "map"]
    leaving = {}
    for show in maps:
        given = show.given
        if not isinstance(given, Tensor) or given.ndim != 4 or any(given is x for x in look.inputs):
            continue
        before = tuple(given.shape[2:])
        inside = {other.grid for other in maps if show.path in _around(other.path)}
        if math.prod(before) > show.positions and inside <= {before, show.grid} and look.works(show):
            leaving[show.path] = before
    return leaving


def _end_of(shows: list[_Show], look: _Look) -> _Show:
    """The last block of several layers, or else the last layer with the norm and activation beside it."""
    works = [look.works(show) for show in shows]
    place = max(n for n, count in enumerate(works) if count >= min(max(works), 2))
    return shows[-1] if isinstance(shows[place].module, nn.Conv2d) else shows[place]


def _token_stages(look: _Look) -> list[_Show]:
    blocks = _blocks([show for show in look.shows if show.layout == "tokens"])
    sizes = [block.positions for block in blocks]
    if len(set(sizes)) > 1:
        ends = [block for n, block in enumerate(blocks) if block.positions not in sizes[n + 1 :]][-STAGES:]
    else:
        places = {math.ceil(len(blocks) * n / GROUPS) - 1 for n in range(1, GROUPS + 1)}
        ends = [block for n, block in enumerate(blocks) if n in places]
    usable = {id(show.tensor): show for show in look.usable()}
    return [usable[id(end.tensor)] for end in ends if id(end.tensor) in usable]


def _blocks(shows: Sequence[_Show]) -> list[_Show]:
    """The modules of several layers, from tokens to tokens, of the class that makes the longest chain."""
    classes: dict[type, list[_Show]] = {}
    for show in shows:
        if show.layers > 1 and isinstance(show.given, Tensor) and show.given.ndim == 3:
            classes.setdefault(type(show.module), []).append(show)

    def links(kind: list[_Show]) -> tuple[int, int]:
        return sum(after.given is before.tensor for before, after in pairwise(kind)), -len(kind)

    # Attention is as numerous, but is given what a norm shows.
    return max(classes.values(), key=links, default=[])


# --- blocks ---


def _hands_on(show: _Show, look: _Look) -> bool:
    """Whether a module is given what it shows: a map for a map, tokens for tokens, of the network's own. A
    list of modules is no block, but made of some."""
    given, shown = show.given, show.tensor
    inside = isinstance(given, Tensor) and not any(given is x for x in look.inputs)
    cells = show.layout in ("map", "tokens") or tuple(shown.shape[2:]) == (1, 1)
    return inside and cells and given.ndim == shown.ndim and not isinstance(show.module, nn.Sequential)


def _chained(shows: Sequence[_Show]) -> list[_Show]:
    """Those of the class whose modules most often hand on to each other; none where none does."""
    classes: dict[type, list[_Show]] = {}
    for show in shows:
        classes.setdefault(type(show.module), []).append(show)
    return max((kind for kind in classes.values() if _links(kind)), key=_links, default=[])


def _links(kind: Sequence[_Show]) -> int:
    return sum(after.given is before.tensor for before, after in pairwise(kind))


def _inside(show: _Show, paths: set[str]) -> bool:
    return show.path in paths or any(around in paths for around in _around(show.path))


def _spread(shows: Sequence[_Show]) -> list[_Show]:
    """The outermost of these; in place of one that is a chain itself, its links."""
    spread = []
    for outer in _outermost(shows):
        links = _chained([show for show in shows if outer.path in _around(show.path)])
        spread += links or [outer]
    return spread


def _units(look: _Look) -> list[_Show]:
    """What is last shown at each convolution's grid before the next one works."""
    usable = look.usable()
    maps = [n for n, show in enumerate(look.shows) if show.layout == "map"]
    convolutions = [n for n in maps if isinstance(look.shows[n].module, nn.Conv2d)]
    units: list[_Show] = []
    for start, end in pairwise([*convolutions, len(look.shows)]):
        grid = look.shows[start].grid
        here = [s for s in usable if any(s is one for one in look.shows[start:end]) and s.grid == grid]
        units += here[-1:]
    return units


# --- the head ---


def _head(look: _Look) -> _Show | None:
    answer = look.answer
    if isinstance(answer, Mapping) and "logits" in answer:
        answer = answer["logits"]
    calls = Counter(show.path for show in look.shows)
    heads = [
        show
        for show in look.shows
        if isinstance(show.module, nn.Linear)
        and calls[show.path] == 1
        and isinstance(answer, Tensor)
        and show.tensor.shape == answer.shape
        and isinstance(show.given, Tensor)
        and show.given.ndim == 2
    ]
    return heads[-1] if heads else None
