"""The benchmark of augmentation cannot rot: both sides come to the same numbers, or it says so."""

import pytest
import torch

from benchmarks import augment
from limbeck.data.loader import Loader
from limbeck.views.crop import crop
from limbeck.views.flip import flip


def test_both_sides_come_to_the_same_numbers() -> None:
    pixels = augment.data(12)
    augment.agree(Loader(pixels, 12, seed=0, augment=(crop, flip)), augment.ByPillow(pixels))


@pytest.mark.parametrize("spoilt", [(crop,), (flip,)])
def test_a_side_that_differs_is_noticed(spoilt: tuple[object, ...]) -> None:
    pixels = augment.data(12)
    with pytest.raises(AssertionError, match="not close"):
        augment.agree(Loader(pixels, 12, seed=0, augment=spoilt), augment.ByPillow(pixels))


def test_pillow_shows_every_place_and_side() -> None:
    pixels, draws = augment.ByPillow(augment.data(1)), torch.random.get_rng_state()
    torch.manual_seed(0)
    shown = {pixels[0][0].numpy().tobytes() for _ in range(500)}
    torch.random.set_rng_state(draws)
    assert len(shown) > 140  # of 162 cuts


def test_it_runs_and_prints_each_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert augment.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["crop,", "flip,", "normalise"] and lines[1].startswith("by Pillow")
    told = [line.split()[0] for line in lines]
    assert [name for name in told if name in augment.OTHERS] == list(augment.OTHERS)


def test_somebody_s_transforms_are_shown_a_pillow_image() -> None:
    pixels = augment.data(3)
    whole = augment.ByTransforms(pixels, lambda image: torch.tensor(image.getpixel((5, 7))))
    assert whole[2][0].tolist() == pixels.x[2, :, 7, 5].tolist() and whole[2][1] == pixels.y[2]


@pytest.mark.parametrize(
    ("rates", "code"), [((130_000, 2_000), 0), ((110_000, 2_000), 1), ((130_000, 4_000), 1)]
)
def test_both_bounds_count(rates: tuple[int, int], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "measure", lambda *_: {"limbeck": rates[0], "Pillow": 1, "v2": rates[1]})
    monkeypatch.setattr(augment, "cost", lambda *_: 1.0)
    assert augment.main([]) == code
