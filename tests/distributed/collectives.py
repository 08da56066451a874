"""Not a test: what two ranks do together. A failed assertion shows as the exit code."""

from __future__ import annotations

import torch

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig, create_mesh, parallelize


def main() -> None:
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.is_main() == (rank == 0)
    assert distributed.broadcast(f"from {rank}") == "from 0"
    gathered = distributed.gather({"rank": rank, "rows": torch.full((rank + 1,), float(rank))})
    assert gathered is None if rank else [entry["rank"] for entry in gathered] == [0, 1]
    values = torch.tensor([1.0, 2.0]) * (rank + 1)
    assert torch.equal(distributed.mean(values), torch.tensor([1.5, 3.0]))

    calls = []
    assert distributed.on_main(lambda: calls.append(1) or "done") == "done"
    assert len(calls) == (1 if rank == 0 else 0)
    try:
        distributed.on_main(lambda: int("x"))
    except ValueError as error:
        assert "invalid literal" in str(error)
    else:
        raise AssertionError("the error of rank 0 did not arrive")

    stop = distributed.AsyncMax()  # rank 1 passes 15 at the second call; both ranks get it at the third
    maxima = [stop.reduce(15 if rank == 1 and number == 1 else 0) for number in range(3)]
    assert maxima == [0, 0, 15], maxima
    assert stop.wait() == 0

    module = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(module.weight, float(rank))
    wrapped = parallelize(module, create_mesh(MeshConfig(), torch.device("cpu"))).module
    assert module.weight.item() == 0, "all start from rank 0's weights"
    wrapped(torch.ones(1, 1) * (rank + 1)).sum().backward()
    assert module.weight.grad.item() == 1.5


with distributed.join("cpu") as device:
    assert device == torch.device("cpu")
    main()
assert distributed.world_size() == 1
