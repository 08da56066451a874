"""How the processes of a run share its work: a mesh of data x expert ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparse_mlp.distributed.group import world_size
from sparse_mlp.errors import UserError


@dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over the processes that torchrun starts. Every process gets its own images."""

    data: int | None = None
    """Groups of processes that hold the same experts. Left out: the number of processes over mesh.expert."""

    expert: int = 1
    """Processes that the experts of each layer are split over. Items travel to them and back (all-to-all)."""

    shard: bool = False
    """Split weights, gradients and optimiser state over all processes (FSDP2) instead of a copy in each (DDP)."""

    balance: Literal["global", "rank"] = "global"
    """Over which items the balance loss is computed: those of the batch of all processes, as one process would, or of
    each process, whose losses are averaged."""

    def __post_init__(self) -> None:
        for name in ("data", "expert"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"mesh.{name} {value} is below 1")
        if self.balance not in ("global", "rank"):
            raise UserError(f"unknown mesh.balance {self.balance!r}; allowed are global, rank")


@dataclass(frozen=True)
class MeshShape:
    """data x expert ranks; rank = data index x expert size + expert index. `shard`: as in MeshConfig."""

    data: int
    expert: int
    shard: bool = False

    @property
    def size(self) -> int:
        return self.data * self.expert

    @property
    def is_split(self) -> bool:
        """Whether a rank lacks weights, so that each forward of the model is collective."""
        return self.expert > 1 or (self.shard and self.size > 1)


@dataclass(frozen=True)
class Mesh(MeshShape):
    """The processes of a run."""

    device: torch.device = field(kw_only=True)

    @cached_property
    def devices(self) -> DeviceMesh:
        """torch's mesh with the dimensions "data" and "expert"; collective when first read."""
        return init_device_mesh(self.device.type, (self.data, self.expert), mesh_dim_names=("data", "expert"))

    @cached_property
    def everyone(self) -> DeviceMesh:
        """All ranks in one dimension."""
        return self.devices["data", "expert"]._flatten("everyone")

    @property
    def expert_group(self) -> dist.ProcessGroup:
        return self.devices.get_group("expert")

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.devices.get_group("data")


def create_mesh(config: MeshConfig, device: torch.device) -> Mesh:
    """The mesh of a configuration. UserError if it does not fit the number of processes."""
    size = world_size()
    data = size // config.expert if config.data is None else config.data
    if data * config.expert != size:
        given = f"mesh.expert {config.expert}" + ("" if config.data is None else f" x mesh.data {config.data}")
        raise UserError(f"{given} does not fit {size} process{'es' * (size > 1)}: start torchrun with another number")
    if config.shard and size == 1:
        raise UserError("mesh.shard would be ignored: there is one process; start several with torchrun")
    return Mesh(data, config.expert, config.shard, device=device)
