"""Random numbers of the items, not of the ranks: a model draws the same ones for an image on any number of ranks.

All ranks seed their generators alike. What a layer draws for its items it draws for those of all ranks, and keeps the
rows of its own: the ranks' batches, one after the other, are the batch that one process would have. On CPUs the numbers
are those of one process to the bit; on GPUs dropout draws by rank.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from sparse_mlp.distributed.group import rank, world_size
from sparse_mlp.moe.router import NoisyTopKRouter
from sparse_mlp.moe.telemetry import moe_layers

LAYERS = (DropPath, _DropoutNd, NoisyTopKRouter)


def draw_by_item(model: nn.Module) -> int:
    """Let every drop path, dropout and noisy router of `model` draw by item; returns how many there are.

    They take tensors whose first dimension goes along the items of the rank, as many on each rank. Dropout inside
    experts, whose rows are those that were routed there, draws by rank.
    """
    inside = {part for layer in moe_layers(model).values() for part in layer.experts.modules()}
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    for layer in layers if world_size() > 1 else ():
        layer.forward = MethodType(_by_rank if layer in inside else _by_item, layer)  # type: ignore[method-assign]
    return len(layers)


def _by_item(layer: nn.Module, x: Tensor) -> Any:
    if not layer.training:
        return type(layer).forward(layer, x)
    if x.is_cuda and isinstance(layer, _DropoutNd):  # fused kernels, which draw otherwise, and whole activations
        return _by_rank(layer, x)
    with _OwnRows():
        return type(layer).forward(layer, x)


def _by_rank(layer: nn.Module, x: Tensor) -> Any:
    """With numbers of this rank's own, after which the generators of all ranks are alike again."""
    if not layer.training:
        return type(layer).forward(layer, x)
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed + rank())
        return type(layer).forward(layer, x)


class _OwnRows(TorchFunctionMode):
    """Inside its block random tensors are this rank's rows of those of all ranks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            return own_rows(args[0], lambda everyone: everyone.normal_())
        if func is Tensor.bernoulli_:
            return args[0].copy_(own_rows(args[0], lambda everyone: everyone.bernoulli_(*args[1:], **kwargs)))
        if func is F.dropout:
            return _dropout(lambda x: x, *args, **kwargs)
        if func in (F.dropout1d, F.dropout2d, F.dropout3d):
            return _dropout(_first_of_channel, *args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    kept_as: Callable[[Tensor], Tensor], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout of what `kept_as` makes of the input: of its numbers, or of its channels."""
    if not training or p == 0:
        return input
    if p == 1:
        kept = torch.zeros_like(input)
    else:
        kept = own_rows(kept_as(input), lambda everyone: everyone.bernoulli_(1 - p).div_(1 - p))
    return input.mul_(kept) if inplace else input * kept


def _first_of_channel(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C, 1, ...)."""
    return x[(slice(None), slice(None), *[slice(1)] * (x.ndim - 2))]


def own_rows(like: Tensor, draw: Any) -> Tensor:
    """This rank's rows of a tensor that `draw` fills for those of all ranks, each having as many as `like` (n, ...)."""
    everyone = draw(like.new_empty(world_size() * like.shape[0], *like.shape[1:]))
    return everyone.unflatten(0, (world_size(), like.shape[0]))[rank()]
