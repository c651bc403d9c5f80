"""Taps are found in models without a table; our own models' tables are the answer. Nothing is moved."""

from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import registry
from limbeck.core.distiller import Distiller
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped
from limbeck.core.teachers import Frozen
from limbeck.knowledge.feature.at import AT
from limbeck.models.choose import blocks, choose
from limbeck.models.cnn import CNN

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shapes(model: nn.Module, taps: dict[str, str], x: Any = X) -> dict[str, tuple[int, ...]]:
    """What the taps show; `check` refuses those that are called twice or changed in place."""
    tapped = Tapped(model.eval(), taps)
    tapped.look(taps)
    return {name: tuple(v.shape) for name, v in tapped.check(x).at.items()}


def bare(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Take the model's table away."""
    table = dict(model.TAPS)
    monkeypatch.delattr(model if "TAPS" in vars(model) else type(model), "TAPS")
    return table


# --- our own models know the answer ---


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("resnet20", {}),
        ("resnet8x4", {}),
        ("wrn_16_2", {}),
        ("mobilenetv2_half", {}),
        ("shufflenet_v1", {}),
        ("shufflenet_v2", {}),
        ("vit_tiny", {"depth": 6, "width": 12}),
        ("vit_tiny", {"depth": 3, "width": 12, "pool": "class"}),
        ("cnn", {"channels": 3}),
        ("cnn", {"channels": 3, "depth": 2}),
    ],
)
def test_the_stages_of_our_own_models_are_found(
    name: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = registry.find("model", name)(classes=10, **knobs)
    assert choose(model, X) == model.TAPS
    table = bare(model, monkeypatch)
    taps = choose(model, X)
    plain = {tap for tap in table if tap == "pooled" or tap.removeprefix("stage").isdigit()}
    assert set(taps) == plain
    assert shapes(model, taps) == shapes(model, {tap: table[tap] for tap in plain})


def test_the_first_block_of_vgg8_is_its_stem_and_its_last_two_are_one_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = registry.find("model", "vgg8")(classes=10)
    table = bare(model, monkeypatch)
    taps = choose(model, X)
    assert list(taps) == ["stage1", "stage2", "stage3", "pooled"]
    assert shapes(model, taps) == shapes(model, {tap: table[tap] for tap in taps})


# --- others' models, after their manners ---


def unit(i: int, o: int, stride: int = 1, kernel: int = 3, inplace: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(o), nn.ReLU(inplace=inplace)]


class Residual(nn.Module):
    """After torchvision's: one ReLU, in place and called twice; `squeeze` adds a branch of 1x1."""

    def __init__(self, i: int, o: int, stride: int, squeeze: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(i, o, 1),
            nn.BatchNorm2d(o),
        )  # 1x1 at the old grid, as in a bottleneck
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, stride, padding=1), nn.BatchNorm2d(o)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(o, o, 1)) if squeeze else None
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.squeeze is not None:
            y = y * self.squeeze(y).sigmoid()
        y += self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self, squeeze: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = unit(3, 4, stride=2, kernel=7)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for n, (i, o) in enumerate([(4, 4), (4, 6), (6, 8), (8, 10)], start=1):
            stride = 1 if n == 1 else 2
            layer = nn.Sequential(Residual(i, o, stride, squeeze), Residual(o, o, 1, squeeze))
            self.add_module(f"layer{n}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def vgg() -> nn.Module:
    """After torchvision's without norms: a list of layers, ReLUs in place, pools between and at the end."""
    layers: list[nn.Module] = []
    for i, o in [(3, 4), (4, 6), (6, 8)]:
        for j in (i, o):
            layers += [nn.Conv2d(j, o, 3, padding=1), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(2))
    net = nn.Sequential()
    net.features = nn.Sequential(*layers)
    net.avgpool = nn.AdaptiveAvgPool2d(7)
    net.flat = nn.Flatten()
    net.classifier = nn.Sequential(nn.Linear(8 * 49, 9), nn.ReLU(inplace=True), nn.Linear(9, 5))
    return net


def flat() -> nn.Module:
    """Blocks in one list; the first at a grid, which widens, has more layers than the last."""
    blocks = [Residual(4, 4, 1), Residual(4, 6, 2), Residual(6, 8, 1), Residual(8, 8, 1)]
    return nn.Sequential(
        *unit(3, 4), *blocks, Residual(8, 9, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5)
    )


def down_at_once() -> nn.Module:
    """After ShuffleNet V2: behind the pool there is nothing at its grid but in the block that leaves it."""
    blocks = [nn.Sequential(Residual(4, 6, 2), Residual(6, 6, 1)), nn.Sequential(Residual(6, 8, 2))]
    return nn.Sequential(
        *unit(3, 4), nn.MaxPool2d(2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def in_a_body() -> nn.Module:
    """All stages in one module, which leaves a grid too, and passes another; a dropout behind it is idle."""
    stages = [nn.Sequential(*unit(i, o, s), *unit(o, o)) for i, o, s in [(4, 4, 1), (4, 6, 2), (6, 8, 2)]]
    head = [nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*unit(3, 4), nn.Sequential(*stages), *head)


def of_two_grids() -> nn.Module:
    """All layers in one module, which is given the image."""
    features = nn.Sequential(*unit(3, 4), *unit(4, 6, 2))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


class Gated(nn.Module):
    """A stage with a branch at a coarse grid beside it."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*unit(i, o, stride), *unit(o, o))
        self.coarse, self.gate = nn.AdaptiveAvgPool2d(2), nn.Conv2d(o, o, 1)
        self.last = nn.Conv2d(o, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        gate = F.interpolate(self.gate(self.coarse(x)), size=x.shape[2:])
        return self.last(x * gate.sigmoid())


def gated() -> nn.Module:
    return nn.Sequential(
        Gated(3, 4, 1), Gated(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )


class Named(nn.Module):
    """After transformers: what a model inside shows is an entry of its output. An auxiliary head is last."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Entries()
        self.hidden, self.head, self.other = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model(x)["last"].mean((2, 3))
        answer = self.head(self.hidden(x))
        return answer + 0 * self.other(x).sum()


class Entries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*unit(3, 6), *unit(6, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"last": self.body(x)}


class Axial(nn.Module):
    """Ends with a layer on the rows of maps, which are no tokens of the batch's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mix, self.head = nn.Sequential(*unit(3, 6)), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix(self.body(x).permute(0, 2, 3, 1).flatten(0, 1))
        return self.head(rows.unflatten(0, (len(x), -1)).mean((1, 2)))


def by_blocks() -> nn.Module:
    """Blocks that each end in their pool."""
    blocks = [nn.Sequential(*unit(i, o), *unit(o, o), nn.MaxPool2d(2)) for i, o in [(3, 4), (4, 6), (6, 8)]]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def plain() -> nn.Module:
    layers = [*unit(3, 4, inplace=False), *unit(4, 6, 2, inplace=False), *unit(6, 8, 2, inplace=False)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Inverted(nn.Module):
    """After MobileNetV2's blocks, in one flat list with a neck behind them."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*unit(i, 2 * i, kernel=1), *unit(2 * i, o, stride), *unit(o, o)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, 4, stride=2))
        sizes = [(4, 5, 1), (5, 6, 2), (6, 6, 1), (6, 8, 2), (8, 8, 1)]
        self.blocks = nn.ModuleList(Inverted(*size) for size in sizes)
        self.neck = nn.Sequential(*unit(8, 20, kernel=1))
        self.dropout = nn.Dropout()
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.neck(x).mean((2, 3)))).log_softmax(1)


class Mix(nn.Module):
    """After ConvNeXt's block: linear layers on channels that are last for a while."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Each stage preceded by a norm at the old grid and a strided convolution."""
    stages = []
    for n, (i, o) in enumerate([(3, 4), (4, 6), (6, 8)]):
        patch = nn.Conv2d(i, o, 4, 4) if n == 0 else nn.Conv2d(i, o, 2, 2)
        stages += [nn.Sequential(nn.GroupNorm(1, i), patch), nn.Sequential(Mix(o), Mix(o))]
    return nn.Sequential(
        nn.Sequential(*stages), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5)
    )


RESNET = {f"stage{n}": f"layer{n}" for n in (1, 2, 3)} | {"pooled": "fc:in"}  # layer4 is of one position


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ResNet, RESNET),
        (lambda: ResNet(squeeze=True), RESNET),
        (
            vgg,
            {
                "stage1": "features.3",
                "stage2": "features.8",
                "stage3": "features.13",
                "pooled": "classifier.2:in",
            },
        ),
        (flat, {"stage1": "3", "stage2": "6", "stage3": "7", "pooled": "10:in"}),
        (down_at_once, {"stage1": "2", "stage2": "4", "stage3": "5", "pooled": "8:in"}),
        (in_a_body, {"stage1": "3.0", "stage2": "3.1", "stage3": "3", "pooled": "7:in"}),
        (of_two_grids, {"stage1": "0.2", "stage2": "0", "pooled": "3:in"}),
        (gated, {"stage1": "0", "stage2": "1", "pooled": "4:in"}),
        (Named, {"stage1": "model.body", "pooled": "head:in"}),
        (Axial, {"stage1": "body", "pooled": "head:in"}),
        (by_blocks, {"stage1": "0.5", "stage2": "1.5", "stage3": "2.5", "pooled": "5:in"}),
        (plain, {"stage1": "2", "stage2": "5", "stage3": "8", "pooled": "11:in"}),
        (
            MobileNet,
            {"stage1": "blocks.0", "stage2": "blocks.2", "stage3": "blocks.4", "pooled": "head:in"},
        ),
        (convnext, {"stage1": "0.1", "stage2": "0.3", "stage3": "0", "pooled": "4:in"}),
    ],
    ids=[
        "resnet",
        "squeezed resnet",
        "vgg",
        "flat",
        "down at once",
        "in a body",
        "of two grids",
        "gated",
        "named",
        "axial",
        "blocks",
        "plain",
        "mobilenet",
        "convnext",
    ],
)
def test_the_stages_of_convolutional_networks(model: Any, expected: dict[str, str]) -> None:
    net = model()
    assert choose(net, X) == expected
    seen = shapes(net, expected)
    grids = [shape[2:] for name, shape in seen.items() if name != "pooled"]
    assert grids == sorted(grids, reverse=True) and len(set(grids)) == len(grids)


def test_the_four_deepest_of_many_grids() -> None:
    """As on large images, where the first two are a stem and what is still close to it."""
    widths = (3, 4, 5, 6, 7, 8, 9)
    blocks = [nn.Sequential(*unit(i, o, 2), *unit(o, o)) for i, o in pairwise(widths)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5))
    taps = choose(net, torch.randn(2, 3, 128, 128))
    assert [taps[f"stage{n}"] for n in (1, 2, 3, 4)] == ["2", "3", "4", "5"] and len(taps) == 5


# --- tokens ---


class Block(nn.Module):
    """attn and mlp are as numerous as blocks, and hold two layers each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Pair(nn.Module):
    """A block whose output is a tuple, as in many of transformers' models."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = Block(width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.scale * self.block(x), None


class ViT(nn.Module):
    """After timm's, with a class token."""

    def __init__(self, depth: int, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 8, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.blocks = nn.ModuleList(kind(6) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return {"loss": x.sum(), "logits": self.head(self.norm(x)[:, 0])}


@pytest.mark.parametrize(
    ("depth", "ends"), [(12, (3, 7, 11)), (7, (2, 4, 6)), (3, (0, 1, 2)), (2, (0, 1)), (1, (0,))]
)
def test_blocks_of_tokens_are_looked_at_in_thirds(depth: int, ends: tuple[int, ...]) -> None:
    net = ViT(depth)
    expected = {f"stage{n}": f"blocks.{end}" for n, end in enumerate(ends, start=1)} | {"pooled": "head:in"}
    assert choose(net, X) == expected
    assert shapes(net, choose(net, X))["stage1"] == (2, 17, 6)


def test_an_element_of_a_tuple_is_tapped_where_nothing_shows_it_whole() -> None:
    net = ViT(3, Pair)
    taps = choose(net, X)
    assert taps == {f"stage{n}": f"blocks.{n - 1}[0]" for n in (1, 2, 3)} | {"pooled": "head:in"}
    assert shapes(net, taps)["stage2"] == (2, 17, 6)


def test_fewer_tokens_are_another_stage() -> None:
    """After Swin as transformers has it, whose maps are tokens."""

    class Merge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, 4)).mean(2)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 6, 4, 4)
            self.body = nn.Sequential(Block(6), Block(6), Merge(), Block(6), Block(6))
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x).flatten(2).mT).mean(1))

    assert choose(Tower(), X) == {"stage1": "body.1", "stage2": "body", "pooled": "head:in"}


def test_maps_with_channels_last_are_left_out() -> None:
    """After Swin as timm and torchvision have it: a method would take rows for channels."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))

    assert choose(Last(), X) == {"pooled": "head:in"}


def test_inputs_by_keyword_need_not_be_images() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 5)
            self.blocks = nn.ModuleList(Block(6) for _ in range(3))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.words(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head((x * attention_mask[..., None]).mean(1))

    x = {"input_ids": torch.arange(14).view(2, 7) % 9, "attention_mask": torch.ones(2, 7)}
    expected = {f"stage{n}": f"blocks.{n - 1}" for n in (1, 2, 3)} | {"pooled": "head:in"}
    assert choose(Reader(), x) == expected


def _transformers(kind: str) -> nn.Module:
    import transformers

    if kind == "ResNet":
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6, 8], depths=[2, 1, 1], layer_type="basic"
        )
    elif kind == "ViT":
        config = transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=32,
            patch_size=8,
        )
    else:
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=4, depths=[2, 2, 2], num_heads=[1, 1, 1], window_size=4
        )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


REAL = [
    ("ResNet", {"stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (8, 2, 2)}),
    ("ViT", {f"stage{n}": (17, 8) for n in (1, 2, 3)}),
    ("Swin", {"stage1": (256, 4), "stage2": (64, 8), "stage3": (16, 16)}),
]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ResNet, {"stage1": (4, 8, 8), "stage2": (6, 4, 4), "stage3": (8, 2, 2)}),
        *(
            pytest.param(partial(_transformers, kind), expected, marks=pytest.mark.slow, id=kind)
            for kind, expected in REAL
            if find_spec("transformers")  # its import takes seconds
        ),
    ],
)
def test_what_the_stages_of_models_from_elsewhere_show(make: Any, expected: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make()
    seen = shapes(model, choose(model, X))
    assert len(seen.pop("pooled")) == 2
    assert seen == {name: (2, *shape) for name, shape in expected.items()}


# --- the look itself ---


class Nervous(nn.Module):
    """Draws, counts and is partly frozen in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*unit(3, 4), nn.Dropout())
        self.frozen = nn.BatchNorm2d(4).eval()
        self.head = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.training_seen: list[bool] = []
        self.learning_seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.training_seen.append(self.training)
        self.learning_seen.append(torch.is_grad_enabled())
        x = self.frozen(self.body(x))
        return self.head(F.dropout(x, 0.5, training=True).mean((2, 3)))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    net = Nervous()
    net.body[1].register_forward_hook(lambda *_: None)
    before = {name: v.clone() for name, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    hooks = [list(m._forward_hooks) for m in net.modules()]
    draws = torch.get_rng_state()
    if fails:
        with pytest.raises(
            Refused, match=r"A Nervous cannot be run on the example .*expected input.* 3 chan"
        ):
            choose(net, X[:, :2])
    else:
        assert choose(net, X) == {"stage1": "body", "pooled": "head:in"}
    assert net.training_seen == net.learning_seen == [False]
    assert [m.training for m in net.modules()] == modes and len(set(modes)) == 2
    assert [list(m._forward_hooks) for m in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


class Dense(nn.Module):
    """Its answer is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sigmoid()


def test_nothing_that_can_be_named_is_no_taps() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ self.weight.T

    assert choose(Opaque(), X) == {}
    assert choose(Dense(), X) == {"stage1": "conv"}
    by_token = nn.Sequential(nn.Flatten(2), nn.Linear(1024, 5))  # and this one's are tokens
    assert choose(by_token, X) == {}
    assert choose(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), X) == {"pooled": "1:in"}


def test_what_runs_twice_or_is_changed_in_place_is_not_tapped() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.changed = nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.once(x)))
            x = self.changed(x)
            x += 1
            x = x.mean((2, 3))
            return self.head(self.head(x))

    assert choose(Twice(), X) == {"stage1": "once"}


def test_two_models_without_tables_are_distilled() -> None:
    torch.manual_seed(0)
    student, teacher, x = CNN(5, channels=3), ResNet(), torch.randn(4, 3, 64, 64)
    taps = choose(teacher, x)
    assert taps["stage4"] == "layer4"
    example = (x, torch.arange(4))
    distiller = Distiller(
        student, Frozen(teacher, taps=taps), [AT()], example=example, taps=choose(student, x)
    )
    distiller(*example)["at"].backward()
    assert student.stages[0][0].weight.grad.any()


# --- blocks ---


@pytest.mark.parametrize(
    ("name", "knobs", "taps"),
    [
        ("resnet20", {}, [f"layer{n}.{k}" for n in (1, 2, 3) for k in range(3)]),
        ("resnet8", {}, ["layer1.0", "layer2.0", "layer3.0"]),
        ("wrn_16_1", {}, [f"block{n}.layer.{k}" for n in (1, 2, 3) for k in range(2)]),
        ("vit_tiny", {"depth": 6, "width": 12}, [f"stages.{n}.{k}" for n in range(3) for k in range(2)]),
        ("cnn", {"channels": 3}, ["stages.0", "stages.1", "stages.2"]),
        (
            "cnn",
            {"channels": 3, "widths": (3, 4), "depth": 2},
            ["stages.0.2", "stages.0", "stages.1.2", "stages.1"],
        ),
        ("vgg8", {}, [f"block{n}" for n in range(5)]),
        (
            "tiny_vit_32",
            {"dims": (8, 8, 16), "depths": (1, 2, 2), "windows": (4, 4), "strides": (2, 1), "head_width": 8},
            ["layers.0.blocks.0", *(f"layers.{n}.blocks.{k}" for n in (1, 2) for k in range(2))],
        ),
    ],
)
def test_the_blocks_of_our_own_models_are_found(name: str, knobs: dict[str, Any], taps: list[str]) -> None:
    model = registry.find("model", name)(classes=10, **knobs)
    found = blocks(model, X)
    assert list(found) == taps
    shapes(model, {tap: tap for tap in found})


def test_blocks_of_others_are_found_though_their_activations_work_in_place() -> None:
    for squeeze in (False, True):
        found = blocks(ResNet(squeeze), torch.randn(2, 3, 64, 64))
        assert list(found) == [f"layer{n}.{k}" for n in (1, 2, 3, 4) for k in (0, 1)]
    plain = nn.Sequential(
        *unit(3, 4), nn.MaxPool2d(2), *unit(4, 5), *unit(5, 6), nn.Flatten(), nn.LazyLinear(4)
    )
    plain(X)
    assert blocks(plain, X) == ("2", "6", "9")


def test_a_block_that_is_given_the_image_is_a_stem_and_one_place_is_enough_for_a_block() -> None:
    chain = nn.Sequential(Residual(3, 4, 2), Residual(4, 5, 1), Residual(5, 6, 2), nn.Flatten())
    assert blocks(chain, X) == ("1", "2")
    assert blocks(chain, X[:, :, :3, :3]) == ("1", "2")


def test_blocks_of_another_kind_before_the_longest_chain_are_blocks_too() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.value(x) * self.key(x).sigmoid()

    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, 2, 1)
            self.early = nn.Sequential(Residual(4, 5, 2), Residual(5, 6, 1))
            self.late = nn.Sequential(*(Attention() for _ in range(3)))
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.late(self.early(self.stem(x)).flatten(2).mT).mean(1))

    assert blocks(Hybrid(), X) == ("early.0", "early.1", "late.0", "late.1", "late.2")


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(Refused, match=r"Dense shows 1 block\(s\)"):
        blocks(Dense(), X)
    with pytest.raises(Refused, match="cannot be run"):
        blocks(CNN(5), X)
