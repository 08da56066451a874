"""Which experts an item goes to, and with which weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What the router decided for N items.

    `gates_NK` are the K largest entries of softmax(logits + noise), in falling order, not renormalised; `experts_NK`
    are their experts. `logits_NE` carry no noise, `noisy_NE` do (the same tensor where there is none).
    """

    gates_NK: Tensor
    experts_NK: Tensor
    logits_NE: Tensor
    noisy_NE: Tensor


def softmax_over_experts(logits_NE: Tensor) -> Tensor:
    """softmax(logits) of each item. Over a few numbers in a row torch's softmax on a CPU takes twenty times as long as
    over as many in a column, so the experts are put there; the same for the backward."""
    return logits_NE.t().softmax(0).t()


def largest(values_NE: Tensor, k: int) -> Tensor:
    """The experts of each item's k largest values, in falling order of these: (N, k)."""
    if k == 1:  # several times faster than topk
        return values_NE.max(-1, keepdim=True)[1]
    return values_NE.topk(k, dim=-1)[1]


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
        if torch.is_autocast_enabled(items_ND.device.type):
            with torch.autocast(items_ND.device.type, enabled=False):
                logits_NE = F.linear(items_ND.to(dtype), self.weight.to(dtype))
        else:
            logits_NE = F.linear(items_ND.to(dtype), self.weight.to(dtype))
        noisy_NE = logits_NE
        if self.training and self.noise_std > 0:
            noisy_NE = logits_NE + self.noise_std * torch.randn_like(logits_NE)
        # chosen by the logits: a softmax may round two of them to the same gate, or to zero
        experts_NK = largest(noisy_NE.detach(), self.top_k)
        return Routing(softmax_over_experts(noisy_NE).gather(1, experts_NK), experts_NK, logits_NE, noisy_NE)
