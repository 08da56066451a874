"""Balance statistics over the global batch instead of each rank's share of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_mlp.distributed.group import world_size
from sparse_mlp.moe.telemetry import moe_layers


def sync_balance(model: nn.Module) -> int:
    """Make every MoE layer of `model` sum its balance statistics over the ranks; returns how many layers there are.

    With S the sum over the ranks r of s_r, and L(S) the same on each of the W ranks, the backward of the sum adds up
    the ranks' gradients: each rank gets W dL/dS ds_r. DistributedDataParallel's mean makes of it dL/dS dS, the gradient
    of one process that has the whole batch. The sum is collective in both directions, also for a rank without an item.
    """
    layers = moe_layers(model).values()
    for layer in layers:
        layer.balance_reduce = sum_over_ranks if world_size() > 1 else None
    return len(layers)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over the ranks, on every rank, with a gradient; collective in both directions.

    torch.distributed.nn.functional.all_reduce does the same, but torch has deprecated it in favour of a private module.
    """
    return _Sum.apply(values)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)
