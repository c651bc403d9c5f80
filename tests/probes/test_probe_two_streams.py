"""Probe: a lesson over two streams of unequal length, one unlabelled (a mean teacher adapts)."""

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import Batch, MeanOf, Scheme, Teacher, checkpoint
from limbeck.core.batch import IGNORE
from limbeck.core.keyed import keyed
from limbeck.core.scheme import Turn
from limbeck.core.taps import Tapped
from limbeck.core.task import labelled_cross_entropy
from limbeck.data.loader import Data, Loader, Streams
from limbeck.engine import Engine, Pace
from limbeck.models.cnn import CNN

SOURCE, TARGET, ROWS, EPOCHS = 28, 12, 4, 8
"""7 steps an epoch, and 3 a pass of the target, so that passes straddle epochs."""


def noisy(batch: Batch, purpose: str = "noise") -> Batch:
    assert batch.index is not None
    draws = keyed(batch.lesson, batch.index, purpose, batch.x[0].numel())
    return batch.replace(x=batch.x + 0.2 * (draws.view_as(batch.x) - 0.5))


class Adapt(Scheme):
    """On the source labels teach; on the target the student's running mean, each under its own noise."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.tapped = Tapped(student)
        self.mean = MeanOf(student, decay=0.8, view=partial(noisy, purpose="the mean's noise"))

    def turns(self, batch: Mapping[str, Batch]) -> Iterator[Turn]:
        source, target = batch["source"], batch["target"]
        here, there = self.tapped(noisy(target).x).out, self.mean(target).out
        yield (
            "student",
            {
                "task": labelled_cross_entropy(self.tapped(source.x), source),
                "consistency": F.mse_loss(here.softmax(1), there.softmax(1)),
            },
        )

    def players(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {"student": dict(self.student.named_parameters())}

    def shipped(self) -> nn.Module:
        return self.mean.model

    def modules(self) -> Mapping[str, nn.Module]:
        return {"student": self.student}

    def teachers(self) -> tuple[Teacher, ...]:
        return (self.mean,)


def data(rows: int, shift: float, labelled: bool) -> Data:
    y = torch.arange(rows) % 3
    noise = torch.randn(rows, 1, 6, 6, generator=torch.Generator().manual_seed(rows))
    x = shift + y[:, None, None, None] + 0.5 * noise
    return Data(x, y if labelled else torch.full_like(y, IGNORE), ("a", "b", "c"))


def streams(target: int = TARGET) -> Streams:
    parts = {"source": data(SOURCE, 5.0, True), "target": data(target, 6.0, False)}
    return Streams({name: Loader(part, ROWS, seed=3, epochs=EPOCHS) for name, part in parts.items()})


def engine(seed: int = 0) -> tuple[Engine, Adapt]:
    torch.manual_seed(seed)
    scheme = Adapt(CNN(3, widths=(4, 8)))
    optimiser = torch.optim.SGD(scheme.student.parameters(), lr=0.1, momentum=0.9)
    pace = Pace(optimiser, lambda step: 1 - step / 60)
    return Engine(scheme, streams(), {"student": pace}, epochs=EPOCHS), scheme


def rows(batches: list[Batch]) -> list[int]:
    return torch.cat([b.index for b in batches if b.index is not None]).tolist()


def drawn(epochs: int, target: int = TARGET) -> dict[str, list[Batch]]:
    both = [batch for epoch in range(epochs) for batch in streams(target).epoch(epoch)]
    return {name: [batch[name] for batch in both] for name in ("source", "target")}


def test_the_longest_stream_is_the_epoch_and_shows_every_row_once() -> None:
    assert streams().steps == 7
    both = drawn(2)
    source = both["source"]
    first, second = rows(source[:7]), rows(source[7:])
    assert sorted(first) == sorted(second) == list(range(SOURCE))
    assert first != second
    for stream in both.values():  # one clock for both
        assert [(b.lesson.epoch, b.lesson.step) for b in stream] == [(step // 7, step) for step in range(14)]


def test_the_shorter_stream_shows_all_its_rows_before_any_again() -> None:
    target = drawn(3)["target"]
    passes = [rows(target[n : n + 3]) for n in range(0, 21, 3)]
    assert all(sorted(seen) == list(range(TARGET)) for seen in passes)
    assert len({tuple(seen) for seen in passes}) == 7  # each in an order of its own


def test_what_does_not_fill_a_batch_waits_for_another_pass() -> None:
    target = drawn(3, target=14)["target"]
    passes = [rows(target[n : n + 3]) for n in range(0, 21, 3)]
    assert all(len(set(seen)) == 12 for seen in passes)
    assert set().union(*passes) == set(range(14))


def test_each_pass_draws_anew_even_within_an_epoch() -> None:
    target = drawn(1)["target"]
    noises: list[dict[int, Tensor]] = []
    for once in (target[:3], target[3:6]):  # two passes in epoch 0
        noises.append({i: row for b in once for i, row in zip(rows([b]), noisy(b).x - b.x, strict=True)})
    assert not any(torch.allclose(noises[0][i], noises[1][i]) for i in range(TARGET))
    assert torch.equal(noisy(target[0]).x, noisy(target[0]).x)  # the same purpose, the same draw
    assert not torch.equal(noisy(target[0]).x, noisy(target[0], "the mean's noise").x)


def test_an_unlabelled_stream_adds_nothing_to_a_labelled_mean() -> None:
    _, scheme = engine()
    target = drawn(1)["target"][0]
    loss = labelled_cross_entropy(scheme.tapped(target.x), target)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in scheme.student.parameters())


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nest of dicts and lists, by path."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, state


def test_stopped_in_mid_epoch_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = engine()
    for _ in whole.lessons():
        if whole.step == 10:
            checkpoint.save(tmp_path, whole.state_dict(), fingerprint="probe")
    resumed, scheme = engine(seed=1)  # other weights, so that only the checkpoint can tell
    resumed.load_state_dict(checkpoint.load(tmp_path))
    assert (resumed.step, scheme.mean.steps) == (10, 10)
    list(resumed.lessons())
    ended, again = dict(leaves(whole.state_dict())), dict(leaves(resumed.state_dict()))
    assert any("teachers.0.model" in path for path in ended)
    del ended[".seconds"], again[".seconds"]
    torch.testing.assert_close(again, ended, rtol=0, atol=0)


def test_the_mean_teacher_averages_floats_and_copies_integers() -> None:
    lesson, scheme = engine()
    means = {name: value.double() for name, value in copy.deepcopy(scheme.student.state_dict()).items()}
    for _ in lesson.lessons():
        decay = min(1 - 1 / (lesson.step + 1), 0.8)
        for name, value in scheme.student.state_dict().items():
            keep = decay if value.is_floating_point() else 0.0
            means[name] = keep * means[name] + (1 - keep) * value
    mine = scheme.mean.model.state_dict()
    for name, value in mine.items():
        torch.testing.assert_close(value.double(), means[name].double(), rtol=1e-5, atol=1e-6)
    assert mine["stages.0.1.num_batches_tracked"] == 2 * 7 * EPOCHS  # two forwards a step


def test_a_mean_of_the_parameters_alone_is_no_model() -> None:
    lesson, scheme = engine()
    fresh = dict(copy.deepcopy(scheme.student).named_buffers())
    list(lesson.lessons())
    ruined = copy.deepcopy(scheme.mean.model)
    ruined.load_state_dict(fresh, strict=False)
    source = streams().loaders["source"].data

    def error(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(model.eval()(source.x), source.y)

    chance = math.log(3)
    assert error(scheme.shipped()) < 0.7 * chance < chance < error(ruined)
