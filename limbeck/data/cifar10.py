"""CIFAR-10: colour images, 32x32, of ten classes of animals and vehicles (A. Krizhevsky: Learning Multiple
Layers of Features from Tiny Images, 2009; no licence is stated).

Read from the official binary version, which is the whole set; where that is not at hand, from `train_10k.npz`
and `test_5k.npz`, which are a part of it: 10,000 of the 50,000 training and 5,000 of the 10,000 test images,
as many of every class. Scores on the part are not scores on CIFAR-10, and reading it says so in a warning.
The validation part is ours and fixed: one in ten of every class' training images.
"""

import warnings
from pathlib import Path

import torch

from limbeck.data.cifar_files import parts
from limbeck.data.loader import Data, Splits
from limbeck.data.published import Online, find

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of all 50,000 training images, in 0 … 1

ARCHIVE, FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
BINARY = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
PART = ["train_10k.npz", "test_5k.npz"]
INSIDE = [f"{FOLDER}/{name}" for name in BINARY]
SHA256 = {
    ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    "train_10k.npz": "29044a876b3ed524e552d80197da44ca59290d43a56782ba44ae63dcf78c0e0a",
    "test_5k.npz": "9858651214053def341f2374ad6d8c4a6a26c7f0d90cfff5af561436339b77d4",
}
ONLINE = Online(["https://www.cs.toronto.edu/~kriz/"], {ARCHIVE: SHA256[ARCHIVE]}, 170.1)
GET = (
    f"put {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html, its folder {FOLDER}, or "
    f"{' and '.join(PART)} in a folder cifar10 and set LIMBECK_DATA to the folder above it"
)


def load(root: Path | None = None) -> Splits:
    """45,000 training, 5,000 validation and 10,000 test images; of the part 9,000, 1,000 and 5,000. Looks in
    `root`; without it in cifar10/ under LIMBECK_DATA and in the user's cache, or else fetches the set."""
    files = find("CIFAR-10", "cifar10", [[ARCHIVE], INSIDE, BINARY, PART], GET, ONLINE, root)
    *some, last = parts(files, SHA256, INSIDE, label_bytes=1, classes=len(CLASSES))
    if files[0].name == PART[0]:
        warnings.warn(
            f"{files[0].parent} holds a part of CIFAR-10, {len(some[0][0]):,} training and {len(last[0]):,} "
            "test images; scores on it are not scores on CIFAR-10.",
            stacklevel=2,
        )
    x, y = zip(*some, strict=True)
    whole = Data(torch.cat(x), torch.cat(y), CLASSES, 1 / 255, MEAN, STD)
    test = Data(*last, CLASSES, 1 / 255, MEAN, STD)
    return Splits(*whole.split(1 / 10, "cifar10"), test)
