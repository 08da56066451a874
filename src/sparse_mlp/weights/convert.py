"""Convert published checkpoints to the layouts of our models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.models import registered_names
from sparse_mlp.models._pyramid import Pyramid
from sparse_mlp.weights.fit import add_batch_counters, check_fit, shapes
from sparse_mlp.weights.read import adapt, read_file
from sparse_mlp.weights.write import write_file

__all__ = ["convert", "convert_file"]


def convert(checkpoint: Mapping[str, Any], model_name: str, use_ema: bool = True) -> dict[str, Tensor]:
    """Return the weights in `checkpoint`, of the authors or of ours, in the layout of `model_name`.

    Wrappers, EMA entries (preferred if `use_ema`, timm's rule) and key prefixes are taken off, see
    `models._checkpoint.unwrap_checkpoint`. The head may have any number of classes. A dense-prediction backbone
    (`norm0`, ...) gives the weights of `create_model(model_name, features_only=True, output_norms=True)`.

    Raises `CheckpointMismatch`, a UserError with the lists of matched, missing, unexpected and misshapen names, for
    weights of another model; UserError for an unknown model or contents that are no weights.
    """
    if not is_model(model_name):
        close = difflib.get_close_matches(model_name, registered_names(), n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise UserError(f"no model is called {model_name!r}{hint}")
    model = _on_meta(model_name)
    try:
        weights = adapt(checkpoint, model, use_ema)
    # A filter of timm's fails on a foreign file in its own way.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the checkpoint does not have the layout of {model_name}: {reason}") from error
    kwargs: dict[str, Any] = {}
    if isinstance(model, Pyramid) and any(key.startswith("output_norms.") for key in weights):
        kwargs = {"features_only": True, "output_norms": True}
        weights = {f"model.{key}": value for key, value in weights.items()}
    elif f"{(classifier := model.pretrained_cfg.get('classifier'))}.weight" in weights:  # type: ignore[union-attr, operator]
        kwargs["num_classes"] = weights[f"{classifier}.weight"].shape[0]
    expected = shapes(_on_meta(model_name, **kwargs).state_dict())
    add_batch_counters(weights, expected)
    check_fit(shapes(weights), expected, f"the weights do not fit {model_name}")
    return {key: value.contiguous() for key, value in weights.items()}


def convert_file(source: Path, model_name: str, target: Path, use_ema: bool = True) -> int:
    """Convert a checkpoint file (torch's, .safetensors, Google's .npz) to `target`.safetensors; return the number of
    tensors.

    Pickled files are read without executing code. FileNotFoundError for a source or folder that is not there, UserError
    for what cannot be read or does not fit, OSError for what cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}")
    if target.is_dir():
        raise UserError(f"the target {target} is a folder; name a file in it that ends in .safetensors")
    if target.suffix != ".safetensors":
        raise UserError(f"the target must end in .safetensors, got {target.name}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into")
    weights = convert(read_file(source), model_name, use_ema)
    write_file(weights, target)
    return len(weights)


def _on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)
