"""Probe: a method that reads the teacher's BatchNorm in `build` (OFD's margin ReLU; Heo et al. 2019)."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import Batch, Card, Distiller, Ensemble, Frozen, Method, Refused, Seen, Teacher, checkpoint
from limbeck.core.teachers import MeanOf
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace
from limbeck.models.cnn import CNN
from limbeck.schemes.offline import Offline


def negative_mean(beta: Tensor, gamma: Tensor) -> Tensor:
    """E[x | x < 0] for x ~ N(beta, gamma²), by channel; -3|gamma| where x is almost never negative."""
    sigma = gamma.abs()
    normal = torch.distributions.Normal(0.0, 1.0)
    below = normal.cdf(-beta / sigma)
    mean = beta - sigma * normal.log_prob(beta / sigma).exp() / below
    return torch.where(below > 0.001, mean, -3 * sigma)


class MarginReLU(Method):
    """Where the teacher is above 0 the student should reach it, elsewhere get below the margin."""

    card = Card("arXiv:1904.01866", 2019, ("feature",), taps=("pre2",), needs=frozenset({"teacher_model"}))

    def __init__(self, tap: str = "pre2") -> None:
        super().__init__()
        self.tap = tap

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        assert t.model is not None
        norm = t.model.get_submodule(t.model.TAPS.get(self.tap, self.tap))
        if not isinstance(norm, nn.BatchNorm2d):
            found = type(norm).__name__
            raise Refused(f"Tap '{self.tap}' of the teacher is a {found}, expected a BatchNorm2d; tap that.")
        margin = negative_mean(norm.bias.detach(), norm.weight.detach())
        self.register_buffer("margin", margin[:, None, None])
        narrow, wide = s.at[self.tap].shape[1], len(margin)
        self.project = nn.Sequential(nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        here, there = self.project(s.at[self.tap]), t.at[self.tap].maximum(self.margin)
        asked = (here > there) | (there > 0)
        return ((here - there).square() * asked).mean()


class Stored(Teacher):
    """Answers kept from another day: nobody stands behind them."""

    offers = frozenset()

    def __call__(self, batch: Batch) -> Seen:
        return Seen(torch.zeros(batch.rows, 3))

    def through(self, x: Any) -> Seen:
        raise AssertionError("a store has no gradient")

    def look(self, names: Iterable[str]) -> None:
        pass


def network(width: int, depth: int, seed: int) -> CNN:
    """The last BatchNorm is tapped as `pre2`, at a path that depends on the depth."""
    torch.manual_seed(seed)
    model = CNN(3, widths=(4, width), depth=depth)
    model.TAPS["pre2"] = f"stages.1.{3 * depth - 2}"
    return model


def teacher() -> CNN:
    """A teacher whose last BatchNorm is no longer new; two scales are negative, the last channel never is."""
    model = network(6, 2, seed=1)
    with torch.no_grad():
        norm = model.get_submodule(model.TAPS["pre2"])
        norm.bias.copy_(torch.tensor([0.0, -1.0, 0.5, 1.5, -0.3, 0.4]))
        norm.weight.copy_(torch.tensor([1.0, 0.5, -0.8, 1.2, -0.2, 0.1]))
        norm.running_mean.normal_()
    return model


def loader() -> Loader:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(8)
    x = y[:, None, None, None] + torch.randn(24, 1, 6, 6, generator=generator)
    return Loader(Data(x, y, ("a", "b", "c")), 8, seed=0, epochs=6)


def engine(teaches: nn.Module) -> tuple[Engine, MarginReLU]:
    drawn = loader()
    distiller = Distiller(network(4, 1, seed=0), Frozen(teaches), MarginReLU(), example=drawn.at(0))
    pace = Pace(torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9), lambda step: 1.0)
    return Engine(Offline(distiller), drawn, {"student": pace}, epochs=6), distiller.methods["marginrelu"]


def test_the_margin_is_the_mean_of_what_the_relu_would_cut() -> None:
    """Against 10⁶ draws a channel: at least 10 % are negative, so 0.01 is more than four standard errors."""
    _, method = engine(teacher())
    norm = teacher().get_submodule("stages.1.4")
    generator = torch.Generator().manual_seed(2)
    for channel in range(5):
        draws = norm.bias[channel] + norm.weight[channel] * torch.randn(10**6, generator=generator)
        assert method.margin[channel].item() == pytest.approx(draws[draws < 0].mean().item(), abs=0.01)
    assert method.margin[5].item() == pytest.approx(-0.3)  # four sigmas above 0: nothing to average


def test_it_trains_and_the_teacher_stays_as_it_was() -> None:
    teaches = teacher()
    before = copy.deepcopy(teaches.state_dict())
    lesson, method = engine(teaches)
    margin, projector = method.margin.clone(), copy.deepcopy(method.project.state_dict())
    losses = [record.losses["marginrelu"] for record in lesson.lessons() if record]
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(dict(teaches.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(module.training for module in teaches.modules())
    assert all(p.grad is None for p in teaches.parameters())
    assert torch.equal(method.margin, margin)
    assert all(not torch.equal(value, projector[name]) for name, value in method.project.state_dict().items())
    assert lesson.scheme.shipped().state_dict().keys() == network(4, 1, seed=0).state_dict().keys()


@pytest.mark.parametrize(
    ("absent", "called"),
    [(Stored(), "Stored"), (Ensemble([Frozen(teacher()), Frozen(teacher())]), "Ensemble")],
)
def test_a_teacher_without_a_model_is_refused_by_name(absent: Teacher, called: str) -> None:
    with pytest.raises(Refused, match=f"'marginrelu' needs teacher_model, which a {called} teacher cannot"):
        Distiller(network(4, 1, seed=0), absent, MarginReLU(), example=loader().at(0))


def test_a_mean_teacher_has_a_model_too() -> None:
    mean = MeanOf(teacher())
    distiller = Distiller(network(4, 1, seed=0), mean, MarginReLU(), example=loader().at(0))
    assert torch.equal(distiller.methods["marginrelu"].margin, engine(teacher())[1].margin)


def test_what_build_refuses_is_said_in_its_own_words() -> None:
    with pytest.raises(Refused, match=r"^Tap 'stage1' of the teacher is a Sequential, expected a Batch"):
        Distiller(network(4, 1, seed=0), teacher(), MarginReLU("stage1"), example=loader().at(0))


def test_the_margin_survives_a_resume(tmp_path: Path) -> None:
    lesson, whole = engine(teacher())
    steps: Iterator[Any] = lesson.lessons()
    for _ in range(4):
        next(steps)
    checkpoint.save(tmp_path, lesson.state_dict(), fingerprint="probe")
    list(steps)
    resumed, method = engine(network(6, 2, seed=3))  # another teacher, so that only the checkpoint can tell
    assert not torch.equal(method.margin, whole.margin)
    resumed.load_state_dict(checkpoint.load(tmp_path))
    assert torch.equal(method.margin, whole.margin)
