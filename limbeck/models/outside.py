"""Networks made elsewhere: `timm:NAME`, `hf:NAME`, and an object of one's own at `package.module:object`.

They bring no table of taps; `choose.py` finds what it can.
"""

import copy
import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from limbeck.core.refused import Refused
from limbeck.models.autoencoder import MAE

Factory = Callable[..., nn.Module]


def timm_model(name: str) -> Factory:
    """The factory of timm's image model `name`.

    Its weights are timm's initial ones, or with `pretrained` the published ones, read from the hub as
    safetensors and never unpickled. `size`, of the (square) images, goes to models that are made for one
    size. Raises `Refused` where timm cannot be imported, and for a name that it does not know.
    """
    try:
        import timm
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise _missing("timm", name, error) from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise Refused(f"timm has no model '{name}'{meant}; `timm.list_models()` tells which it has.")

    def make(classes: int, channels: int = 3, size: int | None = None, pretrained: bool = False) -> nn.Module:
        published = timm.get_pretrained_cfg(name)
        more: dict[str, Any] = {}
        if size is not None and published is not None and published.fixed_input_size:
            more["img_size"] = size
        with _said(f"timm:{name}"):
            if pretrained:
                file = _download(f"timm:{name}", published and published.hf_hub_id)
                more["pretrained_cfg_overlay"] = {"file": file, "custom_load": False}
            return timm.create_model(
                name, pretrained=pretrained, num_classes=classes, in_chans=channels, **more
            )

    return make


def hf_model(name: str) -> Factory:
    """The factory of a Hugging Face image classifier, by its hub id or local folder.

    Of its `config.json` a model of initial weights is made, for the channels and size of the data; with
    `pretrained` it is the published one, with a new head where the classes differ, read from safetensors and
    never unpickled. No code of the hub's is run. Raises `Refused` where transformers cannot be imported.

    A ViT-MAE is no classifier: it comes as our own `mae`, decoder and all, whose masks are a view's.
    """
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise _missing("hf", name, error) from error

    def make(classes: int, channels: int = 3, size: int | None = None, pretrained: bool = False) -> nn.Module:
        with _said(f"hf:{name}"):
            if not pretrained:
                # What a configuration has no word for, from_pretrained leaves out.
                shape = {"num_channels": channels} | ({} if size is None else {"image_size": size})
                config = AutoConfig.from_pretrained(
                    name, num_labels=classes, trust_remote_code=False, local_files_only=_offline(), **shape
                )
                if getattr(config, "model_type", None) == "vit_mae":
                    return _autoencoder(config, classes)
                return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
            config = AutoConfig.from_pretrained(
                name, num_labels=classes, trust_remote_code=False, local_files_only=_offline()
            )
            if getattr(config, "num_channels", channels) != channels:
                raise Refused(
                    f"The model 'hf:{name}' was trained on images of {config.num_channels} channels, and "
                    f"the data's have {channels}; leave out `pretrained`, or give it such images."
                )
            if getattr(config, "model_type", None) == "vit_mae":
                return _trained_autoencoder(name, config, classes)
            model = AutoModelForImageClassification.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the head: all else is as the configuration says
                trust_remote_code=False,
                local_files_only=_offline(),
            )
            return model.train()  # as any new model

    return make


SOURCES: dict[str, Callable[[str], Factory]] = {"timm": timm_model, "hf": hf_model}


def factory(name: str, found: Any) -> Factory:
    """What was found at `package.module:object`: a factory, or for a module a maker of copies, so that two
    models of a recipe share no weights. Raises `Refused` for what is neither."""
    if isinstance(found, nn.Module):
        return lambda: copy.deepcopy(found)
    if not callable(found):
        raise Refused(
            f"The model '{name}' is of type {type(found).__name__}, expected an nn.Module or a function that "
            "makes one; name such an object."
        )
    return found


def _autoencoder(config: Any, classes: int) -> MAE:
    """A masked autoencoder of ours, as a ViT-MAE's configuration has it."""
    widths = (config.hidden_size, config.decoder_hidden_size)
    inside = (config.intermediate_size, config.decoder_intermediate_size)
    if inside != (4 * widths[0], 4 * widths[1]) or config.hidden_act != "gelu" or not config.qkv_bias:
        raise Refused(
            f"Its blocks (widths {widths}, inside {inside}, {config.hidden_act}) are not those of 'mae': "
            "expected four times the width inside, gelu and biases"
        )
    model = MAE(
        classes,
        config.num_channels,
        config.image_size,
        config.patch_size,
        *(config.hidden_size, config.num_hidden_layers, config.num_attention_heads),
        *(config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads),
    )
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.layer_norm_eps
    return model


def _trained_autoencoder(name: str, config: Any, classes: int) -> MAE:
    from transformers import ViTMAEForPreTraining

    theirs = ViTMAEForPreTraining.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=_offline(),
    )
    weights = {}
    for called, value in theirs.state_dict().items():
        for their, our in _OURS.items():
            called = called.replace(their, our)
        weights[called] = value
    for place in [called for called in weights if called.endswith(("q_proj.weight", "q_proj.bias"))]:
        three = [weights.pop(place.replace("q_proj", one)) for one in ("q_proj", "k_proj", "v_proj")]
        weights[place.replace("q_proj", "qkv")] = torch.cat(three)
    cut = weights["encoder.embed.weight"]  # a convolution's, channels first
    weights["encoder.embed.weight"] = cut.permute(0, 2, 3, 1).flatten(1)
    model = _autoencoder(config, classes)
    for part, called in ((model.encoder, _PLACES[0]), (model.decoder, _PLACES[1])):
        if not torch.allclose(weights.pop(called)[0, 1:], part.positions, atol=1e-4):
            raise Refused(
                f"The positions of the model 'hf:{name}' are not the sines and cosines of 'mae', which are "
                "no part of its weights; take a model that has these."
            )
    model.load_state_dict(weights)
    return model


_OURS = {
    "vit.embeddings.cls_token": "encoder.class_token",
    "vit.embeddings.patch_embeddings.projection": "encoder.embed",
    "vit.layers": "encoder.blocks",
    "vit.layernorm": "norm",
    "decoder.mask_token": "decoder.hidden_token",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.decoder_layers": "decoder.blocks",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "pixels",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "o_proj": "project",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
"""The names of a ViT-MAE's tensors in transformers, and ours."""
_PLACES = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")


def _missing(extra: str, name: str, error: Exception) -> Refused:
    package = {"timm": "timm", "hf": "transformers"}[extra]
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return Refused(
            f"The model '{extra}:{name}' needs {package}, which is not installed; pip install "
            f"'limbeck[{extra}]'."
        )
    # timm imports torchvision, and one that was built for another torch fails in many ways.
    return Refused(
        f"The model '{extra}:{name}' needs {package}, which cannot be imported ({_line(error)}); install a "
        f"{package} that fits, and a torchvision that was built for this torch, {torch.__version__}."
    )


def _download(name: str, repository: str | None) -> str:
    if not repository:
        raise Refused(f"The model '{name}' has no published weights; leave out `pretrained`.")
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, "model.safetensors", local_files_only=_offline())


def _offline() -> bool:
    return os.environ.get("LIMBECK_OFFLINE", "0") not in ("", "0")


@contextmanager
def _said(name: str) -> Iterator[None]:
    """What fails inside is said in one sentence, with its own first line."""
    try:
        yield
    except Refused:
        raise
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        fix = (
            "LIMBECK_OFFLINE is set, so nothing was fetched: unset it, or bring the files beforehand"
            if isinstance(error, OSError) and _offline()
            else "check its name, its knobs and, where it is to be fetched, the network"
        )
        raise Refused(f"The model '{name}' cannot be made: {_line(error).rstrip('.')}; {fix}.") from error


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))
