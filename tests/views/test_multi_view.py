"""Multi-view generation: half of the images go through one operation each, fixed by their number."""

import pytest
import torch
from torch import Tensor

from limbeck import Batch, Lesson, Refused, registry
from limbeck.views.multi_view import multi_view

OPS = ("colour", "crop", "rotate", "mask")


def batch(index: list[int], channels: int = 1, epoch: int = 0, size: int = 28) -> Batch:
    """Smooth bright images, so that every operation shows."""
    rows = torch.tensor(index)
    place = torch.arange(size)
    x = (60 + 2 * place[:, None] + 3 * place)[None, None] + (7 * rows % 40)[:, None, None, None]
    return Batch(x.expand(-1, channels, -1, -1).byte(), rows % 10, rows, Lesson(epoch=epoch))


def changed(plain: Batch, shown: Batch) -> Tensor:
    return (plain.x != shown.x).flatten(1).any(1)


def test_half_of_the_images_are_changed_and_the_others_not_at_all() -> None:
    plain = batch(list(range(1000)))
    shown = multi_view(plain)
    assert changed(plain, shown).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert shown.x.dtype == torch.uint8 and shown.y is plain.y and shown.index is plain.index
    assert torch.equal(plain.x, batch(list(range(1000))).x), "the batch itself is as it was"


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_chance_is_the_share_that_is_changed(chance: float) -> None:
    plain = batch(list(range(64)))
    assert changed(plain, multi_view(plain, chance=chance, ops=("mask",))).double().mean() == chance


def test_each_operation_is_as_likely_and_does_what_it_is_called() -> None:
    plain = batch(list(range(800)))
    alone = {name: multi_view(plain, chance=1.0, ops=(name,)).x for name in OPS}
    shown = multi_view(plain, chance=1.0)
    took = {name: (shown.x == x).flatten(1).all(1) for name, x in alone.items() if name != "rotate"}
    for name, rows in took.items():
        assert rows.double().mean().item() == pytest.approx(0.25, abs=0.06), name
    masked, cropped, coloured = (alone[name] for name in ("mask", "crop", "colour"))
    assert ((masked == 0).sum((1, 2, 3)) == 12 * 16).all() and ((masked == plain.x) | (masked == 0)).all()
    assert (cropped[:, :, 4:24, 4:24] > 0).all() and (cropped == 0).flatten(1).any(1).double().mean() > 0.9
    order = coloured.flatten(1).int().diff(dim=1) * plain.x.flatten(1).int().diff(dim=1)
    assert (order >= 0).all(), "colours of a grey image change its levels, not their order"


def test_a_rotation_is_small_about_the_centre_and_leaves_black_corners() -> None:
    rows = list(range(200))
    plain = batch(rows)
    turned = multi_view(plain, chance=1.0, ops=("rotate",), degrees=15.0).x
    assert (turned[:, :, 13:15, 13:15].int() - plain.x[:, :, 13:15, 13:15].int()).abs().max() <= 5
    corners = turned[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).double().mean() > 0.8 and not (turned == 128).all((1, 2, 3)).any()
    assert torch.equal(multi_view(plain, chance=1.0, ops=("rotate",), degrees=0.0).x, plain.x)
    # A straight line from the centre ends up at the angle that it was turned by.
    line = Batch(torch.zeros(200, 1, 57, 57, dtype=torch.uint8), None, torch.tensor(rows))
    line.x[:, :, 28, 28:] = 255
    seen = multi_view(line, chance=1.0, ops=("rotate",), degrees=15.0).x[:, 0, :, 48]
    slope = (seen.double().argmax(1) - 28).double() / 20
    angle = slope.atan().rad2deg()
    assert angle.abs().max() <= 17 and angle.min() < -10 and angle.max() > 10 and angle.mean().abs() < 3


def test_a_sample_has_its_own_draw_wherever_it_stands() -> None:
    def show(index: list[int], epoch: int = 0, purpose: str = "multi_view") -> Tensor:
        return multi_view(batch(index, 3, epoch), chance=1.0, purpose=purpose).x

    a, b = show([5, 8, 6, 7]), show([7, 6, 5])
    assert torch.equal(a[[0, 2, 3]], b.flip(0)[[0, 1, 2]])
    for other in (show([5, 8, 6, 7], epoch=1), show([5, 8, 6, 7], purpose="teacher")):
        assert not torch.equal(other, a)


@pytest.mark.parametrize(
    ("plain", "knobs", "words"),
    [
        (Batch(torch.zeros(2, 1, 8, 8), None, torch.arange(2)), {}, "torch.float32; use it in `augment`"),
        (batch([0], 2), {}, "x has 2 of torch.uint8"),
        (batch([0]), {"ops": ("flip",)}, "has 'flip'; expected some of colour, crop, rotate, mask"),
        (batch([0]), {"ops": ()}, "has nothing"),
        (batch([0]), {"chance": 1.5}, "chance = 1.5"),
        (batch([0]), {"degrees": -1.0}, "degrees = -1.0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(plain: Batch, knobs: dict[str, object], words: str) -> None:
    with pytest.raises(Refused, match=words):
        multi_view(plain, **knobs)  # type: ignore[arg-type]


def test_a_recipe_finds_it() -> None:
    assert registry.find("view", "multi_view") is multi_view
