"""Not a test: gradients through batch norms on this rank's part of a batch, saved by rank 0."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, create_mesh, parallelize

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), timm.layers.BatchNormAct2d(6), nn.Flatten(), nn.Linear(216, 5),
        nn.BatchNorm1d(5, affine=False), nn.Linear(5, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    items, other = torch.randn(12, 3, 8, 8), torch.randn(12, 4)
    items[:6] = 3 * items[:6] + 2  # each half has other statistics
    mine, target = (whole.chunk(distributed.world_size())[distributed.rank()] for whole in (items, other))
    if SPEC["sync"]:
        wrapped = parallelize(model, create_mesh(MeshConfig(), device)).module
    else:
        wrapped = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    (wrapped(mine) - target).square().mean().backward()
    found = {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"state {name}": value for name, value in model.state_dict().items()}
    if distributed.is_main():
        torch.save(found, SPEC["out"])
