"""RandAugment: every operation as Pillow does it for one image; fair draws; the same in any batch."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.keyed import keyed
from limbeck.views.randaugment import OPS, PAPER, randaugment

ENHANCE = {"brightness": "Brightness", "contrast": "Contrast", "colour": "Color", "sharpness": "Sharpness"}
STEADY = ("identity", "autocontrast", "equalize", "invert")  # without magnitude
LEVELS = (0.9, -0.9, 0.4, -1.0, 1.4, -0.13, 0.0)


def images(n: int, channels: int, h: int, w: int, low: int = 0, high: int = 256) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (n, channels, h, w), generator=draw, dtype=torch.uint8)


def batch(n: int, channels: int = 3) -> Batch:
    return Batch(images(n, channels, 12, 9), torch.arange(n), torch.arange(n) * 3, Lesson(seed=2, epoch=5))


def one(name: str, x: Tensor, m: float) -> Tensor:
    """An operation on one image, by Pillow."""
    array = x.permute(1, 2, 0).numpy()
    image = Image.fromarray(array if len(x) == 3 else array[:, :, 0])
    outside = (128,) * 3 if len(x) == 3 else 128
    w, h = image.size
    affine = {
        "shear_x": (1, 0.3 * m, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * m, 1, 0),
        "translate_x": (1, 0, 150 / 331 * w * m, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 150 / 331 * h * m),
    }
    if name in affine:
        done = image.transform(image.size, Image.Transform.AFFINE, affine[name], fillcolor=outside)
    elif name in ENHANCE:
        done = getattr(ImageEnhance, ENHANCE[name])(image).enhance(max(0.0, 1 + 0.9 * m))
    elif name == "rotate":
        done = image.rotate(30 * m, fillcolor=outside)
    elif name == "solarize":
        done = ImageOps.solarize(image, 256 - int(256 * abs(m)))
    elif name == "posterize":
        done = ImageOps.posterize(image, 8 - round(4 * abs(m)))
    elif name == "solarize_add":
        done = image.point(lambda v: min(v + int(110 * abs(m)), 255) if v < 128 else v)
    elif name == "identity":
        done = image
    else:
        done = getattr(ImageOps, name)(image)
    found = torch.from_numpy(np.array(done))
    return found.permute(2, 0, 1) if found.ndim == 3 else found[None]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 17, 23), (1, 28, 28), (3, 2, 5), (1, 1, 1)], ids=str)
def test_an_operation_is_pillows(name: str, shape: tuple[int, int, int]) -> None:
    for low, high in ((0, 256), (60, 180), (90, 91)):
        x = images(len(LEVELS), *shape, low, high)
        shown = OPS[name](x, torch.tensor(LEVELS, dtype=torch.float64))
        assert shown.dtype == torch.uint8 and shown.shape == x.shape
        assert torch.equal(shown, torch.stack([one(name, *row) for row in zip(x, LEVELS, strict=True)]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "magnitude", "chance"), [(2, 9.0, 1.0), (3, 4.5, 0.6)])
def test_it_is_the_slow_way(channels: int, n: int, magnitude: float, chance: float) -> None:
    given = batch(60, channels)
    expected = []
    for x, draws in zip(
        given.x, keyed(given.lesson, given.index, "randaugment", 3 * n).tolist(), strict=True
    ):
        for drawn, side, applied in (draws[3 * k : 3 * k + 3] for k in range(n)):
            if applied < chance:
                x = one(PAPER[int(drawn * 14)], x, magnitude / 10 * (-1 if side < 0.5 else 1))
        expected.append(x)
    assert torch.equal(randaugment(given, n, magnitude, chance=chance).x, torch.stack(expected))


def test_a_sample_changes_alike_in_any_batch_and_anew_in_every_epoch_seed_and_purpose() -> None:
    given = batch(60)
    knobs = {"ops": list(OPS), "sd": 0.5}
    whole = randaugment(given, **knobs).x
    for some in ([31, 2, 2, 17], [5], list(range(59, 0, -2))):
        assert torch.equal(randaugment(given.map(lambda v, some=some: v[some]), **knobs).x, whole[some])
    for lesson in (Lesson(seed=1, epoch=5), Lesson(seed=2, epoch=4)):
        assert not torch.equal(randaugment(given.replace(lesson=lesson), **knobs).x, whole)
    assert not torch.equal(randaugment(given, purpose="another", **knobs).x, whole)


def test_operations_sides_and_chances_are_drawn_fairly() -> None:
    n = 12_000
    dot = torch.zeros(n, 1, 7, 7, dtype=torch.uint8)
    dot[:, :, 3, 3] = 255  # moves by one pixel, one way or the other, along one of two axes, or stays
    given = Batch(dot, index=torch.arange(n))
    ops = ["translate_x", "translate_y", "identity"]
    at = randaugment(given, 1, 331 / 150 / 7 * 10, ops, chance=0.5).x.eq(255).flatten(1).long().argmax(1)
    counts = torch.bincount(at, minlength=49)[[23, 25, 17, 31, 24]]
    assert counts.sum() == n
    for found, share in zip(counts.tolist(), (1 / 12, 1 / 12, 1 / 12, 1 / 12, 2 / 3), strict=True):
        assert found == pytest.approx(share * n, abs=4.5 * (share * (1 - share) * n) ** 0.5)


def test_a_magnitude_is_drawn_about_its_mean() -> None:
    n = 8000
    given = Batch(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), index=torch.arange(n))
    level = randaugment(given, 1, 5, ["solarize_add"], sd=1.0).x.flatten().float() / 11
    assert level.mean().item() == pytest.approx(5, abs=0.1) and level.std().item() == pytest.approx(
        1, abs=0.05
    )
    none = randaugment(given, 1, 0, ["solarize_add"], sd=1.0).x.flatten()
    assert (none == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # below 0 is 0


def test_at_zero_it_is_the_batch() -> None:
    given = batch(40)
    moving = [name for name in OPS if name not in STEADY]
    for still in (randaugment(given, 3, 0, moving), randaugment(given, n=0), randaugment(given, chance=0)):
        assert torch.equal(still.x, given.x)
    assert not torch.equal(randaugment(given, 3, 9, moving).x, given.x)


def test_beyond_ten_everything_still_means_something() -> None:
    given = batch(80)
    shown = [randaugment(given, 1, 30, [name]).x for name in OPS]
    assert all(x.shape == given.x.shape and x.dtype == torch.uint8 for x in shown)
    assert torch.equal(randaugment(given, 1, 30, ["solarize"]).x, 255 - given.x)
    assert set(randaugment(given, 1, 30, ["posterize"]).x.unique().tolist()) == {0, 128}


def test_only_x_changes() -> None:
    given = batch(4)
    kept = given.x.clone()
    shown = randaugment(given)
    assert shown.y is given.y and shown.index is given.index and shown.lesson is given.lesson
    assert torch.equal(given.x, kept)


@pytest.mark.parametrize(
    ("x", "knobs", "found"),
    [
        (torch.zeros(2, 16), {}, r"shape \(2, 16\)"),
        (torch.zeros(2, 3, 4, 4), {}, "3 of torch.float32; use it in `augment`"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.uint8), {}, "4 of torch.uint8"),
        (images(2, 3, 4, 4), {"ops": ["rotate", "sheer"]}, "has 'sheer'; expected some of identity, "),
        (images(2, 3, 4, 4), {"ops": []}, "has nothing; expected"),
        (images(2, 3, 4, 4), {"magnitude": 31}, "magnitude = 31.*expected"),
        (images(2, 3, 4, 4), {"sd": -1.0}, "sd = -1.0.*expected"),
        (images(2, 3, 4, 4), {"n": -1}, "n = -1.*expected"),
        (images(2, 3, 4, 4), {"chance": 1.5}, "chance = 1.5.*expected"),
    ],
)
def test_what_cannot_be_is_refused(x: Tensor, knobs: dict[str, object], found: str) -> None:
    with pytest.raises(Refused, match=f"RandAugment .*{found}") as caught:
        randaugment(Batch(x, index=torch.arange(2)), **knobs)
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "randaugment") is randaugment
