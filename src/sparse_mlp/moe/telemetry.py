"""What the routers do: load, importance, drops, entropy of each layer. Read-only, cheap, detached.

`collect` reads the statistics each MoE layer keeps of its last training forward; `record` watches the forwards inside
a `with` block, in training or evaluation, item by item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_mlp.moe.router import Routing


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

    @torch.no_grad()
    def update(self, routing: Routing, kept_NK: Tensor | None, balance_loss: Tensor) -> None:
        """Take the statistics of one forward; `kept_NK` None means nothing was dropped."""
        num_experts, n = len(self.load), len(routing.logits_NE)
        if routing.sums is not None:
            chosen_E, entropy = routing.sums.chosen_E, routing.sums.entropy
            self.importance.copy_(routing.sums.totals[0] / n)
        else:
            logp_EN = routing.logits_NE.detach().t().log_softmax(0)  # as in `softmax_over_experts`
            p_EN = logp_EN.exp()
            self.importance.copy_(p_EN.mean(1))
            entropy = -(p_EN * logp_EN).sum(0).mean()
            hot_NKE = routing.experts_NK.unsqueeze(-1) == torch.arange(num_experts, device=p_EN.device)
            chosen_E = hot_NKE.sum((0, 1))
        self.load.copy_(chosen_E / routing.experts_NK.numel())
        self.entropy.copy_(entropy / max(math.log(num_experts), 1e-12))
        self.dropped.copy_(torch.zeros_like(self.dropped) if kept_NK is None else 1 - kept_NK.float().mean())
        self.balance_loss.copy_(balance_loss)

    def stats(self) -> RoutingStats:
        return RoutingStats(**{name: getattr(self, name).clone() for name in RoutingStats.__dataclass_fields__})


def moe_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every MoE layer of a model by its dotted name; empty for a dense model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "meter", None), RoutingMeter)
    }


def collect(model: nn.Module) -> dict[str, RoutingStats]:
    """Statistics of each MoE layer's last training forward, by the layer's dotted name."""
    return {name: layer.meter.stats() for name, layer in moe_layers(model).items()}  # type: ignore[union-attr,operator]


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, list[RoutingRecord]]]:
    """Record every forward of every MoE layer inside the block: {layer name: [RoutingRecord, ...]}."""
    layers = moe_layers(model)
    records: dict[str, list[RoutingRecord]] = {name: [] for name in layers}
    before = {name: layer.on_routing for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.on_routing = records[name].append  # type: ignore[assignment]
        yield records
    finally:
        for name, layer in layers.items():
            layer.on_routing = before[name]
