"""Not a test: a model whose experts are split over two ranks, of which one has three batches and the other one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, Together, create_mesh, parallelize
from sparse_mlp.errors import UserError
from sparse_mlp.moe import MoeMlp

SPEC: dict[str, Any] = globals()["SPEC"]

with distributed.join("cpu") as device:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), MoeMlp(6, 8, 4, top_k=2)).eval()
    batches = torch.randn(4, 5, 6)
    expected = [model(batch).detach() for batch in batches]
    parallelize(model, create_mesh(MeshConfig(expert=2), device))
    mine = slice(3) if distributed.is_main() else slice(3, 4)
    with torch.no_grad(), Together(model) as together:
        found = [model(batch) for batch in together.batches(batches[mine])]
    assert len(found) == len(expected[mine])
    for one, other in zip(found, expected[mine], strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad(), Together(model) as together:
        try:
            list(together.batches(batches[:1] if distributed.is_main() else []))
        except UserError as error:
            assert "less to evaluate on" in str(error)
        else:
            raise AssertionError("one rank has nothing to evaluate on")
