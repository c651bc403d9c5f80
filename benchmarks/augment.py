"""What augmentation costs: `python -m benchmarks.augment`, a minute; `--quick` to see that it runs.

Crop, flip and normalise of 32 x 32 images as they leave the Loader, draws and all, beside the same done with
Pillow, image by image, through torch's own DataLoader: CPU time, interleaved in one process at one thread.
Before, both must come to the same numbers under the same draws. Then the time that each other view takes.

Fails when the Loader gives fewer than 120,000 samples a second, or fewer than 40 times as many as Pillow.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck import registry
from limbeck.core.batch import Lesson
from limbeck.core.keyed import generator, keyed
from limbeck.data.loader import Data, Loader
from limbeck.views.crop import crop
from limbeck.views.flip import flip

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RATE, RATIO = 120_000, 40
BATCH = 128
OTHERS = ("cutout", "colour", "randaugment", "mixup", "cutmix")


def data(samples: int) -> Data:
    draw = generator("images to augment")
    x = torch.randint(256, (samples, 3, 32, 32), generator=draw, dtype=torch.uint8)
    y = torch.randint(10, (samples,), generator=draw)
    return Data(x, y, tuple("abcdefghij"), 1 / 255, MEAN, STD)


class ByPillow(Dataset[tuple[Tensor, int]]):
    """A data set that augments an image when it is asked for it."""

    def __init__(self, data: Data) -> None:
        self.pixels = data.x.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.y.tolist()
        self.mean, self.std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        top, left = torch.randint(9, (2,)).tolist()
        return self.shown(number, top, left, bool(torch.rand(()) < 0.5)), self.labels[number]

    def shown(self, number: int, top: int, left: int, mirrored: bool) -> Tensor:
        image = ImageOps.expand(Image.fromarray(self.pixels[number]), 4)
        image = image.crop((left, top, left + 32, top + 32))
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return x.sub(self.mean).div(self.std)


def agree(loader: Loader, slow: ByPillow) -> None:
    batch = loader.at(0)
    assert batch.index is not None
    cuts = (keyed(batch.lesson, batch.index, "crop", 2) * 9).long().tolist()
    mirrored = (keyed(batch.lesson, batch.index, "flip")[:, 0] < 0.5).tolist()
    shown = [
        slow.shown(number, top, left, side)
        for number, (top, left), side in zip(batch.index.tolist(), cuts, mirrored, strict=True)
    ]
    torch.testing.assert_close(batch.x, torch.stack(shown), rtol=0, atol=1e-6)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(samples: int, rounds: int) -> tuple[float, float]:
    """Samples a second: from the Loader, and by Pillow. The median of interleaved rounds."""
    pixels = data(samples)
    loader, slow = Loader(pixels, min(BATCH, samples), seed=0, augment=(crop, flip)), ByPillow(pixels)
    agree(loader, slow)
    # As the activations of any network do: once so much was freed, the C library keeps memory for the next
    # batch, where before it gave it back and had it cleared anew.
    del [torch.zeros(7_000_000)][:]
    few = range(max(BATCH, samples // 8))

    def ours() -> None:
        for _ in loader.epoch(0):
            pass

    def theirs() -> None:
        for _ in DataLoader(slow, BATCH, sampler=few):
            pass

    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]
    done = loader.steps * loader.batch, len(few)
    fast, slowly = (n / statistics.median(t) for n, t in zip(done, zip(*times, strict=True), strict=True))
    return fast, slowly


def cost(name: str, samples: int, rounds: int) -> float:
    """Microseconds a sample that a view takes of uint8 images."""
    pixels, view = data(samples), registry.find("view", name)
    batches = [
        Loader(pixels, BATCH, seed=0).rows(index, Lesson()).replace(x=pixels.x[index])
        for index in torch.arange(samples).split(BATCH)
    ]
    times = [seconds(lambda: [view(batch) for batch in batches]) for _ in range(rounds + 1)][1:]
    return 1e6 * statistics.median(times) / samples


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="few samples, no verdict")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    samples, rounds = (256, 1) if quick else (16_384, 7)

    fast, slow = measure(samples, rounds)
    print(
        f"crop, flip, normalise   {fast:11,.0f} samples/s   by Pillow {slow:,.0f}   {fast / slow:.0f} times"
    )
    for name in OTHERS:
        print(f"{name:22}  {cost(name, samples // 4, rounds):11.2f} µs a sample")
    missed = fast < RATE or fast < RATIO * slow
    if missed and not quick:
        print(f"expected {RATE:,} samples/s and {RATIO} times Pillow's")
    return int(missed and not quick)


if __name__ == "__main__":
    sys.exit(main())
