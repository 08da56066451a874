"""Importance and load losses, and how their gradient enters any training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_mlp.moe.router import Routing, softmax_over_experts


def squared_variation(totals: Tensor) -> Tensor:
    """(std / mean)^2 over experts, as variance over squared mean: the derivative of std is NaN at perfect balance.
    (..., E) -> (...)."""
    tiny = torch.finfo(totals.dtype).tiny
    return totals.var(-1, correction=0) / (totals.mean(-1).square() + tiny)


def importance(logits_NE: Tensor) -> Tensor:
    """Imp_e = sum over items of softmax(logits)_e, without noise. (N, E) -> (E,)."""
    return softmax_over_experts(logits_NE).sum(0)


def load(logits_NE: Tensor, threshold_N1: Tensor, noise_std: float) -> Tensor:
    """Load_e = sum over items of P(e stays in the item's top K if e's noise is drawn anew). (N, E) -> (E,).

    The probability is 1 - Phi((t - logits_e) / noise_std), t the item's K-th largest noisy logit: a smooth stand-in
    for the number of items an expert gets (Shazeer et al. 2017, appendix A; V-MoE, appendix A).
    """
    z_NE = (logits_NE - threshold_N1) / noise_std
    return torch.special.ndtr(z_NE.clamp(-11, 11)).sum(0)  # further out densities are subnormal, which is slow on a CPU


def expert_totals(routing: Routing, noise_std: float) -> Tensor:
    """Importance and, where there is noise (without it the load is undefined), load: (1 or 2, E), sums over items."""
    if routing.sums is not None:
        return routing.sums.totals
    totals = [importance(routing.logits_NE)]
    if noise_std > 0:
        threshold_N1 = routing.noisy_NE.gather(1, routing.experts_NK[:, -1:])
        totals.append(load(routing.logits_NE, threshold_N1, noise_std))
    return torch.stack(totals)


def balance_loss(totals: Tensor) -> Tensor:
    """L_imp / 2 + L_load / 2 from `expert_totals`, unweighted; without the load part, L_imp / 2."""
    return 0.5 * squared_variation(totals).sum()


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        (scale,) = ctx.saved_tensors
        return grad_output, scale.to(ctx.loss_dtype), None


def inject_gradient(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """`output` unchanged; backward through it also adds `scale` times the gradient of `loss`.

    So a layer brings its own loss into any training loop: nothing is collected, returned or kept on the module (a
    tensor with a graph kept there breaks deepcopy and EMA). `scale` () must follow what the loop multiplies its own
    loss by; see `set_balance_scale`.
    """
    return _InjectGradient.apply(output, loss, scale)


def set_balance_scale(model: nn.Module, scale: float) -> None:
    """Tell every MoE layer by what factor the loop multiplies its loss before `backward`.

    Call it with `loss_scale / accumulation_steps` (fp16 loss scaling, gradient accumulation); without a call the
    scale is 1. It is a buffer: changing it does not recompile a compiled model.
    """
    for module in model.modules():
        if hasattr(module, "balance_scale"):
            module.balance_scale.fill_(scale)  # type: ignore[operator]
