"""CRD against a slow loop over gathered vectors, written from the equation, and what its banks must hold."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature import crd
from limbeck.knowledge.feature.crd import CRD, _slope, nce

N, CLASSES, ROWS = 30, 4, 6
FEW, ALL = 12, 50  # fewer negatives than samples are drawn; as many or more, and all of them count


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels() -> Tensor:
    """Classes of unequal size; samples 3, 13 and 23 are unlabelled."""
    y = torch.arange(N) ** 2 % CLASSES
    y[-5:], y[3::10] = 2, IGNORE
    y[9] = 3
    return y


def lesson(epoch: int = 0, y: Tensor | None = None) -> Lesson:
    return Lesson(seed=5, epoch=epoch, samples=N, classes=CLASSES, labels=labels() if y is None else y)


def batch(index: Tensor, at: Lesson | None = None) -> Batch:
    return Batch(rows(len(index), 1), index=index, lesson=at or lesson())


def seen(x: Tensor, tap: str = "pooled") -> Seen:
    return Seen(None, {tap: x})


def built(negatives: int = FEW, y: Tensor | None = None, dtype: torch.dtype = torch.float64, **knobs) -> CRD:
    """For students 3 and teachers 7 wide."""
    torch.manual_seed(0)
    method = CRD(negatives, width=5, **knobs)
    s, t = (seen(rows(2, width), method.tap) for width in (3, 7))
    method.build(s, t, batch(torch.tensor([0, 1]), lesson(y=y)))
    return method.to(dtype)


def step(method: CRD, index: Tensor, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """The loss of some samples, and its gradient in what the student showed."""
    s, t = rows(len(index), 3, seed=seed).requires_grad_(), rows(len(index), 7, seed=seed + 1)
    loss = method.loss(seen(s), seen(t), batch(index, lesson(epoch)))
    loss.backward()
    assert s.grad is not None
    return loss.detach(), s.grad


# --- the equation, one pair at a time ---


@dataclass
class Slow:
    """The method as the official code has it: vectors gathered for each pair, in plain autograd."""

    project_s: nn.Linear
    project_t: nn.Linear
    bank_s: Tensor
    bank_t: Tensor
    z: tuple[float, float] | None = None
    tau: float = 0.07
    momentum: float = 0.5
    epsilon: float = 0.0

    def loss(self, s: Tensor, t: Tensor, index: list[int], pairs: list[dict[int, float]], k: int) -> Tensor:
        """`pairs`: for each row, the negatives and how many times each counts."""
        s, t = (project(x) for project, x in ((self.project_s, s), (self.project_t, t)))
        s, t = (torch.stack([row / row.square().sum().sqrt() for row in x]) for x in (s, t))
        ways = ((s, self.bank_t.clone()), (t, self.bank_s.clone()))
        if self.z is None:
            self.z = tuple(self.average(*way, index, pairs, k) * N for way in ways)  # type: ignore[assignment]
        total = torch.zeros((), dtype=s.dtype)
        for (anchors, bank), z in zip(ways, self.z, strict=True):
            for anchor, own, others in zip(anchors, index, pairs, strict=True):
                total = total - self.h(anchor, bank[own], z, k).log()
                for i, times in others.items():
                    total = total - times * (1 - self.h(anchor, bank[i], z, k)).log()
        for bank, new in ((self.bank_s, s), (self.bank_t, t)):
            for i, row in zip(index, new.detach(), strict=True):
                moved = self.momentum * bank[i] + (1 - self.momentum) * row
                bank[i] = moved / moved.square().sum().sqrt()
        return total / len(index)

    def p(self, a: Tensor, v: Tensor) -> Tensor:
        return ((a * v).sum() / self.tau).exp()

    def h(self, a: Tensor, v: Tensor, z: float, k: int) -> Tensor:
        p = self.p(a, v) / z
        return p / (p + k / N + self.epsilon)

    def average(
        self, anchors: Tensor, bank: Tensor, index: list[int], pairs: list[dict[int, float]], k: int
    ) -> float:
        means = []
        for a, own, others in zip(anchors.detach(), index, pairs, strict=True):
            of_all = self.p(a, bank[own]) + sum(times * self.p(a, bank[i]) for i, times in others.items())
            means.append(of_all / (1 + k))
        return float(sum(means)) / len(means)


def counted(method: CRD, index: Tensor, epoch: int = 0) -> list[dict[int, float]]:
    """Each row's negatives and how many times they count."""
    found = []
    pairs, times = method.pairs(index, lesson(epoch))
    for own, row, counts in zip(index, pairs.tolist(), times.expand_as(pairs).tolist(), strict=True):
        assert row[0] == own and counts[0] == 1
        tally: dict[int, float] = {}
        for i, count in zip(row[1:], counts[1:], strict=True):
            tally[i] = tally.get(i, 0.0) + count
        found.append({i: count for i, count in tally.items() if count})
    return found


def slow(method: CRD, **changes: float) -> Slow:
    def copied(linear: nn.Linear) -> nn.Linear:
        twin = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
        twin.load_state_dict(linear.state_dict())
        return twin

    banks = method.bank_s.clone(), method.bank_t.clone()
    return Slow(copied(method.project_s), copied(method.project_t), *banks, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", ["one", "several"])
@pytest.mark.parametrize("negatives", [FEW, ALL, 1])
def test_three_steps_equal_the_loop_in_loss_gradient_and_banks(
    negatives: int, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "several":
        monkeypatch.setattr(crd, "BLOCK", 3 * negatives)
    method = built(negatives)
    reference = slow(method)
    for count, index in enumerate([[0, 3, 9, 13, 28, 7], [4, 3, 11, 0], [29, 28, 27, 26, 25, 24, 2]]):
        s, t = rows(len(index), 3, seed=count), rows(len(index), 7, seed=count + 50)
        here, there = s.clone().requires_grad_(), s.clone().requires_grad_()
        negative = counted(method, torch.tensor(index), epoch=count)
        found = method.loss(seen(here), seen(t), batch(torch.tensor(index), lesson(count)))
        expected = reference.loss(there, t, index, negative, negatives)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
        for module in (method, reference.project_s, reference.project_t):
            module.zero_grad()
        found.backward()
        expected.backward()
        torch.testing.assert_close(here.grad, there.grad, rtol=1e-6, atol=1e-9)
        for name in ("project_s", "project_t"):
            for p, q in zip(
                getattr(method, name).parameters(), getattr(reference, name).parameters(), strict=True
            ):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
                assert p.grad.abs().max() > 1e-3
        torch.testing.assert_close(method.bank_s, reference.bank_s, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(method.bank_t, reference.bank_t, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(method.log_z.exp(), torch.tensor(reference.z, dtype=torch.float64))


def test_knobs_are_handed_on() -> None:
    method = built(temperature=0.3, momentum=0.9, tap="embedding")
    assert method.looks() == ("embedding",)
    reference = slow(method, tau=0.3, momentum=0.9)
    index, s, t = torch.tensor([0, 3, 9]), rows(3, 3), rows(3, 7, seed=1)
    negative = counted(method, index)
    found = method.loss(seen(s, "embedding"), seen(t, "embedding"), batch(index))
    torch.testing.assert_close(found, reference.loss(s, t, index.tolist(), negative, FEW), rtol=1e-9, atol=0)
    torch.testing.assert_close(method.bank_s, reference.bank_s)


def test_the_official_epsilon_changes_nothing_that_matters() -> None:
    method, index = built(), torch.tensor([0, 3, 9])
    official = slow(method, epsilon=1e-7)
    s, t, negative = rows(3, 3), rows(3, 7, seed=1), counted(method, index)
    found = method.loss(seen(s), seen(t), batch(index))
    torch.testing.assert_close(found, official.loss(s, t, index.tolist(), negative, FEW), rtol=1e-5, atol=0)


def test_nce_is_two_log_sigmoids() -> None:
    scores, times = rows(3, 5), torch.tensor([[1.0, 2.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    total = 0.0
    for row in scores.tolist():
        for i, (score, count) in enumerate(zip(row, times[0].tolist(), strict=True)):
            h = 1 / (1 + math.exp(0.7 - score))
            total -= count * math.log(h if i == 0 else 1 - h)
    found = nce(scores, times, torch.tensor(0.7, dtype=torch.float64))
    assert found.item() == pytest.approx(total / 3, rel=1e-12)


def test_the_slope_is_the_gradient_of_nce() -> None:
    scores, noise = rows(3, 5).requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    for times in (
        torch.tensor([[1.0, 2.0, 0.0, 1.0, 0.5]]).double(),
        torch.cat([torch.ones(3, 1), rows(3, 4) ** 2], 1),
    ):
        (grad,) = torch.autograd.grad(nce(scores, times, noise), scores)
        torch.testing.assert_close(_slope(scores.detach(), times, noise), grad)


@pytest.mark.parametrize("negatives", [FEW, ALL])
def test_gradcheck(negatives: int) -> None:
    method, index = built(negatives), torch.tensor([0, 3, 9, 13])
    banks = method.bank_s.clone(), method.bank_t.clone()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        method.bank_s.copy_(banks[0])
        method.bank_t.copy_(banks[1])
        return method.loss(seen(s), seen(t), batch(index))

    step(method, index)  # finds Z, which then stays
    assert torch.autograd.gradcheck(loss, (rows(4, 3).requires_grad_(), rows(4, 7).requires_grad_()))


# --- who is contrasted with whom ---


def kin(y: Tensor, i: int) -> set[int]:
    """Those known to be of i's class; of an unlabelled sample, itself."""
    return {i} if y[i] == IGNORE else {j for j in range(len(y)) if y[j] == y[i]}


UNLABELLED = torch.full((N,), IGNORE)


@pytest.mark.parametrize("y", [labels(), UNLABELLED], ids=["labels", "no label"])
def test_negatives_are_all_who_are_not_known_to_be_kin(y: Tensor) -> None:
    everybody = torch.arange(N)
    for negatives in (N - 1, ALL):
        method = built(negatives, y)
        met: list[set[int]] = [set() for _ in range(N)]
        for epoch in range(30 if negatives < N else 1):
            for i, negative in enumerate(counted(method, everybody, epoch)):
                met[i] |= negative.keys()
                assert sum(negative.values()) == pytest.approx(negatives)
        assert met == [set(range(N)) - kin(y, i) for i in range(N)]


def test_without_any_labels_it_is_as_with_unlabelled_samples() -> None:
    none, unlabelled = built(y=UNLABELLED), CRD(FEW, width=5)
    torch.manual_seed(0)
    unlabelled.build(
        seen(rows(2, 3)), seen(rows(2, 7)), batch(torch.tensor([0]), replace(lesson(), labels=None))
    )
    everybody = torch.arange(N)
    assert torch.equal(none.pairs(everybody, lesson())[0], unlabelled.pairs(everybody, lesson())[0])


def test_draws_are_fair() -> None:
    """On average each negative counts K/M times, which is what it counts when all do."""
    method, epochs = built(), 400
    index = torch.tensor([0, 3, 28])
    pairs = torch.cat([method.pairs(index, lesson(epoch))[0][:, 1:] for epoch in range(epochs)], 1)
    for i, drawn in zip(index.tolist(), pairs, strict=True):
        others = N - len(kin(labels(), i))
        mean = epochs * FEW / others
        counts = drawn.bincount(minlength=N)
        assert (counts - mean)[counts > 0].abs().max() < 5 * math.sqrt(mean)
        (weights,) = counted(built(ALL), torch.tensor([i]))
        assert all(weight == pytest.approx(ALL / others) for weight in weights.values())


def test_draws_depend_on_the_sample_and_the_epoch_alone() -> None:
    method, some = built(), torch.tensor([23, 4, 17])
    whole = method.pairs(torch.arange(N), lesson())[0]
    assert torch.equal(method.pairs(some, lesson())[0], whole[some])
    assert not torch.equal(method.pairs(torch.arange(N), lesson(epoch=1))[0], whole)
    assert len(set(map(tuple, whole[:, 1:].tolist()))) == N, "two samples would share their draws"


def test_the_labels_of_the_batch_are_not_read() -> None:
    index, s, t = torch.tensor([0, 3, 9]), rows(3, 3), rows(3, 7, seed=1)
    for y in (None, torch.full((3,), IGNORE), torch.tensor([1, 1, 1])):
        shown = batch(index).replace(y=y)
        torch.testing.assert_close(built().loss(seen(s), seen(t), shown), step(built(), index)[0])


# --- what is remembered ---


def test_banks_begin_as_noise_of_length_1() -> None:
    method = CRD(width=128)
    method.build(seen(rows(2, 3)), seen(rows(2, 7)), batch(torch.tensor([0]), replace(lesson())))
    for bank in (method.bank_s, method.bank_t):
        assert bank.shape == (N, 128)
        assert (bank.square().sum(1) - 1).abs().max() < 0.4 and abs(bank.square().mean() * 128 - 1) < 0.05
        assert abs(bank.mean()) < 0.01
    assert not torch.equal(method.bank_s, method.bank_t)


def test_a_step_moves_the_rows_of_its_samples_and_no_others() -> None:
    method, index = built(), torch.tensor([28, 3, 9])
    before = method.bank_s.clone(), method.bank_t.clone()
    step(method, index)
    for now, then in zip((method.bank_s, method.bank_t), before, strict=True):
        assert sorted((now != then).any(1).nonzero()[:, 0].tolist()) == sorted(index.tolist())
        torch.testing.assert_close(now[index].norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_a_sample_shown_more_than_once_is_remembered_by_its_mean() -> None:
    twice, shown = torch.tensor([4, 9, 4, 4]), rows(4, 3)
    t = rows(4, 7, seed=1)
    states = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        method = built()
        then = method.bank_s.clone()
        method.loss(seen(shown[order]), seen(t[order]), batch(twice[order]))
        states.append(method.bank_s)
        torch.testing.assert_close(states[0], method.bank_s)
    embedded = F.normalize(method.project_s(shown))
    mean = embedded[[0, 2, 3]].mean(0)
    torch.testing.assert_close(states[0][4], F.normalize(0.5 * then[4] + 0.5 * mean, dim=0))
    torch.testing.assert_close(states[0][9], F.normalize(0.5 * then[9] + 0.5 * embedded[1], dim=0))


def test_z_makes_the_first_batch_average_1_in_n_and_stays() -> None:
    method, index = built(), torch.tensor([0, 3, 9])
    bank, s = method.bank_t.clone(), rows(3, 3)
    step(method, index)
    pairs, _ = method.pairs(index, lesson())
    scores = torch.einsum("bd,bkd->bk", F.normalize(method.project_s(s)), bank[pairs]) / 0.07
    assert (scores - method.log_z[0]).exp().mean().item() == pytest.approx(1 / N, rel=1e-9)
    first = method.log_z.clone()
    assert first.isfinite().all() and first[0] != first[1]
    step(method, torch.tensor([1, 2]), seed=9)
    assert torch.equal(method.log_z, first)


def test_a_checkpoint_holds_what_is_remembered_and_not_what_the_data_tells() -> None:
    keys = {key.split(".")[0] for key in built().state_dict()}
    assert keys == {"project_s", "project_t", "bank_s", "bank_t", "log_z"}


def test_two_processes_remember_the_same_and_share_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run twice: once to hear what it hands round, and once to be handed that of both."""
    index = torch.tensor([0, 3, 9, 13, 28, 7])
    s, t = rows(6, 3), rows(6, 7, seed=1)
    whole = built()
    both = whole.loss(seen(s), seen(t), batch(index))
    parts = [slice(0, 3), slice(3, 6)]

    def run(part: slice) -> tuple[CRD, Tensor]:
        method = built()
        return method, method.loss(seen(s[part]), seen(t[part]), batch(index[part]))

    handed: list[list[Tensor]] = []
    for part in parts:
        handed.append([])
        monkeypatch.setattr(across, "gather", lambda x: handed[-1].append(x) or x)
        run(part)
    losses = []
    for part in parts:
        calls = zip(*handed, strict=True)
        monkeypatch.setattr(across, "gather", lambda x, calls=calls: torch.cat(next(calls)))
        method, loss = run(part)
        losses.append(loss)
        for bank in ("bank_s", "bank_t", "log_z"):
            torch.testing.assert_close(getattr(method, bank), getattr(whole, bank), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(losses) / 2, both)


# --- numbers and cost ---


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):  # its storage: a broadcast view only looks large
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_holds_scores_with_the_bank_and_never_a_vector_for_each_pair() -> None:
    samples, negatives, width, b = 400, 300, 64, 8
    method = CRD(negatives, width)
    shown = Batch(rows(b, 1), index=torch.arange(b), lesson=Lesson(samples=samples))
    s, t = rows(b, 3, dtype=torch.float32).requires_grad_(), rows(b, 7, dtype=torch.float32)
    method.build(seen(s), seen(t), shown)
    with Largest() as largest:
        method.loss(seen(s), seen(t), shown).backward()
    assert largest.numel == samples * width  # the bank itself
    assert b * samples < samples * width < b * negatives * width


@pytest.mark.parametrize("negatives", [FEW, ALL])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_near(negatives: int, dtype: torch.dtype) -> None:
    """A student in half precision and its method; the teacher answers in float32."""
    index = torch.tensor([0, 3, 9, 13])
    s, t = rows(4, 3, dtype=dtype).requires_grad_(), rows(4, 7, seed=1, dtype=torch.float32)
    method = built(negatives, dtype=dtype)
    exact = built(negatives, dtype=dtype).double()
    for _ in range(2):
        loss = method.loss(seen(s), seen(t), batch(index))
        loss.backward()
        true = exact.loss(seen(s.detach().double()), seen(t.double()), batch(index))
        assert loss.dtype == torch.float32 and abs(loss - true) < 0.05 * true
        assert s.grad is not None and s.grad.isfinite().all() and s.grad.any()


def test_finite_for_dead_constant_and_equal_features() -> None:
    index = torch.tensor([0, 3, 9, 13])
    for shown in (torch.zeros(4, 3), torch.full((4, 3), 1e4), rows(1, 3).repeat(4, 1)):
        method = built(dtype=torch.float32)
        nn.init.zeros_(method.project_s.bias)
        s = shown.float().requires_grad_()
        for _ in range(2):
            method.loss(seen(s), seen(rows(4, 7).float()), batch(index)).backward()
        assert s.grad is not None and s.grad.isfinite().all() and s.grad.abs().max() < 1e3
        assert method.bank_s.isfinite().all() and method.log_z.isfinite().all()


def test_low_temperatures_do_not_overflow() -> None:
    method = built(dtype=torch.float32, temperature=0.005)  # e^200
    s = rows(4, 3, dtype=torch.float32).requires_grad_()
    loss = method.loss(seen(s), seen(rows(4, 7).float()), batch(torch.tensor([0, 3, 9, 13])))
    loss.backward()
    assert loss.isfinite() and method.log_z.isfinite().all()
    assert s.grad is not None and s.grad.isfinite().all()


def test_draws_compile_whole() -> None:
    """The contract compiles the rest, on a set so small that nothing is drawn."""
    method, index = built(), torch.tensor([0, 3, 9, 13])
    torch._dynamo.reset()
    compiled = torch.compile(method.pairs, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(index, lesson()), method.pairs(index, lesson()), strict=True):
        assert torch.equal(found, expected)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("knob", "value"),
    [("negatives", 0), ("width", 0), ("temperature", 0.0), ("temperature", math.nan), ("momentum", 1.0)],
)
def test_a_knob_out_of_range_is_refused(knob: str, value: float) -> None:
    with pytest.raises(Refused, match=f"'crd' has .*{knob} {value}|'crd' has {value} {knob}"):
        CRD(**{knob: value})  # type: ignore[arg-type]


def test_a_lesson_that_does_not_know_the_samples_is_refused() -> None:
    method = CRD()
    for at in (Lesson(), replace(lesson(), samples=9, labels=None)):
        said = f"the lesson has {at.samples} of them where the batch shows number 9"
        with pytest.raises(Refused, match=said):
            method.build(seen(rows(2, 3)), seen(rows(2, 7)), batch(torch.tensor([0, 9]), at))
    method.build(
        seen(rows(2, 3)), seen(rows(2, 7)), batch(torch.tensor([0, 8]), replace(at, labels=torch.arange(9)))
    )


def test_samples_of_one_class_are_refused() -> None:
    with pytest.raises(Refused, match="different classes, and all 30 of them are of one"):
        built(y=torch.ones(N, dtype=torch.long))
    alone = torch.ones(N, dtype=torch.long)
    alone[7] = IGNORE
    counted(built(y=alone), torch.arange(N))  # one who may be another is enough


# --- through the Distiller ---


def test_student_and_teacher_come_to_know_each_others_samples() -> None:
    """Maps of other grids and widths; no labels. At first a sample is found among 30 by chance alone."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU())
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    x, taps = torch.randn(N, 1, 6, 6), {"pooled": ""}
    shown = Batch(x, index=torch.arange(N), lesson=Lesson(samples=N))
    method = CRD(negatives=FEW, width=16)
    distiller = Distiller(student, Frozen(teacher, taps=taps), method, example=shown, task=None, taps=taps)
    adam = torch.optim.Adam(distiller.parameters(), lr=1e-2)

    def found() -> float:
        with torch.no_grad():
            here = F.normalize(method.project_s(student(x).flatten(1)))
            there = F.normalize(method.project_t(teacher(x).flatten(1)))
        return ((here @ there.T).argmax(1) == torch.arange(N)).float().mean().item()

    assert found() < 0.2
    for epoch in range(60):
        at = Lesson(samples=N, epoch=epoch)
        adam.zero_grad()
        distiller(x, None, torch.arange(N), at)["loss"].backward()
        adam.step()
    assert found() > 0.9
    assert all(p.grad is None for p in teacher.parameters())
