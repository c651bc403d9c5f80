"""A teacher's shorter ways give the plain answers, and the model does not show that they were taken."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import registry
from limbeck.core.batch import Batch
from limbeck.core.fast import learns_last
from limbeck.core.keyed import forked, generator
from limbeck.core.taps import Seen, Tapped
from limbeck.core.teachers import Frozen, MeanOf

BATCH = Batch(torch.randn(3, 3, 32, 32, generator=generator("images")))
PLAIN = {"fold": False, "channels_last": False, "stop": False}


def lived_in(model: nn.Module) -> nn.Module:
    """With BatchNorms as after training: each channel its own."""
    for n, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        draw = generator("lived in", n)
        with torch.no_grad():
            if m.running_mean is not None:
                m.running_mean.normal_(0, 0.3, generator=draw)
                m.running_var.uniform_(0.5, 2, generator=draw)
            if m.weight is not None:
                m.weight.uniform_(-2, 2, generator=draw)
                m.bias.normal_(0, 0.3, generator=draw)
    return model.eval()


def net(name: str = "resnet8") -> nn.Module:
    with forked(0, name):
        return lived_in(registry.find("model", name)(classes=10))


def teacher(model: nn.Module, taps: tuple[str, ...] = (), **options: object) -> Frozen:
    frozen = Frozen(model, **options)
    frozen.look(taps)
    return frozen


def close(a: Seen, b: Seen, rounding: float = 1e-5) -> None:
    assert a.at.keys() == b.at.keys()
    for x, y in zip((a.out, *a.at.values()), (b.out, *b.at.values()), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert (x - y).abs().max() <= rounding * y.abs().max()


def equal(a: Seen, b: Seen) -> None:
    close(a, b, 0.0)


def folded(frozen: Frozen, batch: Batch = BATCH) -> list[str]:
    """The BatchNorms that are folded, once the teacher has answered."""
    frozen(batch)
    return [] if frozen.fast is None else [norm for _, norm in frozen.fast.folds]


# --- the networks of the house ---

NORMS = {
    "resnet20": 21,
    "resnet8x4": 10,
    "wrn_16_2": 6,  # of 13: the others follow a sum
    "vgg8": 5,
    "mobilenetv2_half": 53,
    "shufflenet_v1": 49,
    "shufflenet_v2": 56,
}


@pytest.mark.parametrize("name", NORMS)
def test_answers_and_taps_are_the_plain_ones(name: str) -> None:
    model = net(name)
    taps = tuple(model.TAPS)
    quick = teacher(model, taps)
    close(quick(BATCH), teacher(model, taps, **PLAIN)(BATCH))
    assert len(folded(quick)) == NORMS[name]
    assert quick.fast.channels_last


def test_a_transformer_has_nothing_to_fold() -> None:
    model = net("vit_tiny")
    quick = teacher(model, ("stage1", "pooled"))
    equal(quick(BATCH), teacher(model, ("stage1", "pooled"), **PLAIN)(BATCH))
    assert quick.fast is None


def test_each_has_a_switch() -> None:
    def ways(**options: bool) -> str:
        frozen = teacher(net(), **options)
        frozen(BATCH)
        return str(frozen.fast)

    assert ways() == "9 BatchNorms folded into convolutions, channels_last"
    assert ways(channels_last=False) == "9 BatchNorms folded into convolutions"
    assert ways(fold=False) == "channels_last"
    assert ways(**PLAIN) == "None"


def test_the_model_is_untouched() -> None:
    model = net()
    tensors = [*model.parameters(), *model.buffers()]
    before, versions = copy.deepcopy(model.state_dict()), [t._version for t in tensors]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    quick, draws = teacher(model, ("stage1",)), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    seen = quick(BATCH)
    assert quick.fast is not None and seen.model is model and seen.modules["stage1"] is model.layer1
    assert [t._version for t in tensors] == versions
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert all(p.requires_grad and p.grad is None and p.is_contiguous() for p in model.parameters())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), draws)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert not seen.out.requires_grad and not seen.at["stage1"].requires_grad


def test_the_answer_comes_in_the_usual_layout_and_maps_as_they_lie() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    quick = teacher(dense, ("1",))
    seen = quick(BATCH)
    assert quick.fast is not None and seen.out.is_contiguous()
    assert seen.at["1"].is_contiguous(memory_format=torch.channels_last)


def test_with_gradient_it_is_the_plain_model() -> None:
    model = net()
    quick = teacher(model)
    quick(BATCH)
    x = BATCH.x.clone().requires_grad_()
    assert torch.equal(quick.through(x).out, model(x))


# --- what taps look at stays what it is ---


@pytest.mark.parametrize("tap", ["layer1.0.conv1", "layer1.0.bn1:in"])
def test_nothing_folds_under_a_tap(tap: str) -> None:
    model = net()
    quick = teacher(model, (tap,))
    close(quick(BATCH), teacher(model, (tap,), **PLAIN)(BATCH))
    assert "layer1.0.bn1" not in folded(quick) and len(folded(quick)) == 8


def test_a_tap_may_see_a_convolution_from_further_out() -> None:
    model, tap = net("mobilenetv2_half"), "stages.0.0.branch"
    quick = teacher(model, (tap,))
    close(quick(BATCH), teacher(model, (tap,), **PLAIN)(BATCH))
    assert "stages.0.0.norm" not in folded(quick) and len(folded(quick)) == 52


def test_a_later_tap_is_right_too() -> None:
    model = net()
    quick = teacher(model)
    assert "bn1" in folded(quick)
    quick.look(["conv1"])
    close(quick(BATCH), teacher(model, ("conv1",), **PLAIN)(BATCH))
    assert "bn1" not in folded(quick)


# --- what does not fold ---


class Pair(nn.Module):
    """conv → norm, and whatever a test does with them."""

    def __init__(self, forward: Callable[["Pair", Tensor], object], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)
        self.register_buffer("gate", torch.zeros(()))
        self.steps = forward

    def forward(self, x: Tensor) -> object:
        return self.steps(self, x)


class Own(nn.BatchNorm2d):
    """May do more than the one it comes from."""


def twice_read(m: Pair, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + m.gate * y


def both_shown(m: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.conv(x)
    return m.norm(y), y


def twice_run(m: Pair, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + m.gate * m.conv(x)


def twice_normed(m: Pair, x: Tensor) -> Tensor:
    other = x.new_ones(len(x), 4, 30, 30)
    return m.gate * m.norm(other) + m.norm(m.conv(x))


def weight_read(m: Pair, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + m.gate * m.conv.weight.sum()


def decided(m: Pair, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) if m.gate == 0 else m.norm(y.relu())


def between(m: Pair, x: Tensor) -> Tensor:
    return m.norm(m.conv(x) * 1.0)


def asked_for(m: Pair, x: Tensor) -> Tensor:
    """No run shows that a twin would be told apart: its answers do."""
    y = m.norm(m.conv(x))
    return y if isinstance(m.norm, nn.BatchNorm2d) else 2 * y


def straight(m: Pair, x: Tensor) -> Tensor:
    return m.norm(m.conv(x))


@pytest.mark.parametrize(
    "forward", [twice_read, both_shown, twice_run, twice_normed, weight_read, decided, between, asked_for]
)
def test_a_batchnorm_that_is_not_all_that_follows_stays(forward: Callable[[Pair, Tensor], object]) -> None:
    """The gate hides at first what else reads the convolution."""
    with forked(0):
        model = lived_in(Pair(forward))
    quick, plain = teacher(model), teacher(model, **PLAIN)
    assert folded(quick) == []
    for gate in (0.0, 1.0):
        model.gate.fill_(gate)
        a, b = quick(BATCH).out, plain(BATCH).out
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("norm", "count"),
    [
        (nn.BatchNorm2d(4, affine=False), 1),
        (nn.BatchNorm2d(4, eps=0.3), 1),
        (nn.BatchNorm2d(4, track_running_stats=False), 0),
        (Own(4), 0),
        (nn.GroupNorm(2, 4), 0),
    ],
    ids=["no factor", "eps", "of the batch", "somebody's own", "of groups"],
)
def test_which_norms_fold(norm: nn.Module, count: int) -> None:
    with forked(0):
        model = lived_in(Pair(straight, norm))
    quick = teacher(model)
    assert len(folded(quick)) == count
    close(quick(BATCH), teacher(model, **PLAIN)(BATCH))


def test_a_norm_that_is_kept_elsewhere_too_is_left() -> None:
    """A list of modules is no part of the model for torch, so a twin calls those of the original."""

    def hidden(m: Pair, x: Tensor) -> Tensor:
        return m.aside[0](m.conv(x))

    with forked(0):
        model = lived_in(Pair(hidden))
    model.aside = [model.norm]
    quick = teacher(model)
    close(quick(BATCH), teacher(model, **PLAIN)(BATCH))
    assert folded(quick) == []


def test_a_model_that_counts_on_its_layout_is_folded_all_the_same() -> None:
    with forked(0):
        flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), Flat())
    model = lived_in(flat)
    quick = teacher(model)
    close(quick(BATCH), teacher(model, **PLAIN)(BATCH))
    assert folded(quick) == ["1"] and not quick.fast.channels_last


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


class Counting(nn.Module):
    """Moves at every call, in eval too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def test_a_model_that_moves_is_left_and_called_once() -> None:
    model = lived_in(Counting())
    quick = teacher(model)
    for call in (1, 2):
        quick(BATCH)
        assert model.calls == call
    assert quick.fast is None


def test_looking_for_it_uses_up_no_draw() -> None:
    def drawing(m: Pair, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + m.gate * torch.rand(())

    with forked(0):
        model = lived_in(Pair(drawing))
    after = []
    for options in (PLAIN, {}):
        with forked(0):
            frozen = teacher(model, **options)
            frozen(BATCH)
            after.append(torch.get_rng_state())
    assert frozen.fast is not None
    assert torch.equal(*after)


def test_half_precision_weights_are_left() -> None:
    quick = teacher(net().bfloat16())
    quick(BATCH.replace(x=BATCH.x.bfloat16()))
    assert quick.fast is None


# --- hooks of others ---


def test_who_listens_is_heard() -> None:
    model, heard = net(), []
    quick = teacher(model, ("stage1",))
    quick(BATCH)
    assert quick.fast is not None
    model.layer3.register_forward_hook(lambda module, args, out: heard.append(out))
    equal(quick(BATCH), teacher(model, ("stage1",), **PLAIN)(BATCH))
    assert len(heard) == 2
    quick.at_taps(BATCH)
    assert len(heard) == 3
    late = teacher(model)
    late(BATCH)
    assert len(heard) == 4 and late.fast is None


# --- the model changes ---


def trained(model: nn.Module) -> None:
    """One step of an optimiser, BatchNorms with it."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    F.cross_entropy(model(BATCH.x), torch.tensor([0, 1, 2])).backward()
    optimiser.step()
    model.eval()


def moved(model: nn.Module) -> None:
    """Only the BatchNorms' statistics."""
    model.train()
    with torch.no_grad():
        model(BATCH.x)
    model.eval()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v + v.abs() / 3 for k, v in model.state_dict().items()})


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v + v.abs() / 3 for k, v in model.state_dict().items()}, assign=True)


def head_only(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.weight.mul_(2)


def other_activation(model: nn.Module) -> None:
    model.layer2[0].relu1 = nn.Tanh()


@pytest.mark.parametrize("change", [trained, moved, loaded, assigned, head_only, other_activation])
def test_it_follows_the_model(change: Callable[[nn.Module], None]) -> None:
    model = net()
    quick = teacher(model, ("stage2",))
    before = quick(BATCH)
    change(model)
    after = quick(BATCH)
    close(after, teacher(model, ("stage2",), **PLAIN)(BATCH))
    assert (after.out - before.out).abs().max() > 1e-3


def test_it_follows_the_model_into_another_precision() -> None:
    model = net()
    quick = teacher(model)
    quick(BATCH)
    model.double()
    double = BATCH.replace(x=BATCH.x.double())
    close(quick(double), teacher(model, **PLAIN)(double), 1e-12)


def test_weights_are_not_folded_at_every_call() -> None:
    quick = teacher(net())
    quick(BATCH)
    twin = quick.fast._current()
    quick(BATCH)
    assert quick.fast._current() is twin
    assert copy.deepcopy(quick).fast._twin is None


def test_a_copy_has_its_own() -> None:
    model = net()
    quick = teacher(model, ("stage2",))
    before = quick(BATCH)
    twin = copy.deepcopy(quick)
    loaded(twin.model)
    equal(quick(BATCH), before)
    close(twin(BATCH), teacher(twin.model, ("stage2",), **PLAIN)(BATCH))
    assert (twin(BATCH).out - before.out).abs().max() > 1e-3
    assert twin(BATCH).model is twin.model


# --- beside precision, compilers, moving teachers ---


def test_under_autocast_it_rounds_no_worse() -> None:
    model = net()
    exact = teacher(model, **PLAIN)(BATCH).out
    plain, quick = (teacher(model, precision=torch.bfloat16, **o)(BATCH).out for o in (PLAIN, {"fold": True}))
    assert quick.dtype == torch.float32 and not torch.equal(quick, exact)
    assert (quick - exact).abs().max() < 2 * (plain - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_compiler_gets_the_plain_model() -> None:
    model = nn.Sequential(*[nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)])
    quick = teacher(lived_in(model), ("2",))
    close(quick(BATCH), teacher(model, ("2",), **PLAIN)(BATCH))
    traced = torch.compile(quick.__call__, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        close(traced(BATCH), teacher(model, ("2",), **PLAIN)(BATCH))
        loaded(model)
    stopped = torch.compile(quick.at_taps, backend="aot_eager", fullgraph=True)(BATCH)
    assert stopped.out is None
    close(Seen(stopped.at["2"]), Seen(quick(BATCH).at["2"]))


def test_a_teacher_that_moves_at_every_step_takes_no_copy() -> None:
    mean = MeanOf(net())
    mean.look(["stage1"])
    mean(BATCH)
    assert mean.mean.fast is None
    assert mean.at_taps(BATCH).out is None


# --- leaving after the last tap ---


class Stages(nn.Module):
    """Counts how far it went; `guarded` as models are that try again when memory runs out."""

    def __init__(self, guarded: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.ran: list[str] = []
        self.guarded = guarded

    def forward(self, x: Tensor) -> Tensor:
        for name in ("one", "two", "three"):
            try:
                x = getattr(self, name)(x)
            except Exception:
                assert self.guarded
            self.ran.append(name)
        return x


ROWS = Batch(torch.randn(5, 4, generator=generator("rows")))


@pytest.mark.parametrize("guarded", [False, True])
def test_the_model_is_left_after_the_last_tap(guarded: bool) -> None:
    model = Stages(guarded)
    quick = teacher(model, ("two", "one:in"))
    whole = quick(ROWS)
    model.ran.clear()
    seen = quick.at_taps(ROWS)
    assert seen.out is None and model.ran == ["one"]
    assert seen.at.keys() == whole.at.keys() and seen.model is model
    assert all(torch.equal(seen.at[name], whole.at[name]) for name in whole.at)
    model.ran.clear()
    equal(quick(ROWS), whole)
    assert model.ran == ["one", "two", "three"]


def test_who_listens_further_down_is_heard() -> None:
    model, heard = Stages(), []
    model.three.register_forward_hook(lambda module, args, out: heard.append(out))
    assert teacher(model, ("one",)).at_taps(ROWS).out is not None
    assert len(heard) == 1


def test_who_is_called_inside_another_does_not_take_its_stop_for_its_own() -> None:
    inner = Stages()
    within = Tapped(inner)
    within.look(("two",))

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> object:
            return within(x).at["two"]

    whole = Tapped(Asks(), {"first": "inner.one"})
    whole.look(("first",))
    assert whole.until_seen(ROWS.x).out is None
    assert list(whole.until_seen(ROWS.x).at) == ["first"] and within(ROWS.x).out is not None


def test_stopping_has_a_switch_and_needs_a_tap() -> None:
    assert teacher(Stages(), ("one",), stop=False).at_taps(ROWS).out.shape == (5, 4)
    assert teacher(Stages()).at_taps(ROWS).out.shape == (5, 4)


def test_stopping_goes_with_the_other_short_cuts() -> None:
    model = net()
    quick = teacher(model, ("stage1", "stage1_pre_norm"), columns=range(5))
    at = quick.at_taps(BATCH)
    assert quick.fast is not None and at.out is None and at.model is model
    plain = teacher(model, ("stage1", "stage1_pre_norm"), **PLAIN)(BATCH)
    close(Seen(plain.out, at.at), plain)


# --- a learner in channels_last ---


def learner(*layers: nn.Module) -> nn.Module:
    """Two convolutions, and what a test puts between them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *layers, nn.Conv2d(4, 5, 3))
    return model.train()


class Where(nn.Module):
    """Something else for each layout."""

    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(x)


@pytest.mark.parametrize("name", [*NORMS, "tiny_vit_32"])
def test_the_houses_networks_may_learn_in_channels_last(name: str) -> None:
    tapped = Tapped(net(name).train(), {})
    tapped.look(("stage1", "pooled"))
    assert learns_last(tapped, BATCH.x)


def test_to_ask_whether_it_may_moves_nothing() -> None:
    model = net().train()
    before, versions = copy.deepcopy(model.state_dict()), [t._version for t in model.state_dict().values()]
    draws = torch.get_rng_state()
    assert learns_last(Tapped(model), BATCH.x)
    assert all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), draws)
    after = model.state_dict()
    assert [t._version for t in after.values()] == versions
    assert all(torch.equal(after[k], before[k]) and after[k].is_contiguous() for k in before)


@pytest.mark.parametrize(
    ("between", "may"),
    [
        (nn.ReLU(), True),
        (nn.Dropout(0.5), False),
        (nn.Dropout(0.5).eval(), True),
        (nn.Dropout2d(0.5), True),  # whole channels: the draws are those of the usual layout
        (Where(lambda x: x.view(len(x), -1).view(x.shape)), False),
        (Where(lambda x: x * x.stride(1)), False),
        (Where(lambda x: x + x.flatten().as_strided(x.shape, x.stride())), False),
    ],
)
def test_one_that_shows_something_else_in_that_layout_keeps_its_own(between: nn.Module, may: bool) -> None:
    model = learner()
    model.insert(2, between)
    assert learns_last(Tapped(model), BATCH.x) is may


def test_what_has_nothing_to_gain_keeps_its_layout() -> None:
    assert not learns_last(Tapped(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())), BATCH.x)
    assert not learns_last(Tapped(net("vit_tiny")), BATCH.x)
    assert not learns_last(Tapped(learner()), {"input": BATCH.x.flatten(1)})
    assert not learns_last(Tapped(learner()), BATCH.x.to("meta"))


class Hidden(nn.Module):
    """A branch that draws on maps, and counts for nothing as its weight is now."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.weight = nn.Dropout(0.5), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * self.dropout(x)


class Scales(nn.Module):
    """In place, what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


class Made(nn.Sequential):
    def __new__(cls, *layers: nn.Module) -> "Made":
        assert layers
        return super().__new__(cls)


def test_a_draw_counts_whatever_its_weight_is_now() -> None:
    model = learner()
    model.insert(2, Hidden())
    assert not learns_last(Tapped(model), BATCH.x)


def test_what_it_is_given_is_not_changed() -> None:
    x = BATCH.x.clone()
    assert not learns_last(Tapped(nn.Sequential(Scales(), *learner())), x) and torch.equal(x, BATCH.x)


def test_what_cannot_be_tried_keeps_its_layout() -> None:
    assert not learns_last(Tapped(Made(*learner())), BATCH.x)


def test_one_channel_lies_alike_in_both() -> None:
    gray = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    assert not learns_last(Tapped(gray), BATCH.x[:, :1])


def test_it_is_tried_in_full_precision() -> None:
    model = learner()
    model.insert(2, Where(lambda x: x + 1e-2 * x.flatten().as_strided(x.shape, x.stride())))
    with torch.autocast("cpu", torch.bfloat16):
        assert not learns_last(Tapped(model), BATCH.x)


def test_images_may_be_named() -> None:
    assert learns_last(Tapped(learner()), {"input": BATCH.x})
    tapped = Tapped(learner())
    tapped.channels_last = True
    tapped.look(("1",))
    lies = tapped({"input": BATCH.x}).at["1"]
    assert lies.is_contiguous(memory_format=torch.channels_last)


def test_a_learner_that_others_listen_to_keeps_its_layout() -> None:
    model = learner()
    handle = model[0].register_forward_hook(lambda *given: None)
    assert not learns_last(Tapped(model), BATCH.x)
    handle.remove()
    assert learns_last(Tapped(model), BATCH.x)
