"""Normal noise: fixed by (seed, epoch, index, purpose), and normal."""

import pytest
import torch

from limbeck import Batch, Lesson, Refused, registry
from limbeck.views.noise import noise


def batch(index: list[int], epoch: int = 0, seed: int = 0) -> Batch:
    rows = torch.tensor(index)
    x = rows.view(-1, 1, 1, 1).expand(-1, 2, 3, 4).float()
    return Batch(x, rows % 2, rows, Lesson(seed=seed, epoch=epoch))


def test_it_adds_normal_noise_of_its_spread() -> None:
    plain = batch(list(range(2000)))
    shown = noise(plain, sd=0.3)
    added = (shown.x - plain.x).double() / 0.3
    assert added.mean().abs() < 0.02 and added.std().item() == pytest.approx(1, abs=0.02)
    assert (added.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.01)
    assert added.isfinite().all() and added.abs().max() < 6
    flat = added.flatten(1)
    assert (torch.corrcoef(flat.T) - torch.eye(24)).abs().max() < 0.1  # every number its own


def test_without_spread_it_is_the_batch() -> None:
    assert torch.equal(noise(batch([3, 1]), sd=0.0).x, batch([3, 1]).x)


def test_a_sample_has_its_own_draw_wherever_it_stands() -> None:
    a, b = noise(batch([5, 8, 6])), noise(batch([6, 5]))
    assert torch.equal(a.x[0], b.x[1]) and torch.equal(a.x[2], b.x[0])
    assert torch.equal(noise(batch([5, 8, 6])).x, a.x)
    for other in (batch([5, 8, 6], epoch=1), batch([5, 8, 6], seed=1)):
        assert not torch.isclose(noise(other).x, a.x).any(1).all()


def test_a_purpose_is_a_draw() -> None:
    a, b = noise(batch([5, 8]), purpose="student"), noise(batch([5, 8]), purpose="teacher")
    assert not torch.equal(a.x, b.x)
    assert torch.equal(noise(batch([5, 8]), purpose="student").x, a.x)


def test_labels_and_the_rest_stay() -> None:
    plain = batch([5, 8])
    shown = noise(plain)
    assert shown.y is plain.y and shown.index is plain.index and shown.lesson is plain.lesson
    assert noise(plain.replace(x=plain.x.double())).x.dtype == torch.float64


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Batch(torch.zeros(2, 1, dtype=torch.uint8), index=torch.arange(2)), r"x is torch.uint8.*`augment`"),
        (Batch({"x": torch.zeros(2, 1)}, index=torch.arange(2)), "x is a dict"),
        (Batch(torch.zeros(2, 1)), "has no `index`"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(bad: Batch, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        noise(bad)
    assert "\n" not in str(caught.value)


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "noise") is noise
