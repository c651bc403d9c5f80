"""Models from elsewhere: what timm and transformers are asked for, and one sentence where they are not there.

Both libraries are played by stand-ins, for a plain install has neither; where transformers is, it also plays
itself.
"""

import builtins
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import registry
from limbeck.core.refused import Refused
from limbeck.core.taps import Tapped


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    made = ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


# --- not there ---


def fail(monkeypatch: pytest.MonkeyPatch, package: str, error: Exception) -> None:
    """Importing the package raises the error."""
    ordinary = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise error
        return ordinary(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize(("extra", "package"), [("timm", "timm"), ("hf", "transformers")])
def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, extra: str, package: str) -> None:
    fail(monkeypatch, package, ModuleNotFoundError(f"No module named '{package}'", name=package))
    with pytest.raises(Refused, match=rf"'{extra}:net' needs {package}, .*pip install 'limbeck\[{extra}\]'"):
        registry.find("model", f"{extra}:net")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist\nand more"),
        ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
        OSError("torchvision/_C.so: undefined symbol"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_torchvision_that_does_not_fit_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail(monkeypatch, "timm", error)
    with pytest.raises(Refused) as caught:
        registry.find("model", "timm:resnet18")
    said = str(caught.value)
    assert "torchvision" in said.partition("; install")[0] and "\n" not in said and "and more" not in said
    assert f"built for this torch, {torch.__version__}" in said and "pip install" not in said


# --- timm ---


def timm(
    monkeypatch: pytest.MonkeyPatch, hub: str | None = None, published: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """A timm with two models, published at `hub` or with no weights or not at all, and what it is asked to
    make."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **knobs: Any) -> nn.Module:
        asked.append((name, knobs))
        if knobs.get("img_size") == 31:
            raise AssertionError("31 is no multiple of 16\nat all")
        return nn.Linear(knobs["in_chans"], knobs["num_classes"])

    def get_pretrained_cfg(name: str) -> SimpleNamespace | None:
        config = SimpleNamespace(fixed_input_size=name == "vit_tiny", hf_hub_id=hub)
        return config if published else None

    module(
        monkeypatch,
        "timm",
        is_model=["resnet18", "vit_tiny"].__contains__,
        list_models=lambda: ["resnet18", "vit_tiny"],
        get_pretrained_cfg=get_pretrained_cfg,
        create_model=create_model,
    )
    return asked


def test_timm_is_asked_for_the_datas_classes_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timm(monkeypatch)
    make = registry.find("model", "timm:resnet18")
    assert set(inspect.signature(make).parameters) == {"classes", "channels", "size", "pretrained"}
    assert make(classes=7, channels=1, size=32).weight.shape == (7, 1)
    registry.find("model", "timm:vit_tiny")(classes=7, size=32)
    assert asked == [
        ("resnet18", {"pretrained": False, "num_classes": 7, "in_chans": 1}),
        ("vit_tiny", {"pretrained": False, "num_classes": 7, "in_chans": 3, "img_size": 32}),
    ]


def test_timms_published_weights_are_read_from_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timm(monkeypatch, hub="timm/resnet18.a1")
    module(monkeypatch, "huggingface_hub", hf_hub_download=lambda *where, local_files_only: "/".join(where))
    registry.find("model", "timm:resnet18")(classes=7, pretrained=True)
    overlay = {"file": "timm/resnet18.a1/model.safetensors", "custom_load": False}
    assert asked[0][1]["pretrained"] and asked[0][1]["pretrained_cfg_overlay"] == overlay


@pytest.mark.parametrize("published", [True, False])
def test_a_timm_model_without_published_weights_is_refused_as_pretrained(
    monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    asked = timm(monkeypatch, published=published)
    make = registry.find("model", "timm:resnet18")
    make(classes=7, size=32)
    with pytest.raises(Refused, match=r"^The model 'timm:resnet18' has no published weights"):
        make(classes=7, pretrained=True)
    assert len(asked) == 1


def test_a_name_that_timm_does_not_know_is_refused_with_the_near_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timm(monkeypatch)
    with pytest.raises(Refused, match=r"no model 'resnet81' \(did you mean 'resnet18'\?\)"):
        registry.find("model", "timm:resnet81")


def test_what_timm_cannot_make_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    timm(monkeypatch)
    with pytest.raises(Refused, match=r"'timm:vit_tiny' cannot be made: 31 is no multiple of 16; check its "):
        registry.find("model", "timm:vit_tiny")(classes=7, size=31)


def test_no_network_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*where: str, local_files_only: bool) -> str:
        offline.append(local_files_only)
        raise FileNotFoundError("cannot reach the hub")

    offline: list[bool] = []

    timm(monkeypatch, hub="timm/resnet18.a1")
    module(monkeypatch, "huggingface_hub", hf_hub_download=download)
    failed = "'timm:resnet18' cannot be made: cannot reach the hub; "
    make = registry.find("model", "timm:resnet18")
    with pytest.raises(Refused, match=f"{failed}LIMBECK_OFFLINE is set"):
        make(classes=7, pretrained=True)
    monkeypatch.setenv("LIMBECK_OFFLINE", "0")
    with pytest.raises(Refused, match=f"{failed}check its name"):
        make(classes=7, pretrained=True)
    assert offline == [True, False]


# --- Hugging Face ---


class Classifier(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(config.num_channels, config.num_labels)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(pixel_values.mean((2, 3)))}


def hf(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A transformers whose models are of one layer, and what it is asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def configure(name: str, **knobs: Any) -> SimpleNamespace:
        asked.append(("config", knobs))
        return SimpleNamespace(**{"num_channels": 3, "image_size": 224, **knobs})

    def from_config(config: SimpleNamespace, **knobs: Any) -> nn.Module:
        asked.append(("new", knobs))
        return Classifier(config)

    def from_pretrained(name: str, *, config: SimpleNamespace, **knobs: Any) -> nn.Module:
        asked.append(("pretrained", knobs))
        return Classifier(config).eval()

    module(
        monkeypatch,
        "transformers",
        AutoConfig=SimpleNamespace(from_pretrained=configure),
        AutoModelForImageClassification=SimpleNamespace(
            from_config=from_config, from_pretrained=from_pretrained
        ),
    )
    return asked


def saved(folder: Path, weights: str = "") -> str:
    """A tiny vision transformer for 3 classes of 16x16 images in 3 channels, as transformers saves it."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_channels=3, num_labels=3)
    config.save_pretrained(folder)
    model = ViTForImageClassification(config)
    if weights == "safetensors":
        model.save_pretrained(folder)
    elif weights == "pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return f"hf:{folder}"


def test_transformers_is_asked_for_the_datas_shape_and_never_for_a_pickle_or_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hf(monkeypatch)
    make = registry.find("model", "hf:google/vit")
    assert set(inspect.signature(make).parameters) == {"classes", "channels", "size", "pretrained"}
    make(classes=7, channels=1, size=32)
    trained = make(classes=7, channels=3, size=32, pretrained=True)
    assert trained.training
    safe = {"trust_remote_code": False}
    read = safe | {"local_files_only": True, "num_labels": 7}  # the tests are offline
    (_, new), (_, made), (_, published), (_, loaded) = asked
    assert new == read | {"num_channels": 1, "image_size": 32} and made == safe
    assert published == read, "its weights are for the shape that it was trained on"
    assert loaded["use_safetensors"] is True and loaded["trust_remote_code"] is False
    assert loaded["local_files_only"] is True


def test_published_weights_for_other_channels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hf(monkeypatch)
    with pytest.raises(
        Refused, match=r"^The model 'hf:google/vit' was trained on images of 3 channels, and .* have 1"
    ):
        registry.find("model", "hf:google/vit")(classes=7, channels=1, pretrained=True)


def _played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf(monkeypatch)
    answers_in_logits("hf:google/vit")


def _itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_in_logits(saved(tmp_path))


def answers_in_logits(name: str) -> None:
    model = registry.find("model", name)(classes=7, channels=1, size=32)
    assert model.training and model.config.num_labels == 7 and model.config.image_size == 32
    assert Tapped(model)(torch.randn(2, 1, 32, 32)).out.shape == (2, 7)


def _published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = saved(tmp_path, "safetensors")
    make = registry.find("model", name)
    as_it_was, other_head = make(classes=3, pretrained=True), make(classes=7, size=32, pretrained=True)
    for model, other in ((as_it_was, other_head), (other_head, make(classes=7, size=16))):
        same = torch.equal(model.vit.layers[0].mlp.fc1.weight, other.vit.layers[0].mlp.fc1.weight)
        assert same == (other is other_head)
    assert other_head.config.image_size == 16 and other_head.classifier.weight.shape == (7, 8)
    assert other_head.classifier.weight.dtype == torch.float32 and other_head.training


def _pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"cannot be made: .*safetensors"):
        registry.find("model", saved(tmp_path, "pickle"))(classes=3, pretrained=True)


def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"'hf:.*missing' cannot be made"):
        registry.find("model", f"hf:{tmp_path}/missing")(classes=3)


def _masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT-MAE comes as our own, and answers as theirs does to the same mask."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    other = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    shape = {"image_size": 16, "patch_size": 4, "num_channels": 3}
    config = ViTMAEConfig(**sizes, **{f"decoder_{k}": v for k, v in other.items()}, **shape)
    theirs = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    make = registry.find("model", f"hf:{tmp_path}")
    theirs.vit.embeddings.position_embeddings.data.zero_()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"positions .* are not the sines and cosines of 'mae'"):
        make(classes=5, pretrained=True)
    for places, width in (
        (theirs.vit.embeddings.position_embeddings, 8),
        (theirs.decoder.decoder_pos_embed, 12),
    ):
        where = build_2d_sinusoidal_position_embedding(4, 4, width)  # rows first; published weights: columns
        places.data[0, 1:] = where.roll(width // 2, 1)
    theirs.save_pretrained(tmp_path)
    ours, x = make(classes=5, pretrained=True), torch.randn(2, 3, 16, 16)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = theirs(x, noise=noise)
        keep = noise.argsort(1)[:, :4]
        torch.testing.assert_close(ours(x, keep), told.logits, atol=1e-4, rtol=1e-4)
        tapped = Tapped(ours)
        tapped.look(["block1"])
        hidden = theirs(x, noise=noise, output_hidden_states=True).hidden_states
        torch.testing.assert_close(
            tapped({"x": x, "keep": keep}).at["block1"], hidden[1], atol=1e-4, rtol=1e-4
        )
    new = make(classes=5, channels=1, size=32)
    assert new(torch.randn(2, 1, 32, 32)).shape == (2, 64, 16) and new.classes == 5
    config.intermediate_size = 16
    config.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"inside \(16, 48\), gelu\) are not those of 'mae'"):
        make(classes=5)


REAL = [_itself, _published, _pickled, _nowhere, _masked] if find_spec("transformers") else []


@pytest.mark.parametrize(
    "check",
    [_played, *(pytest.param(check, marks=pytest.mark.slow) for check in REAL)],  # its import takes seconds
)
def test_a_model_of_hugging_face(
    check: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tmp_path, monkeypatch)


# --- one's own ---


NET = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
NUMBER = 3


def net(classes: int) -> nn.Module:
    return nn.Linear(4, classes)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    module(monkeypatch, "a_package_of_mine", NET=NET, net=net, NUMBER=NUMBER, Net=nn.Linear)
    return "a_package_of_mine"


def test_a_module_is_copied_for_each_model(mine: str) -> None:
    make = registry.find("model", f"{mine}:NET")
    assert not registry.knobs(make)
    first, second = make(), make()
    for model in (first, second):
        assert torch.equal(model[1].weight, NET[1].weight)
    with torch.no_grad():
        first[1].weight.zero_()
    assert second[1].weight.any() and NET[1].weight.any()


def test_a_function_and_a_class_are_factories_as_they_are(mine: str) -> None:
    assert registry.find("model", f"{mine}:net") is net
    assert registry.find("model", f"{mine}:Net") is nn.Linear


def test_what_is_neither_is_refused(mine: str) -> None:
    with pytest.raises(Refused, match=r"mine:NUMBER' is of type int, expected an nn\.Module or a func"):
        registry.find("model", f"{mine}:NUMBER")


@pytest.mark.parametrize("name", ["timm:", "hf:"])
def test_a_source_without_a_name_names_nothing(name: str) -> None:
    with pytest.raises(Refused, match=f"The model '{name}' names nothing"):
        registry.find("model", name)
