"""Not a test: five steps of a Graph-MLP on this rank's slices of the batches; rank 0 saves the losses and weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from experiments.graphs.random_graphs import planted_graph
from sparse_mlp import distributed
from sparse_mlp.data.node_batches import NodeBatches
from sparse_mlp.distributed import MeshConfig, create_mesh, parallelize
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    rank, ranks = distributed.rank(), distributed.world_size()
    graph = planted_graph(400, 2000, classes=3, features=8)
    torch.manual_seed(0)
    task = NodeClassify(GraphMlp(8, 3, hidden_dim=16, drop_rate=0.0), NodeLossConfig(distill=0.5))
    module = parallelize(task, create_mesh(MeshConfig(), device)).module
    optimizer = torch.optim.Adam(task.param_groups(5e-3), lr=0.01)
    teacher = torch.rand(400, 3, generator=torch.Generator().manual_seed(1)).softmax(1).numpy()
    batches = NodeBatches(graph, 200, 2, 0, rank=rank, world_size=ranks, probabilities=teacher)
    losses = []
    for step in range(5):
        out = module(batches[step])
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses += distributed.mean(torch.stack([out["loss"].detach(), out["accuracy"].float()])).tolist()
    if distributed.is_main():
        torch.save((losses, task.state_dict()), SPEC["out"])
    # The reducer goes before the group it works with, and the ranks leave together: one that tears its group down while
    # another still has threads in it makes that other abort.
    del module, out
    if ranks > 1:
        dist.barrier()
