"""Not a test: one rank has no item in this step; both go through the same collectives. Saves the router's gradient."""

from __future__ import annotations

from typing import Any

import torch

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, create_mesh, parallelize
from sparse_mlp.moe import MoeMlp

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    torch.manual_seed(0)
    layer = MoeMlp(6, 8, 4, top_k=2, balance_weight=1.0)
    torch.nn.init.normal_(layer.router.weight)
    wrapped = parallelize(layer, create_mesh(MeshConfig(), device)).module
    items = torch.randn(0 if distributed.is_main() else 16, 6)
    for _ in range(2):
        wrapped(items).sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.isfinite().all()
    assert layer.router.weight.grad.any()
    assert layer.meter.importance.isfinite().all()
