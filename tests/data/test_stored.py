"""A lesson under stored answers is the lesson under the live teacher; what a store cannot do it refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen, Teacher
from limbeck.data.loader import Data, Loader
from limbeck.data.store import Store
from limbeck.data.store_write import write
from limbeck.data.stored import Stored
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.views.crop import crop
from limbeck.views.flip import flip

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 5))


def data() -> Data:
    draw = torch.Generator().manual_seed(7)
    x = torch.randint(0, 256, (50, 2, 8, 8), dtype=torch.uint8, generator=draw)
    return Data(x, torch.arange(50) % 5, CLASSES, 1 / 255, 0.5, 0.3)


def loader(seed: int = 3, epochs: int = 2, batch: int = 8) -> Loader:
    return Loader(data(), batch, seed=seed, epochs=epochs, augment=(crop, flip))


def teacher() -> Frozen:
    return Frozen(net(0), taps={"stage2": "0"})


def store(folder: Path, kind: str = "float32", tap: str = "float32", epochs: int = 2) -> Path:
    for _ in write(folder, teacher(), loader(), range(epochs), kind=kind, top=4, taps={"stage2": tap}):
        pass
    return folder


def losses(under: Teacher, lessons: Loader) -> list[float]:
    """A student's losses, step by step."""
    student = net(1)
    methods: list[Method] = [KD(), FitNet()]
    distiller = Distiller(student, under, methods, example=lessons.at(0), taps={"stage2": "0"})
    assert distiller.how() == "channels_last"  # a live teacher's maps then lie otherwise than stored ones
    optimiser = torch.optim.SGD(distiller.parameters(), 0.05)
    found = []
    for epoch in range(lessons.epochs):
        for batch in lessons.epoch(epoch):
            loss = distiller(batch)["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(float(loss.detach()))
    return found


def test_the_losses_are_the_live_teachers_bit_for_bit(tmp_path: Path) -> None:
    live, replayed = losses(teacher(), loader()), losses(Stored(store(tmp_path)), loader())
    assert replayed == live and len(live) == 12


@pytest.mark.parametrize(("kind", "tap"), [("float16", "float16"), ("float16", "int8")])
def test_in_half_precision_they_are_so_within_its_rounding(tmp_path: Path, kind: str, tap: str) -> None:
    live, replayed = losses(teacher(), loader()), losses(Stored(store(tmp_path, kind, tap)), loader())
    assert replayed != live and replayed == pytest.approx(live, rel=2e-3)


def test_a_kept_top_is_the_lesson_of_its_target(tmp_path: Path) -> None:
    folder = store(tmp_path, "top")
    batch = loader().at(7)
    stored = Stored(folder)
    assert torch.equal(stored(batch).out, Store(folder).read(1, batch.index)["out"])
    assert stored(batch).at == {} and stored(batch).model is None


def test_a_resumed_lesson_may_begin_anywhere(tmp_path: Path) -> None:
    stored, live = Stored(store(tmp_path)), teacher()
    live.look(["stage2"])  # as when it was stored: how a teacher is computed may depend on where it is tapped
    for batch in loader().epoch(1, start=3):
        assert torch.equal(stored(batch).out, live(batch).out)


def test_stored_epochs_are_reused_in_turn(tmp_path: Path) -> None:
    folder = store(tmp_path)
    stored = Stored(folder, epochs="cycle")
    lessons = loader(seed=9, epochs=5)
    stored.check(lessons.at(0))
    for epoch in range(5):
        batch = next(lessons.epoch(epoch))
        assert torch.equal(stored(batch).out, Store(folder).read(epoch % 2, batch.index)["out"])


# --- what is refused ---


def test_another_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"seed is 4, and .* was written for 3"):
        Stored(store(tmp_path)).check(loader(seed=4).at(0))


def test_a_lesson_longer_than_the_store_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"has 3 epochs, and .* holds 0 to 1: write epoch 2"):
        Stored(store(tmp_path)).check(loader(epochs=3).at(0))


def test_an_epoch_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no answers for epoch 2; it holds 0 to 1"):
        Stored(store(tmp_path))(loader(epochs=3).at(12))


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    fewer = Data(data().x[:40], data().y[:40], CLASSES, 1 / 255, 0.5, 0.3)
    with pytest.raises(Refused, match=r"number of samples is 40, and .* written for 50"):
        Stored(store(tmp_path)).check(Loader(fewer, 8, seed=3, epochs=2).at(0))


@pytest.mark.parametrize("step", [0, 6])
def test_another_view_is_refused_in_every_epoch(tmp_path: Path, step: int) -> None:
    plain = Loader(data(), 8, seed=3, epochs=2, augment=(crop,))
    with pytest.raises(Refused, match=f"shows other views of the samples in epoch {step // 6}"):
        Stored(store(tmp_path))(plain.at(step))


def test_another_batch_size_is_the_same_view(tmp_path: Path) -> None:
    Stored(store(tmp_path)).check(loader(batch=16).at(0))


def test_a_batch_without_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the batch has no `index`"):
        Stored(store(tmp_path))(Batch(torch.zeros(2, 1, 8, 8)))


def test_a_tap_it_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    stored = Stored(store(tmp_path))
    stored.look(["stage2"])
    with pytest.raises(Refused, match=r"does not hold tap 'stage3' of the teacher; it holds stage2"):
        stored.look(["stage3"])


def test_no_gradient_passes(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="stored, so no gradient"):
        Stored(store(tmp_path)).through(torch.zeros(1, 1, 8, 8))


class NeedsIt(Method):
    card = Card("arXiv:0", 2000, ("response",), needs=frozenset({"teacher_gradient"}))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> torch.Tensor:
        return s.out.sum()


def test_a_method_that_needs_the_live_teacher_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        Refused, match="Method 'needsit' needs teacher_gradient, which a Stored teacher cannot"
    ):
        Distiller(net(1), Stored(store(tmp_path)), NeedsIt(), example=loader().at(0))


def test_other_words_than_exact_and_cycle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="epochs are 'some', expected 'exact' or 'cycle'"):
        Stored(store(tmp_path), epochs="some")


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    steps = write(tmp_path, teacher(), loader(), range(2))
    next(steps)
    steps.close()
    with pytest.raises(Refused, match="holds no finished epoch"):
        Stored(tmp_path)


def test_tokens_keep_their_mask(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = loader().at(0)
    words = batch.replace(x={"ids": torch.zeros(2, 3), "attention_mask": mask}, index=batch.index[:2])
    seen = Stored(store(tmp_path), epochs="cycle")(words)
    assert torch.equal(seen.mask, mask.bool()) and seen.out.shape == (2, 5)
