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

    `gates_NK` are the K largest scores of logits + noise, in falling order, renormalised if the router does so;
    `experts_NK` are their experts. `logits_NE` carry no noise, `noisy_NE` do (the same tensor where there is none).
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
    experts_NK = top_indices(logits_NE.detach(), top_k)
    return logits_NE.softmax(-1).gather(-1, experts_NK), experts_NK


def top_indices(values_NE: Tensor, top_k: int) -> Tensor:
    """Where the K largest values of each row are, the first of equal ones first: (N, E) -> (N, K)."""
    experts = []
    for _ in range(top_k):
        experts.append(values_NE.argmax(-1, keepdim=True))
        values_NE = values_NE.scatter(-1, experts[-1], -math.inf)
    return torch.cat(experts, -1)


def renormalize(gates_NK: Tensor) -> Tensor:
    """Gates over their sum, so that the weights of an item add up to 1 (Sparse Upcycling, section 3).

    With K = 1 the weight is 1 whatever the router says, and the sum is a constant to the gradient: the gradient of the
    gate is then that of log(gate), without which the router would learn nothing from the task.
    """
    total_N1 = gates_NK.sum(-1, keepdim=True).clamp_min(torch.finfo(gates_NK.dtype).tiny)
    return gates_NK / (total_N1.detach() if gates_NK.shape[-1] == 1 else total_N1)


class NoisyTopKRouter(nn.Module):
    """G(x) = TopK(softmax(W_g x + eps)), eps ~ N(0, noise_std^2) in training only (Sparse-MLP, section 2.2).

    The arithmetic is float32 (float64 for float64 input) whatever the model's type or autocast: a gate rounded to
    bfloat16 picks other experts. Unless asked to, it does not renormalise the K values.

    With `bias`, a buffer (E,), the K are those with the largest score + bias, and the gates are their scores without
    it (DeepSeek-V3, section 2.1.2). `scores`: "softmax" or "sigmoid", of each logit alone.
    """

    bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        noise_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scores: str = "softmax",
        renormalize: bool = False,
        bias: bool = False,
    ) -> None:
        """`noise_std` defaults to 1/num_experts, the paper's."""
        super().__init__()
        self.top_k, self.scores, self.renormalize = top_k, scores, renormalize
        self.noise_std = 1 / num_experts if noise_std is None else noise_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(num_experts, device=device) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        extra = "" if self.scores == "softmax" else f", scores={self.scores}"
        extra += ", renormalize=True" if self.renormalize else ""
        return f"{dim}, num_experts={num_experts}, top_k={self.top_k}, noise_std={self.noise_std:g}{extra}"

    def forward(self, items_ND: Tensor) -> Routing:
        dtype = torch.promote_types(items_ND.dtype, torch.float32)
        off = torch.autocast(items_ND.device.type, enabled=False) if autocast_type(items_ND) else nullcontext()
        with off:
            logits_NE = F.linear(items_ND.to(dtype), self.weight.to(dtype))
        noisy_NE = logits_NE
        if self.training and self.noise_std > 0:
            noisy_NE = logits_NE + self.noise_std * torch.randn_like(logits_NE)
        gates_NK, experts_NK = self._choose(noisy_NE)
        if self.renormalize:
            gates_NK = renormalize(gates_NK)
        return Routing(gates_NK, experts_NK, logits_NE, noisy_NE)

    def _choose(self, noisy_NE: Tensor) -> tuple[Tensor, Tensor]:
        if self.scores == "softmax" and self.bias is None:
            return top_gates(noisy_NE, self.top_k)
        scores_NE = noisy_NE.softmax(-1) if self.scores == "softmax" else noisy_NE.sigmoid()
        # without a bias by the logits, as several scores may round to the same number
        preferred_NE = noisy_NE if self.bias is None else scores_NE + self.bias.to(scores_NE.dtype)
        experts_NK = top_indices(preferred_NE.detach(), self.top_k)
        return scores_NE.gather(-1, experts_NK), experts_NK
