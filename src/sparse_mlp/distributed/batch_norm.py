"""Batch norm over the global batch, on any device and in any layer that calls `F.batch_norm`.

torch's SyncBatchNorm works on GPUs only. It also replaces modules, which breaks subclasses of BatchNorm that do more:
timm's with an activation, Hire-MLP's over the last dimension.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from sparse_mlp.distributed.balance import sum_over_ranks
from sparse_mlp.distributed.group import world_size


def sync_batch_norm(model: nn.Module) -> int:
    """Compute the training statistics of every batch norm of `model` over all ranks; returns how many there are.

    Types, names and weights of the modules stay as they are; in a single process so do the outputs.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    forward = type(layer).forward
    if not layer.training or world_size() == 1:
        return forward(layer, x)
    with _SyncedStatistics():
        return forward(layer, x)


class _SyncedStatistics(TorchFunctionMode):
    """Replaces `F.batch_norm` by `batch_norm_over_ranks` inside its block."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = batch_norm_over_ranks if func is F.batch_norm else func
        return function(*args, **(kwargs or {}))


def batch_norm_over_ranks(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` in training, with the statistics of all ranks' inputs (B, C, ...); collective in both directions.

    Computed in float32. The variance is summed in a second reduction, from deviations from the common mean: the
    difference of mean square and squared mean would cancel.
    """
    assert training, "statistics are only taken in training"
    x = input.float()
    reduced = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    count = torch.full((1,), x.numel() // x.shape[1], dtype=x.dtype, device=x.device)
    total, count = sum_over_ranks(torch.cat((x.sum(reduced), count))).split((x.shape[1], 1))
    mean = total / count
    x = x - mean.view(shape)
    var = sum_over_ranks(x.square().sum(reduced)) / count
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    x = x * (var + eps).rsqrt().view(shape)
    if weight is not None:
        x = x * weight.view(shape)
    if bias is not None:
        x = x + bias.view(shape)
    return x.to(input.dtype)
