"""Not a test: FSDP2 on the Linears of a dense block and on `experts`; gradients are those of one process."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparse_mlp import distributed
from sparse_mlp.models.sparse_mlp import DenseMlp
from sparse_mlp.moe import MoeMlp

with distributed.join("cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(DenseMlp(16, 32), MoeMlp(16, 24, 4, 2, noise_std=0.0, balance_weight=0.0))
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for module in (model[0].fc1, model[0].fc2, model[1].experts, model):
        fully_shard(module, mesh=mesh)
    x = torch.randn(40, 16)
    for one in (model, whole):
        one(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), whole.get_parameter(name).grad)
