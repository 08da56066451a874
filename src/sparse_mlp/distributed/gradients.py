"""Gradients of weights that lie on several meshes: their norm, and the sum over copies of split experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors, grouped by how they are split: torch's operations on lists take those of one mesh only."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(mesh_of(tensor), []).append(tensor)
    return list(groups.values())


def mesh_of(tensor: Tensor) -> object:
    """What a DTensor is split over; None for a plain tensor."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def full(tensor: Tensor) -> Tensor:
    """The whole of a DTensor (collective); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(value: Any, parameter: Tensor) -> Any:
    """A tensor of a parameter's shape, the same on every rank, split as that is; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, (), the same on every rank; collective where they are split."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [full(get_total_norm(group)) for group in by_mesh(gradients)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; returns the norm before."""
    norm = gradient_norm(parameters)
    for group in by_mesh([parameter for parameter in parameters if parameter.grad is not None]):
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


class ExpertGradients:
    """Sums the gradients of split experts over the ranks that hold copies of them, and divides by all ranks.

    A rank's experts have the gradient of the losses of all ranks that sent it rows. DistributedDataParallel divides the
    sum over the ranks by their number; so it is done here. The sums run while the backward goes on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: int, copies: dist.ProcessGroup | None) -> None:
        """`copies`: the ranks with the same experts; None where nothing is to be summed."""
        self.ranks, self.copies, self.sync = ranks, copies, True
        self._running: list[dist.Work] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._reduce)

    def _reduce(self, parameter: Tensor) -> None:
        if not self.sync:
            return
        assert parameter.grad is not None
        gradient = own_part(parameter.grad)
        gradient.div_(self.ranks)
        if self.copies is not None:
            work = dist.all_reduce(gradient, group=self.copies, async_op=True)
            assert work is not None
            self._running.append(work)

    def wait(self) -> None:
        """Until all sums are there."""
        for work in self._running:
            work.wait()
        self._running.clear()
