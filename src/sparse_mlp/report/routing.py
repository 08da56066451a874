"""Which expert each patch and each channel of an image went to. Computes arrays; `pictures.py` draws them.

B images, S patches, T routed tokens (T = S without Re-represent layers), C channels, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sparse_mlp.moe import telemetry
from sparse_mlp.moe.telemetry import RoutingRecord
from sparse_mlp.report.predictions import Floats, Ints


@dataclass(frozen=True)
class PatchRouting:
    """Channel mixing: the share of every expert in every patch, (B, S, E), each patch's shares summing to 1.

    `exact` says that the routed tokens are the patches themselves; otherwise the shares are attributions through the
    Re-represent layer (see `patch_shares`).
    """

    layer: str
    shares: Floats
    exact: bool

    @property
    def num_experts(self) -> int:
        return self.shares.shape[-1]


@dataclass(frozen=True)
class ChannelRouting:
    """Token mixing: `gates` (B, C, E) of every channel, zero for experts that did not get it, and `patterns` (E, S).

    patterns: how strong an expert's channels are at each patch, the mean over its channels and the images, relative to
    the mean over all channels (0 = alike); NaN for an expert without channels.
    """

    layer: str
    gates: Floats
    patterns: Floats

    @property
    def num_experts(self) -> int:
        return self.gates.shape[-1]

    def order(self) -> Ints:
        """Return the channels sorted by their mean favourite expert, the surest first."""
        mean = self.gates.mean(axis=0)
        return np.lexsort((-mean.max(axis=1), mean.argmax(axis=1)))

    def load(self) -> Floats:
        """Return the share (E,) of the assignments each expert got."""
        count = (self.gates > 0).sum(axis=(0, 1))
        return count / max(1, count.sum())


@dataclass(frozen=True)
class Traced:
    """What a model did with B images: `logits` (B, classes), the patch grid (h, w), and its MoE layers in order."""

    logits: Floats
    grid: tuple[int, int] | None = None
    patches: list[PatchRouting] = field(default_factory=list)
    channels: list[ChannelRouting] = field(default_factory=list)


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> Traced:
    """Run the model on images (B, C, H, W) in evaluation mode and read its routing.

    MoE layers that are not the `mlp_tokens` or `mlp_channels` of a block, and models without a `patch_grid`, have
    nothing to be drawn on an image and are left out.
    """
    inputs: dict[str, Tensor] = {}
    layers = telemetry.moe_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    try:
        with telemetry.record(model) as records:
            logits = _evaluate(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    found = Traced(_numpy(logits), getattr(model, "patch_grid", None))
    if found.grid is None:
        return found
    for name, layer in layers.items():
        block, _, kind = name.rpartition(".")
        weight = _mixing_weight(model.get_submodule(block))
        if records[name] and kind == "mlp_channels":
            gates = dense_gates(records[name][-1], _num_experts(layer))
            if (gates.shape[1] if weight is None else weight.shape[1]) == found.grid[0] * found.grid[1]:
                found.patches.append(PatchRouting(name, patch_shares(gates, weight), weight is None))
        elif records[name] and kind == "mlp_tokens":
            gates = dense_gates(records[name][-1], _num_experts(layer))
            found.channels.append(ChannelRouting(name, gates, channel_patterns(gates, _numpy(inputs[name]), weight)))
    return found


@dataclass(frozen=True)
class MeasuredLoad:
    """Routing of one layer in evaluation: `load` (E,) is each expert's share of the choices before drops."""

    load: Floats
    dropped: float


@torch.no_grad()
def measure_load(model: nn.Module, images: Tensor, batch_size: int = 64) -> dict[str, MeasuredLoad]:
    """Run the model on images (B, C, H, W) in evaluation mode; returns the load of each MoE layer that ran, by name."""
    layers = telemetry.moe_layers(model)
    counts = {name: torch.zeros(_num_experts(layer), dtype=torch.float64) for name, layer in layers.items()}
    dropped = dict.fromkeys(layers, 0)
    for part in images.split(batch_size) if layers else []:
        with telemetry.record(model) as records:
            _evaluate(model, part)
        for name, entries in records.items():
            for entry in entries:
                counts[name] += torch.bincount(entry.experts.flatten().cpu(), minlength=len(counts[name]))
                dropped[name] += int((~entry.kept).sum())
    return {
        name: MeasuredLoad(_numpy(chosen / chosen.sum()), dropped[name] / float(chosen.sum()))
        for name, chosen in counts.items()
        if chosen.sum() > 0
    }


def _evaluate(model: nn.Module, images: Tensor) -> Tensor:
    """Return the model's output in evaluation mode; every module is in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters(), None)
    try:
        return model.eval()(images.to(parameter.device) if parameter is not None else images)
    finally:
        for module, training in modes:
            module.training = training


def _num_experts(layer: nn.Module) -> int:
    return int(layer.num_experts)  # type: ignore[arg-type]


def dense_gates(record: RoutingRecord, num_experts: int) -> Floats:
    """Return the gates (..., E) of a record (..., K), zero where an item was not sent or was dropped."""
    gates = (record.gates * record.kept).float()
    dense = gates.new_zeros(*gates.shape[:-1], num_experts).scatter_add_(-1, record.experts, gates)
    return _numpy(dense)


def patch_shares(gates: Floats, weight: Floats | None) -> Floats:
    """Return the share (B, S, E) of each expert in each patch, from the tokens' gates (B, T, E).

    share(s, e) = sum over tokens t of gate(t, e) |weight(t, s)|, normalised over e: a token counts for a patch as much
    as the Re-represent layer's `weight` (T, S) takes from it. None means that the tokens are the patches.
    """
    mixed = gates if weight is None else np.einsum("bte,ts->bse", gates, np.abs(weight))
    total = mixed.sum(axis=-1, keepdims=True)
    return np.divide(mixed, total, out=np.full_like(mixed, 1 / gates.shape[-1]), where=total > 0)


def dominant_expert(routing: PatchRouting) -> tuple[Ints, Floats]:
    """Return for every patch the expert to colour it by and how strongly it stands out, both (B, S).

    Exact routing: the expert with the largest share, and the share. Otherwise the expert whose share lies furthest
    above its mean over the image's patches, and by how much.
    """
    excess = routing.shares if routing.exact else routing.shares - routing.shares.mean(axis=1, keepdims=True)
    return excess.argmax(axis=-1), excess.max(axis=-1)


def channel_patterns(gates: Floats, inputs: Floats, weight: Floats | None) -> Floats:
    """Return how strong each expert's channels are at each patch, (E, S), relative to all channels.

    gates (B, C, E) and the layer's inputs (B, C, T); `weight` (T, S) spreads a token's strength over the patches it was
    mixed from, None means that tokens are patches.
    """
    strength = np.abs(inputs)
    if weight is not None:
        strength = strength @ (np.abs(weight) / np.abs(weight).sum(axis=0))
    sent = gates > 0
    count = sent.sum(axis=(0, 1))
    total = np.einsum("bce,bcs->es", sent.astype(np.float64), strength)
    each = np.divide(total, count[:, None], out=np.full_like(total, np.nan), where=count[:, None] > 0)
    # An expert whose channels are stronger everywhere has no pattern: only the shape over the patches counts.
    shape = each / each.mean(axis=1, keepdims=True)
    overall = strength.mean(axis=(0, 1))
    return shape / (overall / overall.mean()) - 1


def _mixing_weight(block: nn.Module) -> Floats | None:
    """Return the (T, S) weight by which the block's Re-represent layer makes tokens from patches, if it has one."""
    layer = getattr(block, "rerepresent_in", None)
    return None if layer is None else _numpy(layer.token_proj.weight)


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().double().cpu().numpy()
