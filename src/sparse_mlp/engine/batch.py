"""Moving and splitting batches, and seeding torch's generators for a step."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from torch import Tensor

from sparse_mlp.distributed import world_size
from sparse_mlp.engine.task import Batch
from sparse_mlp.errors import UserError


def move_to_device(value: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    """Move the tensors in nested lists, tuples and dicts to the device; 4-dimensional ones get `memory_format`."""
    if isinstance(value, Tensor):
        layout = memory_format if value.ndim == 4 else torch.preserve_format
        return value.to(device, non_blocking=True, memory_format=layout)
    if isinstance(value, dict):
        return {name: move_to_device(entry, device, memory_format) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(move_to_device(entry, device, memory_format) for entry in value)
    return value


def split_microbatches(batch: Batch, parts: int) -> list[tuple[Batch, float]]:
    """`parts` micro-batches, each with its share of the items: every `parts`-th item, from the first, the second, ...

    So that the micro-batches of all ranks together are those of one process that has the whole batch.
    """
    if parts == 1:
        return [(batch, 1.0)]
    size = len(next(iter(batch.values())))
    return [
        ({name: entry[part::parts] for name, entry in batch.items()}, len(range(part, size, parts)) / size)
        for part in range(parts)
    ]


def seed_torch(device: torch.device, *key: int) -> None:
    """Seed torch's generators of the CPU and of `device` from integers.

    torch.manual_seed also queues a call, with its traceback, for every GPU that is not in use: 0.1 ms a step.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)


def check_batch_size(batch_size: int, microbatches: int) -> None:
    """UserError if a global batch cannot be split over the processes and, in each, into micro-batches."""
    local, rest = divmod(batch_size, world_size())
    if rest:
        raise UserError(f"a batch size of {batch_size} is not divisible by the {world_size()} processes")
    if world_size() > 1 and local % microbatches:  # their micro-batches would not be those of one process
        raise UserError(f"train.grad_accum {microbatches} does not divide the {local} items of each process")
    if local < microbatches:
        raise UserError(f"train.grad_accum {microbatches} exceeds the {local} items of each process")
