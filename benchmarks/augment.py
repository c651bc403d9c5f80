"""What augmentation costs: `python -m benchmarks.augment`, a minute; `--quick` to see that it runs.

Crop, flip and normalise of 32 x 32 images as they leave the Loader, draws and all, beside the same done image
by image through torch's own DataLoader: with Pillow and as few calls as will do, which must come to the same
numbers under the same draws, and by the transforms of torchvision, v2 as its documentation writes them and v1
as the toolkits use them, where torchvision is installed. (`pip install --no-deps torchvision` will do: one
that does not fit torch lacks operators, of which transforms need none.) CPU time, interleaved in one process
at one thread. Then the time that each other view takes.

Fails when the Loader gives fewer than 120,000 samples a second, or fewer than 40 times as many as v2.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

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
BATCH = 256
OPERATORS = [
    "nms",
    "qnms",
    "qroi_align",
    "roi_align",
    "roi_pool",
    "ps_roi_align",
    "ps_roi_pool",
    "deform_conv2d",
    "_roi_align_backward",
    "_roi_pool_backward",
    "_ps_roi_align_backward",
    "_ps_roi_pool_backward",
    "_deform_conv2d_backward",
]
"""What torchvision looks for when it is imported."""
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


class ByTransforms(ByPillow):
    """By somebody's transforms of a Pillow image."""

    def __init__(self, data: Data, change: Callable[[Image.Image], Tensor]) -> None:
        super().__init__(data)
        self.change = change

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.pixels[number])), self.labels[number]


@cache
def declared() -> torch.library.Library:
    """torchvision's operators, by name only."""
    operators = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        operators.define(f"{name}(Tensor x) -> Tensor")
    return operators


def by_torchvision() -> dict[str, Callable[[Image.Image], Tensor]]:
    """Its transforms by version; none where it is not installed."""
    if find_spec("torchvision") is None:
        return {}
    try:
        import_module("torchvision")
    except RuntimeError:  # it was built for another torch, and its operators are not there
        declared()
    v1, v2 = import_module("torchvision.transforms"), import_module("torchvision.transforms.v2")
    return {
        "v2": v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        ),
        "v1": v1.Compose(
            [
                v1.RandomCrop(32, padding=4),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                v1.Normalize(MEAN, STD),
            ]
        ),
    }


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


def measure(samples: int, rounds: int) -> dict[str, float]:
    """Samples a second: from the Loader, and of each pipeline beside it. Medians of interleaved rounds."""
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

    def theirs(data: ByPillow) -> None:
        for _ in DataLoader(data, BATCH, sampler=few):
            pass

    others = {"Pillow": slow, **{v: ByTransforms(pixels, change) for v, change in by_torchvision().items()}}
    calls = {"limbeck": ours, **{name: partial(theirs, other) for name, other in others.items()}}
    done = dict.fromkeys(calls, len(few)) | {"limbeck": loader.steps * loader.batch}
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {name: n / statistics.median(each[name] for each in times) for name, n in done.items()}


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

    rates = measure(samples, rounds)
    fast = rates.pop("limbeck")
    print(f"crop, flip, normalise   {fast:11,.0f} samples/s")
    for name, slow in rates.items():
        print(f"by {name:20} {slow:11,.0f} samples/s, {fast / slow:.0f} times as slow")
    for name in OTHERS:
        print(f"{name:22}  {cost(name, samples // 4, rounds):11.2f} µs a sample")
    if "v2" not in rates:
        print("torchvision is not installed, so nothing is said of it")
    missed = fast < RATE or fast < RATIO * rates.get("v2", 0)
    if missed and not quick:
        print(f"expected {RATE:,} samples/s, and {RATIO} times as many as by v2")
    return int(missed and not quick)


if __name__ == "__main__":
    sys.exit(main())
