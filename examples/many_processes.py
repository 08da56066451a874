"""A training loop of your own on several processes, experts split over them:

torchrun --nproc-per-node 2 examples/many_processes.py
"""

import timm
import torch
import torch.nn.functional as F

import sparse_mlp  # noqa: F401 - registers the models
from sparse_mlp.distributed import MeshConfig, clip_gradients, create_mesh, join, mean, parallelize, rank, world_size

with join("cpu") as device:  # the processes that torchrun started, or this one alone; "auto" takes GPUs
    torch.manual_seed(0)  # every process builds the same model
    model = timm.create_model("sparse_mlp_t4_32", num_classes=10).to(device)
    mesh = create_mesh(MeshConfig(expert=world_size(), shard=world_size() > 1), device)
    parallel = parallelize(model, mesh)
    experts = {p for name, p in model.named_parameters() if ".experts." in name}
    others = [p for p in model.parameters() if p not in experts]  # weights on another mesh: a group of their own
    optimizer = torch.optim.AdamW([{"params": list(experts)}, {"params": others}], lr=1e-3)
    for step in range(4):
        torch.manual_seed(step)  # the same on every process: noise is drawn by item
        images, target = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        # the share of this process
        images, target = images.chunk(world_size())[rank()], target.chunk(world_size())[rank()]
        with parallel.reducing(True):  # False for all but the last of several micro-batches
            loss = F.cross_entropy(parallel.module(images), target)
            loss.backward()
        parallel.finish()
        clip_gradients(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = mean(loss.detach())
        if rank() == 0:
            print(f"step {step}: loss {loss:.4f}")
