"""A tap shows one named tensor inside any model, and says so when it cannot."""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.refused import Refused
from limbeck.core.taps import Seen, Tapped

Show = Callable[[Tensor], Any]
X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Answer(OrderedDict):
    """Like the ModelOutput of transformers: entries by name and, counted, by number."""

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Block(nn.Module):
    """Shows whatever `show` makes of its hidden tensor."""

    def __init__(self, show: Show) -> None:
        super().__init__()
        self.fc, self.show = nn.Linear(3, 4), show

    def forward(self, x: Tensor) -> Any:
        return self.show(self.fc(x))


class Net(nn.Module):
    """A block whose output may be anything, and a head on its hidden tensor."""

    def __init__(self, show: Show = lambda h: h, find: Callable[[Any], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.block, self.head, self.find = Block(show), nn.Linear(4, 2), find

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.find(self.block(x)))

    def hidden(self) -> Tensor:
        return self.block.fc(X)


def look(model: nn.Module, *names: str, taps: dict[str, str] | None = None, x: Any = X) -> Seen:
    tapped = Tapped(model, taps)
    tapped.look(names)
    return tapped(x)


def plain() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), act=nn.ReLU(), head=nn.Linear(4, 2))
    )


# --- what a tap can name ---


def test_a_path_names_the_output_of_any_submodule() -> None:
    model = Net()
    seen = look(model, "block.fc", "head")
    assert torch.equal(seen.at["block.fc"], model.hidden())
    assert torch.equal(seen.at["head"], model(X))
    assert torch.equal(seen.out, model(X))
    assert seen.model is model


def test_in_names_the_first_input_also_when_it_comes_by_keyword() -> None:
    model = Net()
    assert torch.equal(look(model, "head:in").at["head:in"], model.hidden())

    class ByKeyword(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.block(x))

    model = ByKeyword()
    assert torch.equal(look(model, "head:in").at["head:in"], model.hidden())


def test_in_and_keys_go_together() -> None:
    class Takes(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] + pair[1]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.takes = Takes()

        def forward(self, x: Tensor) -> Tensor:
            return self.takes((x, 2 * x))

    assert torch.equal(look(Outer(), "takes:in[1]").at["takes:in[1]"], 2 * X)


@pytest.mark.parametrize(
    ("show", "find", "tap"),
    [
        (lambda h: (h.neg(), h), lambda o: o[1], "block[1]"),
        (lambda h: (h.neg(), h), lambda o: o[1], "block[-1]"),
        (lambda h: [h, h.neg()], lambda o: o[0], "block[0]"),
        (lambda h: {"hidden": h, "rest": h.neg()}, lambda o: o["hidden"], "block[hidden]"),
        (lambda h: {"all": (h.neg(), [h])}, lambda o: o["all"][1][0], "block[all][1][0]"),
        (lambda h: {0: h.neg(), 1: h}, lambda o: o[1], "block[1]"),
        (lambda h: Answer(last=h.neg(), states=(h.neg(), h)), lambda o: o["states"][1], "block[states][1]"),
        (lambda h: Answer(last=h, states=(h.neg(),)), lambda o: o[0], "block[0]"),
    ],
    ids=["tuple", "from-the-end", "list", "dict", "nested", "dict-by-number", "output", "output-by-number"],
)
def test_keys_choose_a_tensor_inside_an_output(show: Any, find: Any, tap: str) -> None:
    model = Net(show, find)
    assert torch.equal(look(model, tap).at[tap], model.hidden())


def test_the_real_model_output_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def show(h: Tensor) -> Any:
        return outputs.BaseModelOutput(last_hidden_state=h, hidden_states=(h.neg(), h))

    model = Net(show, lambda o: o.last_hidden_state)
    seen = look(model, "block[last_hidden_state]", "block[hidden_states][1]", "block[0]")
    for tensor in seen.at.values():
        assert torch.equal(tensor, model.hidden())
    assert len(seen.at) == 3


def test_the_models_own_output_has_the_empty_path() -> None:
    block = Block(lambda h: {"logits": h, "twice": 2 * h})
    seen = look(block, "[twice]", ":in")
    assert torch.equal(seen.at["[twice]"], 2 * block.fc(X))
    assert seen.at[":in"] is X


def test_names_are_looked_up_in_the_taps_then_in_the_models_table() -> None:
    model = Net()
    model.TAPS = {"hidden": "block", "scores": "head"}
    seen = look(model, "hidden", "scores", taps={"scores": "head:in"})
    assert torch.equal(seen.at["hidden"], model.hidden())
    assert torch.equal(seen.at["scores"], model.hidden())


def test_looking_twice_under_one_name_is_looking_once() -> None:
    tapped = Tapped(Net())
    tapped.look(["block"])
    tapped.look(["block", "head"])
    assert tapped.names == ("block", "head")
    assert tapped.check(X).at.keys() == {"block", "head"}


# --- what the answer is, and what it is asked with ---


@pytest.mark.parametrize("made", [dict, Answer])
def test_a_mapping_answers_with_its_logits(made: Any) -> None:
    block = Block(lambda h: made(loss=None, logits=h))
    assert torch.equal(look(block).out, block.fc(X))


def test_the_tap_out_says_where_the_answer_is() -> None:
    block = Block(lambda h: (h.neg(), {"scores": h}))
    assert torch.equal(look(block, taps={"out": "[1][scores]"}).out, block.fc(X))


def test_any_other_answer_is_passed_on_as_it_is() -> None:
    block = Block(lambda h: (h, h))
    assert isinstance(look(block).out, tuple)


def test_an_out_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(Refused, match=r"'out' asks for \[scores\].*logits, loss"):
        look(Block(lambda h: {"logits": h, "loss": h}), taps={"out": "[scores]"})


def test_an_out_that_names_a_module_is_refused() -> None:
    """It would be passed over in silence: the answer is always looked for in the model's own output."""
    with pytest.raises(Refused, match=r"'out'.*'logits'"):
        Tapped(Block(lambda h: {"logits": h}), {"out": "logits"})


def test_a_mapping_of_inputs_goes_by_keyword_and_its_attention_mask_is_shown() -> None:
    class Words(nn.Module):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return ids * attention_mask

    mask = torch.tensor([[1, 1, 0]])
    seen = look(Words(), x={"ids": torch.ones(1, 3), "attention_mask": mask})
    assert seen.out.tolist() == [[1.0, 1.0, 0.0]]
    assert seen.mask.tolist() == [[True, True, False]]


def test_detach_cuts_the_answer_and_every_tap() -> None:
    seen = look(Net(), "block")
    assert seen.out.requires_grad and seen.at["block"].requires_grad
    assert not seen.detach().out.requires_grad and not seen.detach().at["block"].requires_grad
    assert torch.equal(seen.detach().at["block"], seen.at["block"])


def test_gradient_flows_through_what_a_tap_shows() -> None:
    model = Net()
    look(model, "block").at["block"].sum().backward()
    assert model.block.fc.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


# --- what is refused ---


def test_a_tap_that_does_not_exist_is_refused_with_the_near_ones() -> None:
    model = nn.Sequential(OrderedDict(layer1=nn.Linear(3, 3), layer2=nn.Linear(3, 3), other=nn.Linear(3, 2)))
    with pytest.raises(Refused, match="'layr2' does not exist in the student") as refusal:
        Tapped(model, called="student").look(["layr2"])
    near = str(refusal.value).partition("near")[2]
    assert "layer2" in near and "layer1" in near and "other" not in near


def test_a_tap_far_from_any_is_refused_with_the_first_choices() -> None:
    model = Net()
    model.TAPS = {"stage1": "block"}
    with pytest.raises(Refused, match=r"'xyzzy' does not exist.*stage1, block, head"):
        Tapped(model).look(["xyzzy"])


@pytest.mark.parametrize("tap", ["block[", "block]0", "block:inn", "block[]", "a:b:in"])
def test_a_tap_that_cannot_be_read_is_refused_with_an_example(tap: str) -> None:
    with pytest.raises(Refused, match=r"cannot be read.*layer3"):
        Tapped(Net()).look([tap])


@pytest.mark.parametrize(
    ("show", "find", "words"),
    [
        (lambda h: (h, h), lambda o: o[0], r"a tuple of 2, expected one tensor.*'block\[0\]'"),
        (lambda h: {"map": h}, lambda o: o["map"], r"entries map, expected one tensor.*'block\[map\]'"),
    ],
)
def test_a_tap_that_shows_several_tensors_is_refused_with_an_example(
    show: Any, find: Any, words: str
) -> None:
    with pytest.raises(Refused, match=words):
        look(Net(show, find), "block")


@pytest.mark.parametrize("tap", ["block[2]", "block[hidden]"])
def test_an_element_that_is_not_there_is_refused_with_what_is(tap: str) -> None:
    with pytest.raises(Refused, match=r"asks for \[\w+\], found a tuple of 2"):
        look(Net(lambda h: (h, h), lambda o: o[0]), tap)


def test_the_check_refuses_a_tap_that_is_changed_in_place_afterwards() -> None:
    model = plain()
    model.act = nn.ReLU(inplace=True)
    tapped = Tapped(model, called="student")
    tapped.look(["norm"])
    with pytest.raises(Refused, match="'norm' of the student is changed in place"):
        tapped.check(X)


def test_the_layer_after_an_in_place_one_can_be_tapped() -> None:
    model = plain()
    model.act = nn.ReLU(inplace=True)
    tapped = Tapped(model)
    tapped.look(["act"])
    assert tapped.check(X).at["act"].min() == 0


def test_the_check_refuses_a_tap_whose_module_is_called_twice() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x) + self.block(-x))

    tapped = Tapped(Twice())
    tapped.look(["block"])
    with pytest.raises(Refused, match="'block' of the model is called 2 times"):
        tapped.check(X)


def test_a_tap_whose_module_is_not_called_is_refused() -> None:
    class Lazy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block.fc(x))

    tapped = Tapped(Lazy(), called="teacher")
    tapped.look(["block", "head"])
    with pytest.raises(Refused, match="'block' of the teacher showed nothing"):
        tapped(X)


# --- hooks and captures end ---


def test_a_copy_of_a_tapped_model_is_deaf_and_its_original_still_hears() -> None:
    model = Net()
    tapped = Tapped(model)
    tapped.look(["block"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.block.fc.weight.zero_()

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x) + twin(x)

    tapped.model = Both()  # the twin runs while the ear is open
    assert torch.equal(tapped(X).at["block"], model.hidden())
    assert torch.equal(look(twin, "block").at["block"], twin.hidden())


def test_two_tapped_on_one_model_do_not_hear_each_other() -> None:
    model = Net()
    first, second = Tapped(model), Tapped(model)
    first.look(["block"])
    second.look(["head"])
    assert first(X).at.keys() == {"block"}
    assert second(X).at.keys() == {"head"}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_leave_with_the_tapped() -> None:
    model = Net()
    tapped = Tapped(model)
    tapped.look(["block", "head:in"])
    assert hooks(model) == 2
    del tapped
    gc.collect()
    assert hooks(model) == 0


def test_a_capture_does_not_outlive_what_the_call_returned() -> None:
    tapped = Tapped(Net())
    tapped.look(["block"])
    seen = tapped.check(X)
    caught = weakref.ref(seen.at["block"])
    assert caught() is not None
    del seen
    gc.collect()
    assert caught() is None


def test_a_call_that_fails_closes_the_ear() -> None:
    """Else the model's next ordinary forward, and every one after it, would be kept."""
    model = Net()
    tapped = Tapped(model)
    tapped.look(["block"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tapped(torch.zeros(2, 5))
    kept: list[Tensor] = []
    model.block.register_forward_hook(lambda m, a, out: kept.append(out))
    model(X)
    caught = weakref.ref(kept.pop())
    gc.collect()
    assert caught() is None
