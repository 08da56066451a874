"""Not a test: dropout of every kind, drop path and a noisy router on this rank's rows; rank 0 saves those of all."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from sparse_mlp import distributed
from sparse_mlp.distributed import draw_by_item
from sparse_mlp.moe.router import NoisyTopKRouter

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu"):
    torch.manual_seed(0)
    router = NoisyTopKRouter(6, 4, 2)
    layers = nn.ModuleDict(
        {"dropout": nn.Dropout(0.3), "in place": nn.Dropout(0.3, inplace=True), "channels": nn.Dropout2d(0.4),
         "rows": nn.Dropout1d(0.4), "all": nn.Dropout(1.0), "path": DropPath(0.5), "router": router}
    )  # fmt: skip
    assert draw_by_item(layers) == len(layers)
    whole = {"channels": torch.randn(8, 3, 5, 5), "rows": torch.randn(8, 3, 5), "path": torch.randn(8, 4, 6)}
    found = {}
    for name, layer in layers.items():
        x = whole.get(name, torch.ones(8, 6)).clone()
        mine = x.chunk(distributed.world_size())[distributed.rank()].clone()
        torch.manual_seed(7)
        out = layer(mine).noisy_NE if name == "router" else layer(mine)
        found[name] = distributed.all_gather(out.detach())
    if distributed.is_main():
        torch.save(found, SPEC["out"])
