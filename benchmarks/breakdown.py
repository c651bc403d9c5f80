"""Where a step's time goes: `python -m benchmarks.breakdown`, two minutes; `--quick` to see that it runs.

A step of KD, resnet32x4 to resnet8x4, a batch of 64 images of 32 x 32 on one thread of a CPU: what its parts
take, under a live teacher by the shorter ways and by the plain one, the student in either layout; then which
operators the whole step spends its time in. Then what choices behind it are worth by themselves: forward and
backward of networks in `channels_last`, and a product with CRD's bank. CPU time, medians of rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from benchmarks.speed import FULL, QUICK, Scene, race
from limbeck.core.distiller import Distiller
from limbeck.core.keyed import generator
from limbeck.core.teachers import Frozen
from limbeck.knowledge.response.kd import KD
from limbeck.pieces.similarity import products

PARTS = ("student", "teacher", "losses", "backward", "optimiser")
OPERATORS = 8
NETWORKS = (
    *("resnet20", "resnet8x4", "resnet32x4", "wrn_16_2", "vgg8", "vgg13"),
    *("mobilenetv2_half", "shufflenet_v1", "shufflenet_v2", "tiny_vit_32"),
)


def step(scene: Scene, plain: bool) -> Callable[[], dict[str, float]]:
    """A step that says what each of `PARTS` took, in milliseconds."""
    batch, student, teacher = scene.batch(), scene.net(scene.student), scene.net(scene.teacher)
    frozen = Frozen(teacher, fold=not plain, channels_last=not plain)
    lesson = Distiller(student, frozen, KD(), example=batch, channels_last=not plain)
    optimiser = torch.optim.SGD(lesson.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def run() -> dict[str, float]:
        at = [time.process_time()]

        def done() -> None:
            at.append(time.process_time())

        shown = lesson.show(batch)
        done()
        sight = lesson.ask(batch, shown)
        done()
        loss = sum(lesson.losses(sight).values())
        done()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        done()
        optimiser.step()
        done()
        return {part: 1e3 * (b - a) for part, (a, b) in zip(PARTS, pairwise(at), strict=True)}

    return run


def parts(scene: Scene, rounds: int) -> dict[str, list[float]]:
    """For each part what it takes by limbeck's ways and by the plain ones, interleaved."""
    ways = [step(scene, plain) for plain in (False, True)]
    found = [[way() for way in ways] for _ in range(rounds + 1)][1:]
    return {part: [statistics.median(pair[n][part] for pair in found) for n in (0, 1)] for part in PARTS}


def operators(scene: Scene) -> list[tuple[str, int, float]]:
    """(operator, calls, milliseconds by itself) of a step, the largest first."""
    run = step(scene, plain=False)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [(event.key, event.count, event.self_cpu_time_total / 1e3) for event in events]


def layouts(name: str, scene: Scene, rounds: int) -> list[float]:
    """Milliseconds that a network's forward and backward take in `channels_last` and in the usual layout."""
    net, batch = scene.net(name), scene.batch()
    shown = [batch.x.contiguous(memory_format=torch.channels_last), batch.x]

    def learn(x: torch.Tensor) -> None:
        nn.functional.cross_entropy(net(x), batch.y).backward()

    return [1e3 * statistics.median(each) for each in race([partial(learn, x) for x in shown], rounds)]


def bank(scene: Scene, rounds: int) -> list[float]:
    """Milliseconds of a bank's products with the rows of a batch: ours, and as a matrix product."""
    draw = generator("a bank")
    vectors, rows = (torch.randn(n, 128, generator=draw) for n in (scene.samples, scene.rows))
    ways = (lambda: products(vectors, rows), lambda: vectors @ rows.T)
    return [1e3 * statistics.median(each) for each in race(ways, rounds)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="small networks")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    scene, rounds = (QUICK, 2) if quick else (FULL, 9)

    found = parts(scene, rounds)
    whole = [sum(column) for column in zip(*found.values(), strict=True)]
    print(f"{'ms of a step':28}   limbeck   share     plain   share")
    for part, (ours, plain) in found.items():
        print(f"{part:28} {ours:9.1f} {ours / whole[0]:7.1%} {plain:9.1f} {plain / whole[1]:7.1%}")
    print(f"{'all':28} {whole[0]:9.1f} {'':7} {whole[1]:9.1f}\n")

    spent = operators(scene)
    total = sum(ms for _, _, ms in spent)
    print(f"{'operators, by themselves':40}  calls        ms   share")
    for name, calls, ms in spent[:OPERATORS]:
        print(f"{name[:40]:40} {calls:6} {ms:9.1f} {ms / total:7.1%}")
    print(f"{'all others':40} {'':6} {sum(ms for _, _, ms in spent[OPERATORS:]):9.1f}")

    print(f"\n{'ms':34}   limbeck     plain   ratio")
    choices = {
        f"{name}, in channels_last": layouts(name, replace(scene, rows=32), rounds) for name in NETWORKS
    }
    for name, (ours, plain) in {**choices, "products with a bank": bank(scene, rounds)}.items():
        print(f"{name:34} {ours:9.1f} {plain:9.1f} {ours / plain:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
