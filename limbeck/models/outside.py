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
                return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
            config = AutoConfig.from_pretrained(
                name, num_labels=classes, trust_remote_code=False, local_files_only=_offline()
            )
            if getattr(config, "num_channels", channels) != channels:
                raise Refused(
                    f"The model 'hf:{name}' was trained on images of {config.num_channels} channels, and "
                    f"the data's have {channels}; leave out `pretrained`, or give it such images."
                )
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
