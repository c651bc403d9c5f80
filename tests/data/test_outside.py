"""What people bring: all forms of a data set become the same splits; what cannot is refused by its place."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from limbeck import registry
from limbeck.core.batch import IGNORE
from limbeck.core.refused import Refused
from limbeck.data.loader import Data, Splits
from limbeck.data.outside import as_splits, splits

N = 60
X = torch.randint(0, 256, (N, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
Y = torch.arange(N) % 3
OTHER = (X[:9].flip(0), Y[:9].flip(0))


class Mapped(Dataset):
    """A map-style Dataset, which has no `__iter__`."""

    def __init__(self, x: Any = X, y: Any = Y) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, n: int) -> Any:
        if n >= len(self):
            raise IndexError(n)
        return self.x[n], self.y[n]


def pairs(x: Any = X, y: Any = Y) -> Iterator[Any]:
    yield from zip(x, y, strict=True)


def batches() -> Iterator[Any]:
    yield from zip(X.split(7), Y.split(7), strict=True)


def pil(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy())


FORMS: dict[str, Callable[[], Any]] = {
    "arrays": lambda: (X, Y),
    "numpy arrays": lambda: (X.numpy(), Y.numpy().astype(np.uint8)),
    "a Dataset": Mapped,
    "a TensorDataset": lambda: TensorDataset(X, Y),
    "a Subset": lambda: Subset(TensorDataset(X, Y), range(N)),
    "a Dataset of labels in a row of one": lambda: Mapped(X, Y[:, None]),
    "a Dataset of PIL images": lambda: Mapped([pil(x) for x in X], Y.tolist()),
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
    "samples": pairs,
    "samples of numpy": lambda: pairs(X.numpy(), Y.numpy()),
    "a list of samples": lambda: list(pairs(X, Y.tolist())),
    "a tuple of batches": lambda: tuple(batches()),
    "batches with lists of labels": lambda: ((x, y.tolist()) for x, y in batches()),
    "a Data": lambda: Data(X, Y, ("0", "1", "2"), 1 / 255).standardised(),
}


def same(a: Data, b: Data) -> None:
    assert a.x.dtype == b.x.dtype and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert (a.classes, a.scale, a.mean, a.std) == (b.classes, b.scale, b.mean, b.std)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_data(form: str) -> None:
    found = splits(FORMS[form](), valid=OTHER, test=FORMS[form]())
    assert torch.equal(found.train.x, X) and torch.equal(found.train.y, Y)
    assert found.train.x.dtype == torch.uint8 and found.train.classes == ("0", "1", "2")
    assert torch.equal(found.valid.x, OTHER[0]) and torch.equal(found.valid.y, OTHER[1])
    same(found.test, found.train)


def test_bytes_are_normalised_by_the_training_part_and_other_numbers_stay() -> None:
    found = splits((X, Y), valid=OTHER, test=OTHER)
    x = found.train.rows(torch.arange(N))[0].double().transpose(0, 1).flatten(1)
    assert torch.allclose(x.mean(1), torch.zeros(3).double(), atol=1e-6)
    assert torch.allclose(x.std(1, correction=0), torch.ones(3).double(), atol=1e-6)
    assert found.valid.mean == found.test.mean == found.train.mean and found.valid.std == found.train.std
    for real in (X.double() / 7, X.half(), (X.long() * 1000 - 5).numpy()):
        found = splits((real, Y), valid=(real[:9], Y[:9]), test=(real, Y))
        assert found.train.x.dtype == torch.float32
        x, _ = found.test.rows(torch.arange(N))
        assert torch.equal(x, torch.as_tensor(real).float())


def test_grey_and_palette_pictures_get_their_channels() -> None:
    grey = [Image.fromarray(x[0].numpy()) for x in X]
    assert torch.equal(splits(Mapped(grey, Y), test=Mapped(grey, Y)).test.x, X[:, :1])
    palette = [
        pil(torch.full((3, 2, 2), 40 + n, dtype=torch.uint8)).convert("P", palette=1) for n in range(N)
    ]
    assert splits(Mapped(palette, Y), test=Mapped(palette, Y)).test.x[:, :, 0, 0].tolist() == [
        [40 + n] * 3 for n in range(N)
    ]


def test_what_is_read_is_a_copy() -> None:
    x = X.clone()
    found = splits((x, Y), test=(x, Y))
    x.zero_()
    assert torch.equal(found.test.x, X)


# --- labels ---


def test_rows_without_a_label_are_kept_without_one() -> None:
    labels = [None if n % 2 else n % 3 for n in range(N)]
    marked = torch.tensor([IGNORE if label is None else label for label in labels])
    for part in (Mapped(X, labels), list(pairs(X, labels)), (X, marked), [(X, labels)]):
        found = splits(part, valid=OTHER, test=OTHER)
        assert torch.equal(found.train.x, X) and torch.equal(found.train.y, marked)


def test_classes_are_named_by_the_caller_then_the_dataset_then_their_numbers() -> None:
    torchvisions = Mapped()
    torchvisions.classes = ["ant", "bee", "cow", "dog"]  # type: ignore[attr-defined]
    for part in (torchvisions, Subset(torchvisions, range(N)), DataLoader(torchvisions, batch_size=9)):
        assert splits(part, OTHER, OTHER).test.classes == ("ant", "bee", "cow", "dog")
    assert splits(torchvisions, OTHER, OTHER, classes="xyz").train.classes == ("x", "y", "z")
    assert splits((X, Y), OTHER, (X[:3], torch.tensor([4, 0, 1]))).train.classes == tuple("01234")


def test_a_set_without_a_label_needs_its_classes_named() -> None:
    blind = (X, torch.full((N,), IGNORE))
    with pytest.raises(Refused, match=r"No sample has a label, .* name them: `classes`"):
        splits(blind, blind, blind)
    assert splits(blind, blind, blind, classes="abc").train.classes == ("a", "b", "c")


# --- parts that nobody brought ---


def rows(part: Data) -> list[int]:
    return [next(n for n in range(N) if torch.equal(X[n], x)) for x in part.x]


def test_parts_that_are_missing_are_drawn_alike_from_every_class() -> None:
    found = splits((X, Y))
    assert [torch.bincount(part.y).tolist() for part in (found.train, found.valid, found.test)] == [
        [14] * 3,
        [2] * 3,
        [4] * 3,
    ]
    drawn = [rows(part) for part in (found.train, found.valid, found.test)]
    assert sorted(chain.from_iterable(drawn)) == list(range(N))
    assert (drawn[1], drawn[2][:4]) == ([7, 15, 28, 32, 39, 44], [10, 23, 25, 35])  # for years
    torch.manual_seed(5)
    again = splits(Mapped())
    assert [rows(part) for part in (again.train, again.valid, again.test)] == drawn
    same(again.train, found.train)
    assert (
        found.valid.mean
        == found.train.mean
        == Data(found.train.x, found.train.y, tuple("012"), 1 / 255).standardised().mean
    )


def test_only_the_missing_part_is_drawn() -> None:
    found = splits((X, Y), test=OTHER)
    assert torch.bincount(found.train.y).tolist() == [18] * 3 and torch.equal(found.test.x, OTHER[0])
    found = splits((X, Y), valid=OTHER)
    assert torch.bincount(found.train.y).tolist() == [16] * 3 and torch.equal(found.valid.x, OTHER[0])


def test_a_data_keeps_what_it_says_and_others_follow_it() -> None:
    mine = Data(X, Y, tuple("abc"), 0.5, 3.0, 2.0)
    found = splits(mine, test=Data(X[:3], Y[:3], tuple("abc"), 0.25))
    assert (found.train.scale, found.train.mean, found.train.std) == (0.5, 3.0, 2.0)
    assert (found.valid.scale, found.valid.classes) == (0.5, mine.classes) and found.test.scale == 0.25
    assert splits(mine, OTHER, OTHER).test.mean == 3.0
    with pytest.raises(Refused, match=r"a Data, which names its classes; leave `classes` out"):
        splits(mine, classes="abc")


# --- what a recipe's function gave ---


def test_a_recipes_function_may_give_any_of_these() -> None:
    whole, two, three = (splits((X, Y), *more) for more in ((), (None, OTHER), (OTHER, (X[:6], Y[:6]))))
    assert as_splits(whole) is whole
    for found, expected in (
        ((X, Y), whole),
        (Mapped(), whole),
        ([*pairs()], whole),
        ({"train": Mapped()}, whole),
        ((Mapped(), OTHER), two),
        (((X, Y), OTHER), two),
        ({"train": pairs(), "test": OTHER}, two),
        ((pairs(), OTHER, (X[:6], Y[:6])), three),
        (((X, Y), OTHER, (X[:6], Y[:6])), three),
        ({"train": (X, Y), "valid": OTHER, "test": (X[:6], Y[:6]), "classes": ["0", "1", "2"]}, three),
    ):
        given = as_splits(found)
        for part in ("train", "valid", "test"):
            same(getattr(given, part), getattr(expected, part))


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ((Mapped(),), r"a tuple of 1, expected \(train, test\) or \(train, valid, test\)"),
        ((Mapped(),) * 4, "a tuple of 4"),
        ({"x": X, "y": Y}, "a dict of x, y, expected `train` and any of"),
        ({"train": Mapped(), "tests": OTHER}, "a dict of train, tests"),
        ({}, "a dict of nothing"),
        (None, "no training data"),
        ((None, OTHER), "no training data"),
        (7, "The training data is a int, expected a Dataset"),
        ("digits", "The training data is a str"),
        ((Mapped(), 7), "The test data is a int"),
    ],
)
def test_what_is_no_data_is_refused(found: object, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        as_splits(found)


# --- samples that cannot be learned from ---


def one(x: Any = X[0], y: Any = 1) -> list[Any]:
    return [(X[0], 0), (X[1], 1), (x, y)]


class Broken(Mapped):
    def __getitem__(self, n: int) -> Any:
        if n == 4:
            raise OSError("no such file: 4.png")
        return super().__getitem__(n)


BAD: dict[str, tuple[Any, str]] = {
    "another shape": (one(X[0, :, :3]), r"Item 2 .* x of shape \(3, 3, 4\) .*, and item 0 shape \(3, 4, 4\)"),
    "another type": (one(X[0].float()), "Item 2 .* and type float32, and item 0 .* and type uint8"),
    "a name for a label": (
        one(y="cat"),
        "Item 2 of the training data has the label 'cat', expected a class n",
    ),
    "names for labels": (
        [(X[:2], ("cat", "dog"))],
        r"Item 0 .* has labels of shape \(2,\) and type <U3, expected",
    ),
    "a real label": (one(y=1.5), r"Item 2 .* has the label 1\.5, expected a class number"),
    "an odd label": (one(y={"id": 3}), "Item 2 .* has the label "),
    "labels like pixels": (
        one(y=torch.zeros(4, 4, dtype=torch.long)),
        r"Item 2 .* labels of shape \(4, 4\) and",
    ),
    "one hot": (
        Mapped(X, torch.eye(3, dtype=torch.long)[Y]),
        "Item 0 of the training data has 3 labels, expected one class number",
    ),
    "labels that are too few": ([(X[:5], Y[:4])], r"Item 0 .* x of shape \(5, 3, 4, 4\) and 4 label\(s\)"),
    "a dict": ([{"image": X[0], "label": 1}], r"Item 0 .* is a dict, expected a pair \(x, y\)"),
    "a triple": ([(X[0], 1, 7)], "Item 0 .* is a tuple, expected a pair"),
    "no labels at all": (X, r"Item 0 .* is shape \(3, 4, 4\) and type uint8, expected a pair"),
    "a path": (one("cat.png"), "Item 2 .* x of a str, expected a tensor or array of real numbers"),
    "text in an array": (one(np.array(["a"])), "Item 2 .* x of .*, expected a tensor or array of real"),
    "complex numbers": (one(torch.zeros(3, 4, 4, dtype=torch.cfloat)), "Item 2 .* type complex64, expected"),
    "a number": ([(0.5, 1)], "Item 0 .* x of a float"),
    "nothing": ([], "The training data is empty, expected at least one sample"),
    "an empty Dataset": (Mapped(X[:0], Y[:0]), "The training data is empty"),
    "empty batches": ([(X[:0], Y[:0])], "The training data is empty"),
    "channels last": ([(x.permute(1, 2, 0).repeat(2, 2, 1), 0) for x in X], r"shape \(8, 8, 3\).*permute it"),
    "no channel": (
        Mapped(X[:, 0], Y),
        r"Item 0 .* image of shape \(4, 4\), expected \(channels, .* x\[None\]",
    ),
    "a file that is gone": (
        Broken(),
        r"Item 4 of the training data cannot be read: OSError: no such file: 4",
    ),
    "a worker's failure": (
        DataLoader(Broken(), batch_size=3, num_workers=0),
        "Item 1 of the training data cannot be read: OSError",
    ),
    "not a number": (
        one(torch.full((3, 4, 4), float("nan")))[2:],
        "NaN or infinite values in 1 of 1 samples",
    ),
    "a negative label": (one(y=-1), "Label -1 of sample 2"),
    "a DataLoader that shuffles": (DataLoader(Mapped(), shuffle=True), "training data shuffles, .*`dataset`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_learned_from_is_refused_by_its_place(case: str) -> None:
    part, sentence = BAD[case]
    with pytest.raises(Refused, match=sentence) as refusal:
        splits(part, OTHER, OTHER)
    assert "\n" not in str(refusal.value)


def test_a_sentence_of_many_lines_becomes_its_last() -> None:
    def told() -> Iterator[Any]:
        yield X[0], 0
        raise ValueError("in worker 0\nTraceback: long\nno file 7")

    with pytest.raises(Refused, match=r"Item 1 .* cannot be read: ValueError: no file 7") as refusal:
        splits(told(), OTHER, OTHER)
    assert "\n" not in str(refusal.value) and isinstance(refusal.value.__cause__, ValueError)


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(Refused, match="The test data is float32 and the training data uint8"):
        splits((X, Y), OTHER, (X.float(), Y))
    with pytest.raises(
        Refused, match=r"sample of the validation data has shape \(1, 4, 4\), expected \(3, 4, 4\)"
    ):
        splits((X, Y), (X[:, :1], Y), OTHER)
    with pytest.raises(Refused, match="Label 5 of sample 1 is outside the 3 classes"):
        splits((X, Y), OTHER, (X[:2], torch.tensor([0, 5])), classes="abc")
    with pytest.raises(Refused, match=r"A validation split of 0\.1 takes 0 of 9 samples, fewer than"):
        splits(OTHER, test=OTHER)


def test_it_is_no_data_set_by_name() -> None:
    assert "outside" not in registry.names("data") and isinstance(splits((X, Y)), Splits)
