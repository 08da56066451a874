"""Experts in any timm model: the MLPs of chosen blocks become `MoeMlp`s that begin as these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.models._blocks import Blocks, choose_mlps, replace_modules
from sparse_mlp.moe import MoeMlp
from sparse_mlp.weights import starts

__all__ = ["INITS", "ROUTERS", "sparsify"]

INITS: dict[str, tuple[Callable[..., None], float | None]] = {
    "copy": (lambda *_: None, None),
    "noise": (starts.add_noise, 0.01),
    "drop": (starts.redraw_neurons, 0.5),
    "sample": (starts.sample_neurons, 0.5),
    "random": (starts.draw_anew, None),
}
"""Starts of the experts by name, each with its default strength."""

ROUTERS = ("random", "centroids")


def sparsify(
    model: nn.Module,
    blocks: Blocks = "last-2",
    num_experts: int = 8,
    top_k: int = 1,
    *,
    init: str = "copy",
    strength: float | None = None,
    router: str = "random",
    images: Tensor | None = None,
    renormalize: bool = True,
    **arguments: Any,
) -> nn.Module:
    """Turn the MLPs of some blocks of a timm model into mixtures of experts, in place; returns the model.

        model = timm.create_model("vit_base_patch16_224", pretrained=True)
        sparse_mlp.sparsify(model, blocks="last-2", num_experts=8, top_k=2)

    Each expert begins as the MLP (Sparse Upcycling, Komatsuzaki et al. 2023), so that with `renormalize` and without a
    capacity the model's answers stay what they were. Weights are to be loaded before; later ones of a dense model do
    not fit. State that an optimiser has of the MLPs is carried over by `moments.carry_over`.

    Args:
        blocks: a number for the last ones, indices, "last-2", "every-2", or names; see `models._blocks.choose_mlps`.
        num_experts, top_k, renormalize, arguments: of each `MoeMlp`.
        init: what the experts begin as.
            "copy": the MLP.
            "noise": copies with noise, `strength` (0.01) times the standard deviation of each weight.
            "drop": a share `strength` (0.5) of each expert's hidden neurons drawn anew (Drop-Upcycling).
            "sample": a share `strength` (0.5) of the hidden neurons, drawn for each expert, by their mean activation
                on `images` if there are some (MoE Jetpack's importance sampling), else with equal probability.
            "random": weights as of a new layer.
        router: "random", or "centroids" of the MLP's inputs on `images` (cluster-aware upcycling).
        images: (B, C, H, W), prepared as for the model.

    Raises UserError, one line and before anything is changed, for a model without MLPs, blocks that are not there, an
    MLP that experts cannot stand for or that has experts already, or numbers out of range.
    """
    start, default = _start(init, strength, router, images)
    layers: dict[int, MoeMlp] = {}
    swaps: dict[str, nn.Module] = {}
    body = model.model if isinstance(model, FeatureGetterNet) else model  # timm's features_only
    try:
        mlps = choose_mlps(body, blocks)
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, mlp in mlps.items():
        if isinstance(mlp, MoeMlp):
            raise UserError(f"{name} has {mlp.num_experts} experts already")
        if id(mlp) not in layers:  # one module may stand in several places
            try:
                layers[id(mlp)] = MoeMlp.from_mlp(mlp, num_experts, top_k, renormalize=renormalize, **arguments)
            except ValueError as error:
                raise UserError(f"{name} cannot have experts: {error}") from None
        swaps[name] = layers[id(mlp)]
    seen = starts.watch(body, mlps, images) if images is not None else {}
    with torch.no_grad():
        for mlp in {id(mlp): mlp for mlp in mlps.values()}.values():
            layer, inputs = layers[id(mlp)], seen.get(id(mlp))
            start(layer, default if strength is None else strength, inputs)
            if router == "centroids":
                assert inputs is not None
                layer.router.weight.copy_(starts.centroids(inputs.items, num_experts))
    replace_modules(body, swaps)
    return model


def _start(
    init: str, strength: float | None, router: str, images: Tensor | None
) -> tuple[Callable[..., None], float | None]:
    if init not in INITS:
        raise UserError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if router not in ROUTERS:
        raise UserError(f"router must be one of {', '.join(ROUTERS)}; got {router!r}")
    if router == "centroids" and images is None:
        raise UserError('router="centroids" needs images')
    if images is not None and router != "centroids" and init != "sample":
        raise UserError(f'images would be ignored: neither init={init!r} nor router="random" looks at them')
    start, default = INITS[init]
    if strength is not None and (default is None or not 0 < strength <= 1):
        raise UserError(f"strength {strength:g} " + ("is not in (0, 1]" if default else f"has no effect on {init!r}"))
    return start, default
