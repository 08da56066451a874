"""Process group, data parallelism and reductions over ranks; everything that imports torch.distributed."""

from sparse_mlp.distributed.balance import sync_balance
from sparse_mlp.distributed.batch_norm import sync_batch_norm
from sparse_mlp.distributed.group import (
    AsyncMax,
    all_gather,
    broadcast,
    gather,
    is_main,
    join,
    mean,
    on_main,
    rank,
    resolve_device,
    world_size,
    wrap,
)

__all__ = [
    "AsyncMax",
    "all_gather",
    "broadcast",
    "gather",
    "is_main",
    "join",
    "mean",
    "on_main",
    "rank",
    "resolve_device",
    "sync_balance",
    "sync_batch_norm",
    "world_size",
    "wrap",
]
