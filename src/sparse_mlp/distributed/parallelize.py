"""One call that spreads a built model over a mesh: copies or shards of the dense weights, split experts, or both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from sparse_mlp.distributed.balance import sync_balance
from sparse_mlp.distributed.batch_norm import sync_batch_norm
from sparse_mlp.distributed.draws import draw_by_item
from sparse_mlp.distributed.expert_parallel import split_experts
from sparse_mlp.distributed.gradients import ExpertGradients
from sparse_mlp.distributed.mesh import Mesh
from sparse_mlp.errors import UserError
from sparse_mlp.moe.telemetry import moe_layers


class Parallel:
    """A module that trains on a mesh. `module` is what is called; gradients are means over the ranks after `finish`."""

    def __init__(self, module: nn.Module, mesh: Mesh, experts: ExpertGradients | None) -> None:
        self.module, self.mesh, self.experts = module, mesh, experts

    @contextlib.contextmanager
    def reducing(self, sync: bool) -> Iterator[None]:
        """A forward and backward in which gradients are summed over the ranks, or only added up locally."""
        if self.experts is not None:
            self.experts.sync = sync
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(sync)
            yield
        elif isinstance(self.module, DistributedDataParallel) and not sync:
            with self.module.no_sync():
                yield
        else:
            yield

    def finish(self) -> None:
        """Wait for the gradients of split experts."""
        if self.experts is not None:
            self.experts.wait()


def parallelize(module: nn.Module, mesh: Mesh, *, balance: str = "global", forwards: Sequence[str] = ()) -> Parallel:
    """Spread a module over the ranks of a mesh, in place; collective. Every rank has built the same one.

    Weights of experts are split over `mesh.expert`, others are copied or, with `mesh.shard`, split over all ranks.
    `balance`: see MeshConfig. `forwards`: its methods besides `forward` that use the weights. UserError for a mesh that
    the module's experts do not fit.
    """
    if balance == "rank" and any(layer.bias_rate > 0 for layer in moe_layers(module).values()):
        raise UserError("mesh.balance rank does not fit bias_rate: the bias of the routers is the same on every rank")
    if mesh.expert > 1:
        split_experts(module, mesh)
    if balance == "global":
        sync_balance(module)
    draw_by_item(module)
    if mesh.size == 1:
        return Parallel(module, mesh, None)
    sync_batch_norm(module)
    shards = _shard_experts(module, mesh) if mesh.shard else set[nn.Parameter]()
    apart = {p: name for name, p in module.named_parameters() if isinstance(p, DTensor) and p not in shards}
    copies = mesh.data_group if mesh.data > 1 else None
    experts = ExpertGradients([p for p in apart if p.requires_grad], mesh.size, copies) if apart else None
    if mesh.shard:
        for unit in units(module):
            unit.register_forward_hook(_without_view)
            fully_shard(unit, mesh=mesh.everyone, reshard_after_forward=True, ignored_params=set(apart))
        fully_shard(module, mesh=mesh.everyone, reshard_after_forward=True, ignored_params=set(apart))
        for name in forwards:
            register_fsdp_forward_method(module, name)
        return Parallel(module, mesh, experts)
    if not any(p.requires_grad for p in module.parameters()):
        return Parallel(module, mesh, None)  # a moving average
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, apart.values())
    ids = [mesh.device] if mesh.device.type == "cuda" else None
    ddp = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
    return Parallel(ddp, mesh, experts)


def _shard_experts(module: nn.Module, mesh: Mesh) -> set[nn.Parameter]:
    """Shard split experts over their copies too, where their widths divide; returns the weights that were sharded."""
    sharded: set[nn.Parameter] = set()
    for layer in moe_layers(module).values() if mesh.expert > 1 and mesh.data > 1 else ():
        experts: nn.Module = layer.experts
        weights = list(experts.parameters())
        # a norm inside them would be left to nobody; such experts stay copies along `data`
        if any(not isinstance(weight, DTensor) or weight.shape[1] % mesh.data for weight in weights):
            continue
        copies = mesh.devices["data"]
        fully_shard(experts, mesh=copies, reshard_after_forward=True, shard_placement_fn=_second_dimension)
        assert isinstance(experts, FSDPModule)
        experts.set_gradient_divide_factor(mesh.size)
        experts.set_force_sum_reduction_for_comms(True)  # gloo has no sum that multiplies before
        sharded |= set(experts.parameters())
    return sharded


def _without_view(_module: nn.Module, _args: Any, output: Any) -> Any:
    """An operation in place on a view that a unit returns would skip the gathering of its weights in the backward."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _second_dimension(_parameter: Tensor) -> Shard:
    return Shard(1)


def units(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a module, which are gathered and freed one at a time; children before parents.

    They are the entries of a list or sequence in which a type of module with parts repeats; of entries that hold such
    lists themselves, as stages do, the inner ones. None if they hold less than half of the weights.
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and _repeats(child):
            for entry in child:
                found += units(entry) or ([entry] if _weights(entry) else [])
        else:
            found += units(child)
    inside = sum(_weights(unit) for unit in found)
    return found if 2 * inside >= _weights(module) else []


def _repeats(entries: nn.ModuleList | nn.Sequential) -> bool:
    kinds = [type(entry) for entry in entries if _weights(entry) and any(True for _ in entry.children())]
    return len(kinds) > len(set(kinds))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
