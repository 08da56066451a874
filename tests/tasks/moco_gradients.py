"""Not a test: loss and gradients of MoCo v3 on this rank's share of a batch, saved by rank 0."""

from __future__ import annotations

from typing import Any

import timm
import torch

import sparse_mlp.models  # noqa: F401 - registers the models
from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, create_mesh, parallelize
from sparse_mlp.moe import set_balance_scale
from sparse_mlp.tasks.moco import Moco, MocoConfig

SPEC: dict[str, Any] = globals()["SPEC"]

torch.set_num_threads(1)
with distributed.join("cpu") as device:
    torch.manual_seed(0)
    model = timm.create_model(SPEC["model"], num_classes=3, **SPEC["args"])
    config = MocoConfig(hidden_dim=16, out_dim=8, momentum=0.5, **SPEC.get("config", {}))
    task = Moco(model, config, num_classes=3)
    batch = {name: torch.randn(8, 3, 32, 32) for name in ("view1", "view2")}
    batch["view1"][:4] += 1  # each half of the batch has other statistics
    ranks, rank = distributed.world_size(), distributed.rank()
    mine = {name: value.chunk(ranks)[rank] for name, value in batch.items()}
    set_balance_scale(task, 1 / task.model_passes)
    wrapped = parallelize(task, create_mesh(MeshConfig(), device)).module  # its hooks live as long as it does
    task.before_step(0, 1)
    out = wrapped(mine)
    out["loss"].backward()
    found = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.requires_grad}
    found["loss"] = distributed.mean(out["loss"].detach())
    found |= {f"state {name}": value for name, value in task.state_dict().items()}
    if distributed.is_main():
        torch.save(found, SPEC["out"])
