"""Not a test: the gradient norm of experts with a norm and dropout inside on this rank's items; rank 0 saves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, clip_gradients, create_mesh, parallelize
from sparse_mlp.moe import MoeMlp

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    torch.manual_seed(0)
    layer = MoeMlp(
        8, 12, 4, top_k=2, act="silu", gate="first", norm_layer=nn.LayerNorm, shared_experts=1, noise_std=0.0
    )
    for parameter in layer.experts.norm.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(nn.Linear(8, 8), layer)
    items = torch.randn(16, 8).chunk(distributed.world_size())[distributed.rank()]
    parallel = parallelize(model, create_mesh(MeshConfig(**SPEC["mesh"]), device))
    with parallel.reducing(True):
        loss = parallel.module(items).square().mean()
        loss.backward()
    parallel.finish()
    norms = [clip_gradients([parameter], 1e9) for parameter in model.parameters()]
    assert len({float(torch.rand(())) for _ in range(3)}) == 3
    if distributed.is_main():
        torch.save(torch.stack(norms), SPEC["out"])
