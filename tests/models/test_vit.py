"""The vision transformer: DeiT-Ti's size, its taps, attention that can be seen, and fresh tails."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN
from limbeck.models.vit import MODELS, ViT

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
POOLS = ("mean", "class")


def vit(**knobs: object) -> ViT:
    torch.manual_seed(0)
    small = {"size": 16, "width": 12, "depth": 6, "heads": 2}
    return ViT(5, **{**small, **knobs})  # type: ignore[arg-type]


def test_its_size_is_that_of_deit_tiny() -> None:
    tiny = MODELS["vit_tiny"]
    block = 4 * 192 + (192 + 1) * 3 * 192 + (192 + 1) * 192 + (192 + 1) * 768 + (768 + 1) * 192
    small = (48 + 1) * 192 + 64 * 192 + 12 * block + 2 * 192 + (192 + 1) * 100
    assert sum(p.numel() for p in tiny(classes=100, channels=3).parameters()) == small == 5_379_748
    with torch.device("meta"):
        deit = tiny(1000, size=224, patch=16, pool="class")
    assert sum(p.numel() for p in deit.parameters()) == 5_717_416


def test_its_weights_start_as_deits() -> None:
    model = vit(width=48, pool="class")
    for parameter in (model.positions, model.class_token, model.stages[1][0].attention.qkv.weight):
        assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert (model.head.bias == 0).all()


def test_its_defaults_take_images_of_32() -> None:
    model = MODELS["vit_tiny"](classes=7)
    tapped = Tapped(model)
    tapped.look(["stage1", "stage2", "stage3", "stage3_attention"])
    seen = tapped.check(torch.randn(1, 3, 32, 32))
    assert seen.out.shape == (1, 7) and model.grid == (8, 8)
    assert all(seen.at[f"stage{n}"].shape == (1, 64, 192) for n in (1, 2, 3))
    assert seen.at["stage3_attention"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("pool", "tokens"), [("mean", 16), ("class", 17)])
def test_every_tap_shows_its_stage_and_the_pooled_one_what_the_head_reads(pool: str, tokens: int) -> None:
    model = vit(pool=pool)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(X)
    assert torch.equal(model.head(seen.at["pooled"]), seen.out) and seen.out.shape == (2, 5)
    for n in (1, 2, 3):
        assert seen.at[f"stage{n}"].shape == (2, tokens, 12)
        where = seen.at[f"stage{n}_attention"]
        assert where.shape == (2, 2, tokens, tokens)
        assert where.min() > 0 and torch.allclose(where.sum(-1), torch.ones(2, 2, tokens), atol=1e-6)
    final = model.norm(seen.at["stage3"])
    assert torch.allclose(seen.at["pooled"], final.mean(1) if pool == "mean" else final[:, 0], atol=1e-6)


def test_attention_is_the_scaled_product_of_queries_and_keys() -> None:
    attention = vit().stages[0][0].attention
    nn.init.normal_(attention.qkv.weight)
    x = torch.randn(3, 7, 12)
    q, k, v = (
        part.reshape(3, 7, 2, 6).transpose(1, 2) for part in attention.qkv(x).split([12, 12, 12], dim=2)
    )
    there = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 7, 12)
    assert torch.allclose(attention(x), attention.project(there), atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_queries_keys_and_values_are_seen_side_by_side(pool: str) -> None:
    """Those of a stage's last block, each head after head: they make the attention that is seen, too."""
    tapped = Tapped(vit(pool=pool))
    tapped.look(["stage2_qkv", "stage2_attention"])
    seen = tapped.check(X)
    tokens = 16 if pool == "mean" else 17
    assert seen.at["stage2_qkv"].shape == (2, tokens, 36)
    q, k, _ = (part.unflatten(2, (2, 6)).transpose(1, 2) for part in seen.at["stage2_qkv"].chunk(3, 2))
    assert torch.allclose((q @ k.mT / 6**0.5).softmax(-1), seen.at["stage2_attention"], atol=1e-6)


def test_a_block_adds_to_its_tokens_with_its_norms_in_front() -> None:
    block = vit().stages[0][0]
    x = torch.randn(2, 5, 12)
    y = x + block.attention(F.layer_norm(x, (12,), eps=1e-6))
    assert torch.allclose(block(x), y + block.mlp(F.layer_norm(y, (12,), eps=1e-6)), atol=1e-6)


def test_gradient_passes_through_the_attention_that_is_seen() -> None:
    model = vit()
    tapped = Tapped(model)
    tapped.look(["stage3_attention"])
    tapped(X).at["stage3_attention"].square().sum().backward()
    grad = model.stages[2][1].attention.qkv.weight.grad
    assert grad is not None and grad[:24].abs().max() > 0 and grad[24:].abs().max() == 0  # values: none


def test_patches_are_read_row_by_row_and_know_their_place() -> None:
    model = vit().eval()
    for position in range(16):
        x = torch.zeros(1, 3, 16, 16)
        row, column = divmod(position, 4)
        x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
        first = model.patches(x).flatten(2).transpose(1, 2)
        zero = model.patches(torch.zeros_like(x)).flatten(2).transpose(1, 2)
        assert (first - zero).abs().sum((0, 2)).nonzero().flatten().tolist() == [position]
    shifted = X.roll(4, 3)  # the same patches in other places
    nn.init.normal_(model.positions)
    assert not torch.allclose(model(X), model(shifted), atol=1e-5)
    nn.init.zeros_(model.positions)
    assert torch.allclose(model(X), model(shifted), atol=1e-6)


def test_knobs_shape_it() -> None:
    model = vit(channels=1, patch=8, depth=4, stages=4, heads=3)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(X[:, :1])
    assert [n for n in seen.at if n.startswith("stage") and "_" not in n] == [
        f"stage{n}" for n in (1, 2, 3, 4)
    ]
    assert seen.at["stage4"].shape == (2, 4, 12) and seen.at["stage4_attention"].shape == (2, 3, 4, 4)
    assert all(len(stage) == 1 for stage in model.stages)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"patch": 5}, "size 16 and patch 5"),
        ({"heads": 5}, "width 12 and heads 5"),
        ({"stages": 4}, "depth 6 and stages 4"),
        ({"stages": 0}, "depth 6 and stages 0"),
        ({"pool": "max"}, "'max', expected mean or class"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(knobs: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        vit(**knobs)


@pytest.mark.parametrize("shape", [(12, 16), (16, 20), (32, 32)])
def test_images_of_another_size_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(Refused, match=rf"16x16 was shown {shape[0]}x{shape[1]}"):
        vit()(torch.randn(2, 3, *shape))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("i", "blocks"), [(0, 4), (1, 2), (2, 2)])
def test_a_tail_leads_from_its_stage_to_the_final_tokens(pool: str, i: int, blocks: int) -> None:
    model = vit(pool=pool)
    tapped = Tapped(model)
    tapped.look([f"stage{i + 1}"])
    tokens = tapped(X).at[f"stage{i + 1}"]
    tail = model.tail(i)
    assert tail(tokens).shape == tokens.shape
    assert sum(hasattr(module, "attention") for module in tail.modules()) == blocks
    assert torch.allclose(
        tail(tokens).mean(-1), torch.zeros(tokens.shape[:2]), atol=1e-5
    )  # normed at the end


@pytest.mark.parametrize("i", [0, 2])
def test_a_tail_is_fresh_and_learns(i: int) -> None:
    model = vit(width=48).requires_grad_(False)
    for p in model.parameters():
        p.fill_(3.0)
    tail = model.double().tail(i)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in tail.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float64 for p in tail.parameters())
    layers = [m for m in tail.modules() if isinstance(m, nn.Linear)]
    assert layers and all(float(m.weight.detach().std()) == pytest.approx(0.02, rel=0.1) for m in layers)
    assert all((m.bias == 0).all() for m in layers)


@pytest.mark.parametrize("pool", POOLS)
def test_it_answers_alike_in_eval_and_after_its_weights_went_elsewhere(pool: str) -> None:
    model = vit(pool=pool).eval()
    torch.manual_seed(1)
    other = ViT(5, size=16, width=12, depth=6, heads=2, pool=pool).eval()
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(X), model(X)) and torch.equal(model(X), model(X))


@pytest.mark.parametrize("student_is", ["cnn", "vit"])
def test_it_teaches_a_cnn_and_learns_from_one(student_is: str) -> None:
    torch.manual_seed(0)
    cnn = CNN(5, channels=3)
    student, teacher = (cnn, vit()) if student_is == "cnn" else (vit(), cnn)
    before = copy.deepcopy(teacher.state_dict())
    y = torch.tensor([0, 3])
    distiller = Distiller(student, teacher, [KD()], example=(X, y)).train()
    optimiser = torch.optim.Adam(distiller.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = distiller(X, y)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())


@pytest.mark.parametrize("pool", POOLS)
def test_it_compiles_whole(pool: str) -> None:
    torch.compiler.reset()
    model = vit(pool=pool, depth=1, stages=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(X).square().sum()
    loss.backward()
    assert torch.allclose(loss, model(X).square().sum(), atol=1e-6)
    assert all(p.grad is not None for p in model.parameters())
