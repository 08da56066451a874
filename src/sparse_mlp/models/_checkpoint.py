"""What the checkpoint filters share: wrappers taken off, and where published weights are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from timm.models import get_pretrained_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from sparse_mlp.moe.dense import Parts, expert_weights
from sparse_mlp.moe.telemetry import moe_layers

__all__ = ["StateDict", "names_weights", "no_published_weights", "unwrap_checkpoint", "upcycle"]

StateDict = dict[str, Tensor]

_EMA = ("state_dict_ema", "model_ema")
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")


def unwrap_checkpoint(checkpoint: Mapping[str, Any], use_ema: bool = True, own: Collection[str] = ()) -> StateDict:
    """Return the bare state dict in the contents of a checkpoint file.

    Takes off the wrappers `state_dict_ema` and `model_ema` (where present and `use_ema`, timm's rule), `state_dict` and
    `model`, and key prefixes: `module.` (DDP), `_orig_mod.` (torch.compile), `model.` (trainers), `backbone.` and
    `encoder.` (detectors, segmenters), in any order. What has no such prefix beside names that have one is another part
    of the larger model and is left out. A prefix with which a name in `own` (the model's names) begins stays.

    Raises ValueError for contents that are no tensors.
    """
    wrappers = (*_EMA, *_WRAPPERS) if use_ema else _WRAPPERS
    while key := next((key for key in wrappers if isinstance(checkpoint.get(key), Mapping)), None):
        checkpoint = checkpoint[key]
    state_dict = {str(key): value for key, value in checkpoint.items()}
    prefixes = [prefix for prefix in _PREFIXES if not any(name.startswith(prefix) for name in own)]
    while prefix := next((p for p in prefixes if any(key.startswith(p) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    not_tensors = [key for key, value in state_dict.items() if not isinstance(value, Tensor | np.ndarray)]
    if not_tensors:
        raise ValueError(f"not a state dict: {', '.join(map(repr, not_tensors[:5]))} hold no tensors")
    return state_dict


def upcycle(state_dict: StateDict, model: nn.Module | None) -> StateDict:
    """A dense model's weights for one with experts: each expert is the MLP in its place, the router `model`'s own."""
    weights = dict(state_dict)
    for name, layer in ({} if model is None else moe_layers(model)).items():
        mlp = {key: weights.pop(key) for key in list(weights) if re.match(rf"{re.escape(name)}\.fc[12]\.", key)}
        if not mlp:
            continue
        parts = Parts(("fc1",), "fc2", nn.GELU())
        own = expert_weights({key.removeprefix(f"{name}."): value for key, value in mlp.items()}, layer, parts)
        router = layer.router.weight.detach()
        if router.is_meta:
            router = nn.init.trunc_normal_(torch.empty_like(router, device="cpu"), std=0.02)
        weights |= {f"{name}.{key}": value for key, value in {**own, "router.weight": router.clone()}.items()}
    return weights


def names_weights(variant: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of a model, or its default configuration, say where its weights are."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return bool(cfg.has_weights or cfg.state_dict)


def no_published_weights(variant: str) -> RuntimeError:
    """The error, of the type that timm raises, that says where the authors' files are and what reads them."""
    cfg = get_pretrained_cfg(variant)
    if cfg is None or not cfg.origin_url:
        return RuntimeError(f"there are no published weights of {variant}")
    return RuntimeError(
        f"the published weights of {variant} cannot be fetched by a program: the authors' file is linked from the "
        f"README of {cfg.origin_url}, and `sparse-mlp convert FILE {variant}.safetensors --model {variant}` reads it"
    )
