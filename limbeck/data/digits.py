"""Handwritten digits: 1797 grey 8x8 images in ten classes, embedded in scikit-learn (UCI Optical Recognition
of Handwritten Digits, test part; E. Alpaydin and C. Kaynak 1998; CC BY 4.0). No network is needed.

The split is ours and fixed: of every class, 20 % of the samples in file order's shuffle are for testing, 10 %
for choosing.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from limbeck.data.loader import Data, Splits


def load() -> Splits:
    """1257 training, 180 validation and 360 test images; pixels 0 … 16, normalised by the training split's
    statistics."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).to(torch.uint8).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    rest, test = train_test_split(range(len(y)), test_size=360, stratify=labels, random_state=0)
    train, valid = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
    seen = x[train].float() / 16
    mean, std = float(seen.mean()), float(seen.std())
    parts = (
        Data(x[i], y[i], tuple("0123456789"), 1 / 16, mean, std)
        for i in map(torch.tensor, (train, valid, test))
    )
    return Splits(*parts)
