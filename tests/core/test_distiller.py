"""The offline lesson as one module: what it asks, sums, builds, leaves alone and refuses."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch, Lesson
from limbeck.core.distiller import Distiller
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Ramp, Term
from limbeck.core.taps import Seen
from limbeck.core.teachers import Ensemble, Frozen


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCH = Batch(randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(6))
PAIR = (BATCH.x, BATCH.y)


class Net(nn.Module):
    TAPS: ClassVar = {"hidden": "body"}

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2))
            self.head = nn.Linear(width, classes)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.body(x))


def student(classes: int = 4) -> Net:
    return Net(5, classes, seed=1)


def teacher(classes: int = 4, seed: int = 2) -> Net:
    return Net(8, classes, seed)


class Response(Method):
    """Mean squared gap of the answers."""

    card = Card("none", 2000, ("response",), needs=frozenset({"same_classes"}), per_sample=True)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.builds = scale, 0

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.builds += 1

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return self.scale * F.mse_loss(s.out, t.out)


class Feature(Method):
    """Projects the student's hidden tensor to the teacher's width, and counts the losses it was asked for."""

    card = Card("none", 2000, ("feature",), taps=("hidden",), per_sample=True)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.at["hidden"].shape[1], t.at["hidden"].shape[1])
        self.register_buffer("asked", torch.zeros(()))

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        self.asked += 1
        return F.mse_loss(self.project(s.at["hidden"]), t.at["hidden"])


class Says(Method):
    """Whatever `loss` it is given."""

    card = Card("none", 2000, ("response",))

    def __init__(self, say: Callable[[Seen, Seen], Tensor], needs: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.say = say
        self.card = Card("none", 2000, ("response",), needs=frozenset(needs))  # type: ignore[misc]

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return self.say(s, t)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: v.clone() for name, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def still(model: nn.Module) -> nn.Module:
    """Without dropout, so that two forwards may be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# --- construction leaves the world as it was ---


def test_construction_moves_no_weight_no_buffer_and_no_random_state() -> None:
    s, t = student(), teacher()
    before, random = (snapshot(s), snapshot(t)), torch.get_rng_state()
    distiller = Distiller(s, t, [Response(), Feature()], example=PAIR)
    assert same(snapshot(s), before[0]) and same(snapshot(t), before[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in distiller.parameters())
    assert distiller.methods["feature"].asked == 0  # nor what a method remembers


def test_a_tap_before_a_batchnorm_and_the_answer_may_be_taught_together() -> None:
    class Early(Feature):
        card = Card("none", 2000, ("feature",), taps=("body.0",))

        def build(self, s: Seen, t: Seen, batch: Batch) -> None:
            self.project = nn.Linear(5, 8)

        def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
            return F.mse_loss(self.project(s.at["body.0"]), t.at["body.0"])

    s = student()
    before = snapshot(s)
    distiller = Distiller(s, teacher(), [Response(), Early()], example=PAIR)
    assert same(snapshot(s), before)
    distiller(*PAIR)["loss"].backward()
    assert s.body[0].weight.grad.abs().sum() > 0


def test_a_refused_construction_leaves_it_so_too() -> None:
    s = student()
    before, random = snapshot(s), torch.get_rng_state()
    with pytest.raises(Refused):
        Distiller(s, teacher(), Says(lambda s, t: s.out[:, :2] @ t.out), example=PAIR)
    assert same(snapshot(s), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_student_stays_the_plain_model() -> None:
    s = student()
    keys = list(s.state_dict())
    distiller = Distiller(s, teacher(), [Feature()], example=PAIR)
    assert distiller.student is s
    assert list(s.state_dict()) == keys
    student().load_state_dict(s.state_dict())
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "methods"}


def test_teachers_are_no_children_and_never_learn() -> None:
    t = teacher()
    distiller = Distiller(student(), t, [Response()], example=PAIR)
    assert not {id(p) for p in t.parameters()} & {id(p) for p in distiller.parameters()}
    distiller.train()
    distiller(*PAIR)["loss"].backward()
    assert all(p.grad is None for p in t.parameters())
    assert not any(m.training for m in t.modules())


def test_a_methods_modules_depend_on_the_seed_and_on_nothing_else() -> None:
    def weight(methods: Any, seed: int = 0) -> Tensor:
        distiller = Distiller(student(), teacher(), methods, example=PAIR, seed=seed)
        return distiller.methods["feature"].project.weight

    first = weight([Feature()])
    torch.rand(7)
    assert torch.equal(weight([Response(), Feature()]), first)
    assert not torch.equal(weight([Feature()], seed=1), first)


# --- the losses of one batch ---


def test_forward_gives_each_loss_by_name_their_sum_and_the_logits() -> None:
    s, t = still(student()), teacher()
    distiller = Distiller(s, t, [Term(Response(), weight=0.5), Feature()], example=PAIR, task_weight=3.0)
    losses = distiller(*PAIR)
    assert losses.keys() == {"task", "response", "feature", "loss", "logits"}
    assert torch.equal(losses["logits"], s(BATCH.x))
    answer = t.eval()(BATCH.x)
    assert torch.allclose(losses["task"], 3 * F.cross_entropy(losses["logits"], BATCH.y))
    assert torch.allclose(losses["response"], 0.5 * F.mse_loss(losses["logits"], answer))
    assert torch.allclose(losses["loss"], losses["task"] + losses["response"] + losses["feature"])


def test_a_batch_may_come_whole_or_as_x_and_y() -> None:
    distiller = Distiller(still(student()), teacher(), Response(), example=BATCH)
    assert torch.equal(distiller(BATCH)["loss"], distiller(*PAIR)["loss"])


def test_without_a_task_only_methods_teach_and_no_label_is_needed() -> None:
    distiller = Distiller(student(), teacher(), Response(), example=(BATCH.x, None), task=None)
    losses = distiller(BATCH.x)
    assert losses.keys() == {"response", "loss", "logits"}
    assert torch.equal(losses["loss"], losses["response"])


def test_a_weight_of_0_is_not_built_and_not_asked() -> None:
    method, t = Response(), teacher()
    distiller = Distiller(student(), t, [Term(method, weight=0)], example=PAIR)
    assert method.builds == 0 and len(distiller.methods) == 0
    assert distiller(*PAIR).keys() == {"task", "loss", "logits"}
    assert t.calls == 0


def test_a_ramp_multiplies_and_never_skips() -> None:
    distiller = Distiller(
        still(student()), teacher(), Term(Feature(), weight=2, ramp=Ramp(4, after=1)), example=PAIR
    )
    full = distiller(BATCH.replace(lesson=Lesson(epoch=9)))["feature"]
    losses = [distiller(BATCH.replace(lesson=Lesson(epoch=epoch)))["feature"] for epoch in range(6)]
    for loss, factor in zip(losses, [0, 0.25, 0.5, 0.75, 1, 1], strict=True):
        assert torch.allclose(loss, factor * full)
    assert losses[0] == 0
    assert distiller.methods["feature"].asked == 7  # at 0 too


def test_several_teachers_give_the_mean_of_a_loss_built_for_each() -> None:
    one, two = teacher(), Net(11, 4, seed=3)
    term = Term(Feature(), (Frozen(one), Frozen(two)), weight=3.0)
    distiller = Distiller(still(student()), None, term, example=PAIR)
    losses = distiller(*PAIR)
    assert losses.keys() == {"task", "feature", "loss", "logits"}
    hidden = distiller.student.body(BATCH.x)
    gaps = [
        F.mse_loss(method.project(hidden), t.eval().body(BATCH.x))
        for method, t in zip(distiller.methods.values(), (one, two), strict=True)
    ]
    assert torch.allclose(losses["feature"], 3.0 * (gaps[0] + gaps[1]) / 2)
    assert not torch.equal(gaps[0], gaps[1])


def test_the_same_method_twice_gets_two_names() -> None:
    distiller = Distiller(still(student()), teacher(), [Response(), Response(scale=2.0)], example=PAIR)
    losses = distiller(*PAIR)
    assert torch.allclose(losses["response_2"], 2 * losses["response"])
    assert list(distiller.methods) == ["response", "response_2"]


def test_two_terms_with_several_teachers_keep_two_names() -> None:
    teachers = (Frozen(teacher(seed=2)), Frozen(teacher(seed=3)))
    terms = [Term(Response(), teachers), Term(Response(scale=2.0), teachers)]
    losses = Distiller(still(student()), None, terms, example=PAIR)(*PAIR)
    first, second = (loss for name, loss in losses.items() if name.startswith("response"))
    assert torch.allclose(second, 2 * first)


def test_a_term_may_have_its_own_name() -> None:
    distiller = Distiller(student(), teacher(), [Term(Response(), name="hint")], example=PAIR)
    assert "hint" in distiller(*PAIR)


@pytest.mark.parametrize("name", ["task", "loss", "logits", "a.b"])
def test_a_name_that_would_hide_another_loss_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=f"'{name}'"):
        Distiller(student(), teacher(), [Term(Response(), name=name)], example=PAIR)


# --- who is asked, and how often ---


def flip(batch: Batch) -> Batch:
    return batch.replace(x=-batch.x)


def test_a_teacher_is_asked_once_however_many_terms_listen() -> None:
    only, other = Frozen(teacher()), Frozen(teacher(seed=3))
    terms = [Response(), Feature(), Term(Response(), (only,)), Term(Feature(), (other, only))]
    distiller = Distiller(student(), only, terms, example=PAIR)
    only.model.calls = other.model.calls = 0
    distiller(*PAIR)
    assert (only.model.calls, other.model.calls) == (1, 1)


def test_the_student_runs_once_for_each_view() -> None:
    s = student()
    terms = [Response(), Feature(), Term(Response(), view=flip), Term(Feature(), view=flip)]
    distiller = Distiller(s, teacher(), terms, example=PAIR)
    s.calls = 0
    distiller(*PAIR)
    assert s.calls == 2


def test_a_terms_view_is_what_the_student_is_shown_for_it() -> None:
    batches: list[Batch] = []

    class Watches(Response):
        def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
            batches.append(batch)
            return F.mse_loss(s.out, t.out)

    s, t = still(student()), teacher()
    distiller = Distiller(s, t, Term(Watches(), view=flip), example=PAIR)
    losses = distiller(*PAIR)
    assert torch.equal(batches[-1].x, -BATCH.x)
    assert torch.allclose(losses["watches"], F.mse_loss(s(-BATCH.x), t.eval()(BATCH.x)))
    assert torch.allclose(losses["task"], F.cross_entropy(s(BATCH.x), BATCH.y))
    assert torch.equal(losses["logits"], s(BATCH.x))


def test_the_common_view_is_the_students_and_no_teachers() -> None:
    s, t = still(student()), teacher()
    distiller = Distiller(s, t, Response(), example=PAIR, view=flip)
    losses = distiller(*PAIR)
    assert torch.allclose(losses["task"], F.cross_entropy(s(-BATCH.x), BATCH.y))
    assert torch.allclose(losses["response"], F.mse_loss(s(-BATCH.x), t.eval()(BATCH.x)))


# --- modes ---


def test_in_eval_it_returns_the_students_plain_answer() -> None:
    s, t = student(), teacher()
    distiller = Distiller(s, t, Response(), example=PAIR).eval()
    t.calls = 0
    assert torch.equal(distiller(BATCH.x), s(BATCH.x))
    assert not s.training and t.calls == 0


def test_what_the_user_froze_stays_in_eval() -> None:
    s = student()
    s.body.requires_grad_(False)
    distiller = Distiller(s, teacher(), Response(), example=PAIR)
    before = snapshot(s.body)
    for _ in range(2):
        assert not any(m.training for m in s.body.modules())
        assert s.training and s.head.training and distiller.training
        distiller(*PAIR)
        distiller.eval()
        distiller.train()
    assert same(snapshot(s.body), before)
    learns = distiller.players()["student"]
    assert learns.keys() == {"student.head.weight", "student.head.bias"}


# --- what is refused ---


def refuse(
    words: str, *methods: Method | Term, s: nn.Module | None = None, t: Any = None, **options: Any
) -> None:
    options = {"example": BATCH, **options}
    with pytest.raises(Refused, match=words) as refusal:
        Distiller(s or student(), t or teacher(), list(methods), **options)
    assert "\n" not in str(refusal.value)


def test_nothing_to_learn_from_is_refused() -> None:
    refuse("nothing to learn from", task=None)
    refuse("nothing to learn from", Term(Response(), weight=0), task=None)


def test_a_method_without_a_teacher_is_refused() -> None:
    with pytest.raises(Refused, match="'response' has no teacher"):
        Distiller(student(), None, Response(), example=PAIR)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight: float) -> None:
    refuse(
        f"weight of 'response' is {weight}, expected a finite number >= 0", Term(Response(), weight=weight)
    )


def test_different_classes_are_refused_with_what_still_works() -> None:
    words = "'response' compares class scores.*4 classes.*7.*feature and relation methods.*`columns`"
    refuse(words, Response(), t=teacher(7))
    Distiller(student(), teacher(7), Feature(), example=PAIR)
    Distiller(student(), Frozen(teacher(7), columns=[0, 2, 4, 6]), Response(), example=PAIR)


def test_different_rows_are_refused() -> None:
    def twice(batch: Batch) -> Batch:
        return batch.replace(x=batch.x.repeat(2, 1), y=batch.y.repeat(2), index=batch.index.repeat(2))

    refuse("'response' would compare 12 rows of the student with 6", Response(), view=twice)
    refuse(
        "'feature' would compare 6 rows of the student with 12", Feature(), t=Frozen(teacher(), view=twice)
    )


def test_a_loss_that_does_not_depend_on_the_student_is_refused() -> None:
    refuse("'says' does not depend on the student", Says(lambda s, t: t.out.mean()))
    refuse("'says' does not depend on the student", Says(lambda s, t: s.out.detach().mean()))


def test_a_loss_that_depends_only_on_the_methods_own_modules_is_refused() -> None:
    class SelfTaught(Feature):
        def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
            return F.mse_loss(self.project(s.at["hidden"].detach()), t.at["hidden"])

    refuse("'selftaught' does not depend on the student", SelfTaught())


def test_a_loss_that_is_not_one_finite_number_is_refused() -> None:
    refuse(
        "'says' on the example is nan, expected one finite", Says(lambda s, t: s.out.mean() * float("nan"))
    )
    refuse("expected one finite number", Says(lambda s, t: s.out.mean(1)))


def test_a_pair_a_method_cannot_compare_is_refused_with_both_shapes() -> None:
    class Direct(Feature):
        def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
            return (s.at["hidden"] - t.at["hidden"]).mean()

    refuse(
        r"'direct' cannot compare.*the student shows 'hidden' \(6, 5\), the teacher 'hidden' \(6, 8\)",
        Direct(),
    )


def test_what_a_method_needs_and_the_example_lacks_is_refused_by_name() -> None:
    needs_labels = Says(lambda s, t: s.out.mean(), ("labels",))
    needs_index = Says(lambda s, t: s.out.mean(), ("index",))
    refuse("'says' needs labels.*`y`", needs_labels, example=Batch(BATCH.x), task=None)
    refuse("'says' needs index.*`index`", needs_index, example=PAIR)
    Distiller(student(), teacher(), [needs_labels, needs_index], example=BATCH)


def test_what_a_method_needs_and_the_teacher_cannot_give_is_refused_by_name() -> None:
    reads_model = Says(lambda s, t: s.out.mean(), ("teacher_model",))
    reads_gradient = Says(lambda s, t: s.out.mean(), ("teacher_gradient",))
    ensemble = Ensemble([Frozen(teacher())])
    refuse("'says' needs teacher_model, which a Ensemble teacher cannot give", reads_model, t=ensemble)
    Distiller(student(), ensemble, reads_gradient, example=PAIR)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_tap_that_does_not_exist_says_in_whom(who: str) -> None:
    def bare() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    pair = {"s": bare()} if who == "student" else {"t": bare()}
    refuse(f"'hidden' does not exist in the {who}", Feature(), **pair)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_tap_changed_in_place_says_in_whom(who: str) -> None:
    def changed() -> nn.Module:
        model = Net(8, 4, seed=3)
        model.body[2] = nn.ReLU(inplace=True)
        model.TAPS = {"hidden": "body.1"}
        return model

    pair = {"s": changed()} if who == "student" else {"t": changed()}
    refuse(f"'hidden' of the {who} is changed in place", Feature(), **pair)


def test_an_example_the_student_cannot_take_is_refused() -> None:
    refuse("student.*example.*shapes cannot be multiplied", Response(), example=(randn(6, 9), BATCH.y))


def test_a_copy_of_a_distiller_has_taps_that_hear() -> None:
    """A deepcopy takes the student along; its taps must listen to the copied student, not to the first."""
    distiller = Distiller(still(student()), teacher(), Feature(), example=PAIR)
    twin = copy.deepcopy(distiller)
    with torch.no_grad():
        twin.student.body[0].weight.zero_()
    mine, theirs = distiller(*PAIR), twin(*PAIR)
    assert torch.equal(theirs["logits"], twin.student(BATCH.x))
    assert not torch.equal(mine["feature"], theirs["feature"])


class Hint(Feature):
    """Reads taps alone, and says so."""

    card = replace(Feature.card, reads_out=False)


def test_a_teacher_stops_where_nobody_reads_its_answer() -> None:
    def answer(*terms: Method | Term) -> Tensor | None:
        distiller = Distiller(student(), teacher(), terms, example=PAIR)
        return distiller.see(BATCH).teachers[0].out

    assert answer(Hint()) is None
    assert answer(Feature()) is not None
    assert answer(Hint(), Response()) is not None
    assert answer(Term(Hint(), through=[lambda s, t: (s, t, 1.0)])) is not None


def test_stopping_teaches_the_same() -> None:
    losses = []
    for stop in (True, False):
        distiller = Distiller(student(), Frozen(teacher(), stop=stop), Hint(), example=PAIR)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(distiller(BATCH)["loss"])
    assert torch.equal(*losses)


# --- other places of the teacher ---


class Watched(Feature):
    """A feature method that looks at the teacher under another name, and watches."""

    def teacher_looks(self) -> tuple[str, ...]:
        return ("deep",)

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        pass

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        self.seen = t.at["deep"].detach()
        return (s.at["hidden"].mean() - t.at["deep"].mean()) ** 2

    def figures(self) -> dict[str, float]:
        return {"level": float(self.seen.mean())}


def test_a_method_looks_where_its_term_says() -> None:
    other = teacher()
    term = Term(Watched(), pairs={"deep": "body.0"})
    distiller = Distiller(student(), other, term, example=PAIR)
    assert distiller(BATCH)["loss"].requires_grad
    other.eval()
    assert torch.equal(distiller.methods["watched"].seen, other.body[0](BATCH.x))
    level = float(other.body[0](BATCH.x).detach().mean())
    assert distiller.figures() == {"watched.level": level}


def test_pairs_name_what_the_method_looks_at() -> None:
    with pytest.raises(Refused, match=r"pairs of method 'watched' name 'hidden'.*it looks at deep"):
        Distiller(student(), teacher(), Term(Watched(), pairs={"hidden": "body.0"}), example=PAIR)


# --- how maps lie ---


IMAGES = Batch(randn(6, 3, 8, 8), BATCH.y, BATCH.index)


def cnn(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 3))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))


class Maps(Method):
    """A loss of the student's and the teacher's maps at `2`, and how these lay when it was last asked."""

    card = Card("none", 2000, ("feature",), taps=("2",), per_sample=True)

    def __init__(self, say: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.say = say
        self.lay: list[bool] = []

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        maps = s.at["2"], t.at["2"]
        self.lay = [v.is_contiguous(memory_format=torch.channels_last) for v in maps]
        return self.say(*maps)


class Judged(Maps):
    """With a rival that reads the maps as `see` does."""

    def __init__(self, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__(F.mse_loss)
        self.critic = nn.Linear(4, 1)
        self.see = see

    def rivals(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def rival_loss(self, name: str, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return self.critic(self.see(s.at["2"]).mean((2, 3))).mean()


def flat(v: Tensor) -> Tensor:
    return v.view(len(v), -1)


def strided(v: Tensor) -> Tensor:
    return v * v.stride(1)


def cut(v: Tensor) -> Tensor:
    """A gradient that depends on how the map lies, where the value does not."""
    return v + (v - v.detach()) * v.stride(1)


LIES = [
    (F.mse_loss, True),
    (lambda s, t: F.mse_loss(s.flatten(1), t.flatten(1)), True),
    (lambda s, t: F.mse_loss(flat(s), flat(t)), False),
    (lambda s, t: F.mse_loss(strided(s), strided(t)), False),
    (lambda s, t: F.mse_loss(cut(s), t), False),
]


@pytest.mark.parametrize(("say", "last"), LIES)
def test_a_method_is_shown_maps_as_they_lie_if_that_is_all_one_to_it(
    say: Callable[[Tensor, Tensor], Tensor], last: bool
) -> None:
    method = Maps(say)
    distiller = Distiller(cnn(4, 1), cnn(4, 2), method, example=IMAGES)
    distiller(IMAGES)
    assert method.lay == [last, last]


def test_each_method_is_shown_them_in_its_own_layout() -> None:
    methods = [Maps(say) for say, _ in LIES]
    Distiller(cnn(4, 1), cnn(4, 2), methods, example=IMAGES)(IMAGES)
    assert [method.lay[0] for method in methods] == [last for _, last in LIES]


@pytest.mark.parametrize(("see", "last"), [(lambda v: v, True), (lambda v: flat(v).view(v.shape), False)])
def test_a_rival_is_asked_too(see: Callable[[Tensor], Tensor], last: bool) -> None:
    method = Judged(see)
    distiller = Distiller(cnn(4, 1), cnn(4, 2), method, example=IMAGES)
    sight = distiller.see(IMAGES)
    assert len(list(distiller.rival_losses(sight))) == 1
    distiller.losses(sight)
    assert method.lay == [last, last]


def test_a_teachers_maps_lie_as_the_students_do_however_it_answers() -> None:
    method = Maps(F.mse_loss)
    plain = Frozen(cnn(4, 2), fold=False, channels_last=False)
    Distiller(cnn(4, 1), plain, method, example=IMAGES)(IMAGES)
    assert method.lay == [True, True]
    Distiller(cnn(4, 1), cnn(4, 2), method, example=IMAGES, channels_last=False)(IMAGES)
    assert method.lay == [False, False]


def test_in_either_layout_it_learns_the_same() -> None:
    exact = replace(IMAGES, x=IMAGES.x.double())
    steps = []
    for channels_last in (False, True):
        one = cnn(4, 1).double()
        distiller = Distiller(
            one, cnn(4, 2).double(), [Maps(F.mse_loss)], example=exact, channels_last=channels_last
        )
        assert distiller.how() == ("channels_last" if channels_last else "")
        distiller(exact)["loss"].backward()
        assert all(p.is_contiguous() for p in one.parameters())
        steps.append([*(p.grad for p in one.parameters()), *one.state_dict().values()])
    assert any(not torch.equal(a, b) for a, b in zip(*steps, strict=True))  # it did go another way
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b)


class Dense(nn.Module):
    """Maps as its answer, in a mapping; `flat` shows them as tokens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.body, self.flat = cnn(4, seed)[:4], nn.Flatten(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        self.flat(maps)
        return {"mask": maps}


def test_answers_by_name_and_tokens_of_maps_are_shown_in_the_usual_layout() -> None:
    def tokens(s: Seen, t: Seen) -> Tensor:
        return F.mse_loss(flat(s.at["flat"]), flat(t.at["flat"]))

    method = Says(tokens)
    method.card = replace(method.card, taps=("flat",))  # type: ignore[misc]
    distiller = Distiller(
        Dense(1), Dense(2), method, example=IMAGES, task=lambda seen, batch: flat(seen.out["mask"]).mean()
    )
    assert distiller.how() == "channels_last"
    assert set(distiller(IMAGES)) == {"task", "says", "loss", "logits"}


@pytest.mark.parametrize(("see", "last"), [(lambda v: v, True), (lambda v: flat(v).view(v.shape), False)])
def test_a_task_that_reads_a_map_is_asked_too(see: Callable[[Tensor], Tensor], last: bool) -> None:
    lay = []

    def task(seen: Seen, batch: Batch) -> Tensor:
        lay.append(seen.at["2"].is_contiguous(memory_format=torch.channels_last))
        return see(seen.at["2"]).mean()

    Distiller(cnn(4, 1), cnn(4, 2), Maps(F.mse_loss), example=IMAGES, task=task)(IMAGES)
    assert lay[-1] is last


class Picky(nn.Module):
    """Counts on the usual layout when `picks` says so."""

    def __init__(self, picks: Callable[[nn.Module, Tensor], bool]) -> None:
        super().__init__()
        self.body, self.head, self.picks = cnn(4, 1)[:4], cnn(4, 1)[4:], picks

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        if self.picks(self, x):
            flat(maps)
        return self.head(maps)


def test_in_eval_it_answers_as_the_plain_student_in_its_own_layout() -> None:
    one = Picky(lambda model, x: not model.training)
    distiller = Distiller(one, cnn(4, 2), Response(), example=IMAGES)
    assert distiller.how() == "channels_last"
    assert torch.equal(distiller.eval()(IMAGES.x), one(IMAGES.x))


def test_every_view_of_the_student_is_tried() -> None:
    small = Term(Response(), view=lambda batch: batch.replace(x=batch.x[..., :7, :7]))
    one = Picky(lambda model, x: x.shape[-1] < 8 and not x.is_contiguous())
    assert Distiller(one, cnn(4, 2), Term(Response()), example=IMAGES).how() == "channels_last"
    assert Distiller(one, cnn(4, 2), small, example=IMAGES).how() == ""


def test_a_student_with_a_layout_of_its_own_is_shown_as_it_is() -> None:
    one = cnn(4, 1).to(memory_format=torch.channels_last)
    graded = []

    def slope(s: Seen, t: Seen) -> Tensor:
        (grad,) = torch.autograd.grad(s.out.sum(), s.at["2"], create_graph=True, allow_unused=True)
        graded.append(grad is not None)
        return s.out.sum() if grad is None else grad.square().mean() + s.out.mean()

    method = Says(slope)
    method.card = replace(method.card, taps=("2",))  # type: ignore[misc]
    Distiller(one, cnn(4, 2), method, example=IMAGES, channels_last=False)(IMAGES)
    assert graded[-1]


def test_a_resumed_lesson_lies_as_it_did() -> None:
    first = Distiller(cnn(4, 1), cnn(4, 2), Maps(F.mse_loss), example=IMAGES)
    other = Distiller(cnn(4, 1), cnn(4, 2), Maps(F.mse_loss), example=IMAGES, channels_last=False)
    assert first.layout["student"] and first.layout["lies_last"]
    other.layout = first.layout
    assert other.how() == "channels_last" and other.layout == first.layout
    assert torch.equal(other(IMAGES)["loss"], first(IMAGES)["loss"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch asks for it on purpose
def test_compiled_dense_answers_come_in_the_usual_layout_too() -> None:
    torch._dynamo.reset()
    says = Says(lambda s, t: F.mse_loss(flat(s.out), flat(t.out)))
    distiller = Distiller(cnn(4, 1)[:4], cnn(4, 2)[:4], says, example=IMAGES, task=None)
    plain = distiller(IMAGES)["loss"]
    distiller.compile("eager")
    assert distiller.how() == "compiled, channels_last"
    torch.testing.assert_close(distiller(IMAGES)["loss"], plain)
