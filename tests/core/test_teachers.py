"""A teacher answers, lets gradient pass to what it is shown when asked to, and nothing of it ever moves."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.refused import Refused
from limbeck.core.taps import Seen
from limbeck.core.teachers import Ensemble, Frozen, MeanOf, Peer, Teacher


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCH = Batch(randn(6, 3), torch.zeros(6, dtype=torch.long), torch.arange(6))


def net(classes: int = 4, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, classes)).eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: v.clone() for name, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def both_verbs(teacher: Teacher) -> list[Seen]:
    return [teacher(BATCH), teacher.through(BATCH.x), teacher.check(BATCH)]


each_kind = pytest.mark.parametrize(
    "make", [Frozen, MeanOf, lambda m: Ensemble([Frozen(m)])], ids=["frozen", "mean", "ensemble"]
)


# --- the two verbs ---


@each_kind
def test_an_answer_has_no_gradient(make: Callable[[nn.Module], Teacher]) -> None:
    x = BATCH.x.clone().requires_grad_()
    assert not make(net())(BATCH.replace(x=x)).out.requires_grad


def test_an_answer_can_be_saved_for_a_backward() -> None:
    answer = Frozen(net())(BATCH).out  # under inference_mode this multiplication would fail
    weight = torch.ones(4, requires_grad=True)
    (answer * weight).sum().backward()
    assert torch.equal(weight.grad, answer.sum(0))


@each_kind
def test_through_lets_gradient_pass_to_x_and_never_to_a_parameter(
    make: Callable[[nn.Module], Teacher],
) -> None:
    model, x = net(), BATCH.x.clone().requires_grad_()
    teacher = make(model)
    teacher.through(x).out.square().sum().backward()
    expected = BATCH.x.clone().requires_grad_()
    out = model(expected) if not isinstance(teacher, Ensemble) else model(expected).log_softmax(1)
    (gradient,) = torch.autograd.grad(out.square().sum(), expected)
    assert torch.allclose(x.grad, gradient)
    inside = [model, *([teacher.model] if isinstance(teacher, MeanOf) else [])]
    assert all(p.grad is None for m in inside for p in m.parameters())


def test_through_puts_every_flag_back_also_when_the_forward_fails() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    teacher = Frozen(model)
    teacher.through(BATCH.x)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        teacher.through(torch.zeros(2, 9))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_nothing_moves_and_eval_is_restored_after_somebodys_train() -> None:
    model = net()
    teacher, before, expected = Frozen(model), snapshot(model), model(BATCH.x)
    for ask in (lambda: teacher(BATCH), lambda: teacher.through(BATCH.x), lambda: teacher.check(BATCH)):
        nn.ModuleList([model]).train()
        assert torch.equal(ask().out, expected)  # dropout and batch statistics would both show
        assert not any(m.training for m in model.modules())
    assert same(snapshot(model), before)


def test_one_module_in_train_mode_is_enough_to_restore_eval() -> None:
    model = net()
    teacher = Frozen(model)
    model[2].train()
    teacher(BATCH)
    assert not model[2].training


def test_taps_are_shown_by_both_verbs() -> None:
    model = net()
    teacher = Frozen(model, taps={"hidden": "0"})
    teacher.look(["hidden"])
    for seen in both_verbs(teacher):
        assert torch.equal(seen.at["hidden"], model[0](BATCH.x))
        assert seen.model is model


# --- what a teacher owns ---


def test_its_view_is_what_it_is_shown() -> None:
    teacher = Frozen(net(), view=lambda b: b.replace(x=b.x.flip(1)))
    expected = net()(BATCH.x.flip(1))
    assert torch.equal(teacher(BATCH).out, expected)
    assert torch.equal(teacher.check(BATCH).out, expected)
    assert torch.equal(teacher.through(BATCH.x.flip(1)).out, expected)  # x as the view would show it


def test_normalise_comes_after_the_view_by_channel() -> None:
    view: Callable[[Batch], Batch] = lambda b: b.replace(x=b.x + 1)  # noqa: E731
    teacher = Frozen(nn.Identity(), view=view, normalise=([1.0, 2.0, 3.0], [2.0, 4.0, 5.0]))
    expected = (BATCH.x + 1 - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 4.0, 5.0])
    assert torch.equal(teacher(BATCH).out, expected)


def test_normalise_takes_numbers_and_reaches_maps_by_channel() -> None:
    x = randn(2, 2, 3, 3)
    assert torch.equal(Frozen(nn.Identity(), normalise=(0.5, 2.0)).through(x).out, (x - 0.5) / 2)
    by_channel = Frozen(nn.Identity(), normalise=([1.0, 2.0], [1.0, 4.0])).through(x).out
    assert torch.equal(by_channel[:, 1], (x[:, 1] - 2) / 4)


def test_normalise_refuses_a_mapping_of_inputs() -> None:
    with pytest.raises(Refused, match=r"single input tensor.*view"):
        Frozen(nn.Identity(), normalise=(0.0, 1.0)).through({"input": BATCH.x})


def test_precision_computes_in_less_and_answers_in_float32() -> None:
    inside: list[torch.dtype] = []
    model = net()
    model[0].register_forward_hook(lambda m, a, out: inside.append(out.dtype))
    teacher = Frozen(model, taps={"hidden": "0"}, precision=torch.bfloat16)
    teacher.look(["hidden"])
    exact = net()(BATCH.x)
    for seen in both_verbs(teacher):
        assert seen.out.dtype == seen.at["hidden"].dtype == torch.float32
        assert not torch.equal(seen.out, exact)
        assert torch.allclose(seen.out, exact, atol=0.05)
    assert inside == [torch.bfloat16] * 3


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_it_may_answer_few_rows_at_a_time(rows: int) -> None:
    inside: list[int] = []
    model = net()
    model[0].register_forward_hook(lambda m, a, out: inside.append(len(out)))
    teacher = Frozen(model, taps={"hidden": "0"}, batch=rows)
    teacher.look(["hidden"])
    whole = Frozen(net(), taps={"hidden": "0"})
    whole.look(["hidden"])
    for ask in (Frozen.__call__, Frozen.at_taps, Frozen.check):
        inside.clear()
        found, expected = ask(teacher, BATCH), ask(whole, BATCH)
        asked = inside[2:] if ask is Frozen.check else inside  # which asks one row, then two, before
        assert sum(asked) == BATCH.rows and max(asked) == min(rows, BATCH.rows)
        torch.testing.assert_close(found.at["hidden"], expected.at["hidden"])
        if expected.out is not None:
            torch.testing.assert_close(found.out, expected.out)
    assert teacher.how().endswith(f"{rows} rows at a time")
    quiet = Frozen(net(), taps={"hidden": "0"}, batch=rows)
    quiet.look(["hidden"])
    assert quiet.at_taps(BATCH).out is None
    inside.clear()
    teacher.through(BATCH.x)
    assert inside == [BATCH.rows]


class Tokens(nn.Module):
    """Sums over tokens that count."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (input_ids * attention_mask).sum(1, keepdim=True).float()


def test_inputs_by_name_and_their_mask_are_cut_too() -> None:
    x = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.tensor([[1, 1, 0]] * 4)}
    one, few = (Frozen(Tokens(), batch=rows)(Batch(x)) for rows in (None, 3))
    assert torch.equal(one.out, few.out) and torch.equal(one.mask, few.mask) and len(few.mask) == 4


class Upended(nn.Module):
    """Its tap has the tokens first, or no row at all."""

    def __init__(self, rowless: bool) -> None:
        super().__init__()
        self.tokens, self.rowless = nn.Identity(), rowless

    def forward(self, x: Tensor) -> Tensor:
        self.tokens(x.new_ones(3, 3) if self.rowless else x.T)
        return x


@pytest.mark.parametrize("rowless", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_tap_without_a_row_for_each_is_refused(rows: int, rowless: bool) -> None:
    teacher = Frozen(Upended(rowless), batch=rows)
    teacher.look(["tokens"])
    with pytest.raises(Refused, match="Tap 'tokens' of the teacher has 3 entries for 2 rows"):
        teacher.check(BATCH)


def test_answers_that_cannot_be_put_together_and_no_rows_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(Refused, match="answers 1 rows at a time, and its answers, each a tuple"):
        Frozen(Two(), batch=1).check(BATCH)
    with pytest.raises(Refused, match="0 rows at a time, expected 1 or more"):
        Frozen(net(), batch=0)


def test_columns_say_which_output_scores_each_class() -> None:
    teacher = Frozen(net(), columns=[3, 1])
    expected = net()(BATCH.x)[:, [3, 1]]
    for seen in both_verbs(teacher):
        assert torch.equal(seen.out, expected)


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refused, match="column"):
        Frozen(net(), columns=[0, 4]).check(BATCH)


# --- a mean of a learner ---


def test_a_mean_follows_by_its_formula_and_copies_counters() -> None:
    learner = net()
    mean = MeanOf(learner, decay=0.6)
    expected = snapshot(learner)
    for step in range(1, 5):
        with torch.no_grad():
            for n, p in enumerate(learner.parameters()):
                p.add_(randn(*p.shape, seed=10 * step + n))
        learner.train()(BATCH.x)  # moves BatchNorm's statistics and its counter
        mean.follow()
        decay = min(1 - 1 / (step + 1), 0.6)
        for name, now in learner.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * now if now.is_floating_point() else now.clone()
            )
    found = mean.model.state_dict()
    assert found["1.num_batches_tracked"] == 4
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6), name
    assert not torch.allclose(found["1.running_mean"], learner.state_dict()["1.running_mean"])


def test_a_mean_begins_as_its_learner_and_is_not_its_learner() -> None:
    learner = net()
    mean = MeanOf(learner)
    before = mean(BATCH).out
    assert torch.equal(before, learner(BATCH.x))
    with torch.no_grad():
        learner[3].weight.zero_()
    assert torch.equal(mean(BATCH).out, before)


def test_a_mean_remembers_its_weights_and_its_steps() -> None:
    def follow(mean: MeanOf) -> None:
        with torch.no_grad():
            for p in mean.learner.parameters():
                p.add_(1.0)
        mean.follow()

    mean = MeanOf(net(), decay=0.9)
    for _ in range(3):
        follow(mean)
    again = MeanOf(copy.deepcopy(mean.learner), decay=0.9)
    again.load_state_dict(copy.deepcopy(mean.state_dict()))
    follow(mean)
    follow(again)
    assert same(snapshot(mean.model), snapshot(again.model))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(Refused, match=rf"decay.*{decay}.*\[0, 1\)"):
        MeanOf(net(), decay=decay)


# --- several with one voice ---


def test_an_ensemble_answers_the_log_of_the_weighted_mean_probability() -> None:
    models = [net(seed=1), net(seed=2), net(seed=3)]
    ensemble = Ensemble([Frozen(m) for m in models], [1, 2, 5])
    probabilities = [m(BATCH.x).softmax(1) for m in models]
    expected = (1 * probabilities[0] + 2 * probabilities[1] + 5 * probabilities[2]) / 8
    for seen in both_verbs(ensemble):
        assert torch.allclose(seen.out.exp(), expected, atol=1e-6)
        assert seen.at == {} and seen.model is None


def test_an_ensemble_is_equal_by_default_and_a_weight_of_0_is_silence() -> None:
    one, two = net(seed=1), net(seed=2)
    equal = Ensemble([Frozen(one), Frozen(two)])(BATCH).out.exp()
    assert torch.allclose(equal, (one(BATCH.x).softmax(1) + two(BATCH.x).softmax(1)) / 2, atol=1e-6)
    silent = Ensemble([Frozen(one), Frozen(two)], [0, 3])(BATCH).out
    assert torch.allclose(silent, two(BATCH.x).log_softmax(1), atol=1e-6)


def test_an_ensemble_mixes_dense_answers_by_position() -> None:
    heads = [nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)]
    x = randn(2, 2, 4, 4)
    mixed = Ensemble([Frozen(h) for h in heads], [1, 3])(Batch(x)).out.exp()
    assert torch.allclose(mixed, 0.25 * heads[0](x).softmax(1) + 0.75 * heads[1](x).softmax(1), atol=1e-6)


def test_an_ensemble_refuses_taps_and_offers_no_model() -> None:
    ensemble = Ensemble([Frozen(net())])
    ensemble.look([])
    with pytest.raises(Refused, match=r"no tap 'pooled'.*`teachers`"):
        ensemble.look(["pooled"])
    assert ensemble.offers == {"teacher_gradient"}


def test_an_ensemble_passes_no_more_gradient_than_each_of_its_teachers() -> None:
    deaf = Peer(net(), BATCH)
    assert not Ensemble([Frozen(net()), deaf]).offers and not Ensemble([Ensemble([deaf])]).offers


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1], [float("inf"), 1]], ids=str
)
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(Refused, match="2 teachers has weights"):
        Ensemble([Frozen(net()), Frozen(net())], weights)


def test_an_ensemble_of_nobody_is_refused() -> None:
    with pytest.raises(Refused, match="no teachers"):
        Ensemble([])


def test_an_ensemble_of_teachers_with_different_classes_is_refused() -> None:
    with pytest.raises(Refused, match=r"4.*5"):
        Ensemble([Frozen(net(4)), Frozen(net(5))]).check(BATCH)


def test_an_ensemble_moves_and_remembers_its_members() -> None:
    learner = net()
    ensemble = Ensemble([Frozen(net(seed=5)), MeanOf(learner, decay=0.5)])
    with torch.no_grad():
        learner[0].weight.add_(1.0)
    ensemble.follow()
    again = Ensemble([Frozen(net(seed=5)), MeanOf(net(seed=9), decay=0.5)])
    assert not torch.equal(again(BATCH).out, ensemble(BATCH).out)
    again.load_state_dict(copy.deepcopy(ensemble.state_dict()))
    assert torch.equal(again(BATCH).out, ensemble(BATCH).out)
    assert not torch.equal(ensemble(BATCH).out, Ensemble([Frozen(net(seed=5)), Frozen(net())])(BATCH).out)


def test_a_mean_moves_a_tied_weight_once_and_follows_buffers_that_are_not_saved() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("scale", torch.ones(1), persistent=False)

    learner = Tied()
    mean = MeanOf(learner, decay=0.5)
    before = mean.model.a.weight.detach().clone()
    with torch.no_grad():
        learner.a.weight.add_(1.0)
        learner.scale.add_(1.0)
    mean.follow()
    torch.testing.assert_close(mean.model.a.weight, before + 0.5)
    torch.testing.assert_close(mean.model.scale, torch.tensor([1.5]))
