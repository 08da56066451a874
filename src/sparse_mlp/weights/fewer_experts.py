"""Fewer experts for a trained model: the ones that its images use most, or similar ones merged; one is a dense MLP."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.models._blocks import replace_modules
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.dense import to_mlp
from sparse_mlp.moe.router import Routing
from sparse_mlp.moe.telemetry import RoutingMeter, moe_layers

__all__ = ["merge_experts", "prune_experts"]

Images = Tensor | Iterable[Tensor]


def prune_experts(model: nn.Module, images: Images, keep: int) -> nn.Module:
    """Keep the `keep` experts of each layer that get the largest share of the gates on `images`; returns the model.

    In place. K becomes at most `keep`. With `keep=1` a layer becomes the dense MLP that its experts began as, or timm's
    one, so that a model that `sparsify` made has timm's own names of weights again.

    Args:
        images: (B, C, H, W), or batches of them, prepared as for the model.

    Raises UserError for a model without experts, fewer experts than `keep`, or a layer that cannot be one MLP.
    """
    layers = _layers(model, keep)
    for name, (gates_E, _) in _watch(model, layers, images).items():
        chosen = gates_E.argsort(descending=True, stable=True)[:keep].sort().values
        _keep(model, name, layers[name], chosen)
    return model


def merge_experts(model: nn.Module, images: Images, keep: int) -> nn.Module:
    """Merge the experts of each layer into `keep`; returns the model. As `prune_experts`, of which see the arguments.

    The experts with the largest share of the gates on `images` stay; each other one joins the one whose router logits
    are most alike, and a group's weights are averaged by these shares (MC-SMoE, Li et al. 2024, section 3.2; without
    its alignment of neurons, which experts that began as one MLP do not need). The router keeps the rows of those that
    stay.
    """
    layers = _layers(model, keep)
    for name, (gates_E, likeness_EE) in _watch(model, layers, images).items():
        layer = layers[name]
        chosen = gates_E.argsort(descending=True, stable=True)[:keep].sort().values
        group_E = likeness_EE[:, chosen].argmax(1)
        group_E[chosen] = torch.arange(keep, device=group_E.device)
        share_E = gates_E + 1e-12 * gates_E.sum().clamp_min(1.0)  # of a group that no item went to, the mean
        with torch.no_grad():
            for linear in (layer.experts.fc1, layer.experts.fc2):
                for parameter in linear.parameters():
                    for group, expert in enumerate(chosen.tolist()):
                        members = (group_E == group).nonzero()[:, 0]
                        weights = (share_E[members] / share_E[members].sum()).to(parameter.dtype)
                        parameter[expert] = torch.tensordot(weights, parameter[members], 1)
        _keep(model, name, layer, chosen)
    return model


def _layers(model: nn.Module, keep: int) -> dict[str, MoeMlp]:
    layers = moe_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no experts")
    for name, layer in layers.items():
        if not 1 <= keep <= layer.num_experts:
            raise UserError(f"keep {keep} must be between 1 and the {layer.num_experts} experts of {name}")
        if keep == 1 and (
            layer.shared is not None or (layer.router.scores != "softmax" and not layer.router.renormalize)
        ):
            why = "it has shared experts" if layer.shared is not None else "the gate of one expert is not 1"
            raise UserError(f"{name} cannot become one MLP: {why}")
    return layers


@torch.no_grad()
def _watch(model: nn.Module, layers: dict[str, MoeMlp], images: Images) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer: the sum of each expert's gates, (E,), and the cosines of the experts' logits, (E, E)."""
    sums = {
        name: (torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64))
        for name, n in ((name, layer.num_experts) for name, layer in layers.items())
    }

    def note(name: str, routing: Routing) -> None:
        gates_E, products_EE = sums[name]
        logits_NE = routing.logits_NE.double().cpu()
        gates_E.index_add_(0, routing.experts_NK.flatten().cpu(), routing.gates_NK.flatten().double().cpu())
        products_EE += logits_NE.t() @ logits_NE

    hooks = [
        layer.router.register_forward_hook(lambda _, args, routing, name=name: note(name, routing))
        for name, layer in layers.items()
    ]
    training = model.training
    try:
        for batch in [images] if isinstance(images, Tensor) else images:
            model.eval()(batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not any(gates_E.any() for gates_E, _ in sums.values()):
        raise UserError("there are no images to see which experts are used")
    found = {}
    for name, (gates_E, products_EE) in sums.items():
        size_E = products_EE.diagonal().sqrt().clamp_min(1e-12)
        found[name] = (gates_E, products_EE / size_E.outer(size_E))
    return found


def _keep(model: nn.Module, name: str, layer: MoeMlp, chosen: Tensor) -> None:
    """Leave a layer these experts; or, if it is one, put its MLP in the layer's place."""
    if len(chosen) == 1:
        replace_modules(model, {name: to_mlp(layer, int(chosen))})
        return
    device = layer.router.weight.device
    chosen = chosen.to(device)
    for module in (layer.router, layer.experts.fc1, layer.experts.fc2):
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(parameter.detach()[chosen].clone(), parameter.requires_grad))
    if layer.router.bias is not None:
        layer.router.bias = layer.router.bias[chosen].clone()
    layer.num_experts, layer.meter = len(chosen), RoutingMeter(len(chosen), device)
    layer.top_k = layer.router.top_k = min(layer.top_k, len(chosen))
