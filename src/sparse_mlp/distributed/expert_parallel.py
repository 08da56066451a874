"""Experts split over ranks: each rank holds E / P experts of every MoE layer, and items travel to theirs and back.

Legend as in `sparse_mlp.moe.dispatch`; P ranks of the expert axis. M rows are this rank's, R rows those it received.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sparse_mlp.distributed.mesh import Mesh
from sparse_mlp.errors import UserError
from sparse_mlp.moe import MoeMlp, dispatch
from sparse_mlp.moe.experts import ExpertLinear, product_type
from sparse_mlp.moe.telemetry import moe_layers


def split_experts(model: nn.Module, mesh: Mesh) -> list[MoeMlp]:
    """Leave to each rank its share of the experts of every MoE layer, as DTensors split along their first dimension.

    Returns the layers. UserError, before anything is changed, for a model without experts or whose number of experts
    does not divide.
    """
    layers = moe_layers(model)
    if not layers:
        raise UserError(f"mesh.expert {mesh.expert} would be ignored: the model has no experts")
    for name, layer in layers.items():
        if layer.num_experts % mesh.expert:
            raise UserError(f"the {layer.num_experts} experts of {name} do not divide over mesh.expert {mesh.expert}")
    for layer in layers.values():
        for linear in (module for module in layer.experts.modules() if isinstance(module, ExpertLinear)):
            for name, parameter in linear.named_parameters(recurse=False):
                shard = distribute_tensor(parameter.detach(), mesh.devices["expert"], [Shard(0)])
                linear.register_parameter(name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
            linear.register_forward_hook(_own_experts)
        layer.dispatcher = ExpertParallel(mesh.expert_group)
    return list(layers.values())


def _own_experts(_module: nn.Module, _args: Any, weights: tuple[Tensor, Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in weights)


class ExpertParallel:
    """A dispatcher: sends each row to the rank of its expert and brings the result back.

    Collective, in both directions, also for a rank without an item.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)

    def __call__(self, items_ND: Tensor, gates_NK: Tensor, plan: dispatch.Plan, experts: dispatch.Experts) -> Tensor:
        rows_MD = dispatch.gather(items_ND, plan.item_M, plan.row_NK)
        rows_MD = rows_MD.to(
            product_type(rows_MD)
        )  # what the experts would do first: half of the bytes in half precision
        rows_MD = self._apply(rows_MD, self._counts(plan), experts)
        return dispatch.combine(rows_MD, plan.row_NK, gates_NK.to(rows_MD.dtype))

    def _counts(self, plan: dispatch.Plan) -> Tensor:
        """Rows of each expert, (P, E / P). With a capacity every expert has as many."""
        counts_E = plan.counts_E
        if counts_E is None:
            num_experts = plan.chosen_E.shape[0]
            counts_E = torch.full_like(plan.chosen_E, plan.item_M.shape[0] // num_experts)
        return counts_E.view(self.ranks, -1)

    def _apply(self, rows_MD: Tensor, counts_PE: Tensor, experts: dispatch.Experts) -> Tensor:
        """All experts' results: (M, D) -> (M, D), rows in the order of experts; row p of the counts goes to rank p."""
        received_PE = torch.empty_like(counts_PE)
        dist.all_to_all_single(received_PE, counts_PE.contiguous(), group=self.group)
        # sizes of messages are numbers on the host
        sent, received = torch.stack([counts_PE.sum(1), received_PE.sum(1)]).tolist()
        rows_RD = exchange(rows_MD, sent, received, self.group)
        # they came rank by rank, of each by expert; the experts take them by expert
        local = received_PE.shape[1]
        expert_PE = torch.arange(local, device=rows_RD.device).expand_as(received_PE)
        expert_R = expert_PE.flatten().repeat_interleave(received_PE.flatten(), output_size=sum(received))
        from_R, to_R1, counts_E = dispatch.sort_by_expert(expert_R.unsqueeze(1), local)
        rows_RD = experts(dispatch.gather(rows_RD, from_R, to_R1), counts_E)
        rows_RD = dispatch.gather(rows_RD, to_R1.squeeze(1), from_R.unsqueeze(1))
        return exchange(rows_RD, received, sent, self.group)


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """`sent[p]` rows to rank p, in order of p; returns `received[p]` of each. With a gradient, which travels back."""
    return _Exchange.apply(rows, sent, received, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(gradient, ctx.received, ctx.sent, ctx.group), None, None, None
