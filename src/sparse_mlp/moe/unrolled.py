"""Experts for a program outside torch: a loop over experts, each an MLP of its own, on slices of the rows.

An exporter follows it: every item is multiplied with the weights of its own experts only, whose number of rows is read
from the router at run time, and a quantiser finds each expert's weights as an ordinary linear layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparse_mlp.moe.telemetry import moe_layers


class UnrolledExperts(nn.Module):
    """The experts of a `MoeMlp` as E MLPs. Rows (M, D) in the order of experts, how many each has -> (M, D)."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        gelu = getattr(experts, "gelu", None)
        act = nn.GELU(approximate=gelu) if gelu is not None else experts.act
        self.mlps = nn.ModuleList(_Mlp(experts, expert, act) for expert in range(len(experts.fc1.weight)))

    def forward(self, rows_MD: Tensor, counts_E: Tensor | None = None) -> Tensor:
        if counts_E is None:
            parts_ECD = rows_MD.unflatten(0, (len(self.mlps), -1))
            return torch.cat([mlp(parts_ECD[expert]) for expert, mlp in enumerate(self.mlps)])
        found, start = [], 0
        for mlp, count in zip(self.mlps, counts_E.tolist(), strict=True):
            torch._check(count >= 0)
            torch._check(start + count <= rows_MD.shape[0])
            found.append(mlp(rows_MD.narrow(0, start, count)))
            start = start + count
        return torch.cat(found)


class _Mlp(nn.Module):
    def __init__(self, experts: Any, expert: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = (_linear(layer, expert) for layer in (experts.fc1, experts.fc2))
        self.act, self.gate = act, getattr(experts, "gate", None)
        self.norm = getattr(experts, "norm", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.gate is None:
            return self.fc2(self.norm(self.act(hidden)))
        first, last = hidden.chunk(2, -1)
        return self.fc2(self.norm(first * self.act(last) if self.gate == "last" else self.act(first) * last))


def _linear(layer: Any, expert: int) -> nn.Linear:
    weight, bias = layer.weight[expert], None if layer.bias is None else layer.bias[expert]
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def unroll(model: nn.Module) -> nn.Module:
    """A copy of a model for evaluation whose MoE layers have `UnrolledExperts`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in moe_layers(model).values():
        layer.experts = UnrolledExperts(layer.experts)  # type: ignore[assignment]
    return model
