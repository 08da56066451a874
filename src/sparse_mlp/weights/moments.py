"""An optimiser's state of a dense model for the model with experts that began as it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from sparse_mlp.errors import UserError
from sparse_mlp.moe import MoeMlp
from sparse_mlp.moe.dense import expert_weights
from sparse_mlp.moe.telemetry import moe_layers

__all__ = ["carry_over"]

State = Mapping[str, Mapping[str, Any]]
"""Of each parameter by name: tensors of its shape (moments), and numbers (steps)."""


def carry_over(state: State, model: nn.Module, new: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The state of a dense model's optimiser for the parameters of `model`, as far as it has some.

    Each expert has the state of the MLP that it began as, moments and steps unchanged (Sparse Upcycling, Komatsuzaki
    et al. 2023, section 3, where this helps vision models); a router has none. `new`: names of
    parameters that may be of another shape, and then have none either. UserError for others, and for an optimiser whose
    state is not one value for each weight.
    """
    found = {name: dict(values) for name, values in state.items()}
    for name, layer in moe_layers(model).items():
        if layer.origin is not None and f"{name}.experts.fc1.weight" not in state:
            found |= _of_experts(state, f"{name}.", layer)
    carried = {}
    for name, parameter in model.named_parameters():
        if name not in found:
            continue
        if misfit := _misfit(found[name], parameter):
            if name in new:
                continue
            raise UserError(f"the optimiser's state of {name} does not fit: {misfit} for {tuple(parameter.shape)}")
        carried[name] = found[name]
    return carried


def _of_experts(state: State, prefix: str, layer: MoeMlp) -> dict[str, dict[str, Any]]:
    """Of a layer's parameters, from that of the MLP which had the layer's place."""
    assert layer.origin is not None
    mlp = {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
    if not mlp:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, example in next(iter(mlp.values())).items():
        if isinstance(example, Tensor) and example.ndim:
            moments = {name: values[key] for name, values in mlp.items()}
            of_layer = expert_weights(moments, layer, layer.origin.parts, divide=False)
        else:
            own = (name for name, _ in layer.named_parameters() if not name.startswith("router."))
            of_layer = {name: copy.deepcopy(example) for name in own}  # optimisers count in place
        for name, value in of_layer.items():
            found.setdefault(f"{prefix}{name}", {})[key] = value
    return found


def _misfit(values: Mapping[str, Any], parameter: Tensor) -> tuple[int, ...] | None:
    """The shape of a tensor that is neither one number nor of the parameter's shape."""
    shapes = (tuple(value.shape) for value in values.values() if isinstance(value, Tensor) and value.ndim)
    return next((shape for shape in shapes if shape != tuple(parameter.shape)), None)
