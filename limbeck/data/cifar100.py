"""CIFAR-100: 60,000 colour images, 32x32, of a hundred fine classes (A. Krizhevsky: Learning Multiple Layers
of Features from Tiny Images, 2009; no licence is stated).

Read from the official binary version, or from `train_0.npz` … `train_4.npz` and `test.npz`; both are the
whole set, in different orders. The validation part is ours and fixed for each of the two: 50 of the 500
training images of every class.
"""

from pathlib import Path

import torch

from limbeck.data.cifar_files import parts
from limbeck.data.loader import Data, Splits
from limbeck.data.published import Online, find

NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
    palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
    rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
    sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
"""
CLASSES = tuple(NAMES.split())  # fine, in the order of their labels
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of the 50,000 training images, in 0 … 1

ARCHIVE, FOLDER = "cifar-100-binary.tar.gz", "cifar-100-binary"
BINARY = ["train.bin", "test.bin"]
ARRAYS = [*(f"train_{n}.npz" for n in range(5)), "test.npz"]
INSIDE = [f"{FOLDER}/{name}" for name in BINARY]
SHA256 = {
    ARCHIVE: "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
    "train_0.npz": "24267fb86726c9a147363b8d8f007e52db5233ee81bdbd823913e7b35d830195",
    "train_1.npz": "4ac8f8dfa7588c2846d5928462eb3dc43bf6f0cfb788b8e51fc7c1af3dd1bff0",
    "train_2.npz": "725ce96e055fb937986e32864ca40ad0fa15ddc0aabd9952e743849604c27b68",
    "train_3.npz": "194cb87cef4235485827261173e68c43a868c02c8f20e69ac151724947217a11",
    "train_4.npz": "b01fa114f5fe1600bb8e7d543f0cfb83a40033c93f1ba028fa93edbda0a764b2",
    "test.npz": "8e21b2826f12b2ec154ee276ca3c293f6cec345988f585354020d1a155355631",
}
ONLINE = Online(["https://www.cs.toronto.edu/~kriz/"], {ARCHIVE: SHA256[ARCHIVE]}, 168.5)
GET = (
    f"put {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html, its folder {FOLDER}, or "
    f"{', '.join(ARRAYS)} in a folder cifar100 and set LIMBECK_DATA to the folder above it"
)


def load(root: Path | None = None) -> Splits:
    """45,000 training, 5,000 validation and 10,000 test images. Looks in `root`; without it in cifar100/
    under LIMBECK_DATA and in the user's cache, or else fetches the set."""
    files = find("CIFAR-100", "cifar100", [[ARCHIVE], INSIDE, BINARY, ARRAYS], GET, ONLINE, root)
    *some, last = parts(files, SHA256, INSIDE, label_bytes=2, classes=len(CLASSES))
    x, y = zip(*some, strict=True)
    whole = Data(torch.cat(x), torch.cat(y), CLASSES, 1 / 255, MEAN, STD)
    test = Data(*last, CLASSES, 1 / 255, MEAN, STD)
    return Splits(*whole.split(1 / 10, "cifar100"), test)
