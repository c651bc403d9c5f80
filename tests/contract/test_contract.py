"""The contract every method passes. Methods are found by listing their folder; a new one needs no edit here.

Each check is a function of `make`, which makes a method with its defaults. At the end are methods that break
the contract, each in one way; each must be caught.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import checkpoint, registry
from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch
from limbeck.core.distiller import Distiller, TaskLoss
from limbeck.core.keyed import forked, generator
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Term
from limbeck.core.taps import Seen, Tapped
from limbeck.core.task import labelled_cross_entropy
from limbeck.core.teachers import Frozen, Teacher
from limbeck.data.loader import Data, Loader
from limbeck.engine import Engine, Pace
from limbeck.schemes.offline import Offline

Make = Callable[[], Method]

CLASSES, ROWS = 5, 32
CHANNELS = 2  # one lies alike in every layout


# --- two kinds of networks, each in two sizes ---


class CNN(nn.Module):
    """Three stages that show maps, also in front of their ReLU; `stride` is the first one's."""

    TAPS = {  # noqa: RUF012
        **{f"stage{n + 1}": f"stages.{n}" for n in range(3)},
        **{f"stage{n + 1}_pre": f"stages.{n}.1" for n in range(3)},
        **{f"stage{n + 1}_qkv": f"stages.{n}" for n in range(3)},  # no attention: who needs one refuses
        "pooled": "head:in",
    }

    def __init__(self, widths: tuple[int, int, int], stride: int, dropout: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, stride in zip((CHANNELS, *widths[:-1]), widths, (stride, 2, 2), strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        return x + self.mlp(x)


class ViT(nn.Module):
    """Three blocks that show tokens."""

    TAPS = {  # noqa: RUF012
        **{f"stage{n + 1}": f"blocks.{n}" for n in range(3)},
        **{f"stage{n + 1}_pre": f"blocks.{n}" for n in range(3)},  # a block ends in a sum, not in a ReLU
        **{f"stage{n + 1}_qkv": f"blocks.{n}.qkv" for n in range(3)},
        "pooled": "head:in",
    }

    def __init__(self, width: int, patch: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Conv2d(CHANNELS, width, patch, patch)
        self.position = nn.Parameter(0.1 * torch.randn((8 // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean(1)))


NETS: dict[str, Callable[[float], nn.Module]] = {
    "cnn": lambda dropout: CNN((4, 6, 8), 1, dropout),
    "vit": lambda dropout: ViT(8, 2, dropout),
    "other cnn": lambda dropout: CNN((5, 7, 9), 2, dropout),
    "other vit": lambda dropout: ViT(12, 4, dropout),
}
# Student and teacher; the first pair that a method accepts is the one that it is checked on.
PAIRS = [("cnn", "other cnn"), ("vit", "other vit"), ("cnn", "other vit"), ("vit", "other cnn")]
PAIRS += [("cnn", "cnn"), ("vit", "vit"), ("cnn", "vit"), ("vit", "cnn")]


def net(name: str, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with forked(seed, name):
        return NETS[name](dropout)


# --- a pair, its data, a method between them ---


def data() -> Loader:
    """Three batches of rows bright and dark, about a third of them unlabelled."""
    draw = generator("the contract's data")
    bright = 3 * torch.randn(3 * ROWS, 1, 1, 1, generator=draw)
    x = bright + torch.randn(3 * ROWS, CHANNELS, 8, 8, generator=draw)
    y = torch.arange(3 * ROWS) % CLASSES
    y[torch.randperm(len(y), generator=draw)[: len(y) // 3]] = IGNORE
    return Loader(Data(x, y, tuple("abcde")), ROWS, seed=0, epochs=2)


@dataclass
class Case:
    method: Method
    student: nn.Module
    teacher: nn.Module
    distiller: Distiller
    loader: Loader

    @property
    def batch(self) -> Batch:
        return self.loader.at(0)

    def engine(self) -> Engine:
        scheme = Offline(self.distiller)
        paces = {
            player: Pace(torch.optim.AdamW(parameters.values(), 0.01), lambda step: 1 / (1 + step))
            for player, parameters in scheme.players().items()
        }
        return Engine(scheme, self.loader, paces, epochs=2)

    def train(self) -> None:
        for _ in self.engine().lessons():
            pass


def case(
    make: Make,
    pair: tuple[str, str] | None = None,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    term: Callable[[Method], Term] = Term,
    task: TaskLoss | None = labelled_cross_entropy,
    channels_last: bool = True,
) -> Case:
    """A student, a teacher and what `make` makes between them. Only the teacher does not depend on `seed`."""
    s, t = pair or fitting(make)
    method, student, teacher, loader = make(), net(s, seed + 1, dropout), net(t, dropout=0.5), data()
    distiller = Distiller(
        student,
        Frozen(teacher, channels_last=channels_last),
        term(method),
        example=loader.at(0),
        task=task,
        channels_last=channels_last,
        seed=seed,
    )
    return Case(method, student, teacher, distiller, loader)


def total(distiller: Distiller, batch: Batch) -> Tensor:
    """What the student lowers. Not `forward`, which leaves methods with rivals to schemes."""
    return sum(distiller.losses(distiller.see(batch)).values())


@cache
def fitting(make: Make) -> tuple[str, str]:
    refusals = []
    for pair in PAIRS:
        try:
            case(make, pair)
        except Refused as error:
            refusals.append(str(error))
        else:
            return pair
    raise AssertionError("no pair will do:\n" + "\n".join(refusals))


# --- what a method sees, in float64 ---


@dataclass
class Sight:
    method: Method
    s: Seen
    t: Seen
    batch: Batch

    def loss(self, rows: slice | Tensor = slice(None), **changes: Tensor) -> Tensor:
        """The loss of some of the rows. The method stays as it is, and its draws are the same each time."""
        batch = self.batch.map(lambda v: v[rows]).replace(**changes)
        with forked("loss"):
            return copy.deepcopy(self.method).loss(_rows(self.s, rows), _rows(self.t, rows), batch)


def sight(c: Case) -> Sight:
    seen = c.distiller.eval().see(c.batch)
    (s, batch), t = seen.students[0], seen.teachers[0]
    return Sight(c.method.double(), _double(s), _double(t), batch)


def _double(seen: Seen) -> Seen:
    seen = seen.detach()
    out = None if seen.out is None else seen.out.double()
    return replace(seen, out=out, at={name: v.double() for name, v in seen.at.items()})


def _rows(seen: Seen, rows: slice | Tensor) -> Seen:
    out = None if seen.out is None else seen.out[rows]
    return replace(seen, out=out, at={name: v[rows] for name, v in seen.at.items()})


def _same(a: Any, b: Any) -> bool:
    """Bit for bit, in whatever they are nested."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def _finite(loss: Tensor, learners: nn.Module) -> bool:
    """The loss, and whatever gradient it has."""
    if loss.requires_grad:
        loss.backward()
    values = [loss, *(p.grad for p in learners.parameters() if p.grad is not None)]
    return all(bool(torch.isfinite(value).all()) for value in values)


def _learns(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


# --- the checks ---


def check_loss_is_one_finite_number(make: Make) -> None:
    c = case(make)
    for rows in (ROWS, ROWS - 5):  # the last batch of somebody's own loader may be smaller
        loss = total(c.distiller, c.batch.map(lambda v, rows=rows: v[:rows]))
        assert loss.shape == () and torch.isfinite(loss)


def check_assembly_leaves_no_trace(make: Make) -> None:
    """Weights are drawn by the seed and nobody else's generator; looking at the example moves nothing."""
    methods = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        c = case(make, dropout=0.3)
        assert torch.equal(before, torch.get_rng_state()), "assembly draws from everybody's generator"
        s, t = fitting(make)
        assert _same(c.student.state_dict(), net(s, 1).state_dict()), "assembly moves the student"
        assert _same(c.teacher.state_dict(), net(t).state_dict()), "assembly moves the teacher"
        methods.append(c.method.state_dict())
    assert _same(*methods), "the method's weights do not depend on the seed alone"


def check_gradient_reaches_the_learners_only(make: Make) -> None:
    c = case(make, task=None)
    total(c.distiller, c.batch).backward()
    assert all(p.grad is None for p in c.teacher.parameters()), "gradient reaches the teacher"
    assert any(map(_learns, c.student.parameters())), "no gradient reaches the student"
    c.distiller.zero_grad()
    c.train()  # in turns: a rival's gradient comes from its own
    idle = [name for name, p in c.method.named_parameters() if p.requires_grad and not _learns(p)]
    assert not idle, f"no gradient reaches {idle}"
    owned = [name for player in c.distiller.players().values() for name in player]
    assert sorted(owned) == sorted(name for name, p in c.distiller.named_parameters() if p.requires_grad)


def check_teacher_stays_as_it_is(make: Make) -> None:
    c = case(make)
    before = copy.deepcopy(c.teacher.state_dict())
    c.teacher.train()
    for _ in c.engine().lessons():
        assert not any(module.training for module in c.teacher.modules()), "the teacher is in train mode"
        c.teacher.train()
    assert _same(before, c.teacher.state_dict()), "the teacher has changed"


def check_weight_zero_is_plain_training(make: Make) -> None:
    """Not built at weight 0; and built, but with a ramp that stands at 0, the student does not notice it. (In
    the usual layout: a gradient of zeros may lie otherwise, and what follows is then rounded otherwise.)"""
    student, loader = net(fitting(make)[0], 1, dropout=0.3), data()
    alone = Distiller(student, None, [], example=loader.at(0), channels_last=False)
    plain = Case(make(), student, student, alone, loader)
    asleep, unbuilt = (
        case(make, dropout=0.3, term=term, channels_last=False)
        for term in (
            lambda method: Term(method, ramp=Ramp(1, after=100)),
            lambda method: Term(method, weight=0.0),
        )
    )
    for c in (plain, unbuilt, asleep):
        c.train()
    assert _same(unbuilt.student.state_dict(), student.state_dict()), "weight 0 is not plain training"
    assert _same(asleep.student.state_dict(), student.state_dict()), "a ramp at 0 is not plain training"


def check_order_of_rows(make: Make) -> None:
    if make().card.order_free:
        look = sight(case(make))
        _close(look.loss(torch.randperm(ROWS, generator=generator("order"))), look.loss())


def check_bfloat16(make: Make) -> None:
    c = case(make, task=None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(c.distiller, c.batch)
    assert _finite(loss, c.distiller), "not finite in bfloat16"


def check_absent_classes(make: Make) -> None:
    c = case(make, task=None)
    y = c.batch.y
    fewer = [torch.where(y == k, IGNORE, y) for k in range(CLASSES)]
    for y in (*fewer, torch.zeros(ROWS).long(), torch.full((ROWS,), IGNORE)):
        c.distiller.zero_grad()
        loss = total(c.distiller, c.batch.replace(y=y))
        assert _finite(loss, c.distiller), f"not finite with labels {y.tolist()}"


def check_unlabelled_rows(make: Make) -> None:
    """A method that asks for no labels is not moved by them; a labelled mean is over the labelled rows."""
    card, look = make().card, sight(case(make))
    if "labels" not in card.needs:
        for y in (torch.full((ROWS,), IGNORE), torch.arange(ROWS) % CLASSES):
            assert torch.equal(look.loss(y=y), look.loss()), "labels matter, and the card does not say so"
    elif card.per_sample:
        labelled = look.batch.y != IGNORE
        _close(look.loss(labelled.nonzero()[:, 0]), look.loss())


def check_zero_at_match(make: Make) -> None:
    for name in ("cnn", "vit") if make().card.zero_at_match else ():
        method, student, loader = make(), net(name), data()
        try:
            distiller = Distiller(student, copy.deepcopy(student), method, example=loader.at(0))
        except Refused:
            continue
        look = sight(Case(method, student, student, distiller, loader))
        loss = float(look.loss().detach())
        assert abs(loss) < 1e-9, f"{loss} at a perfect match"


def check_parts_of_a_batch(make: Make) -> None:
    """Micro-batches as the engine cuts them: their losses, weighted by rows, add up to the batch's."""
    if make().card.per_sample:
        look, cut = sight(case(make)), 5
        labelled = (look.batch.y != IGNORE).double()
        assert labelled[:cut].mean() != labelled[cut:].mean(), "with labels spread evenly this test is blind"
        parts = 0.0
        for rows, share in ((slice(cut), cut / ROWS), (slice(cut, ROWS), 1 - cut / ROWS)):
            parts = parts + share * look.loss(rows, labelled=share * labelled.sum())
        _close(parts, look.loss())


def check_gradient_is_the_true_one(make: Make) -> None:
    look = sight(case(make))
    names = list(look.s.at)
    shown = [v.requires_grad_() for v in (look.s.out, *look.s.at.values())]

    def loss(out: Tensor, *at: Tensor) -> Tensor:
        return replace(look, s=replace(look.s, out=out, at=dict(zip(names, at, strict=True)))).loss()

    true = torch.autograd.gradcheck(loss, shown, fast_mode=True, raise_exception=False)
    assert true, "the gradient is not the loss's"


class _Losses(nn.Module):
    """A distiller's losses as what can be compiled."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.distiller.losses(self.distiller.see(batch))


def check_compiles_whole(make: Make) -> None:
    # In the usual layout: this backend runs views where torch only guesses how a convolution's output lies.
    eager, traced = (case(make, channels_last=False).distiller for _ in range(2))
    batch = data().at(0)
    torch._dynamo.reset()
    compiled = torch.compile(_Losses(traced), backend="aot_eager", fullgraph=True)
    try:
        found = compiled(batch)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"it cannot be compiled whole: {error}") from error
    expected = _Losses(eager)(batch)
    for losses in (expected, found):
        sum(losses.values()).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(traced.named_buffers()), dict(eager.named_buffers()))
    for p, q in zip(traced.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def check_resumes(make: Make) -> None:
    """Saved within an epoch and loaded into other weights, a run ends as it would have ended, bit for bit."""
    whole = case(make, dropout=0.3).engine()
    with tempfile.TemporaryDirectory() as folder:
        for _ in whole.lessons():
            if whole.step == 2:
                checkpoint.save(Path(folder), whole.state_dict(), fingerprint="contract")
        resumed = case(make, seed=1, dropout=0.3).engine()
        resumed.load_state_dict(checkpoint.load(Path(folder)))
    steps = sum(1 for _ in resumed.lessons())
    assert steps == whole.step - 2
    ends = [engine.state_dict() | {"seconds": None} for engine in (whole, resumed)]
    assert _same(ends[0]["scheme"], ends[1]["scheme"]), "student, methods or teachers differ after a resume"
    assert _same(*ends), "optimisers or sums differ after a resume"


def check_any_pair_works_or_is_refused(make: Make) -> None:
    for pair in PAIRS:
        try:
            c = case(make, pair, task=None)
        except Refused as error:
            named = [s in str(error) and t in str(error) for s, t in _shapes(make, pair)]
            assert any(named), f"{pair}: name both shapes in: {error}"
        else:
            assert _finite(total(c.distiller, c.batch), c.distiller), pair
            assert any(map(_learns, c.student.parameters())), pair


def _shapes(make: Make, pair: tuple[str, str]) -> list[tuple[str, str]]:
    """What student and teacher show where the method looks."""
    seen = []
    for name in pair:
        tapped = Tapped(net(name))
        tapped.look(make().looks())
        seen.append(tapped(data().at(0).x))
    s, t = seen
    both = [(s.at[name], t.at[name]) for name in s.at] or [(s.out, t.out)]
    return [(str(tuple(here.shape)), str(tuple(there.shape))) for here, there in both]


class Stored(Teacher):
    """A teacher's answers without the teacher."""

    offers = frozenset()

    def __init__(self, model: nn.Module) -> None:
        self.live = Frozen(model)

    def __call__(self, batch: Batch) -> Seen:
        seen = self.live(batch)
        return Seen(seen.out, seen.at, seen.mask)

    def through(self, x: Any) -> Seen:
        raise AssertionError("a stored answer passes no gradient")

    def look(self, names: Any) -> None:
        self.live.look(names)


def check_what_a_stored_teacher_lacks(make: Make) -> None:
    s, t = fitting(make)
    needs = make().card.needs & {"teacher_model", "teacher_gradient"}
    try:
        distiller = Distiller(net(s), Stored(net(t)), Term(make(), name="taught"), example=data().at(0))
    except Refused as error:
        words = ("'taught'", "Stored", *needs)
        assert needs and all(word in str(error) for word in words), error
    else:
        assert not needs, f"the card says that it needs {needs}, and it does without"
        assert torch.isfinite(total(distiller, data().at(1)))


def check_whether_it_reads_the_answer(make: Make) -> None:
    """Who says that it reads taps alone gets by without the teacher's answer, which may then not exist."""
    c = case(make)
    if c.method.card.reads_out:
        return
    look = sight(c)
    told = replace(look, t=_double(c.distiller.teachers()[0](c.batch)))
    assert isinstance(told.t.out, Tensor)
    try:
        blind = replace(look, t=replace(told.t, out=None)).loss(slice(None))
    except (AttributeError, TypeError) as error:
        raise AssertionError(f"it reads the teacher's answer: {error}") from error
    assert _same(blind, told.loss(slice(None)))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("name", registry.names("method"))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check: Callable[[Make], None], name: str) -> None:
    check(registry.find("method", name))


# --- the contract is not blind ---


class Right(Method):
    """Keeps the contract; each method below breaks it in one way."""

    card = Card("arXiv:0000.00000", 2000, ("response",), per_sample=True, zero_at_match=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.scale = nn.Parameter(torch.ones(s.out.shape[1]))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return ((s.out - t.out) * self.scale).square().mean()


class Labelled(Right):
    """Keeps it too, with a mean over labelled rows and a look at the teacher's weights."""

    card = replace(Right.card, needs=frozenset({"labels", "teacher_model"}))

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        super().build(s, t, batch)
        self.register_buffer("bias", t.model.head.bias.detach().clone())

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return across.labelled_mean(((s.out - t.out) * self.scale * self.bias).square().mean(1), batch)


class Narrow(Right):
    """Keeps it too, for pairs of equal shapes; the distiller says why it cannot be used on others."""

    card = replace(Right.card, taps=("stage2",))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) + (s.at["stage2"] - t.at["stage2"]).square().mean()


class Contested(Right):
    """Keeps it too, with a rival."""

    card = replace(Right.card, zero_at_match=False)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        super().build(s, t, batch)
        self.critic = nn.Linear(s.out.shape[1], 1)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) - self.critic(s.out).mean()

    def rivals(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return (self.critic(s.out) - self.critic(t.out)).mean() + self.critic(s.out).square().mean()


class Fickle(Right):
    """Not finite for a small batch."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) * (1.0 if len(s.out) == ROWS else float("nan"))


class Leaking(Right):
    """Lets its gradient into the teacher."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, Seen(t.model(batch.x)), batch)


class Idle(Right):
    """Has a module that learns nothing."""

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        super().build(s, t, batch)
        self.project = nn.Linear(3, 3)


class Hollow(Right):
    """Teaches its own module, and the student nothing."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s.detach(), t, batch) + 0 * s.out.sum()


class Drifting(Right):
    """Begins with other weights every time."""

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        chance = torch.Generator()
        chance.seed()
        self.scale = nn.Parameter(torch.rand(s.out.shape[1], generator=chance))


class Adopting(Right):
    """Trains the teacher's head as if it were its own."""

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        super().build(s, t, batch)
        self.head = t.model.head

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) + self.head.bias.square().mean()


class Waking(Right):
    """Puts the teacher to work."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        t.model.train()
        return super().loss(s, t, batch)


class Soothing(Right):
    """Puts the student to rest."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        s.model.eval()
        return super().loss(s, t, batch)


class Ordered(Right):
    """Compares each row with its neighbour's answer."""

    card = replace(Right.card, zero_at_match=False)

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, Seen(t.out.roll(1, 0)), batch)


class Coarse(Right):
    """Divides by what bfloat16 rounds to 0."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) / (1.001 * torch.ones_like(s.out) - 1).mean()


class Hopeful(Right):
    """Trusts that every class is there."""

    card = replace(Right.card, needs=frozenset({"labels"}))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) + s.out[batch.y == 2].square().mean()


class Secret(Right):
    """Reads labels and does not say so."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) * (1 + (batch.y == 2).sum())


class Diluting(Labelled):
    """Divides the labelled rows' sum by the number of all rows."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return (((s.out - t.out) * self.scale).square().mean(1) * (batch.y != IGNORE)).mean()


class Local(Labelled):
    """Divides by the labelled rows at hand."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch.replace(labelled=None))


class Relating(Right):
    """Compares rows, and says that it does not."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(Seen(s.out.mean(0)), Seen(t.out.mean(0)), batch)


class Restless(Right):
    """Is never content."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) + s.out.square().mean()


class Feigning(Right):
    """Has a gradient that is not its loss's."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, Seen(t.out + 0.5 * (s.out - s.out.detach())), batch)


class Breaking(Right):
    """Looks at a number in the middle of the graph."""

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return super().loss(s, t, batch) * (1 if float(s.out.detach().sum()) > 0 else 2)


class Forgetful(Right):
    """Remembers in a plain attribute."""

    mean = 1.0

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        loss = super().loss(s, t, batch)
        self.mean = 0.9 * self.mean + 0.1 * float(loss.detach())
        return loss / self.mean


class Curt(Right):
    """Refuses, and does not say what it saw."""

    card = replace(Right.card, taps=("stage2",))

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        super().build(s, t, batch)
        if s.at["stage2"].shape != t.at["stage2"].shape:
            raise Refused("This pair does not fit.")


class Peeking(Right):
    """Reads the teacher's model and does not say so."""

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        super().build(s, t, batch)
        self.register_buffer("bias", t.model.head.bias.detach().clone())


class Absent(Right):
    """Reads the teacher's answer, and says that it does not."""

    card = replace(Right.card, reads_out=False)


WRONG: list[tuple[Make, Callable[[Make], None]]] = [
    (Fickle, check_loss_is_one_finite_number),
    (Drifting, check_assembly_leaves_no_trace),
    (Leaking, check_gradient_reaches_the_learners_only),
    (Idle, check_gradient_reaches_the_learners_only),
    (Hollow, check_gradient_reaches_the_learners_only),
    (Adopting, check_teacher_stays_as_it_is),
    (Waking, check_teacher_stays_as_it_is),
    (Soothing, check_weight_zero_is_plain_training),
    (Ordered, check_order_of_rows),
    (Coarse, check_bfloat16),
    (Hopeful, check_absent_classes),
    (Secret, check_unlabelled_rows),
    (Diluting, check_unlabelled_rows),
    (Local, check_parts_of_a_batch),
    (Relating, check_parts_of_a_batch),
    (Restless, check_zero_at_match),
    (Feigning, check_gradient_is_the_true_one),
    (Breaking, check_compiles_whole),
    (Forgetful, check_resumes),
    (Curt, check_any_pair_works_or_is_refused),
    (Peeking, check_what_a_stored_teacher_lacks),
    (Absent, check_whether_it_reads_the_answer),
]


@pytest.mark.parametrize("make", [Right, Labelled, Narrow, Contested])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_right_method_passes(check: Callable[[Make], None], make: Make) -> None:
    check(make)


@pytest.mark.parametrize(("make", "check"), WRONG, ids=lambda thing: thing.__name__.removeprefix("check_"))
def test_a_wrong_method_is_caught(make: Make, check: Callable[[Make], None]) -> None:
    fitting(make)  # it gets as far as the check
    with pytest.raises(AssertionError):
        check(make)


def test_every_check_can_fail() -> None:
    assert {check for _, check in WRONG} == set(CHECKS)
