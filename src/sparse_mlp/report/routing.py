"""Which expert each patch and each channel of an image went to. Computes arrays; `pictures.py` draws them.

B images, S patches, T routed tokens (T = S without Re-represent layers), C channels, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_mlp.moe import MoeMlp, telemetry
from sparse_mlp.moe.telemetry import RoutingRecord
from sparse_mlp.report.predictions import Floats, Ints
from sparse_mlp.report.watch import TOKEN_MIXING, Placement, Watched, grid_of, place, watch

MAX_FILTERS = 24  # hidden units of an expert that are drawn


@dataclass(frozen=True)
class PatchRouting:
    """Channel mixing: the share of every expert in every patch, (B, S, E), each patch's shares summing to 1.

    `exact` says that the routed tokens are the patches themselves; otherwise the shares are attributions through the
    Re-represent layer (see `patch_shares`). `grid` (h, w) is where the S patches lie, row by row. Where the routing is
    exact, `scores` (B, S, E) are the router's and `chosen` (B, S, K) the experts of each patch, -1 for a dropped one.
    """

    layer: str
    shares: Floats
    exact: bool
    grid: tuple[int, int]
    scores: Floats | None = None
    chosen: Ints | None = None

    @property
    def num_experts(self) -> int:
        return self.shares.shape[-1]


@dataclass(frozen=True)
class ChannelRouting:
    """Token mixing: `gates` (B, C, E) of every channel, zero for experts that did not get it, and `patterns` (E, S).

    patterns: how strong an expert's channels are at each patch of the `grid` (h, w), the mean over its channels and the
    images, relative to the mean over all channels (0 = alike); NaN for an expert without channels.
    filters: (E, F, S) the first-layer weights of an expert's hidden units over the patches, the strongest units first.
    """

    layer: str
    gates: Floats
    patterns: Floats
    grid: tuple[int, int]
    filters: Floats | None = None

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
    """What a model did with B images: its output, (B, classes) for a classifier, and its MoE layers in order.

    `unplaced`: why the items of a layer cannot be drawn on an image, by the layer's name.
    """

    logits: Floats
    patches: list[PatchRouting] = field(default_factory=list)
    channels: list[ChannelRouting] = field(default_factory=list)
    unplaced: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, images: Tensor) -> Traced:
    """Run the model on images (B, C, H, W) in evaluation mode and read the routing of every MoE layer."""
    output, seen = watch(model, images)
    found = Traced(_numpy(output))
    for name, one in seen.items():
        weight = mixing_weight(model, name)
        if name.rpartition(".")[2] == TOKEN_MIXING:
            routing: ChannelRouting | PatchRouting | str = _channel_routing(name, one, images, weight)
        else:
            routing = patch_routing(model, name, one, images, weight)
        if isinstance(routing, str):
            found.unplaced[name] = routing
        elif isinstance(routing, PatchRouting):
            found.patches.append(routing)
        else:
            found.channels.append(routing)
    return found


def patch_routing(
    model: nn.Module, name: str, one: Watched, images: Tensor, weight: Floats | None
) -> PatchRouting | str:
    """Where the patches of the images went in a layer; or, in words, why its items are no patches."""
    gates = dense_gates(one.record, one.num_experts)
    if weight is not None:
        grid = grid_of(weight.shape[1], images)
        if grid is None or gates.shape[1] != len(weight):
            return f"its {gates.shape[1]} items are mixed of patches that are no grid of the image's shape"
        return PatchRouting(name, patch_shares(gates, weight), False, grid)
    placed = place(one.record.experts.shape[:-1], images, int(getattr(model, "num_prefix_tokens", 0)))
    if isinstance(placed, str):
        return placed
    chosen = one.record.experts.where(one.record.kept, -1)
    parts = (_numpy(one.scores()), chosen.cpu().numpy())
    gates, scores, chosen = (_patches(part, placed) for part in (gates, *parts))
    return PatchRouting(name, patch_shares(gates, None), True, placed.grid, scores, chosen)


def _patches(items: Any, placed: Placement) -> Any:
    """(B, h, w, X) or (B, N, X) -> (B, S, X) without the items that are no patches."""
    return items.reshape(len(items), -1, items.shape[-1])[:, placed.skipped :]


def _channel_routing(name: str, one: Watched, images: Tensor, weight: Floats | None) -> ChannelRouting | str:
    tokens = one.layer.dim
    grid = grid_of(tokens if weight is None else weight.shape[1], images)
    if grid is None or one.record.experts.ndim != 3 or (weight is not None and len(weight) != tokens):
        return f"it mixes {tokens} positions that are no grid of the image's shape"
    assert one.inputs is not None
    gates = dense_gates(one.record, one.num_experts)
    patterns = channel_patterns(gates, _numpy(one.inputs), weight)
    return ChannelRouting(name, gates, patterns, grid, spatial_filters(one.layer, weight))


def spatial_filters(layer: MoeMlp, weight: Floats | None, most: int = MAX_FILTERS) -> Floats:
    """Return the first-layer weights (E, F, S) of the F hidden units with the largest weights, the largest first.

    `weight` (T, S) takes them from the tokens to the patches that these are mixed from: what the unit would weigh if
    the layer in between were linear.
    """
    filters = _numpy(layer.experts.fc1.weight).transpose(0, 2, 1)
    if weight is not None:
        filters = filters @ weight
    order = np.argsort(-np.linalg.norm(filters, axis=-1), axis=1, kind="stable")[:, :most]
    return np.take_along_axis(filters, order[..., None], axis=1)


@dataclass(frozen=True)
class MeasuredLoad:
    """Routing of one layer in evaluation: `load` (E,) is each expert's share of the choices before drops."""

    load: Floats
    dropped: float


def measure_load(model: nn.Module, images: Tensor, batch_size: int = 64) -> dict[str, MeasuredLoad]:
    """Run the model on images (B, C, H, W) in evaluation mode; returns the load of each MoE layer that ran, by name."""
    counts: dict[str, Tensor] = {}
    dropped: dict[str, int] = {}
    for part in images.split(batch_size) if telemetry.moe_layers(model) else []:
        for name, one in watch(model, part)[1].items():
            for entry in one.records:
                chosen = torch.bincount(entry.experts.flatten().cpu(), minlength=one.num_experts)
                counts[name] = counts.get(name, 0) + chosen
                dropped[name] = dropped.get(name, 0) + int((~entry.kept).sum())
    return {
        name: MeasuredLoad(_numpy(chosen / chosen.sum()), dropped[name] / float(chosen.sum()))
        for name, chosen in counts.items()
        if chosen.sum() > 0
    }


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


def mixing_weight(model: nn.Module, name: str) -> Floats | None:
    """Return the (T, S) weight by which the Re-represent layer before a layer makes tokens from patches, if any."""
    layer = getattr(model.get_submodule(name.rpartition(".")[0]), "rerepresent_in", None)
    return None if layer is None else _numpy(layer.token_proj.weight)


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().double().cpu().numpy()
