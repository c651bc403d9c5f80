"""Pairs: one key for both, whichever way round; labels that go with their share; Beta by its inverse."""

import math

import pytest
import torch

from limbeck import Batch, Refused
from limbeck.core.batch import IGNORE
from limbeck.pieces import pairs


def test_both_draw_by_the_lower_number_whichever_way_round() -> None:
    batch = Batch(torch.zeros(6, 1), index=torch.tensor([7, 3, 2, 9, 4, 8]))
    assert pairs.keys(batch, "Mix").tolist() == [3, 3, 2, 2, 4, 4]


def test_a_partner_is_the_other_of_a_pair() -> None:
    x = torch.arange(24).view(4, 3, 2)
    assert torch.equal(pairs.partner(x), x[[1, 0, 3, 2]])


def test_a_label_is_its_own_or_its_partners_and_none_stays_none() -> None:
    y = torch.tensor([1, 2, 3, IGNORE, IGNORE, IGNORE])
    assert pairs.label(y, torch.ones(6).bool()).tolist() == y.tolist()
    assert pairs.label(y, torch.zeros(6).bool()).tolist() == [2, 1, IGNORE, IGNORE, IGNORE, IGNORE]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_beta_has_its_moments_and_its_median(alpha: float) -> None:
    share = pairs.beta((torch.arange(20_000) + 0.5) / 20_000, alpha).double()
    assert bool((share.diff() >= 0).all()) and float(share[0]) >= 0 and float(share[-1]) <= 1
    assert share.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-2)


def test_beta_of_one_half_is_the_arcsine_law() -> None:
    u = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.99])
    law = torch.tensor([math.sin(math.pi * v / 2) ** 2 for v in u.tolist()])
    torch.testing.assert_close(pairs.beta(u, 0.5), law)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_no_such_beta_is_refused(alpha: float) -> None:
    with pytest.raises(Refused, match=r"alpha is .*expected a number > 0"):
        pairs.beta(torch.zeros(2), alpha)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (Batch(torch.zeros(3, 1), index=torch.arange(3)), "3 rows with an index"),
        (Batch(torch.zeros(2, 1)), "2 rows without an index"),
        (Batch(torch.zeros(2, 1), torch.zeros(2, 5), torch.arange(2)), r"labels of shape \(2, 5\)"),
    ],
)
def test_what_has_no_pairs_is_refused(batch: Batch, found: str) -> None:
    with pytest.raises(Refused, match=f"Mix mixes rows.*{found}.*expected") as caught:
        pairs.keys(batch, "Mix")
    assert "\n" not in str(caught.value)
