"""MoeMlp: router, dispatch, experts and balance loss in one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from sparse_mlp.moe import balancing, capacity, dense, dispatch, telemetry
from sparse_mlp.moe.arguments import check_arguments
from sparse_mlp.moe.buffers import NonPersistentBuffers
from sparse_mlp.moe.experts import Experts
from sparse_mlp.moe.general_experts import Act, GeneralExperts, make_experts
from sparse_mlp.moe.router import NoisyTopKRouter, Routing


@register_notrace_module  # timm's FX feature extraction takes the layer as one node
class MoeMlp(NonPersistentBuffers):
    """MoE(x) = sum_i G(x)_i E_i(x) over the K experts the router chose for x (Sparse-MLP, section 2.2).

    Input (..., D), output the same shape; every vector along the last dimension is an item. Raises ValueError if an
    argument is out of range or items are not D wide.

    Args:
        dim: D, width of an item. hidden_dim: H, of each expert. num_experts: E. top_k: K, experts per item.
        capacity_ratio, eval_capacity_ratio: rows per expert, in training and in evaluation, as a multiple of the even
            share N K / E; None is dropless: no result depends on other items. A choice without a row adds zero.
        capacity_group: what a capacity is counted over, "image" (each entry of the first of three or more dimensions)
            or "batch". prioritized: items take rows by falling first gate (Batch Prioritized Routing).
        noise_std: of the router's logits in training; default 1/E.
        balance_weight: of L_imp/2 + L_load/2. A loop that multiplies its loss must say so: see `balance`.
        renormalize: gates over their sum, so that each item's add up to 1 (Sparse Upcycling, section 3).
        scores: what gates are of the logits, "softmax" or "sigmoid" (DeepSeek-V3, section 2.1.2).
        bias_rate: of a bias on the scores against the load (DeepSeek-V3: 0.001, balance_weight=0), see `router_bias`.
        z_loss_weight: of the router's z-loss (ST-MoE, equation 5: 0.001), added as the balance loss is.
        shared_experts: experts that every item goes through, besides its K (DeepSeekMoE, section 3.2).
        act, gate, bias, drop, norm_layer: of the experts, see `make_experts`; GELU alone has the fast kernels.
        channels_first: the input is (B, D, ...) and not (..., D), as that of 1x1 convolutions.

    Set from outside:
        dispatcher: brings items to the experts and back, in place of `dispatch.local`.
        balance_reduce: a differentiable sum of the balance totals, (1 or 2, E), over ranks.
        on_routing: receives a `telemetry.RoutingRecord` of each forward.
    """

    balance_scale: Tensor
    experts: Experts | GeneralExperts
    shared: Experts | GeneralExperts | None

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
        renormalize: bool = False,
        scores: str = "softmax",
        bias_rate: float = 0.0,
        z_loss_weight: float = 0.0,
        shared_experts: int = 0,
        act: Act = "gelu",
        gate: str | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        channels_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_arguments(locals())
        self.dim, self.num_experts, self.top_k, self.shared_experts = dim, num_experts, top_k, shared_experts
        self.capacity_ratio, self.eval_capacity_ratio = capacity_ratio, eval_capacity_ratio
        self.capacity_group, self.prioritized, self.channels_first = capacity_group, prioritized, channels_first
        self.balance_weight, self.bias_rate, self.z_loss_weight = balance_weight, bias_rate, z_loss_weight
        dd: Any = {"device": device, "dtype": dtype}
        scoring: Any = {"scores": scores, "renormalize": renormalize, "bias": bias_rate > 0}
        form: Any = {"act": act, "gate": gate, "bias": bias, "drop": drop, "norm_layer": norm_layer}
        self.router = NoisyTopKRouter(dim, num_experts, top_k, noise_std, **dd, **scoring)
        self.experts = make_experts(dim, hidden_dim, num_experts, **form, **dd)
        self.shared = make_experts(dim, hidden_dim, shared_experts, **form, **dd) if shared_experts else None
        self.meter = telemetry.RoutingMeter(num_experts, device)
        self.register_buffer("balance_scale", torch.ones((), device=device), persistent=False)
        self.dispatcher: dispatch.Dispatcher = dispatch.local
        self.balance_reduce: Callable[[Tensor], Tensor] | None = None
        self.on_balance_loss: Callable[[Tensor], None] | None = None  # see `balance.collect_balance_loss`
        self.on_routing: Callable[[telemetry.RoutingRecord], None] | None = None
        self._warned: set[tuple[float, int]] = set()
        self.origin: dense.Origin | None = None

    @classmethod
    def from_mlp(cls, mlp: nn.Module, num_experts: int, top_k: int = 1, **arguments: Any) -> MoeMlp:
        """Experts that begin as a trained MLP, which stays as it is: see `dense.from_mlp`."""
        return dense.from_mlp(cls, mlp, num_experts, top_k, **arguments)

    @classmethod
    def as_mlp_layer(cls, num_experts: int, top_k: int = 1, **arguments: Any) -> Callable[..., MoeMlp]:
        """A constructor of timm's signature, for a model's argument `mlp_layer`. See `dense.as_mlp_layer`."""
        return dense.as_mlp_layer(cls, num_experts, top_k, **arguments)

    def reset_parameters(self) -> None:
        """Draw all weights anew; the buffers as at the start."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.init_non_persistent_buffers()

    init_weights = reset_parameters  # what timm's weight initialisers call

    def init_non_persistent_buffers(self) -> None:
        self.balance_scale.fill_(1.0)
        self.meter.reset()

    def extra_repr(self) -> str:
        mode = "dropless" if self.capacity_ratio is None else f"capacity_ratio={self.capacity_ratio:g}"
        return f"{mode}, balance_weight={self.balance_weight:g}"

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.channels_first else x
        if x.shape[-1] != self.dim:
            raise ValueError(f"MoeMlp of width {self.dim} got an input of shape {tuple(x.shape)}")
        items_ND = x.reshape(-1, self.dim)
        routing = self.router(items_ND)
        plan = self._plan(routing, x)
        y_ND = self.dispatcher(items_ND, routing.gates_NK, plan, self.experts)
        if self.shared is not None:
            shared_MD = self.shared(items_ND.repeat(self.shared_experts, 1))
            y_ND = y_ND + shared_MD.view(self.shared_experts, *y_ND.shape).sum(0)
        if self.training:
            y_ND = balancing.inject_balance(self, y_ND, routing, plan)
        if self.on_routing is not None:
            self.on_routing(telemetry.RoutingRecord.of(routing, plan, x.shape[:-1]))
        y = y_ND.view(x.shape)
        return y.movedim(-1, 1) if self.channels_first else y

    def _plan(self, routing: Routing, x: Tensor) -> dispatch.Plan:
        ratio = self.capacity_ratio if self.training else self.eval_capacity_ratio
        if ratio is None or x.numel() == 0:
            return dispatch.dropless(routing.experts_NK, self.num_experts)
        return capacity.plan(routing, x.shape, ratio, self.capacity_group, self.prioritized, self._warned)
