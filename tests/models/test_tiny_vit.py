"""TinyViT: published sizes and names, windows and biases against slow references, taps, fresh tails."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped
from limbeck.knowledge.feature.fitnet import FitNet
from limbeck.knowledge.response.kd import KD
from limbeck.models.cnn import CNN
from limbeck.models.tiny_vit import MODELS, TinyViT

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"dims": (6, 8, 12), "depths": (1, 2, 2), "windows": (3, 4), "head_width": 4, "strides": (2, 1)}


def tiny(**knobs: object) -> TinyViT:
    """Three stages, at grids of 16, 8 and 4 for X: windows of 3 have to be filled up with zeros."""
    torch.manual_seed(0)
    return TinyViT(5, **{**SMALL, **knobs})  # type: ignore[arg-type]


def lively(model: nn.Module) -> nn.Module:
    """The same with weights that let everything count: biases, norms and blocks that begin as nothing."""
    for name, p in model.named_parameters():
        nn.init.normal_(p, 1 if "norm" in name or "bn" in name else 0, 0.3)
    return model


def by_hand(dims: Sequence[int], depths: Sequence[int], windows: Sequence[int], classes: int) -> int:
    """Parameters, counted from the paper's layout."""

    def conv(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel**2 + 2 * outputs  # and its norm

    first, half = dims[0], dims[0] // 2
    total = conv(3, half, 3) + conv(half, first, 3)
    total += depths[0] * (conv(first, 4 * first, 1) + conv(1, 4 * first, 3) + conv(4 * first, first, 1))
    for a, d, depth, window in zip(dims, dims[1:], depths[1:], windows, strict=False):
        total += conv(a, d, 1) + conv(1, d, 3) + conv(d, d, 1)
        attention = 2 * d + (d + 1) * 3 * d + (d + 1) * d + d // 32 * window**2
        mlp = 2 * d + (d + 1) * 4 * d + (4 * d + 1) * d
        total += depth * (attention + conv(1, d, 3) + mlp)
    return total + 2 * dims[-1] + (dims[-1] + 1) * classes


@pytest.mark.parametrize(
    ("name", "dims", "exactly", "millions", "macs"),
    [
        ("tiny_vit_5m", (64, 128, 160, 320), 5_392_764, "5.4", "1.3"),
        ("tiny_vit_11m", (64, 128, 256, 448), 10_996_972, "11.0", "2.0"),
        ("tiny_vit_21m", (96, 192, 384, 576), 21_198_568, "21.2", "4.3"),
    ],
)
def test_its_size_and_cost_are_the_published(
    name: str, dims: tuple[int, ...], exactly: int, millions: str, macs: str
) -> None:
    with torch.device("meta"):
        model = MODELS[name](1000).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    size = sum(p.numel() for p in model.parameters())
    assert size == exactly == by_hand(dims, (2, 2, 6, 2), (7, 14, 7), 1000)
    assert f"{size / 1e6:.1f}" == millions
    assert f"{counter.get_total_flops() / 2e9:.1f}" == macs


def test_the_small_one_has_the_size_it_says() -> None:
    with torch.device("meta"):
        model = MODELS["tiny_vit_32"](100)
    size = sum(p.numel() for p in model.parameters())
    assert size == 2_449_540 == by_hand((64, 128, 160), (2, 2, 6), (4, 4), 100)


def test_its_tensors_have_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        state = MODELS["tiny_vit_5m"](1000).state_dict()
    official = {
        "patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "patch_embed.seq.2.bn.running_var": (64,),
        "layers.0.blocks.1.conv2.c.weight": (256, 1, 3, 3),
        "layers.0.blocks.1.conv3.bn.weight": (64,),
        "layers.0.downsample.conv1.c.weight": (128, 64, 1, 1),
        "layers.0.downsample.conv2.c.weight": (128, 1, 3, 3),
        "layers.0.downsample.conv3.bn.bias": (128,),
        "layers.1.blocks.0.attn.attention_biases": (4, 49),
        "layers.1.blocks.0.attn.norm.weight": (128,),
        "layers.2.blocks.5.attn.attention_biases": (5, 196),
        "layers.2.blocks.5.attn.qkv.weight": (480, 160),
        "layers.2.blocks.5.local_conv.c.weight": (160, 1, 3, 3),
        "layers.2.blocks.5.local_conv.bn.num_batches_tracked": (),
        "layers.3.blocks.1.attn.attention_biases": (10, 49),
        "layers.3.blocks.1.attn.proj.bias": (320,),
        "layers.3.blocks.1.mlp.norm.bias": (320,),
        "layers.3.blocks.1.mlp.fc1.weight": (1280, 320),
        "layers.3.blocks.1.mlp.fc2.weight": (320, 1280),
        "norm_head.weight": (320,),
        "head.bias": (1000,),
    }
    assert {name: tuple(state[name].shape) for name in official} == official
    assert len(state) == 296


def test_at_224_its_stages_have_the_papers_grids() -> None:
    torch.manual_seed(0)
    tapped = Tapped(MODELS["tiny_vit_5m"](10).eval())
    tapped.look(["stem", "stage1", "stage2", "stage3", "stage4", "pooled"])
    with torch.no_grad():
        seen = tapped.check(torch.randn(1, 3, 224, 224))
    assert {name: tuple(v.shape[1:]) for name, v in seen.at.items()} == {
        "stem": (64, 56, 56),
        "stage1": (64, 56, 56),
        "stage2": (128, 28, 28),
        "stage3": (160, 14, 14),
        "stage4": (320, 7, 7),
        "pooled": (320,),
    }
    assert seen.out.shape == (1, 10) and seen.out.isfinite().all()


@pytest.mark.parametrize(("size", "grids"), [((32, 32), (16, 8, 4)), ((28, 28), (14, 7, 4))])
def test_the_small_one_takes_small_images(size: tuple[int, int], grids: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = MODELS["tiny_vit_32"](classes=7, channels=1)
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(torch.randn(2, 1, *size))
    assert seen.out.shape == (2, 7) and seen.at["pooled"].shape == (2, 160)
    shapes = [(2, width, grid, grid) for width, grid in zip((64, 128, 160), grids, strict=True)]
    assert [seen.at[f"stage{n}"].shape for n in (1, 2, 3)] == shapes


def test_a_tap_shows_what_its_stage_gives_and_pooled_what_the_head_reads() -> None:
    model = lively(tiny()).eval()
    tapped = Tapped(model)
    tapped.look(model.TAPS)
    seen = tapped.check(X)
    x = model.patch_embed(X)
    assert torch.equal(seen.at["stem"], x)
    for n, stage in enumerate(model.stages):
        x = stage(x)
        assert torch.equal(seen.at[f"stage{n + 1}"], x)
        x = model.layers[n].downsample(x) if n < 2 else x
    assert torch.equal(seen.at["pooled"], model.norm_head(x.mean((2, 3))))
    assert torch.equal(seen.out, model.head(seen.at["pooled"]))


def slow_attention(attention: nn.Module, x: Tensor, side: int, width: int) -> Tensor:
    """One window (n c), head by head and place by place."""
    n, c = x.shape
    inputs = F.layer_norm(x, (c,), attention.norm.weight, attention.norm.bias)
    qkv = inputs @ attention.qkv.weight.T + attention.qkv.bias
    heads = []
    for head, part in enumerate(qkv.split(3 * width, dim=1)):
        q, k, v = part.split(width, dim=1)
        scores = torch.empty(n, n)
        for i in range(n):
            for j in range(n):
                down, right = abs(i // side - j // side), abs(i % side - j % side)
                bias = attention.attention_biases[head, down * side + right]
                scores[i, j] = q[i] @ k[j] / math.sqrt(width) + bias
        heads.append(scores.softmax(1) @ v)
    return torch.cat(heads, 1) @ attention.proj.weight.T + attention.proj.bias


def test_attention_adds_a_bias_for_how_far_two_places_are_apart() -> None:
    attention = lively(tiny().layers[1].blocks[0].attn)
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        slow = torch.stack([slow_attention(attention, window, 3, 4) for window in x])
        assert torch.allclose(attention(x), slow, atol=1e-5)


def test_a_block_looks_in_windows_then_around_then_within() -> None:
    """On a grid of 5x7, so windows of 3 are filled up with zeros at the lower and the right edge."""
    block = lively(tiny().layers[1].blocks[0]).eval()
    block.local_conv.bn.running_mean.normal_()
    x = torch.randn(2, 8, 5, 7)
    with torch.no_grad():
        filled = torch.zeros(2, 8, 6, 9)
        filled[:, :, :5, :7] = x
        looked = torch.empty_like(filled)
        for row in (0, 3):
            for column in (0, 3, 6):
                window = filled[:, :, row : row + 3, column : column + 3].reshape(2, 8, 9)
                seen = block.attn(window.mT).mT.reshape(2, 8, 3, 3)
                looked[:, :, row : row + 3, column : column + 3] = seen
        y = x + looked[:, :, :5, :7]
        bn = block.local_conv.bn
        y = F.conv2d(y, block.local_conv.c.weight, padding=1, groups=8)
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        norm, mlp = block.mlp.norm, block.mlp
        inner = F.layer_norm(y.movedim(1, 3), (8,), norm.weight, norm.bias)
        expected = y + mlp.fc2(F.gelu(mlp.fc1(inner))).movedim(3, 1)
        assert torch.allclose(block(x), expected, atol=1e-5)


def test_an_inverted_residual_begins_as_a_gelu_and_adds_its_branch() -> None:
    block = tiny().layers[0].blocks[0]
    x = torch.randn(2, 6, 5, 5)
    assert torch.equal(block(x), F.gelu(x))
    lively(block).eval()
    branch = block.conv3(F.gelu(block.conv2(F.gelu(block.conv1(x)))))
    assert torch.allclose(block(x), F.gelu(x + branch), atol=1e-6) and branch.abs().max() > 0.1
    assert block.conv1.c.weight.shape == (24, 6, 1, 1) and block.conv2.c.groups == 24


def test_merging_has_an_activation_behind_all_but_its_last_convolution() -> None:
    merging = lively(tiny().layers[0].downsample).eval()
    x = torch.randn(2, 6, 5, 8)
    y = merging.conv3(F.gelu(merging.conv2(F.gelu(merging.conv1(x)))))
    assert torch.equal(merging(x), y) and y.shape == (2, 8, 3, 4)


def test_its_weights_start_as_the_official_ones() -> None:
    model = tiny(dims=(16, 32, 64), head_width=16)
    for name, p in model.named_parameters():
        if name.endswith("attention_biases"):
            assert (p == 0).all()
        elif name.endswith("bn.weight") or (name.endswith("weight") and "norm" in name):
            assert (p == (0 if "conv3" in name and "blocks" in name else 1)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim == 2:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.15), name
        else:  # torch's own, uniform up to the root of one over the fan-in
            bound = p[0].numel() ** -0.5
            assert 0.8 * bound < p.abs().max() <= bound, name
    assert all(torch.equal(a, b) for a, b in zip(tiny().parameters(), tiny().parameters(), strict=True))


def test_blocks_are_left_out_more_often_the_deeper_they_are() -> None:
    with torch.device("meta"):
        rates = [m.rate for m in MODELS["tiny_vit_21m"](10).modules() if hasattr(m, "rate")]
        assert {m.rate for m in MODELS["tiny_vit_5m"](10).modules() if hasattr(m, "rate")} == {0}
        assert max(m.rate for m in MODELS["tiny_vit_11m"](10).modules() if hasattr(m, "rate")) == 0.1
    assert rates == pytest.approx([0.2 * n / 11 for n in range(12)])


def test_in_training_a_row_goes_without_a_branch_or_with_a_larger_one() -> None:
    drop = tiny(drop_path=0.8).layers[2].blocks[1].drop_path
    x = torch.rand(4000, 1, 2, 1) + 1
    factor = (drop(x) / x).flatten(1)
    kept = factor[:, 0] > 0
    assert torch.equal(kept, factor[:, 1] > 0), "a row as a whole"
    assert torch.allclose(factor[kept], torch.tensor(5.0)) and 0.17 < kept.float().mean() < 0.23
    assert torch.equal(drop.eval()(x), x)
    model, before = tiny(), torch.get_rng_state()
    model(X)
    assert torch.equal(torch.get_rng_state(), before), "at a rate of 0 nothing is drawn"
    model = tiny(drop_path=0.5)
    lively(model)
    assert not torch.equal(model(X), model(X)) and torch.equal(model.eval()(X), model(X))


@pytest.mark.parametrize("size", [(20, 28), (7, 9), (3, 3)])
def test_any_size_of_image_is_taken(size: tuple[int, int]) -> None:
    out = tiny()(torch.randn(3, 3, *size))
    assert out.shape == (3, 5) and out.isfinite().all()


@pytest.mark.parametrize(("i", "blocks"), [(0, 4), (1, 2), (2, 2)])
def test_a_tail_leads_from_its_stage_to_the_last_map(i: int, blocks: int) -> None:
    model = lively(tiny()).eval()
    tapped = Tapped(model)
    tapped.look([f"stage{i + 1}", "stage3"])
    seen = tapped(X)
    tail = model.tail(i).eval()
    there = tail(seen.at[f"stage{i + 1}"])
    assert there.shape == seen.at["stage3"].shape
    assert sum(hasattr(module, "local_conv") for module in tail.modules()) == blocks
    parts = [model.layers[n].downsample for n in range(i, 2)] + [model.stages[n] for n in range(i + 1, 3)]
    own = parts or [model.stages[2]]
    names = sorted(n for part in own for n, _ in part.named_parameters())
    assert sorted(n.partition(".")[2] for n, _ in tail.named_parameters()) == names


def test_a_tail_with_the_networks_weights_is_what_follows() -> None:
    model = lively(tiny(drop_path=0.3)).eval()
    tapped = Tapped(model)
    tapped.look(["stage1", "stage3"])
    seen = tapped(X)
    tail = model.tail(0)
    follows = nn.Sequential(
        model.layers[0].downsample, model.stages[1], model.layers[1].downsample, model.stages[2]
    )
    tail.load_state_dict(follows.state_dict())
    assert torch.equal(tail.eval()(seen.at["stage1"]), seen.at["stage3"])
    rates = [m.rate for m in tail.modules() if hasattr(m, "rate")]
    assert rates == [m.rate for m in follows.modules() if hasattr(m, "rate")]


@pytest.mark.parametrize("i", [0, 2])
def test_a_tail_is_fresh_and_learns(i: int) -> None:
    model = tiny(dims=(16, 32, 64), head_width=16).requires_grad_(False)
    for p in model.parameters():
        p.fill_(3.0)
    tail = model.double().tail(i)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in tail.parameters()}
    assert all(p.requires_grad and p.dtype == torch.float64 for p in tail.parameters())
    layers = [m for m in tail.modules() if isinstance(m, nn.Linear)]
    assert layers and all(float(m.weight.detach().std()) == pytest.approx(0.02, rel=0.15) for m in layers)


def test_gradient_reaches_every_weight() -> None:
    model = lively(tiny())
    F.cross_entropy(model(X), torch.tensor([0, 3, 4])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"dims": ()}, r"has dims \[\]"),
        ({"depths": (1, 0, 2)}, r"has depths \[1, 0, 2\]"),
        ({"windows": (3, 0)}, r"has windows \[3, 0\]"),
        ({"strides": (0, 1)}, r"has strides \[0, 1\]"),
        ({"depths": (1, 2)}, "3 dims, 2 depths and 2 windows"),
        ({"windows": (3, 4, 4)}, "3 dims, 3 depths and 3 windows"),
        ({"strides": (2, 2, 2)}, r"strides \[2, 2, 2\]; expected two"),
        ({"dims": (6, 8, 13)}, r"dims \[6, 8, 13\] and head_width 4"),
        ({"head_width": 0}, "head_width 0"),
        ({"drop_path": 1.0}, "drop_path of a tiny_vit is 1.0"),
        ({"drop_path": -0.1}, "drop_path of a tiny_vit is -0.1"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(knobs: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        tiny(**knobs)


def test_it_answers_alike_in_eval_and_after_its_weights_went_elsewhere() -> None:
    model = lively(tiny())
    model(X)
    model.eval()
    other = tiny().eval()
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(X), model(X)) and torch.equal(model(X), model(X))


@pytest.mark.parametrize("student_is", ["cnn", "tiny_vit"])
def test_it_teaches_a_cnn_and_learns_from_one(student_is: str) -> None:
    torch.manual_seed(0)
    cnn = CNN(5, channels=3)
    student, teacher = (cnn, tiny()) if student_is == "cnn" else (tiny(), cnn)
    before = copy.deepcopy(teacher.state_dict())
    y = torch.tensor([0, 3, 4])
    distiller = Distiller(student, teacher, [KD(), FitNet("stage2")], example=(X, y)).train()
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


def test_it_compiles_whole() -> None:
    torch.compiler.reset()
    model = lively(tiny(dims=(6, 8), depths=(1, 1), windows=(3,))).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(X).square().sum()
    loss.backward()
    assert torch.allclose(loss, model(X).square().sum(), rtol=1e-4)
    assert all(p.grad is not None for p in model.parameters())
