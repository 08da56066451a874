"""Which experts an item goes to, and with which weight."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_mlp.moe import compiled


class Sums(NamedTuple):
    """Over items, made while routing: `totals` (1 or 2, E) as `balance.expert_totals`, with its gradient; how often
    each expert was chosen, (E,); and the mean entropy () of the softmax without noise."""

    totals: Tensor
    chosen_E: Tensor
    entropy: Tensor


class Routing(NamedTuple):
    """What the router decided for N items.

    `items_ND` are those it was given, for the experts to take. `gates_NK` are the K largest entries of
    softmax(logits + noise), in falling order, not renormalised; `experts_NK` are their experts. `logits_NE` carry no
    noise, `noisy_NE` do (the same tensor where there is none). Where the router is compiled, both are constants, and in
    training `sums` is there; elsewhere whoever needs a sum makes it, from the logits.
    """

    items_ND: Tensor
    gates_NK: Tensor
    experts_NK: Tensor
    logits_NE: Tensor
    noisy_NE: Tensor
    sums: Sums | None = None


class _Route(torch.autograd.Function):
    """The router compiled: one pass over items where autograd makes twenty, and one back.

    Returns the items too: the experts must take these, so that what they send back comes here and the router adds its
    part in place. Nobody else may hold that gradient.
    """

    @staticmethod
    def forward(ctx, items_ND, weight, noise_NE, noise_std, top_k, sums):  # type: ignore[no-untyped-def]
        routed = compiled.route(items_ND, weight, noise_NE, noise_std, top_k, sums)
        gates_NK, experts_NK, logits_NE, noisy_NE, over_items = routed
        ctx.save_for_backward(items_ND, weight, logits_NE, None if noise_NE is None else noisy_NE, experts_NK)
        ctx.noise_std = noise_std
        ctx.set_materialize_grads(False)
        totals, chosen_E, entropy = (logits_NE.new_empty(0) for _ in range(3))
        if over_items is not None:
            kinds = 1 if noise_NE is None else 2  # without noise the load is undefined
            num_experts = len(weight)
            totals = over_items[: kinds * num_experts].view(kinds, -1).clone()
            chosen_E = over_items[2 * num_experts : -1].clone()
            entropy = over_items[-1] / max(len(items_ND), 1)
        constant = experts_NK, logits_NE.detach(), noisy_NE.detach(), chosen_E, entropy
        ctx.mark_non_differentiable(*constant)
        return items_ND.view_as(items_ND), gates_NK, totals, *constant

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND, grad_gates_NK, grad_totals, *_):  # type: ignore[no-untyped-def]
        items_ND, weight, *routed, experts_NK = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            grad_ND = (torch.zeros_like(items_ND) if grad_ND is None else grad_ND).contiguous()
        grads = grad_gates_NK, grad_totals, grad_ND
        grad_weight = compiled.route_backward(items_ND, weight, *routed, ctx.noise_std, experts_NK, *grads)
        return grad_ND, grad_weight, None, None, None, None


def softmax_over_experts(logits_NE: Tensor) -> Tensor:
    """softmax(logits) of each item. Over a few numbers in a row torch's softmax on a CPU takes twenty times as long as
    over as many in a column, so the experts are put there; the same for the backward."""
    return logits_NE.t().softmax(0).t()


def largest(values_NE: Tensor, k: int) -> Tensor:
    """The experts of each item's k largest values, in falling order of these, the first of equal ones first: (N, k).

    By k maxima, which are faster than topk on a CPU and, unlike it, leave nothing open.
    """
    experts = []
    for _ in range(k):
        experts.append(values_NE.max(-1, keepdim=True)[1])
        values_NE = values_NE.scatter(-1, experts[-1], -math.inf)
    return torch.cat(experts, -1)


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
        if len(self.weight) <= compiled.MOST_EXPERTS and compiled.serves(items_ND, self.weight):
            return self._compiled(items_ND)
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
        gates_NK = softmax_over_experts(noisy_NE).gather(1, experts_NK)
        return Routing(items_ND, gates_NK, experts_NK, logits_NE, noisy_NE)

    def _compiled(self, items_ND: Tensor) -> Routing:
        noise_NE = None
        if self.training and self.noise_std > 0:
            noise_NE = items_ND.new_empty(len(items_ND), len(self.weight)).normal_()
        routed = _Route.apply(items_ND, self.weight, noise_NE, self.noise_std, self.top_k, self.training)
        passed_ND, gates_NK, totals, experts_NK, logits_NE, noisy_NE, *others = routed
        return Routing(
            passed_ND if items_ND.requires_grad else items_ND,
            gates_NK,
            experts_NK,
            logits_NE,
            logits_NE if noise_NE is None else noisy_NE,
            Sums(totals, *others) if self.training else None,
        )
