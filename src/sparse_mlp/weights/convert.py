"""Published checkpoints in, our weights out."""

from __future__ import annotations

import difflib
import pickle
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import is_model, model_entrypoint
from torch import Tensor

from sparse_mlp.errors import UserError
from sparse_mlp.models import registered_names
from sparse_mlp.models._pyramid import CheckpointMismatch, Pyramid, check_fit, unwrap_checkpoint

__all__ = ["CheckpointMismatch", "convert", "convert_file"]


def convert(state_dict: Mapping[str, Any], model_name: str, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the weights in `state_dict`, a checkpoint of the authors' or ours, in the layout of `model_name`.

    Wrappers (`model`, `state_dict`), EMA entries (preferred if `use_ema`, timm's rule) and the prefixes of DDP,
    torch.compile and dense-prediction frameworks are taken off. The head may have any number of classes. A
    dense-prediction backbone (`norm0`, ...) gives the weights of `create_model(model_name, features_only=True,
    output_norms=True)`. Raises `CheckpointMismatch`, a ValueError with the lists of matched, missing and unexpected
    keys, for weights of another model.
    """
    if not is_model(model_name):
        close = difflib.get_close_matches(model_name, registered_names(), n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise UserError(f"no model is called {model_name!r}{hint}")
    filter_fn = getattr(sys.modules[model_entrypoint(model_name).__module__], "checkpoint_filter_fn", None)
    bare = unwrap_checkpoint(state_dict, use_ema)
    with torch.device("meta"):
        model = timm.create_model(model_name)
    ours = dict(filter_fn(bare, model)) if filter_fn else bare
    dense = isinstance(model, Pyramid) and any(key.startswith("output_norms.") for key in ours)
    kwargs: dict[str, Any] = {"features_only": True, "output_norms": True} if dense else {}
    classifier = getattr(timm.get_pretrained_cfg(model_name), "classifier", None)
    if not dense and classifier and f"{classifier}.weight" in ours:
        kwargs["num_classes"] = ours[f"{classifier}.weight"].shape[0]
    with torch.device("meta"):
        model = timm.create_model(model_name, **kwargs)
    prefix = "model." if dense else ""
    ours = {prefix + key: value.contiguous() for key, value in ours.items()}
    check_fit(ours, model, model_name)
    return ours


def convert_file(source: Path, model_name: str, target: Path, use_ema: bool = True) -> int:
    """Convert the checkpoint file `source` (.pth, .pt, .safetensors) to `target`.safetensors; return the number of
    tensors.

    Pickled files are read with `weights_only=True`, so that no code in them runs.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    if target.suffix != ".safetensors":
        raise UserError(f"the target must end in .safetensors, got {target.name}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into")
    if source.suffix == ".safetensors":
        try:
            checkpoint: Mapping[str, Any] = load_file(source)
        except SafetensorError as error:
            raise UserError(f"{source} is no safetensors file: {error}") from error
    else:
        checkpoint = _load_pickled(source)
    weights = convert(checkpoint, model_name, use_ema)
    save_file(weights, target)
    return len(weights)


def _load_pickled(source: Path) -> Mapping[str, Any]:
    """Read a pickled checkpoint without executing code; an `argparse.Namespace` in it is allowed."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:  # foreign, empty, cut short
        raise UserError(f"{source} is no checkpoint that can be read without running code in it") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{source} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint
