"""Importance and load losses, and how their gradient enters a training loop: by itself, or collected and added.

By itself each MoE layer injects the gradient of its balance loss where its output's gradient arrives, as if the loss
had been added to the loop's own. That needs no plumbing, but the layer cannot see by what a loop multiplies its loss: a
loop that divides it by n accumulation steps, or scales it for fp16, has to name this factor too:

    set_balance_scale(model, 1 / n)               # gradient accumulation: once, before the first forward
    set_balance_scale(model, scaler.get_scale())  # fp16: before each forward; both: the product of the two

Or the loop adds the loss itself, and nothing is injected:

    with collect_balance_loss(model) as balance_losses:
        output = model(x)
    loss = criterion(output, target) + sum(balance_losses)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_mlp.moe.kernels import accelerated


def squared_variation(totals: Tensor) -> Tensor:
    """(std / mean)^2 over experts, as variance over squared mean: the derivative of std is NaN at perfect balance.
    (..., E) -> (...)."""
    tiny = torch.finfo(totals.dtype).tiny
    return totals.var(-1, correction=0) / (totals.mean(-1).square() + tiny)


def importance(logits_NE: Tensor) -> Tensor:
    """Imp_e = sum over items of softmax(logits)_e, without noise. (N, E) -> (E,)."""
    return logits_NE.softmax(-1).sum(0)


def load(logits_NE: Tensor, threshold_N1: Tensor, noise_std: float) -> Tensor:
    """Load_e = sum over items of P(e stays in the item's top K if e's noise is drawn anew). (N, E) -> (E,).

    The probability is 1 - Phi((t - logits_e) / noise_std), t the item's K-th largest noisy logit: a smooth stand-in
    for the number of items an expert gets (Shazeer et al. 2017, appendix A; V-MoE, appendix A).
    """
    z_NE = (logits_NE - threshold_N1) / noise_std
    return torch.special.ndtr(z_NE.clamp(-11, 11)).sum(0)  # further out densities are subnormal, which is slow on a CPU


@accelerated
def expert_totals(logits_NE: Tensor, noisy_NE: Tensor, experts_NK: Tensor, noise_std: float) -> tuple[Tensor, Tensor]:
    """Importance and, where there is noise (without it the load is undefined), load: (1 or 2, E), sums over items.
    And the sum of the entropies of softmax(logits), (), which has no gradient."""
    totals = [importance(logits_NE)]
    if noise_std > 0:
        totals.append(load(logits_NE, noisy_NE.gather(1, experts_NK[:, -1:]), noise_std))
    logp_NE = logits_NE.detach().log_softmax(-1)
    return torch.stack(totals), -(logp_NE.exp() * logp_NE).sum()


def balance_loss(totals: Tensor) -> Tensor:
    """L_imp / 2 + L_load / 2 from `expert_totals`, unweighted; without the load part, L_imp / 2."""
    return 0.5 * squared_variation(totals).sum()


def z_loss(logits_NE: Tensor) -> Tensor:
    """The mean over items of (log sum_e exp(logits_e))^2: it keeps logits small (ST-MoE, equation 5). (N, E) -> ()."""
    return logits_NE.logsumexp(-1).square().sum() / max(logits_NE.shape[0], 1)


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, loss, scale = inputs
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        (scale,) = ctx.saved_tensors
        return grad_output, scale.to(ctx.loss_dtype), None


class _InjectInTransforms(_InjectGradient):
    """With the rules for forward-mode AD and vmap, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info, in_dims, output, loss, scale):  # type: ignore[no-untyped-def]
        output_dim, *dims = in_dims
        output = output.expand(info.batch_size, *output.shape) if output_dim is None else output.movedim(output_dim, 0)
        if any(dim is not None for dim in dims):  # each loss has its scale as gradient, and so it has in their sum
            loss, scale = (loss * scale).sum(), torch.ones_like(scale.sum())
        return _InjectInTransforms.apply(output, loss, scale), 0


def inject_gradient(output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """`output` unchanged; backward through it also adds `scale` times the gradient of `loss`.

    So a layer brings its own loss into any training loop: nothing is collected, returned or kept on the module (a
    tensor with a graph kept there breaks deepcopy and EMA). `scale` () must follow what the loop multiplies its own
    loss by; see `set_balance_scale`.
    """
    function = _InjectGradient if torch.compiler.is_compiling() else _InjectInTransforms
    return function.apply(output, loss, scale)


def set_balance_scale(model: nn.Module, scale: float) -> None:
    """Tell every MoE layer by what factor the loop multiplies its loss before `backward`.

    Call it with `loss_scale / accumulation_steps` (fp16 loss scaling, gradient accumulation) before the forward;
    without a call the scale is 1. It is a buffer: changing it does not recompile a compiled model.
    """
    from sparse_mlp.moe.telemetry import moe_layers

    for layer in moe_layers(model).values():
        layer.balance_scale.fill_(scale)


@contextmanager
def collect_balance_loss(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, in training, every forward of an MoE layer of `model` appends its weighted balance loss, (), to
    the list, for the loop to add to its own, and injects nothing."""
    from sparse_mlp.moe.telemetry import moe_layers

    layers, losses = moe_layers(model).values(), list[Tensor]()
    before = [layer.on_balance_loss for layer in layers]
    try:
        for layer in layers:
            layer.on_balance_loss = losses.append
        yield losses
    finally:
        for layer, callback in zip(layers, before, strict=True):
            layer.on_balance_loss = callback
