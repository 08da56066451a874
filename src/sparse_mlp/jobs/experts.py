"""The experts of a model's configuration."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.jobs.recipe import ExpertsConfig, ModelConfig
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.telemetry import moe_layers
from sparse_mlp.weights import sparsify

AT_INFERENCE = ("top_k", "eval_capacity_ratio", "capacity_group", "prioritized", "renormalize")
"""Arguments of experts that need no other weights."""


_NOT_FURTHER = {"num_experts", "top_k", "renormalize"}  # fields of their own
_NOT_FURTHER |= {"dim", "hidden_dim", "act", "gate", "bias", "drop", "norm_layer", "channels_first", "device", "dtype"}


def has_experts(config: ExpertsConfig) -> bool:
    return config.blocks is not None


def add_experts(model: nn.Module, config: ExpertsConfig, images: Callable[[], Tensor] | None = None) -> None:
    """Give a dense model the experts of its configuration, which begin as its MLPs; without some, nothing happens.

    `images` gives those, (B, C, H, W), that the centroids of a router are of. UserError, one line, for what the model
    or the layer cannot have.
    """
    if config.blocks is None:
        return
    arguments = sparsify_arguments(config)
    if config.router == "centroids":
        if images is None:
            raise UserError("model.experts.router centroids is for classification and pre-training alone")
        arguments |= {"router": config.router, "images": images()}
    sparsify(model, **arguments)


def as_stored(config: ExpertsConfig) -> ExpertsConfig:
    """The experts of a model whose weights are loaded afterwards, those of its routers too."""
    return replace(config, router="random")


def sparsify_arguments(config: ExpertsConfig) -> dict[str, Any]:
    """What `sparse_mlp.sparsify` is to be called with besides the model and images."""
    assert config.blocks is not None
    named = {"blocks": parse_blocks(config.blocks), "num_experts": config.num_experts, "top_k": config.top_k}
    strength = {} if config.strength is None else {"strength": config.strength}
    return {**named, "init": config.init, **strength, "renormalize": config.renormalize, **config.args}


def parse_blocks(blocks: int | str) -> int | str | Sequence[int] | Sequence[str]:
    """ "3,7" -> [3, 7]; names likewise; a number and "last-2" as they are."""
    if isinstance(blocks, int) or re.fullmatch(r"\w+-\d+", blocks):
        return blocks
    parts = [part.strip() for part in blocks.split(",") if part.strip()]
    numbers = [int(part) for part in parts if re.fullmatch(r"-?\d+", part)]
    return numbers if len(numbers) == len(parts) else parts


def check_experts(config: ExpertsConfig) -> None:
    """UserError for options that would be ignored, and for unknown arguments of the layer."""
    if not has_experts(config):
        changed = [name for name, value in vars(ExpertsConfig()).items() if getattr(config, name) != value]
        if changed:
            raise UserError(f"model.experts.{changed[0]} would be ignored: model.experts.blocks does not say where")
        return
    known = [name for name in inspect.signature(MoeMlp).parameters if name not in _NOT_FURTHER]
    for name in config.args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise UserError(f"model.experts.args {name}={config.args[name]!r} is no argument of experts{hint}")


def change_at_inference(config: ModelConfig, args: Mapping[str, Any]) -> ModelConfig:
    """A trained model's configuration with other arguments: of its experts, if it was given some, or of the model.

    UserError for an argument that would change more than the way from the same weights to the answers.
    """
    for name, value in args.items():
        if name not in AT_INFERENCE:
            known = ", ".join(AT_INFERENCE)
            raise UserError(f"model.args {name}={value!r} cannot change in a trained model; what can: {known}")
    if not has_experts(config.experts):
        return replace(config, args={**config.args, **args})
    fields = {name: args[name] for name in ("top_k", "renormalize") if name in args}
    for name, value in fields.items():
        if type(value) is not type(getattr(config.experts, name)):
            kind = "a whole number" if name == "top_k" else "True or False"
            raise UserError(f"model.args {name}={value!r} must be {kind}")
    further = {name: value for name, value in args.items() if name not in fields}
    return replace(config, experts=replace(config.experts, **fields, args={**config.experts.args, **further}))


def check_at_inference(trained: nn.Module, changed: nn.Module, args: Mapping[str, Any]) -> None:
    """UserError for other arguments of a model without experts, and for a K above the one a layer was trained with.

    Nothing was learned of the sum of more answers. Of both models only the structure is looked at.
    """
    layers = moe_layers(trained)
    for name, value in args.items():
        if not layers:
            raise UserError(f"model.args {name}={value!r} would be ignored: the trained model has no experts")
    for name, layer in moe_layers(changed).items():
        if layer.top_k > (most := layers[name].top_k):
            of = f"{most} of {layer.num_experts} experts an item"
            raise UserError(f"model.args top_k={args['top_k']!r} is too many: {name} was trained with {of}")
