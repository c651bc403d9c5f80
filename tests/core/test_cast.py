"""What a stage brings to a scheme: the right number of learners, and for each a lesson of its own."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.cast import Cast
from limbeck.core.method import Card, Method
from limbeck.core.refused import Refused
from limbeck.core.scheme import Term
from limbeck.core.taps import Seen
from limbeck.core.task import labelled_cross_entropy
from limbeck.core.teachers import Frozen, Peer

BATCH = Batch(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4)


class Match(Method):
    """Logits, through a projector."""

    card = Card("none", 2000, ("response",))

    def build(self, s: Seen, t: Seen, batch: Batch) -> None:
        self.project = nn.Linear(s.out.shape[1], t.out.shape[1])

    def loss(self, s: Seen, t: Seen, batch: Batch) -> Tensor:
        return (self.project(s.out) - t.out).square().mean()


class Scale(nn.Module):
    """A lens that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, s: Seen, t: Seen) -> tuple[Seen, Seen, Tensor]:
        return s, t, self.factor


def net(seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 4)


def _shift(batch: Batch, by: float) -> Batch:
    return batch.replace(x=batch.x + by)


shifted = partial(_shift, by=1.0)  # as a recipe's are


NETS = {"a": net(0), "b": net(1), "c": net(2)}
PEERS = {name: Peer(model, BATCH, called=name) for name, model in NETS.items()}
TRAINED = Frozen(net(3))


def cast(*names: str, terms: list[Term] | None = None, **more: object) -> Cast:
    learners = {name: NETS[name] for name in names}
    peers = {name: PEERS[name] for name in names}
    return Cast(learners, BATCH, terms or [], labelled_cross_entropy, peers=peers, **more)  # type: ignore[arg-type]


def test_each_part_has_a_learner() -> None:
    assert cast("a").names("solo", "student") == ("a",)
    assert cast("b", "a").names("duet", "student", "generator") == ("b", "a")


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_another_number_of_learners_is_refused_with_both(names: tuple[str, ...]) -> None:
    found = rf"'solo' has 1 learner.*student.* names {len(names)}.*learner = 'student'"
    with pytest.raises(Refused, match=found) as caught:
        cast(*names).names("solo", "student")
    assert "\n" not in str(caught.value)
    with pytest.raises(Refused, match=r"has 2 learner.*learner = \['student', 'generator'\]"):
        cast("a").names("duet", "student", "generator")


def test_nobody_is_among_his_own_teachers() -> None:
    term = Term(Match(), (PEERS["a"], PEERS["b"], PEERS["c"], TRAINED))
    whole = cast("a", "b", "c", terms=[term])
    assert whole.distiller("a").teachers() == (PEERS["b"], PEERS["c"], TRAINED)
    assert whole.distiller("b").teachers() == (PEERS["a"], PEERS["c"], TRAINED)
    assert cast("a", terms=[Term(Match(), (PEERS["a"], TRAINED))]).distiller("a").teachers() == (TRAINED,)


def test_a_term_is_the_mean_over_the_teachers_that_are_left() -> None:
    whole = cast("a", "b", "c", terms=[Term(Match(), tuple(PEERS.values()), weight=3.0)])
    distiller = whole.distiller("a")
    for name in ("b", "c"):
        PEERS[name].told(PEERS[name].check(BATCH))
    expected = [
        (method.project(NETS["a"](BATCH.x)) - NETS[name](BATCH.x)).square().mean()
        for method, name in zip(distiller.methods.values(), ("b", "c"), strict=True)
    ]
    losses = distiller.losses(distiller.see(BATCH))
    torch.testing.assert_close(losses["match"], 3.0 * (expected[0] + expected[1]) / 2)


def test_a_term_that_is_left_without_a_teacher_is_refused() -> None:
    with pytest.raises(Refused, match="'Match' would let 'a' teach itself; name another learner"):
        cast("a", "b", terms=[Term(Match(), (PEERS["a"],))]).distiller("a")


def test_learners_share_no_module_but_the_teachers() -> None:
    term = Term(Match(), (TRAINED,), through=(Scale(),))
    whole = cast("a", "b", terms=[term])
    a, b = whole.distiller("a"), whole.distiller("b")
    assert not {id(p) for p in a.parameters()} & {id(p) for p in b.parameters()}
    assert not {id(p) for p in a.parameters()} & {id(p) for p in term.through[0].parameters()}  # type: ignore[attr-defined]
    assert len(list(a.lenses.parameters())) == 1
    assert a.teachers() == b.teachers() == (TRAINED,)


def test_a_view_that_is_everybodys_is_shown_once() -> None:
    """So BatchNorm moves once a step, and dropout draws once."""
    terms = [Term(Match(), (TRAINED,), view=shifted), Term(Match(), (TRAINED,), name="again", view=shifted)]
    assert len(cast("a", terms=terms, view=shifted).distiller("a").show(BATCH)) == 1
    assert len(cast("a", terms=terms).distiller("a").show(BATCH)) == 2


def test_the_lesson_is_as_the_cast_says() -> None:
    distiller = cast("b", task_weight=0.25, view=shifted).distiller("b")
    assert distiller.student is NETS["b"]
    loss = distiller.losses(distiller.see(BATCH))["task"]
    expected = nn.functional.cross_entropy(NETS["b"](BATCH.x + 1), BATCH.y)
    torch.testing.assert_close(loss, 0.25 * expected)


def test_taps_are_a_learners_own() -> None:
    named = Cast(NETS, BATCH, task=labelled_cross_entropy, taps={"a": {"score": ""}}, peers=PEERS)
    distiller = named.distiller("a")
    distiller.look(["score"])
    assert torch.equal(distiller.show(BATCH)[0][0].at["score"], NETS["a"](BATCH.x))
    with pytest.raises(Refused, match="Tap 'score' does not exist in the b"):
        named.distiller("b").look(["score"])
