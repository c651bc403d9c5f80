"""The plain CNN: its grids and widths, its taps, and fresh tails."""

import pytest
import torch

from limbeck.core.taps import Tapped
from limbeck.models.cnn import CNN

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def cnn(**knobs: object) -> CNN:
    torch.manual_seed(0)
    return CNN(5, **{"channels": 3, "widths": (4, 6, 10), "depth": 2, **knobs})  # type: ignore[arg-type]


def test_it_answers_one_score_a_class() -> None:
    assert cnn()(X).shape == (2, 5)
    assert cnn(widths=[7], depth=1)(X).shape == (2, 5)


def test_its_defaults_take_grey_images() -> None:
    assert CNN(10)(X[:, :1]).shape == (2, 10)


def test_every_tap_shows_its_stage_and_the_pooled_one_what_the_head_reads() -> None:
    model = cnn()
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(X)
    grids = {"stage1": (4, 12, 12), "stage2": (6, 6, 6), "stage3": (10, 3, 3)}
    before = {f"{name}_pre": shape for name, shape in grids.items()}
    assert {n: tuple(v.shape[1:]) for n, v in seen.at.items()} == grids | before | {"pooled": (10,)}
    assert all(torch.equal(seen.at[f"{name}_pre"].relu(), seen.at[name]) for name in grids)
    assert all(float(seen.at[f"stage{n}"].detach().min()) == 0 for n in (1, 2, 3))  # after the ReLU
    assert torch.allclose(seen.at["pooled"], seen.at["stage3"].mean((2, 3)))
    assert torch.equal(model.head(seen.at["pooled"]), seen.out)


def test_depth_is_the_number_of_convolutions_a_stage() -> None:
    for depth in (1, 3):
        stage = cnn(depth=depth).stages[1]
        assert sum(isinstance(m, torch.nn.Conv2d) for m in stage) == depth


@pytest.mark.parametrize(("i", "shape"), [(0, (4, 12, 12)), (1, (6, 6, 6)), (2, (10, 3, 3))])
def test_a_tail_leads_from_its_stage_to_the_final_grid_and_width(i: int, shape: tuple[int, ...]) -> None:
    assert cnn().tail(i)(torch.randn(2, *shape)).shape == (2, 10, 3, 3)


def test_a_tail_is_fresh_and_its_own() -> None:
    model = cnn()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    model(X)  # moves BatchNorm's statistics
    tail = model.tail(0)
    theirs = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert not theirs & {id(t) for t in [*tail.parameters(), *tail.buffers()]}
    fresh = tail.state_dict()
    convolutions = [v for v in fresh.values() if v.ndim == 4]
    assert len(convolutions) == 4 and all(v.std() > 0 for v in convolutions)
    norms = [v for name, v in fresh.items() if v.ndim == 1 and name.endswith("weight")]
    assert len(norms) == 4 and all(torch.equal(v, torch.ones_like(v)) for v in norms)
    assert all(v.sum() == 0 for name, v in fresh.items() if name.endswith(("bias", "running_mean")))
    assert all(p.requires_grad for p in tail.parameters())


def test_a_tail_learns_even_where_the_network_is_frozen() -> None:
    frozen = cnn().requires_grad_(False).eval().double()
    for i in range(3):
        tail = frozen.tail(i)
        assert tail.training and all(p.requires_grad and p.dtype == torch.float64 for p in tail.parameters())
