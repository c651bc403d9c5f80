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


def test_it_runs_and_prints_both_rates(capsys: pytest.CaptureFixture[str]) -> None:
    assert augment.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["crop,", "flip,", "normalise"] and "by Pillow" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(augment.OTHERS)
