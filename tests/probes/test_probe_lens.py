"""A lens changes what a method compares, and the method never knows.

Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024: z → (z - mean) / (std + 1e-7), std
unbiased over the classes. Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023: the
temperature learns, and its square scales the loss.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import build, checkpoint, recipe, registry
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.data.loader import Data, Splits
from limbeck.engine import Engine, Pace
from limbeck.schemes.offline import Offline


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def soft(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student), both softened."""
    return (
        F.kl_div((s / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean")
        * temperature**2
    )


class Soft(Method):
    card = Card("none", 2000, ("response",), per_sample=True)

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return soft(s.out, t.out, self.temperature)


class Judged(Method):
    """A critic tells the student's logits from the teacher's: a rival that must see what the method sees."""

    card = Card("none", 2000, ("response",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.critic = nn.Linear(s.out.shape[1], 1)

    def rivals(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return (F.softplus(self.critic(s.out)) + F.softplus(-self.critic(t.out))).mean()

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return F.softplus(-self.critic(s.out)).mean()


def standard(z: Tensor) -> Tensor:
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


def standardised(s: Seen, t: Seen) -> tuple[Seen, Seen, float]:
    return replace(s, out=standard(s.out)), replace(t, out=standard(t.out)), 1.0


class Temperature(nn.Module):
    """Divides both by a temperature that learns with the student; the loss is scaled by its square."""

    def __init__(self, start: float = 3.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([start]))

    def forward(self, s: Seen, t: Seen) -> tuple[Seen, Seen, Tensor]:
        return (
            replace(s, out=s.out / self.value),
            replace(t, out=t.out / self.value),
            self.value.squeeze() ** 2,
        )


class Drawn:
    steps = 4

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step in range(start, self.steps):
            draw = torch.Generator().manual_seed(10 * epoch + step)
            yield Batch(
                torch.randn(6, 3, generator=draw, dtype=torch.float64), torch.randint(5, (6,), generator=draw)
            )


BATCH = next(Drawn().epoch(0))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), nn.Sequential(nn.Linear(3, 5))


def taught(student: nn.Module, teacher: nn.Module, *terms: Term) -> tuple[dict[str, Tensor], Distiller]:
    distiller = Distiller(student, teacher, list(terms), example=BATCH, task=None)
    return distiller.losses(distiller.see(BATCH)), distiller


def test_a_method_through_a_lens_is_the_method_on_what_the_lens_shows() -> None:
    student, teacher = pair()
    losses, distiller = taught(
        student, teacher, Term(Soft(), weight=9.0, through=(standardised,)), Term(Soft(), name="plain")
    )
    s, t = student(BATCH.x), teacher(BATCH.x).detach()
    want = 9.0 * soft(standard(s), standard(t), 2.0)
    torch.testing.assert_close(losses["soft"], want, rtol=0, atol=1e-12)
    # A lens is its own term's alone.
    torch.testing.assert_close(losses["plain"], soft(s, t, 2.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(distiller(BATCH)["logits"], s, rtol=0, atol=0)
    got = torch.autograd.grad(losses["soft"], list(student.parameters()))
    for g, w in zip(got, torch.autograd.grad(want, list(student.parameters())), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_standardised_logits_forget_shift_and_positive_scale(whose: str) -> None:
    nets = dict(zip(("student", "teacher"), pair(), strict=True))
    terms = (Term(Soft(), through=(standardised,)), Term(Soft(), name="plain"))
    before, _ = taught(nets["student"], nets["teacher"], *terms)
    with torch.no_grad():
        nets[whose][-1].weight.mul_(3.0)
        nets[whose][-1].bias.mul_(3.0).add_(7.0)
    after, _ = taught(nets["student"], nets["teacher"], *terms)
    assert after["soft"].item() == pytest.approx(before["soft"].item(), rel=1e-5)  # 1e-7 beside the std
    assert abs(after["plain"].item() / before["plain"].item() - 1) > 0.1


def test_lenses_apply_first_to_last() -> None:
    student, teacher = pair()
    through = (standardised, Temperature(3.0))
    losses, _ = taught(
        student,
        teacher,
        Term(Soft(1.0), through=through),
        Term(Soft(1.0), through=through[::-1], name="turned"),
    )
    s, t = standard(student(BATCH.x)), standard(teacher(BATCH.x))
    torch.testing.assert_close(losses["soft"], soft(s, t, 3.0), rtol=0, atol=1e-12)
    # The temperature was standardised away.
    torch.testing.assert_close(losses["turned"], 9 * soft(s, t, 1.0), rtol=1e-5, atol=0)


def test_a_rival_looks_through_the_lens_too() -> None:
    """A critic trained on raw logits would be no judge of standardised ones."""
    student, teacher = pair()
    _, distiller = taught(student, teacher, Term(Judged(), through=(standardised,)))
    sight = distiller.see(BATCH)
    ((name, loss),) = distiller.rival_losses(sight)
    assert name == "judged.critic"
    critic = distiller.methods["judged"].critic
    s, t = critic(standard(student(BATCH.x))), critic(standard(teacher(BATCH.x)))
    torch.testing.assert_close(loss, (F.softplus(s) + F.softplus(-t)).mean(), rtol=0, atol=1e-12)


def first_three(s: Seen, t: Seen) -> tuple[Seen, Seen, float]:
    return replace(s, out=s.out[:, :3]), replace(t, out=t.out[:, :3]), 1.0


def test_modules_are_built_for_what_the_lens_shows() -> None:
    student, teacher = pair()
    losses, distiller = taught(student, teacher, Term(Judged(), through=(first_three,)))
    assert distiller.methods["judged"].critic.in_features == 3
    assert losses["judged"].isfinite()


# --- a lens that learns ---


def lesson() -> tuple[Engine, Distiller]:
    student, teacher = pair()
    distiller = Distiller(student, teacher, [Term(Soft(1.0), through=(Temperature(),))], example=BATCH)
    scheme = Offline(distiller)
    pace = Pace(
        torch.optim.SGD(list(scheme.players()["student"].values()), 0.1, momentum=0.9), lambda step: 1.0
    )
    return Engine(scheme, Drawn(), {"student": pace}, epochs=2), distiller


def test_a_temperature_learns_with_the_student_by_the_true_gradient() -> None:
    engine, distiller = lesson()
    (lens,) = distiller.lenses
    value = lens.value.detach().clone().requires_grad_()
    s, t = distiller.student(BATCH.x), pair()[1](BATCH.x)
    (want,) = torch.autograd.grad(soft(s, t, value), value)
    next(engine.lessons())
    torch.testing.assert_close(lens.value.grad, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lens.value, value - 0.1 * want, rtol=0, atol=1e-12)


def test_a_temperature_is_saved_and_resumed(tmp_path: Path) -> None:
    whole, distiller = lesson()
    for n, _ in enumerate(whole.lessons(), 1):
        if n == 3:
            checkpoint.save(tmp_path, whole.state_dict(), fingerprint="lens")
            halfway = copy.deepcopy(distiller.lenses[0].value)
    again, resumed = lesson()
    again.load_state_dict(checkpoint.load(tmp_path, fingerprint="lens"))
    assert torch.equal(resumed.lenses[0].value, halfway)
    list(again.lessons())
    assert again.step == whole.step == 8
    assert not torch.equal(distiller.lenses[0].value, halfway)
    for (name, p), q in zip(distiller.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, s: Seen, t: Seen) -> tuple[Seen, Seen, float]:
        return replace(s, out=self.norm(s.out)), t, 1.0


def test_what_a_lens_remembers_begins_with_the_first_batch() -> None:
    student, teacher = pair()
    lens = Normalised()
    distiller = Distiller(student, teacher, [Term(Soft(), through=(lens,))], example=BATCH)
    assert lens.norm.num_batches_tracked == 0
    distiller(BATCH)
    assert lens.norm.num_batches_tracked == 1


# --- named in a recipe ---


def tiny() -> Splits:
    data = Data(
        torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5, tuple("abcde")
    )
    return Splits(data, data, data)


def net(classes: int) -> nn.Module:
    return nn.Linear(3, classes)


def test_a_recipe_names_a_lens_function_and_a_lens_that_learns() -> None:
    torch.set_default_dtype(torch.float32)  # what the loader makes
    net_, here = {"name": f"{__name__}:net"}, __name__
    term = {
        "method": f"{here}:Soft",
        "through": [f"{here}:standardised", f"{here}:Temperature"],
        "temperature": 1.0,
    }
    plan = recipe.parse(
        {
            "data": f"{here}:tiny",
            "models": {"teacher": net_, "student": net_},
            "stages": [{"learner": "student", "epochs": 1, "batch": 8, "terms": [term]}],
        }
    )
    engine = build.lab(plan).engine(0)
    distiller = engine.scheme.modules()["distiller"].train()
    batch = engine.loader.at(0)
    s, t = distiller.student(batch.x), distiller.teachers()[0](batch).out
    losses = distiller(batch)
    torch.testing.assert_close(losses["soft"], soft(standard(s), standard(t), 3.0))
    assert "lenses.0.value" in engine.scheme.players()["student"]


def test_a_methods_file_is_no_lens() -> None:
    """Its function is its equation, even where it bears the file's name."""
    assert not registry.names("lens").keys() & registry.names("method").keys()
