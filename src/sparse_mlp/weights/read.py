"""Read names and tensors from weight files of any format, without executing code in them."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.models._checkpoint import unwrap_checkpoint
from sparse_mlp.models.sparse_mlp import from_google
from sparse_mlp.weights.moco import from_moco

__all__ = ["adapt", "have_experts", "names_and_tensors", "read_file"]


def read_file(path: Path) -> Mapping[str, Any]:
    """Return the contents of a .safetensors, .npz or torch file. UserError, one line, for any other.

    Torch files are read with `weights_only=True`; an `argparse.Namespace`, which many training scripts store beside the
    weights, is allowed.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        with torch.serialization.safe_globals([Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or foreign file fails in as many ways as there are formats: pickle, zip, safetensors, memory.
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(contents, Mapping):
        raise UserError(f"{path} holds no weights that can be read: it is a {type(contents).__name__}, no state dict")
    return contents


def have_experts(path: Path) -> bool:
    """Whether a file holds the weights of a model with experts. FileNotFoundError if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except Exception as error:  # damaged, in as many ways as there are
            raise _unreadable(path, error) from error
    else:
        names = list(unwrap_checkpoint(read_file(path)))
    return any(name.endswith("router.weight") for name in names)


def names_and_tensors(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return what a file of weights holds, as `model` names it; nothing is checked against the model yet."""
    contents = read_file(path)
    of_timm = not _module(model).startswith("sparse_mlp.")
    if path.suffix == ".npz" and of_timm and hasattr(model, "load_pretrained"):
        return _by_own_loader(model, path, contents)
    try:
        return adapt(contents, model)
    # A filter of timm's fails on a foreign file in its own way.
    except Exception as error:
        raise _unreadable(path, error) from error


def adapt(contents: Mapping[str, Any], model: nn.Module, use_ema: bool = True) -> dict[str, Tensor]:
    """Take wrappers, prefixes and MoCo v3's other parts off and rename to `model`'s names, by its checkpoint filter."""
    weights = unwrap_checkpoint(contents, use_ema, own=model.state_dict())
    if any(name.startswith("MixerBlock_") for name in weights):
        weights = from_google(weights)
    weights = {name: torch.as_tensor(value) for name, value in from_moco(weights).items()}  # an .npz holds arrays
    filter_fn = getattr(sys.modules[_module(model)], "checkpoint_filter_fn", None)
    return dict(filter_fn(weights, model)) if filter_fn else weights


def _module(model: nn.Module) -> str:
    """The file of a model: where its name was registered, for `mixer_t4_32` is of a class of timm's."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return model_entrypoint(name).__module__ if name and is_model(name) else type(model).__module__


def _by_own_loader(model: nn.Module, path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Names and tensors of a JAX file that only a method of timm's model can read.

    Such a method passes over what does not fit. It fills a copy of the model here, with a classifier of the file's
    size and NaN everywhere, so that what it passed over is known to be missing.
    """
    twin = copy.deepcopy(model)
    bias = next((arrays[name] for name in arrays if re.search(r"(^|/)head/(conv2d/)?bias$", name)), None)
    if bias is not None and getattr(model, "num_classes", 0) not in (0, bias.size):
        twin.reset_classifier(bias.size)  # type: ignore[operator]
    for value in twin.state_dict().values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    try:
        twin.load_pretrained(str(path))  # type: ignore[operator]
    except Exception as error:  # each model's loader has its own
        raise _unreadable(path, error) from error
    return {name: value for name, value in twin.state_dict().items() if not value.isnan().any()}


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", reason)
        reason = f"it cannot be read without running code in it ({code[1]})" if code else "it is no file of torch's"
    elif isinstance(error, KeyError) and isinstance(error.args[0], str):
        reason = f"it has no {error.args[0]!r}"
    elif isinstance(error, LookupError | EOFError | AttributeError | TypeError):
        reason = "it is damaged, or of another layout"
    first = re.split(r"\. |\n", reason)[0]
    return UserError(f"{path} holds no weights that can be read: {first}")
