"""Not a test: gradients of an unevenly routed MoE layer on this rank's half of the items, saved by rank 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, create_mesh, parallelize
from sparse_mlp.moe import MoeMlp, telemetry

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), MoeMlp(6, 8, 4, top_k=2, noise_std=0.0, balance_weight=1.0))
    items = torch.randn(16, 6)
    items[:8] += 2  # each half of the batch likes other experts
    mine = items.chunk(distributed.world_size())[distributed.rank()]
    balance = "global" if SPEC["sync"] else "rank"
    wrapped = parallelize(model, create_mesh(MeshConfig(), device), balance=balance).module
    wrapped(mine).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    loss = telemetry.collect(model)["1"].balance_loss
    if distributed.is_main():
        torch.save({**gradients, "balance": loss}, SPEC["out"])
