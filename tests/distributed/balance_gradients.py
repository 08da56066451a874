"""Not a test: gradients of an unevenly routed MoE layer on this rank's half of the items, saved by rank 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_mlp import distributed
from sparse_mlp.distributed import sync_balance
from sparse_mlp.moe import MoeMlp, telemetry

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), MoeMlp(6, 8, 4, top_k=2, noise_std=0.0, balance_weight=1.0))
    items = torch.randn(16, 6)
    items[:8] += 2  # each half of the batch likes other experts
    mine = items.chunk(distributed.world_size())[distributed.rank()]
    layers = sync_balance(model) if SPEC["sync"] else None
    assert layers in (1, None)
    wrapped = distributed.wrap(model, device)
    wrapped(mine).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    balance = telemetry.collect(model)["1"].balance_loss
    if distributed.is_main():
        torch.save({**gradients, "balance": balance}, SPEC["out"])
