"""A trained model with less and less computation for its experts: the figure of V-MoE's section 4."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict

from torch import nn

from sparse_mlp import distributed
from sparse_mlp.data import InputSpec
from sparse_mlp.engine import RunFolder
from sparse_mlp.errors import UserError
from sparse_mlp.files import write_json
from sparse_mlp.moe.telemetry import moe_layers
from sparse_mlp.report.capacity import CURVE, Point
from sparse_mlp.report.cost import count_macs

RATIOS = (None, 1.0, 0.75, 0.5, 0.25, 0.1)


def write_capacity_curve(run: RunFolder, model: nn.Module, spec: InputSpec, top1: Callable[[nn.Module], float]) -> None:
    """Evaluate a model at several capacities, items taking places by falling gate, and note it in the run folder.

    The layers are afterwards as before. UserError for a model without experts; collective.
    """
    layers = list(moe_layers(model).values())
    if not layers:
        raise UserError(f"{run.path} has no experts whose capacity could be limited: leave out --curve")
    before = [(layer.eval_capacity_ratio, layer.prioritized) for layer in layers]
    points = []
    with warnings.catch_warnings():  # the multiply-adds are counted, so that no rounding is hidden
        warnings.filterwarnings("ignore", message="capacity ratio", category=UserWarning)
        for ratio in RATIOS:
            for layer in layers:
                layer.eval_capacity_ratio, layer.prioritized = ratio, ratio is not None
            macs = count_macs(model.cpu(), spec.channels, spec.image_size)[""]
            points.append(Point(ratio, macs, top1(model)))
    for layer, (ratio, prioritized) in zip(layers, before, strict=True):
        layer.eval_capacity_ratio, layer.prioritized = ratio, prioritized
    if distributed.is_main():
        write_json(run.path / CURVE, {"points": [asdict(point) for point in points]})
