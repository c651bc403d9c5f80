"""A learner as a teacher: it repeats what it showed in its own lesson, without gradient, and runs nothing."""

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped
from limbeck.core.teachers import Peer

BATCH = Batch(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 4))


def test_it_says_what_it_was_told_without_gradient_and_runs_nothing() -> None:
    model, calls = net(), []
    peer, tapped = Peer(model, BATCH), Tapped(model)
    peer.look(["0"])
    tapped.look(peer.names)
    model.register_forward_hook(lambda *args: calls.append(1))
    shown = tapped(BATCH.x)
    peer.told(shown)
    answer = peer(BATCH.replace(x=torch.zeros(2, 9)))  # which no network could answer
    assert torch.equal(answer.out, shown.out) and torch.equal(answer.at["0"], shown.at["0"])
    assert not answer.out.requires_grad and not answer.at["0"].requires_grad
    assert shown.out.requires_grad and len(calls) == 1


def test_the_last_word_counts() -> None:
    peer, tapped = Peer(net(), BATCH), Tapped(net())
    for x in (BATCH.x, BATCH.x + 1):
        shown = tapped(x)
        peer.told(shown)
        assert torch.equal(peer(BATCH).out, shown.out)


def test_it_passes_no_gradient_and_offers_none() -> None:
    peer = Peer(net(), BATCH, called="anna")
    assert not peer.offers
    with pytest.raises(Refused, match="'anna' learns while it teaches"):
        peer.through(BATCH.x)


def test_before_a_lesson_it_answers_its_own_example_and_nothing_moves() -> None:
    """Whoever asks may see another view of it, or a map from inside."""
    model = net()
    peer = Peer(model, BATCH)
    peer.look(["0"])
    for mode in (True, False):
        model.train(mode)
        before = {name: v.clone() for name, v in model.state_dict().items()}
        draws = torch.get_rng_state()
        answer = peer.check(BATCH.replace(x=torch.zeros(2, 9)))
        assert answer.out.shape == (6, 4) and not answer.out.requires_grad
        assert torch.equal(answer.at["0"], model[0](BATCH.x))
        assert torch.equal(torch.get_rng_state(), draws)
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
        assert all(module.training is mode for module in model.modules())


def test_a_tap_changed_in_place_is_noticed() -> None:
    peer = Peer(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), BATCH, called="anna")
    peer.look(["0"])
    with pytest.raises(Refused, match="'0' of the anna is changed in place"):
        peer.check(BATCH)


def test_it_has_no_state_and_does_not_move() -> None:
    model = net()
    peer, before = Peer(model, BATCH), {name: v.clone() for name, v in model.state_dict().items()}
    assert peer.state_dict() == {}
    peer.follow()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
