"""Several processes as one: torchrun's group, data parallelism, sums over ranks."""

from sparse_mlp.distributed.balance import sync_balance
from sparse_mlp.distributed.group import (
    Vote,
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
    "Vote",
    "broadcast",
    "gather",
    "is_main",
    "join",
    "mean",
    "on_main",
    "rank",
    "resolve_device",
    "sync_balance",
    "world_size",
    "wrap",
]
