"""MoeMlp: router, dispatch, experts and balance loss in one layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_mlp.moe import balance, compiled, dispatch, telemetry
from sparse_mlp.moe.experts import GELU, Experts
from sparse_mlp.moe.router import NoisyTopKRouter, Routing


class MoeMlp(nn.Module):
    """MoE(x) = sum_i G(x)_i E_i(x) over the K experts the router chose for x (Sparse-MLP, section 2.2).

    Input (..., D), output the same shape; every vector along the last dimension is an item. Dropless in evaluation
    unless told otherwise, so that an image's result does not depend on the other images of the batch.

    | mode | eager | torch.compile, torch.export, ONNX |
    |---|---|---|
    | dropless | sorted items, one product per expert; reads E counts from the device | blocks of slots, static shapes |
    | capacity | slots, no wait for the device | the same |

    Args:
        dim: D, width of an item.
        hidden_dim: H, hidden width of each expert.
        num_experts: E.
        top_k: K, experts per item.
        capacity_ratio: slots per expert in training, as a multiple of the even share N K / E; None is dropless.
            A choice that finds no slot is dropped: it adds zero, and the residual around the layer carries the item.
        eval_capacity_ratio: the same in evaluation.
        capacity_group: what a capacity is counted over: "image" (each entry of the first dimension, for inputs of
            three or more dimensions) or "batch" (all items).
        prioritized: items take slots by falling first gate (Batch Prioritized Routing) rather than in their order.
        noise_std: of the router's logits in training; default 1/E.
        balance_weight: of the balance loss L_imp/2 + L_load/2, whose gradient the layer adds by itself.
        act: "gelu" or "gelu_tanh".

    Raises:
        ValueError: if a number is out of range, or the last dimension of an input is not `dim`.
    """

    balance_scale: Tensor

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 1,
        *,
        capacity_ratio: float | None = None,
        eval_capacity_ratio: float | None = None,
        capacity_group: str = "image",
        prioritized: bool = False,
        noise_std: float | None = None,
        balance_weight: float = 0.01,
        act: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(dim, hidden_dim, num_experts, top_k, noise_std, balance_weight)
        for name, ratio in (("capacity_ratio", capacity_ratio), ("eval_capacity_ratio", eval_capacity_ratio)):
            if ratio is not None and not 0 < ratio < float("inf"):
                raise ValueError(f"{name} must be above 0, or None for dropless; got {ratio}")
        if capacity_group not in ("image", "batch"):
            raise ValueError(f'capacity_group must be "image" or "batch"; got {capacity_group!r}')
        if prioritized and capacity_ratio is None and eval_capacity_ratio is None:
            raise ValueError("prioritized=True needs a capacity_ratio: without a capacity nothing is dropped")
        if act not in GELU:
            raise ValueError(f"act must be one of {', '.join(GELU)}; got {act!r}")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.capacity_ratio, self.eval_capacity_ratio = capacity_ratio, eval_capacity_ratio
        self.capacity_group, self.prioritized = capacity_group, prioritized
        self.balance_weight = balance_weight
        self.router = NoisyTopKRouter(dim, num_experts, top_k, noise_std, device, dtype)
        self.experts = Experts(dim, hidden_dim, num_experts, act, device, dtype)
        self.meter = telemetry.RoutingMeter(num_experts, device)
        self.register_buffer("balance_scale", torch.ones((), device=device), persistent=False)
        # set from outside: a differentiable sum over ranks of (2, E) totals; a listener for RoutingRecords
        self.balance_reduce: Callable[[Tensor], Tensor] | None = None
        self.on_routing: Callable[[telemetry.RoutingRecord], None] | None = None
        self._warned_capacity: set[tuple[float, int]] = set()

    def reset_parameters(self) -> None:
        """Draw all weights anew, each expert from its own random start."""
        self.router.reset_parameters()
        self.experts.fc1.reset_parameters()
        self.experts.fc2.reset_parameters()

    # timm's weight initialisers call a module's own method of this name
    init_weights = reset_parameters

    def extra_repr(self) -> str:
        mode = "dropless" if self.capacity_ratio is None else f"capacity_ratio={self.capacity_ratio:g}"
        return f"{mode}, balance_weight={self.balance_weight:g}"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoeMlp of width {self.dim} got an input of shape {tuple(x.shape)}")
        items_ND = x.reshape(-1, self.dim)
        routing = self.router(items_ND)
        y_ND, kept_NK = self._run_experts(items_ND, routing, self._groups(x))
        if self.training and items_ND.shape[0] > 0:
            y_ND = self._balance(y_ND, routing, kept_NK)
        if self.on_routing is not None:
            self.on_routing(_record(routing, kept_NK, x.shape[:-1]))
        return y_ND.view(x.shape)

    def _run_experts(self, items_ND: Tensor, routing: Routing, groups: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        ratio = self.capacity_ratio if self.training else self.eval_capacity_ratio
        if ratio is not None and items_ND.shape[0] > 0:
            experts_GNK, gates_GNK = (t.view(*groups, self.top_k) for t in (routing.experts_NK, routing.gates_NK))
            capacity = self._capacity(groups[1], ratio)
            slots = dispatch.capacity_slots(experts_GNK, gates_GNK, self.num_experts, capacity, self.prioritized)
            return self.experts.forward_slots(items_ND, routing.gates_NK, slots), slots.kept_NK
        if torch.compiler.is_compiling():
            slots, expert_of_block = dispatch.block_slots(routing.experts_NK, self.num_experts)
            return self.experts.forward_slots(items_ND, routing.gates_NK, slots, expert_of_block), None
        sort_by_expert = (compiled if compiled.serves(items_ND) else dispatch).sort_by_expert
        by_expert = sort_by_expert(routing.experts_NK, self.num_experts)
        return self.experts.forward_sorted(routing.items_ND, routing.gates_NK, routing.experts_NK, *by_expert), None

    def _balance(self, y_ND: Tensor, routing: Routing, kept_NK: Tensor | None) -> Tensor:
        totals = balance.expert_totals(routing, self.router.noise_std)
        if self.balance_reduce is not None:
            totals = self.balance_reduce(totals)
        loss = balance.balance_loss(totals)
        self.meter.update(routing, kept_NK, loss)
        return balance.inject_gradient(y_ND, self.balance_weight * loss, self.balance_scale)

    def _groups(self, x: Tensor) -> tuple[int, int]:
        """Groups that a capacity is counted over, and items in each."""
        per_image = self.capacity_group == "image" and x.ndim >= 3
        return (x.shape[0], math.prod(x.shape[1:-1])) if per_image else (1, math.prod(x.shape[:-1]))

    def _capacity(self, items: int, ratio: float) -> int:
        capacity = dispatch.capacity(items, self.num_experts, self.top_k, ratio)
        if not torch.compiler.is_compiling() and (ratio, items) not in self._warned_capacity:
            self._warned_capacity.add((ratio, items))
            actual = capacity * self.num_experts / (items * self.top_k)
            if abs(actual / ratio - 1) > 0.01:
                warnings.warn(
                    f"capacity ratio {ratio:g} over groups of {items} items rounds to {capacity} slots for each of "
                    f"{self.num_experts} experts: the actual ratio is {actual:.3g}",
                    stacklevel=3,
                )
        return capacity


def _check(
    dim: int, hidden_dim: int, num_experts: int, top_k: int, noise_std: float | None, balance_weight: float
) -> None:
    for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts ({num_experts}); got {top_k}")
    if noise_std is not None and noise_std < 0:
        raise ValueError(f"noise_std must not be negative; got {noise_std}")
    if balance_weight < 0:
        raise ValueError(f"balance_weight must not be negative; got {balance_weight}")


def _record(routing: Routing, kept_NK: Tensor | None, shape: torch.Size) -> telemetry.RoutingRecord:
    kept_NK = torch.ones_like(routing.experts_NK, dtype=torch.bool) if kept_NK is None else kept_NK
    experts, gates, kept = (
        t.detach().view(*shape, t.shape[-1]) for t in (routing.experts_NK, routing.gates_NK, kept_NK)
    )
    return telemetry.RoutingRecord(experts, gates, kept)
