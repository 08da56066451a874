"""Which experts an item goes to, and with which weight."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_mlp.moe.autocast import autocast_type
from sparse_mlp.moe.kernels import accelerated


class Routing(NamedTuple):
    """What the router decided for N items.

    `gates_NK` are the K largest entries of softmax(logits + noise), in falling order, not renormalised; `experts_NK`
    are their experts. `logits_NE` carry no noise, `noisy_NE` do (the same tensor where there is none).
    """

    gates_NK: Tensor
    experts_NK: Tensor
    logits_NE: Tensor
    noisy_NE: Tensor


@accelerated
def top_gates(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest values of each item's softmax, in falling order, and whose they are: (N, E) -> 2 x (N, K).

    The experts are chosen by the logits, for a softmax may round two of them to the same gate; the first of equal ones
    comes first, which torch.topk leaves open.
    """
    rest_NE, experts = logits_NE.detach(), []
    for _ in range(top_k):
        experts.append(rest_NE.argmax(-1, keepdim=True))
        rest_NE = rest_NE.scatter(-1, experts[-1], -math.inf)
    experts_NK = torch.cat(experts, -1)
    return logits_NE.softmax(-1).gather(-1, experts_NK), experts_NK


class NoisyTopKRouter(nn.Module):
    """G(x) = TopK(softmax(W_g x + eps)), eps ~ N(0, noise_std^2) in training only (Sparse-MLP, section 2.2).

    The arithmetic is float32 (float64 for float64 input) whatever the model's type or autocast: a gate rounded to
    bfloat16 picks other experts. The raw softmax values are the weights: renormalising them over the top K would
    make the weight 1 at K=1 and leave the router without a task gradient.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        noise_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`noise_std` defaults to 1/num_experts, the paper's."""
        super().__init__()
        self.top_k = top_k
        self.noise_std = 1 / num_experts if noise_std is None else noise_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"{dim}, num_experts={num_experts}, top_k={self.top_k}, noise_std={self.noise_std:g}"

    def forward(self, items_ND: Tensor) -> Routing:
        dtype = torch.promote_types(items_ND.dtype, torch.float32)
        off = torch.autocast(items_ND.device.type, enabled=False) if autocast_type(items_ND) else nullcontext()
        with off:
            logits_NE = F.linear(items_ND.to(dtype), self.weight.to(dtype))
        noisy_NE = logits_NE
        if self.training and self.noise_std > 0:
            noisy_NE = logits_NE + self.noise_std * torch.randn_like(logits_NE)
        gates_NK, experts_NK = top_gates(noisy_NE, self.top_k)
        return Routing(gates_NK, experts_NK, logits_NE, noisy_NE)
