"""What a MoE layer does in training besides: the gradient of its balance loss, the move of its router's bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_mlp.moe import balance, router_bias
from sparse_mlp.moe.dispatch import Plan
from sparse_mlp.moe.kernels import in_transform
from sparse_mlp.moe.router import Routing

if TYPE_CHECKING:
    from sparse_mlp.moe.layer import MoeMlp


def inject_balance(layer: MoeMlp, y_ND: Tensor, routing: Routing, plan: Plan) -> Tensor:
    """The layer's output, whose backward adds the gradient of the balance loss and of the z-loss to the router's.

    Keeps the layer's statistics. With `balance.collect_balance_loss` the loss is handed over instead.
    """
    # The load's estimate takes the K-th largest logit for the threshold, which it is not where a bias chooses.
    noise_std = layer.router.noise_std if layer.router.bias is None else 0.0
    logits = routing.logits_NE, routing.noisy_NE
    totals, entropies = balance.expert_totals(*logits, routing.experts_NK, noise_std)
    importance_E = totals[0]
    if layer.balance_reduce is not None:  # by ranks without an item too, for the others wait for them
        totals = layer.balance_reduce(totals)
    loss = balance.balance_loss(totals)
    if not in_transform(loss):
        layer.meter.update(plan, importance_E, entropies, loss)
        y_ND = _move_bias(layer, y_ND, plan)
    weighted = layer.balance_weight * loss
    if layer.z_loss_weight > 0:
        weighted = weighted + layer.z_loss_weight * balance.z_loss(routing.logits_NE)
    if layer.on_balance_loss is not None:
        layer.on_balance_loss(weighted)
        return y_ND
    return balance.inject_gradient(y_ND, weighted, layer.balance_scale)


def _move_bias(layer: MoeMlp, y_ND: Tensor, plan: Plan) -> Tensor:
    if layer.router.bias is None:
        return y_ND
    chosen_E = plan.chosen_E.to(torch.float32)
    if layer.balance_reduce is not None:
        chosen_E = layer.balance_reduce(chosen_E)
    return router_bias.move_in_backward(y_ND, layer.router.bias, router_bias.bias_step(chosen_E, layer.bias_rate))
