"""What the routers do: load, importance, drops, entropy of each layer. Read-only, cheap, detached.

`collect` reads the statistics each MoE layer keeps of its last training forward; `record` watches the forwards inside
a `with` block, in training or evaluation, item by item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_mlp.moe.dispatch import Plan
from sparse_mlp.moe.router import Routing

if TYPE_CHECKING:
    from sparse_mlp.moe.layer import MoeMlp


@dataclass(frozen=True)
class RoutingStats:
    """One layer's last training forward. Detached tensors on the layer's device.

    load: (E,) share of the assignments each expert was chosen for, before drops; sums to 1.
    importance: (E,) mean noise-free softmax; sums to 1.
    dropped: () share of assignments dropped. entropy: () mean entropy of the noise-free softmax over log E, in [0, 1].
    balance_loss: () unweighted L_imp / 2 + L_load / 2.
    """

    load: Tensor
    importance: Tensor
    dropped: Tensor
    entropy: Tensor
    balance_loss: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and floats; waits for the device."""
        return {name: getattr(self, name).tolist() for name in RoutingStats.__dataclass_fields__}


@dataclass(frozen=True)
class RoutingRecord:
    """One forward of one layer, item by item; leading dimensions are those of the layer's input.

    experts: (..., K) expert of each choice. gates: (..., K) its weight. kept: (..., K) False where it was dropped.
    """

    experts: Tensor
    gates: Tensor
    kept: Tensor

    @classmethod
    def of(cls, routing: Routing, plan: Plan, shape: torch.Size) -> RoutingRecord:
        """From what the layer has of N items, `shape` being theirs."""
        kept_NK = torch.ones_like(routing.experts_NK, dtype=torch.bool) if plan.kept_NK is None else plan.kept_NK
        tensors = routing.experts_NK, routing.gates_NK.detach(), kept_NK
        return cls(*(t.view(*shape, t.shape[-1]) for t in tensors))


class RoutingMeter(nn.Module):
    """Buffers with the last training forward's statistics. Overwritten, never added to: a recomputed forward
    (activation checkpointing) changes nothing. Not part of the state dict."""

    load: Tensor
    importance: Tensor
    dropped: Tensor
    entropy: Tensor
    balance_loss: Tensor

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        for name in RoutingStats.__dataclass_fields__:
            size = (num_experts,) if name in ("load", "importance") else ()
            self.register_buffer(name, torch.zeros(size, device=device), persistent=False)

    def reset(self) -> None:
        """As before the first forward: zeros."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def update(self, plan: Plan, importance_E: Tensor, entropies: Tensor, balance_loss: Tensor) -> None:
        """Take the statistics of one forward; importance and entropies are sums over items."""
        (n, top_k), num_experts = plan.row_NK.shape, len(self.load)
        if n == 0:
            return
        self.importance.copy_(importance_E / n)
        self.load.copy_(plan.chosen_E / (n * top_k))
        self.entropy.copy_(entropies / (n * max(math.log(num_experts), 1e-12)))
        self.dropped.copy_(torch.zeros_like(self.dropped) if plan.kept_NK is None else 1 - plan.kept_NK.float().mean())
        self.balance_loss.copy_(balance_loss)

    def stats(self) -> RoutingStats:
        return RoutingStats(**{name: getattr(self, name).clone() for name in RoutingStats.__dataclass_fields__})


def moe_layers(model: nn.Module) -> dict[str, MoeMlp]:
    """Every MoE layer of a model by its dotted name; empty for a dense model."""
    from sparse_mlp.moe.layer import MoeMlp

    return {name: module for name, module in model.named_modules() if isinstance(module, MoeMlp)}


def collect(model: nn.Module) -> dict[str, RoutingStats]:
    """Statistics of each MoE layer's last training forward, by the layer's dotted name."""
    return {name: layer.meter.stats() for name, layer in moe_layers(model).items()}


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[RoutingRecord]]]:
    """Record every forward of every MoE layer inside the block: {layer name: [RoutingRecord, ...]}."""
    layers = moe_layers(model)
    records: dict[str, list[RoutingRecord]] = {name: [] for name in layers}
    before = {name: layer.on_routing for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.on_routing = records[name].append
        yield records
    finally:
        for name, layer in layers.items():
            layer.on_routing = before[name]
