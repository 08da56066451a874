"""What the MoE layers of a model do with a batch of images, and where on the image their items lie."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_mlp.moe import MoeMlp, telemetry
from sparse_mlp.moe.telemetry import RoutingRecord

TOKEN_MIXING = "mlp_tokens"
"""Name, in Mixers, of the layer whose items are channels."""


@dataclass
class Watched:
    """One layer in a forward: its input, (B, ..., D), what it recorded, and the router's logits (N, E)."""

    layer: MoeMlp
    records: list[RoutingRecord] = field(default_factory=list)
    inputs: Tensor | None = None
    logits: Tensor | None = None

    @property
    def record(self) -> RoutingRecord:
        """Of the last forward."""
        return self.records[-1]

    @property
    def num_experts(self) -> int:
        return self.layer.num_experts

    def scores(self) -> Tensor:
        """The router's score of every expert, (..., E): the gates that the experts would have if all were chosen."""
        assert self.logits is not None
        sigmoid = getattr(self.layer.router, "scores", "softmax") == "sigmoid"
        scores = self.logits.sigmoid() if sigmoid else self.logits.softmax(-1)
        return scores.view(*self.record.experts.shape[:-1], -1)


@torch.no_grad()
def watch(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Watched]]:
    """The output for images (B, C, H, W) in evaluation mode, and the MoE layers that ran, by name."""
    layers = telemetry.moe_layers(model)
    seen = {name: Watched(layer) for name, layer in layers.items()}
    handles = []
    for one in seen.values():
        handles.append(one.layer.register_forward_pre_hook(lambda _, args, one=one: setattr(one, "inputs", args[0])))
        handles.append(one.layer.router.register_forward_hook(lambda *args, one=one: _keep_logits(one, args[2])))
    try:
        with telemetry.record(model) as records, evaluating(model):
            parameter = next(model.parameters(), None)
            output = model(images.to(parameter.device) if parameter is not None else images)
    finally:
        for handle in handles:
            handle.remove()
    for name, entries in records.items():
        seen[name].records.extend(entries)
    return output, {name: one for name, one in seen.items() if one.records}


def _keep_logits(one: Watched, routing: Any) -> None:
    one.logits = routing.logits_NE


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module is in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Placement:
    """Items as patches: the grid (h, w) over the image, and how many items before it are none, as a class token."""

    grid: tuple[int, int]
    skipped: int = 0


def place(items: torch.Size, images: Tensor, prefix_tokens: int) -> Placement | str:
    """Where the items of a layer, (B, h, w) or (B, N), lie on images (B, C, H, W); or, in words, why nowhere."""
    if items[0] != len(images):
        return f"its {math.prod(items)} items are not sorted by image"
    if len(items) == 3:
        return Placement((items[1], items[2]))
    if len(items) != 2:
        return f"its items lie in {len(items) - 1} dimensions"
    for skipped in dict.fromkeys((prefix_tokens, 0)):
        grid = grid_of(items[1] - skipped, images)
        if grid is not None:
            return Placement(grid, skipped)
    return f"its {items[1]} items per image are no grid of the image's shape"


def grid_of(patches: int, images: Tensor) -> tuple[int, int] | None:
    """The grid (h, w) of so many square patches over images (B, C, H, W); None if there is none."""
    height, width = images.shape[-2:]
    rows = round(math.sqrt(max(patches, 0) * height / width))
    columns = round(rows * width / height)
    return (rows, columns) if rows * columns == patches > 0 and rows * width == columns * height else None
