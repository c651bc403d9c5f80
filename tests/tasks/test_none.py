"""Label-free distillation: nothing is asked of the data, nothing is scored, nothing is lowered."""

import pytest
import torch
from torch import nn

from limbeck import registry
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.engine import evaluate
from limbeck.knowledge.response.kd import KD

BATCH = Batch(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def test_it_is_found_by_its_name() -> None:
    assert registry.find("task", "none").headline == ""


def test_it_scores_nothing_without_looking_at_a_row() -> None:
    def rows() -> object:
        raise AssertionError("a row was asked for")
        yield

    model = nn.Linear(4, 3)
    assert evaluate(model, registry.find("task", "none")(), rows()) == {}
    assert model.training


def test_it_passes_any_data() -> None:
    task = registry.find("task", "none")()
    for out in (torch.zeros(6), {"anything": None}):
        task.check(Seen(out), BATCH)


def test_it_has_no_loss() -> None:
    with pytest.raises(Refused, match="The task 'none' has no loss"):
        registry.find("task", "none")().loss(Seen(torch.zeros(6, 3)), BATCH)


def test_a_pair_learns_without_labels() -> None:
    distiller = Distiller(nn.Linear(4, 3), nn.Linear(4, 3), KD(), example=BATCH, task=None)
    losses = distiller(BATCH)
    assert set(losses) == {"kd", "loss", "logits"}
