"""The processes that train together: one alone, or those that torchrun started.

Every function also works in a single process, where it is (almost) nothing. All ranks have to call a collective
function, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_mlp.errors import UserError

T = TypeVar("T")

_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def resolve_device(name: str, index: int = 0) -> torch.device:
    """Device for "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; allowed are auto, cpu, cuda, cuda:0, cuda:1, ...") from None
    if device.type == "cuda":
        found = torch.cuda.device_count()
        number = index if device.index is None else device.index
        if number >= found:
            raise UserError(f"device {name!r} was asked for, but torch finds {found} GPUs here")
        return torch.device("cuda", number)
    return device


@contextmanager
def join(device: str = "auto") -> Iterator[torch.device]:
    """Join the processes torchrun started, for the time of the block; yields the device this process works on.

    Without torchrun this process stays alone. Raises ValueError if torchrun's environment is incomplete.
    """
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    size = os.environ.get("WORLD_SIZE", "1")
    if dist.is_initialized() or ("RANK" not in os.environ and size == "1"):
        yield resolve_device(device)
        return
    if missing:
        raise UserError(f"some of torchrun's variables are set, but not {', '.join(missing)}; start with torchrun")
    if size != "1" and ":" in device:
        raise UserError(f"device {device!r} is one GPU for {size} processes; cuda gives each its own")
    target = resolve_device(device, index=int(os.environ["LOCAL_RANK"]))
    if target.type == "cuda":
        torch.cuda.set_device(target)
    # gloo carries what is on the CPU (objects, votes) also where nccl carries the gradients.
    dist.init_process_group("cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo")
    try:
        yield target
    finally:
        dist.destroy_process_group()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel if there are several processes, else itself."""
    if world_size() == 1:
        return module
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def mean(values: Tensor) -> Tensor:
    """Mean over the ranks, elementwise, on every rank."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def all_gather(local: Tensor) -> Tensor:
    """The ranks' tensors (of one shape), joined along the first dimension in rank order; no gradient goes through."""
    if world_size() == 1:
        return local.detach()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.detach().contiguous())
    return torch.cat(parts)


def broadcast(value: T) -> T:
    """Rank 0's value (anything that pickles) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T] | None:
    """Every rank's value in rank order on rank 0, None elsewhere."""
    if world_size() == 1:
        return [value]
    box: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, box, dst=0)
    return box


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; its value, or the exception it raised, on every rank."""
    if world_size() == 1:
        return function()
    result: tuple[T | None, Exception | None] = (None, None)
    if is_main():
        try:
            result = (function(), None)
        except Exception as error:  # handed to the other ranks, who would wait for ever otherwise
            result = (None, error)
    value, failure = broadcast(result)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


class Vote:
    """Agreement on a number over the ranks without waiting: the verdict on what was cast at one call comes at the next.

    Signals reach the processes at different steps; all have to stop after the same one.
    """

    def __init__(self) -> None:
        self._ballot = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def cast(self, value: int) -> int:
        """Largest number any rank cast at the last call (a single process: at this call)."""
        if world_size() == 1:
            return value
        verdict = self.close()
        self._ballot.fill_(value)
        self._work = dist.all_reduce(self._ballot, op=dist.ReduceOp.MAX, async_op=True)
        return verdict

    def close(self) -> int:
        """Wait for the vote under way, if any, and return its verdict."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._ballot)
