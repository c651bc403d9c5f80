"""Colour: pixel by pixel with the standard library's HSV, in the drawn order; the same in any batch."""

import colorsys

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.core.keyed import keyed
from limbeck.views.colour import colour

STILL = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "chance": 1.0, "grey": 0.0}


def batch(n: int = 6, size: tuple[int, int] = (4, 3), channels: int = 3) -> Batch:
    x = torch.randint(
        256, (n, channels, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return Batch(x, torch.arange(n) % 3, torch.arange(n) * 5, Lesson(seed=3, epoch=2))


def luma(p: list[float]) -> float:
    return 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]


def clipped(p: list[float]) -> list[float]:
    return [min(max(v, 0.0), 1.0) for v in p]


def slow(given: Batch, strength: list[float], chance: float, grey: float) -> Tensor:
    """Image by image, change by change, pixel by pixel."""
    shown = []
    for n, draw in enumerate(keyed(given.lesson, given.index, "colour", 10).tolist()):
        pixels = [[v / 255 for v in p] for p in given.x[n].flatten(1).T.tolist()]
        for kind in sorted(range(4), key=lambda k: draw[k]) if draw[8] < chance else ():
            swing = strength[kind] * (2 * draw[4 + kind] - 1)
            f, mean = max(0.0, 1 + swing), sum(map(luma, pixels)) / len(pixels)
            if kind == 0:
                pixels = [clipped([f * v for v in p]) for p in pixels]
            elif kind == 1:
                pixels = [clipped([mean + f * (v - mean) for v in p]) for p in pixels]
            elif kind == 2:
                pixels = [clipped([luma(p) + f * (v - luma(p)) for v in p]) for p in pixels]
            else:
                hsv = [colorsys.rgb_to_hsv(*p) for p in pixels]
                pixels = [list(colorsys.hsv_to_rgb((h + swing) % 1, s, v)) for h, s, v in hsv]
        if draw[9] < grey:
            pixels = [[luma(p)] * 3 for p in pixels]
        shown.append(torch.tensor(pixels).T.reshape(given.x[n].shape))
    return torch.stack(shown)


@pytest.mark.parametrize(
    "strength", [[0.4, 0.4, 0.4, 0.1], [0.9, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0.5]], ids=str
)
@pytest.mark.parametrize(("chance", "grey"), [(1.0, 0.0), (0.6, 0.4)])
def test_it_is_the_slow_way(strength: list[float], chance: float, grey: float) -> None:
    given = batch(12)
    given.x[0, :, 0] = 77  # some greys, which have no hue
    expected = slow(given, strength, chance, grey)
    whole = colour(given, *strength, chance, grey)
    real = colour(given.replace(x=given.x / 255), *strength, chance, grey)
    torch.testing.assert_close(real.x, expected, rtol=0, atol=2e-6)
    assert whole.x.dtype == torch.uint8 and not torch.equal(whole.x, given.x)
    assert (whole.x - expected * 255).abs().max() < 0.51


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_sample_changes_alike_in_any_batch_and_anew_in_every_epoch_seed_and_purpose(kind: str) -> None:
    given = batch(40, (9, 7))
    given = given if kind == "uint8" else given.replace(x=given.x / 255)
    whole = colour(given).x
    for some in ([31, 2, 2, 17], [5], list(range(39, 0, -2))):
        assert torch.equal(colour(given.map(lambda v, some=some: v[some])).x, whole[some])
    for lesson in (Lesson(seed=1, epoch=2), Lesson(seed=3, epoch=1)):
        assert not torch.equal(colour(given.replace(lesson=lesson)).x, whole)
    assert not torch.equal(colour(given, purpose="another").x, whole)


def test_factors_are_uniform() -> None:
    n = 20_000
    given = Batch(torch.full((n, 1, 1, 1), 0.5), index=torch.arange(n))
    f = colour(given, **{**STILL, "brightness": 0.5}).x.flatten() * 2
    assert f.min() >= 0.5 and f.max() <= 1.5
    counts = torch.histc(f, 20, 0.5, 1.5)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 50  # chi squared of 19 degrees: 99.99 % lie below


def test_chances_are_shares_of_the_images() -> None:
    n = 10_000
    x = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(n, -1, -1, -1)
    given = Batch(x, index=torch.arange(n))
    grey = colour(given, **{**STILL, "grey": 0.3}).x.flatten(1)
    assert (grey == 124).all(1).float().mean().item() == pytest.approx(0.3, abs=0.02)
    bright = colour(given, **{**STILL, "brightness": 0.5, "chance": 0.7}).x
    assert (bright != x).flatten(1).any(1).float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_without_strength_it_is_the_batch_and_only_x_changes() -> None:
    given = batch()
    kept = given.x.clone()
    for x in (given.x, given.x / 255):
        assert torch.equal(colour(given.replace(x=x), **STILL).x, x)
    shown = colour(given)
    assert shown.y is given.y and shown.index is given.index and shown.lesson is given.lesson
    assert torch.equal(given.x, kept)


def test_one_channel_has_only_brightness_and_contrast() -> None:
    given = batch(channels=1)
    assert torch.equal(colour(given, 0, 0, 0.9, 0.5, 1.0, 1.0).x, given.x)
    assert not torch.equal(colour(given, 0.9, 0, 0, 0, 1.0).x, given.x)


@pytest.mark.parametrize(
    ("x", "knobs", "found"),
    [
        (torch.zeros(2, 16), {}, r"shape \(2, 16\)"),
        (torch.zeros(2, 4, 3, 3), {}, "4 channels of torch.float32"),
        (torch.zeros(2, 3, 3, 3).long(), {}, "3 channels of torch.int64"),
        (torch.full((2, 3, 3, 3), -1.5), {}, "from -1.5 to -1.5; use it in `augment`"),
        (torch.full((2, 3, 3, 3), 1.5), {}, "from 1.5 to 1.5; use it in `augment`"),
        (torch.zeros(2, 3, 3, 3), {"contrast": -0.1}, "strengths are 0.4, -0.1.*expected"),
        (torch.zeros(2, 3, 3, 3), {"hue": 0.6}, "strengths are .*0.6.*expected"),
        (torch.zeros(2, 3, 3, 3), {"grey": 1.1}, "chances 0.8, 1.1; expected"),
    ],
)
def test_what_cannot_be_is_refused(x: Tensor, knobs: dict[str, float], found: str) -> None:
    with pytest.raises(Refused, match=f"Colour.*{found}") as caught:
        colour(Batch(x, index=torch.arange(2)), **knobs)
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "colour") is colour
