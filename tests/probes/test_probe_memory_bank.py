"""Probe: a method with a memory bank, which needs N and all labels (the shape of CRD; Tian et al. 2020)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import Batch, Card, Distiller, Method, Refused, Seen, checkpoint
from limbeck.core import across
from limbeck.core.batch import IGNORE
from limbeck.core.keyed import keyed
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace
from limbeck.models.cnn import CNN
from limbeck.schemes.offline import Offline

N, CLASSES = 30, 4


class Contrast(Method):
    """Both networks' pictures of a sample should be closer than the bank's of K samples of other classes."""

    needs = frozenset({"labels", "index"})
    card = Card("arXiv:1910.10699", 2020, ("relation",), taps=("pooled",), needs=needs)

    def __init__(self, count: int = 12, width: int = 5, momentum: float = 0.5, heat: float = 0.2) -> None:
        super().__init__()
        self.count, self.width, self.momentum, self.heat = count, width, momentum, heat

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        labels = batch.lesson.labels
        if labels is None:
            raise Refused("A memory bank needs the label of every sample, and the lesson has none.")
        self.project_s = nn.Linear(s.at["pooled"].shape[1], self.width)
        self.project_t = nn.Linear(t.at["pooled"].shape[1], self.width)
        for bank in ("bank_s", "bank_t"):
            self.register_buffer(bank, F.normalize(torch.randn(batch.lesson.samples, self.width)))
        # Samples by class, unlabelled ones left out: who is not of my class is before or after it.
        sizes = torch.bincount(labels[labels != IGNORE], minlength=batch.lesson.classes)
        order = labels.argsort(stable=True)[(labels == IGNORE).sum() :]
        known = {"labels": labels, "order": order, "sizes": sizes, "first": sizes.cumsum(0) - sizes}
        for name, value in known.items():
            self.register_buffer(name, value, persistent=False)

    def negatives(self, batch: Batch) -> Tensor:
        """K samples of other classes for each row (b K), whoever else is in the batch."""
        own = self.labels[batch.index].clamp(min=0)  # an unlabelled row draws too, and counts nothing
        first, size = self.first[own, None], self.sizes[own, None]
        place = (keyed(batch.lesson, batch.index, "negatives", self.count) * (len(self.order) - size)).long()
        return self.order[place + size * (place >= first)]

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        here = F.normalize(self.project_s(s.at["pooled"]))
        there = F.normalize(self.project_t(t.at["pooled"]))
        self.drawn = self.negatives(batch)
        loss = self.one_way(here, there, self.bank_t) + self.one_way(there, here, self.bank_s)
        with torch.no_grad():
            rows = across.gather(batch.index)
            for bank, new in ((self.bank_s, here), (self.bank_t, there)):
                bank[rows] = F.normalize(torch.lerp(across.gather(new), bank[rows], self.momentum))
        return across.labelled_mean(loss, batch)

    def one_way(self, anchor: Tensor, match: Tensor, bank: Tensor) -> Tensor:
        others = torch.einsum("b d, b k d -> b k", anchor, bank[self.drawn])
        scores = torch.cat([(anchor * match).sum(1, keepdim=True), others], 1) / self.heat
        return scores.logsumexp(1) - scores[:, 0]


def loader() -> Loader:
    """Five steps an epoch; every fifth sample is unlabelled."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (N,), generator=generator)
    x = y[:, None, None, None] + torch.randn(N, 1, 6, 6, generator=generator)
    y[::5] = IGNORE
    return Loader(Data(x, y, tuple("abcd")), 6, seed=7, epochs=3)


def engine(seed: int = 0) -> tuple[Engine, Contrast]:
    drawn = loader()
    torch.manual_seed(0)
    teacher = CNN(CLASSES, widths=(4, 8))
    torch.manual_seed(seed)
    student = CNN(CLASSES, widths=(4, 6))
    distiller = Distiller(student, teacher, Contrast(), example=drawn.at(0), seed=seed)
    pace = Pace(torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9), lambda step: 1.0)
    return Engine(Offline(distiller), drawn, {"student": pace}, epochs=3), distiller.methods["contrast"]


def everybody(epoch: int = 0) -> Batch:
    drawn = loader()
    return drawn.rows(torch.arange(N), drawn.lesson(epoch, 0))


def test_the_bank_holds_every_sample() -> None:
    _, method = engine()
    assert method.bank_s.shape == method.bank_t.shape == (N, 5)


def test_negatives_are_all_of_the_other_classes_and_nobody_else() -> None:
    _, method = engine()
    method.count = 1000  # enough to meet everybody
    batch, labels = everybody(), loader().data.y
    assert batch.y is not None
    for own, drawn in zip(batch.y, method.negatives(batch), strict=True):
        if own != IGNORE:
            others = (labels != own) & (labels != IGNORE)
            assert set(drawn.tolist()) == set(others.nonzero()[:, 0].tolist())


def test_draws_depend_on_the_sample_and_the_epoch_alone() -> None:
    _, method = engine()
    whole = everybody()
    drawn = method.negatives(whole)
    some = torch.tensor([23, 4, 17, 11])
    assert torch.equal(method.negatives(whole.map(lambda v: v[some])), drawn[some])
    assert not torch.equal(method.negatives(everybody(epoch=1)), drawn)


def test_construction_leaves_the_bank_as_built_and_a_step_moves_its_own_rows() -> None:
    built = []

    class Watched(Contrast):
        def build(self, s: Seen, t: Seen, batch: Batch) -> None:
            super().build(s, t, batch)
            built.append((self.bank_s.clone(), self.bank_t.clone()))

    batch = loader().at(0)
    assert batch.index is not None
    distiller = Distiller(CNN(CLASSES), CNN(CLASSES), Watched(), example=batch)
    method = distiller.methods["watched"]
    assert torch.equal(method.bank_s, built[0][0]) and torch.equal(method.bank_t, built[0][1])
    distiller(batch)
    for now, then in ((method.bank_s, built[0][0]), (method.bank_t, built[0][1])):
        moved = (now != then).any(1).nonzero()[:, 0]
        assert moved.tolist() == sorted(batch.index.tolist())


def test_stopped_in_mid_epoch_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    lesson, method = engine()
    states: list[Any] = []
    for _ in lesson.lessons():
        states.append((method.drawn, method.bank_s.clone(), method.bank_t.clone()))
        if lesson.step == 7:
            checkpoint.save(tmp_path, lesson.state_dict(), fingerprint="probe")
    resumed, again = engine(seed=1)  # other weights and another bank, so that only the checkpoint can tell
    resumed.load_state_dict(checkpoint.load(tmp_path))
    assert torch.equal(again.bank_s, states[6][1]) and torch.equal(again.bank_t, states[6][2])
    for _ in resumed.lessons():
        drawn, bank_s, bank_t = states[resumed.step - 1]
        assert torch.equal(again.drawn, drawn)
        assert torch.equal(again.bank_s, bank_s) and torch.equal(again.bank_t, bank_t)
    assert resumed.step == len(states) == 15


def test_an_example_without_index_is_refused_by_name() -> None:
    batch = loader().at(0)
    with pytest.raises(Refused, match="'contrast' needs index, and the example has none"):
        Distiller(CNN(CLASSES), CNN(CLASSES), Contrast(), example=batch.replace(index=None))


def test_a_bank_cannot_be_cut_into_micro_batches() -> None:
    lesson, _ = engine()
    with pytest.raises(Refused, match=r"'contrast' .* cannot be cut into 2 micro-batches"):
        Engine(lesson.scheme, lesson.loader, lesson.paces, epochs=3, accumulate=2)
