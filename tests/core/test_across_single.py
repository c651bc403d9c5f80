"""One process: gathering is the identity, and a labelled mean is the mean over the labelled rows."""

import pytest
import torch
from torch import Tensor

from limbeck.core import across
from limbeck.core.batch import IGNORE, Batch


def labelled(*y: int) -> Batch:
    return Batch(torch.zeros(len(y), 1), torch.tensor(y))


def test_alone_there_is_one_process_and_nothing_to_gather() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (across.processes(), across.rank()) == (1, 0)
    assert across.gather(x) is x
    assert torch.equal(across.total(x), x)


def test_a_labelled_mean_is_over_the_labelled_rows() -> None:
    values = torch.tensor([1.0, 100.0, 3.0, 100.0])
    assert float(across.labelled_mean(values, labelled(0, IGNORE, 2, IGNORE))) == 2.0


def test_a_labelled_mean_of_tokens_is_over_the_labelled_tokens() -> None:
    values = torch.tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]])
    y = torch.tensor([[4, 1, IGNORE], [0, IGNORE, IGNORE]])
    assert float(across.labelled_mean(values, Batch(torch.zeros(2, 3), y))) == 3.0


def test_with_no_row_labelled_it_is_0_and_so_is_its_gradient() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = across.labelled_mean(values, labelled(IGNORE, IGNORE))
    loss.backward()
    assert loss == 0.0
    assert values.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_stands_in_an_unlabelled_row_never_enters(poison: float) -> None:
    values = torch.tensor([4.0, poison], requires_grad=True)
    loss = across.labelled_mean(values, labelled(1, IGNORE))
    loss.backward()
    assert loss == 4.0
    assert values.grad.tolist() == [1.0, 0.0]


def test_the_batch_may_say_what_the_mean_divides_by() -> None:
    """The parts of a batch, each told the whole's count, sum to the whole's mean."""
    whole = labelled(0, IGNORE, 1, 2, 0)
    values = torch.tensor([1.0, 9.0, 2.0, 4.0, 5.0])
    parts = zip(values.split([2, 3]), whole.y.split([2, 3]), strict=True)
    sums = [across.labelled_mean(v, Batch(v, y, labelled=torch.tensor(4.0))) for v, y in parts]
    assert float(sum(sums)) == float(across.labelled_mean(values, whole)) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_summed_and_counted_in_float32(dtype: torch.dtype) -> None:
    rows = 2**11 + 1  # neither counts so far
    mean: Tensor = across.labelled_mean(torch.ones(rows, dtype=dtype), labelled(*[0] * rows))
    assert mean.dtype == torch.float32
    assert float(mean) == 1.0
