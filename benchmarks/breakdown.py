"""Where the time of a step goes: `python -m benchmarks.breakdown`, a minute; `--quick` to see that it runs.

A step of KD, resnet32x4 to resnet8x4, a batch of 64 images of 32 x 32 on one thread of a CPU: what its parts
take, under a live teacher by the shorter ways and by the plain one, the student in either layout; then which
operators the whole step spends its time in. CPU time, medians of rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.speed import FULL, QUICK, Scene
from limbeck.core.distiller import Distiller
from limbeck.core.teachers import Frozen
from limbeck.knowledge.response.kd import KD

PARTS = ("student", "teacher", "losses", "backward", "optimiser")
OPERATORS = 8


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
