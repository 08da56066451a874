"""Process group, data parallelism and reductions over ranks; everything that imports torch.distributed."""

from sparse_mlp.distributed.balance import sync_balance
from sparse_mlp.distributed.batch_norm import sync_batch_norm
from sparse_mlp.distributed.draws import draw_by_item
from sparse_mlp.distributed.gradients import by_mesh, clip_gradients, full, gradient_norm, mesh_of, own_part, split_like
from sparse_mlp.distributed.group import (
    AsyncMax,
    RankLostError,
    all_gather,
    any_rank,
    broadcast,
    gather,
    is_main,
    join,
    mean,
    on_main,
    rank,
    recall,
    remember,
    resolve_device,
    world_size,
)
from sparse_mlp.distributed.mesh import Mesh, MeshConfig, create_mesh
from sparse_mlp.distributed.parallelize import Parallel, parallelize
from sparse_mlp.distributed.together import Together

__all__ = [
    "AsyncMax",
    "Mesh",
    "MeshConfig",
    "Parallel",
    "RankLostError",
    "Together",
    "all_gather",
    "any_rank",
    "broadcast",
    "by_mesh",
    "clip_gradients",
    "create_mesh",
    "draw_by_item",
    "full",
    "gather",
    "gradient_norm",
    "is_main",
    "join",
    "mean",
    "mesh_of",
    "on_main",
    "own_part",
    "parallelize",
    "rank",
    "recall",
    "remember",
    "resolve_device",
    "split_like",
    "sync_balance",
    "sync_batch_norm",
    "world_size",
]
