"""How cost grows: `python -m benchmarks.scaling`, a minute; `--quick` to see that it runs.

A step of KD, or of several FitNets, with small networks; a batch read of a store. One thing grows at a time:
the number of classes, of taps, of rows, of stored samples. CPU time at one thread, the median of rounds in
which all sizes take turns, and the slope of its logarithm over the logarithm of the size: 1 is linear, 0 is
constant. What a step costs before anything grows pulls it below 1, so the slope is that of the last two
sizes. For a store it is also how much a reader takes on top of the file, which must not grow.

`--keep NAME` writes benchmarks/results/speed/NAME.json and NAME.svg.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import memory, speed
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import generator
from limbeck.core.scheme import Term
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.schemes.offline import Offline

SMALL = replace(speed.FULL, teacher="resnet14", student="resnet8", rows=16, size=16, samples=1000)
STAGES = ("stage1", "stage2", "stage3")
READ = 4096


@dataclass
class Curve:
    """Milliseconds, and megabytes, at each size."""

    sizes: Sequence[int]
    ms: list[float]
    mb: list[float]

    @property
    def slope(self) -> float:
        (a, b), (x, y) = self.sizes[-2:], self.ms[-2:]
        return math.log(y / x) / math.log(b / a)


def step(scene: speed.Scene, terms: int = 0) -> Callable[[], object]:
    """A step under KD, or under so many FitNets."""
    batch, student, teacher = scene.batch(), scene.net(scene.student), scene.net(scene.teacher)
    hints = [Term(FitNet(STAGES[n % 3]), name=f"hint {n}") for n in range(terms)]
    return speed._steps(Offline(Distiller(student, teacher, hints or KD(), example=batch)), batch)


def curve(sizes: Sequence[int], arms: Sequence[Callable[[], object]], rounds: int) -> Curve:
    times = speed.race(arms, rounds)
    return Curve(sizes, [1e3 * statistics.median(each) for each in times], [_peak(arm) for arm in arms])


def loss_of(classes: int) -> Callable[[], object]:
    """KD's loss alone, where the networks are out of the way."""
    s, t = torch.randn(2, 64, classes, generator=generator("answers"))
    s.requires_grad_()
    method = KD()
    return lambda: torch.autograd.grad(method.loss(speed.Seen(s), speed.Seen(t), speed.Batch(s)), s)


def readers(sizes: Sequence[int], folder: Path, rounds: int) -> Curve:
    """As many samples of stores of every size, shuffled. Megabytes are what a reader holds beside the map."""
    arms = []
    for size in sizes:
        store = speed.stored(str(folder / str(size)), speed.FULL, size, "top")
        order = torch.randperm(size, generator=generator("order"))[:READ].split(64)
        arms.append(lambda store=store, order=order: [store.read(0, index) for index in order])
    found = curve(sizes, arms, rounds)
    found.mb = [_traced(arm) for arm in arms]
    return found


def _peak(arm: Callable[[], object]) -> float:
    return memory.peak(arm) / 1e6


def _traced(arm: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        arm()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def measure(rounds: int, quick: bool) -> dict[str, Curve]:
    classes = (10, 100) if quick else (100, 1000, 10_000, 40_000, 80_000)
    rows = (4, 8) if quick else (8, 16, 32, 64)
    taps = (1, 2) if quick else (1, 2, 4, 8, 16)
    samples = (5000, 10_000) if quick else (10_000, 50_000, 250_000, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        return {
            "KD's loss, by classes": curve(classes, [loss_of(n) for n in classes], rounds),
            "a step of KD, by rows": curve(rows, [step(replace(SMALL, rows=n)) for n in rows], rounds),
            "a step of FitNet, by taps": curve(taps, [step(SMALL, n) for n in taps], rounds),
            f"{READ:,} rows of a store, by samples": readers(samples, Path(folder), rounds),
        }


def drawn(curves: dict[str, Curve]) -> str:
    """All curves on logarithmic axes, each in a frame of its own."""
    frames = []
    for place, (name, found) in enumerate(curves.items()):
        x, y = ([math.log10(v) for v in values] for values in (found.sizes, found.ms))
        wide, high = max(x) - min(x), max(max(y) - min(y), 1.0)
        points = " ".join(
            f"{20 + 200 * (a - min(x)) / wide:.1f},{140 - 100 * (b - min(y)) / high:.1f}"
            for a, b in zip(x, y, strict=True)
        )
        frames.append(
            f'<g transform="translate({240 * place} 0)"><text x="20" y="20">{name}</text>'
            f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2"/>'
            f'<text x="20" y="160">{found.sizes[0]:,} to {found.sizes[-1]:,}: {found.ms[0]:.3g} to '
            f"{found.ms[-1]:.3g} ms</text></g>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {240 * len(curves)} 170" '
        f'font-family="sans-serif" font-size="11" fill="currentColor">{"".join(frames)}</svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="How cost grows.")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/speed/NAME.json and .svg")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    curves = measure(given.rounds, given.quick)
    for name, found in curves.items():
        print(f"{name}: slope {found.slope:.2f}")
        for size, ms, mb in zip(found.sizes, found.ms, found.mb, strict=True):
            print(f"  {size:9,d} {ms:10.3f} ms {mb:10.3f} MB")
    if given.keep:
        said = {name: {**asdict(found), "slope": found.slope} for name, found in curves.items()}
        told = {"setting": speed.setting(SMALL, given.rounds), "curves": said}
        speed.RESULTS.mkdir(parents=True, exist_ok=True)
        kept = speed.RESULTS / f"{given.keep}.json"
        kept.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        kept.with_suffix(".svg").write_text(drawn(curves), encoding="utf-8")
        print(f"\nkept in {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
