"""MoeMlp: router, dispatch, experts and balance loss in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timm.layers import register_notrace_module
from torch import Tensor

from sparse_mlp.moe import balance, dispatch, telemetry
from sparse_mlp.moe.arguments import check_arguments, warn_if_rounded
from sparse_mlp.moe.buffers import NonPersistentBuffers
from sparse_mlp.moe.experts import Experts
from sparse_mlp.moe.router import NoisyTopKRouter, Routing


@register_notrace_module  # timm's FX feature extraction takes the layer as one node
class MoeMlp(NonPersistentBuffers):
    """MoE(x) = sum_i G(x)_i E_i(x) over the K experts the router chose for x (Sparse-MLP, section 2.2).

    Input (..., D), output the same shape; every vector along the last dimension is an item. Dropless in evaluation
    unless told otherwise, so that an image's result does not depend on the other images of the batch.

    Args:
        dim: D, width of an item.
        hidden_dim: H, hidden width of each expert.
        num_experts: E. top_k: K, experts per item.
        capacity_ratio: rows per expert in training, as a multiple of the even share N K / E; None is dropless.
            A choice that finds no row is dropped: it adds zero, and the residual around the layer carries the item.
        eval_capacity_ratio: the same in evaluation.
        capacity_group: what a capacity is counted over: "image" (each entry of the first dimension, for inputs of
            three or more dimensions) or "batch" (all items).
        prioritized: items take rows by falling first gate (Batch Prioritized Routing) rather than in their order.
        noise_std: of the router's logits in training; default 1/E.
        balance_weight: of the balance loss L_imp/2 + L_load/2, whose gradient the layer adds by itself. A loop that
            multiplies its loss (accumulation, fp16) must say so: see `balance`, which has the other way too.
        act: "gelu" or "gelu_tanh".

    Attributes to set from outside:
        dispatcher: brings items to the experts and back, in place of `dispatch.local`.
        balance_reduce: a differentiable sum of the balance totals, (1 or 2, E), over ranks.
        on_routing: receives a `telemetry.RoutingRecord` of each forward.

    Raises ValueError if a number is out of range, or the last dimension of an input is not `dim`.
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
        check_arguments(
            sizes={"dim": dim, "hidden_dim": hidden_dim, "num_experts": num_experts, "top_k": top_k},
            ratios={"capacity_ratio": capacity_ratio, "eval_capacity_ratio": eval_capacity_ratio},
            not_negative={"noise_std": noise_std, "balance_weight": balance_weight},
            capacity_group=capacity_group,
            prioritized=prioritized,
            act=act,
        )
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.capacity_ratio, self.eval_capacity_ratio = capacity_ratio, eval_capacity_ratio
        self.capacity_group, self.prioritized = capacity_group, prioritized
        self.balance_weight = balance_weight
        self.router = NoisyTopKRouter(dim, num_experts, top_k, noise_std, device, dtype)
        self.experts = Experts(dim, hidden_dim, num_experts, act, device, dtype)
        self.meter = telemetry.RoutingMeter(num_experts, device)
        self.register_buffer("balance_scale", torch.ones((), device=device), persistent=False)
        self.dispatcher: dispatch.Dispatcher = dispatch.local
        self.balance_reduce: Callable[[Tensor], Tensor] | None = None
        self.on_balance_loss: Callable[[Tensor], None] | None = None  # see `balance.collect_balance_loss`
        self.on_routing: Callable[[telemetry.RoutingRecord], None] | None = None
        self._warned: set[tuple[float, int]] = set()

    def reset_parameters(self) -> None:
        """Draw all weights anew; the buffers as at the start."""
        self.router.reset_parameters()
        self.experts.fc1.reset_parameters()
        self.experts.fc2.reset_parameters()
        self.init_non_persistent_buffers()

    init_weights = reset_parameters  # what timm's weight initialisers call

    def init_non_persistent_buffers(self) -> None:
        self.balance_scale.fill_(1.0)
        self.meter.reset()

    def extra_repr(self) -> str:
        mode = "dropless" if self.capacity_ratio is None else f"capacity_ratio={self.capacity_ratio:g}"
        return f"{mode}, balance_weight={self.balance_weight:g}"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoeMlp of width {self.dim} got an input of shape {tuple(x.shape)}")
        items_ND = x.reshape(-1, self.dim)
        routing = self.router(items_ND)
        plan = self._plan(routing, x)
        y_ND = self.dispatcher(items_ND, routing.gates_NK, plan, self.experts)
        if self.training:
            y_ND = self._balance(y_ND, routing, plan)
        if self.on_routing is not None:
            self.on_routing(telemetry.RoutingRecord.of(routing, plan, x.shape[:-1]))
        return y_ND.view(x.shape)

    def _plan(self, routing: Routing, x: Tensor) -> dispatch.Plan:
        ratio = self.capacity_ratio if self.training else self.eval_capacity_ratio
        if ratio is None or x.numel() == 0:
            return dispatch.dropless(routing.experts_NK, self.num_experts)
        groups, items = 1, math.prod(x.shape[:-1])
        if self.capacity_group == "image" and x.ndim >= 3:
            groups, items = x.shape[0], math.prod(x.shape[1:-1])
        experts_GNK, gates_GNK = (t.view(groups, items, self.top_k) for t in (routing.experts_NK, routing.gates_NK))
        capacity = self._capacity(items, ratio)
        return dispatch.limited(experts_GNK, gates_GNK, self.num_experts, capacity, self.prioritized)

    def _capacity(self, items: int, ratio: float) -> int:
        capacity = dispatch.capacity(items, self.num_experts, self.top_k, ratio)
        if not torch.compiler.is_compiling() and (ratio, items) not in self._warned:
            self._warned.add((ratio, items))
            warn_if_rounded(ratio, items, capacity, self.num_experts, self.top_k)
        return capacity

    def _balance(self, y_ND: Tensor, routing: Routing, plan: dispatch.Plan) -> Tensor:
        logits = routing.logits_NE, routing.noisy_NE
        totals, entropies = balance.expert_totals(*logits, routing.experts_NK, self.router.noise_std)
        importance_E = totals[0]
        if self.balance_reduce is not None:  # by ranks without an item too, for the others wait for them
            totals = self.balance_reduce(totals)
        loss = balance.balance_loss(totals)
        self.meter.update(plan, importance_E, entropies, loss)
        if self.on_balance_loss is not None:
            self.on_balance_loss(self.balance_weight * loss)
            return y_ND
        return balance.inject_gradient(y_ND, self.balance_weight * loss, self.balance_scale)
