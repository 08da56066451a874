"""The process group of a run: a single process, or the processes that torchrun started.

Every function also works in a single process. All ranks must call a collective function, in the same order.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_mlp.errors import UserError

T = TypeVar("T")

JOIN_SECONDS = "SPARSE_MLP_JOIN_SECONDS"
"""Environment variable: how long a process waits for the others when a run begins."""

_job_store: dist.Store | None = None

_CONNECTION_ERRORS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")

_DEVICES = "auto, cpu, cuda, cuda:0, cuda:1, ..."
_TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLostError(RuntimeError):
    """A process of the group has ended, or never came. The message is one line."""

    exit_code = 1


def rank() -> int:
    """Rank of this process; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0, which writes files and shows progress."""
    return rank() == 0


def resolve_device(name: str, index: int = 0) -> torch.device:
    """The device for "auto" (a GPU where there is one), "cpu", "cuda" (GPU `index`) or "cuda:N".

    UserError for any other name, for a device torch knows but this package does not train on, and for a missing GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; allowed are {_DEVICES}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported for training; allowed are {_DEVICES}")
    if device.type == "cpu":
        if device.index:
            raise UserError(f"device {name!r} does not exist: torch has one CPU device, cpu")
        return torch.device("cpu")
    found = torch.cuda.device_count()
    number = index if device.index is None else device.index
    if number >= found:
        raise UserError(f"device {name!r} does not exist: torch finds {found} GPUs")
    return torch.device("cuda", number)


@contextmanager
def join(device: str = "auto") -> Iterator[torch.device]:
    """Process group of the processes torchrun started, for the duration of the block; yields this process's device.

    Without torchrun no group is created. Raises UserError if torchrun's environment is incomplete.
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
    # Objects and flags are on the CPU and need gloo; gradients on GPUs need nccl.
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=_meet(), rank=int(os.environ["RANK"]), world_size=int(size))
        yield target
    except RuntimeError as error:
        if (lost := _lost_rank(error)) is None:
            raise
        raise lost from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet() -> dist.Store:
    """A store of the processes, when all of them have come. RankLostError if some do not, that names them.

    torchrun's store still holds what processes wrote that it has since started again. So rank 0 makes up a new name,
    answers with it whoever asks, and what is stored from then on is stored under it.
    """
    global _job_store
    seconds, own, size = float(os.environ.get(JOIN_SECONDS, "600")), uuid.uuid4().hex, int(os.environ["WORLD_SIZE"])
    wait = timedelta(seconds=seconds)
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=wait))
        if rank == 0:
            name = own
            _answer(store, name, size, time.monotonic() + seconds)
        else:
            store.set(f"ask/{rank}", own)
            store.wait([f"answer/{own}"], wait)
            name = store.get(f"answer/{own}").decode()
            store.set(f"{name}/here/{rank}", "")
            store.wait([f"{name}/all"], wait)
    except dist.DistError as error:
        raise RankLostError(f"not all of {size} processes came within {seconds:g} seconds ({JOIN_SECONDS})") from error
    _job_store = store
    return dist.PrefixStore(name, store)


def _answer(store: dist.Store, name: str, size: int, until: float) -> None:
    """Tell every rank that asks the name, until all have it; a rank that was started again asks again."""
    missing, answered = set(range(1, size)), set[bytes]()
    while missing:
        for rank in sorted(missing):
            if store.check([f"{name}/here/{rank}"]):
                missing.remove(rank)
            elif store.check([f"ask/{rank}"]) and (asks := store.get(f"ask/{rank}")) not in answered:
                store.set(f"answer/{asks.decode()}", name)
                answered.add(asks)
        if missing and time.monotonic() > until:
            named = ", ".join(map(str, sorted(missing)))
            raise RankLostError(f"rank {named} of {size} did not come in time ({JOIN_SECONDS} says how long to wait)")
        time.sleep(0.01)
    store.set(f"{name}/all", "")


def _lost_rank(error: RuntimeError) -> RankLostError | None:
    """What an error of the communication means for the user; None for any other error."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(part in text for part in _CONNECTION_ERRORS):
        return None
    return RankLostError(
        f"rank {os.environ['RANK']} lost another process, which has ended or cannot be reached; what was saved stays, "
        "and the run can be resumed"
    )


def remember(key: str, value: str) -> None:
    """Keep a text in torchrun's store, which lives as long as the job: also when the processes are started again."""
    if _job_store is not None:
        _job_store.set(f"job/{key}", value)


def recall(key: str) -> str | None:
    """What this job has remembered; None if it is nothing, or without torchrun."""
    if _job_store is None or not _job_store.check([f"job/{key}"]):
        return None
    return _job_store.get(f"job/{key}").decode()


def mean(values: Tensor) -> Tensor:
    """Elementwise mean over the ranks, on every rank; collective."""
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values


def any_rank(value: bool) -> bool:
    """Whether `value` is true on any rank; collective."""
    if world_size() == 1:
        return value
    found = torch.tensor(int(value))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def all_gather(local: Tensor) -> Tensor:
    """The ranks' tensors (all of one shape), concatenated in rank order along the first dimension; without gradient."""
    if world_size() == 1:
        return local.detach()
    gathered = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(gathered, local.detach().contiguous())
    return torch.cat(gathered)


def broadcast(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value (any object that pickles) on every rank; collective. `group`: another one of all ranks."""
    if world_size() == 1:
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=0, group=group)
    return objects[0]


def gather(value: T) -> list[T] | None:
    """Every rank's value in rank order on rank 0, None on the others; collective."""
    if world_size() == 1:
        return [value]
    objects: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, objects, dst=0)
    return objects


def on_main(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `function` on rank 0 only; every rank returns its value or raises its exception; collective."""
    if world_size() == 1:
        return function()
    result: tuple[T | None, Exception | None] = (None, None)
    if is_main():
        try:
            result = (function(), None)
        except Exception as error:  # raised on all ranks: the others would wait forever
            result = (None, error)
    value, raised = broadcast(result, group)
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]


class AsyncMax:
    """Maximum over the ranks of a number, without waiting: a call returns the result of the call before it.

    For signals, which reach the processes during different steps while all ranks have to stop after the same one.
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def reduce(self, value: int) -> int:
        """Maximum over the ranks of the previous call's values, 0 at the first call; collective.

        In a single process the value of this call.
        """
        if world_size() == 1:
            return value
        maximum = self.wait()
        self._value.fill_(value)
        self._work = dist.all_reduce(self._value, op=dist.ReduceOp.MAX, async_op=True)
        return maximum

    def wait(self) -> int:
        """Finish the reduction in progress and return its maximum; 0 if there is none."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._value)
