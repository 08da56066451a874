"""What a model costs: parameters, and multiply-adds by module."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, channels: int, image_size: int) -> dict[str, int]:
    """Multiply-adds of the matrix products for one image, in evaluation, by module name ("" is the whole model)."""
    training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, channels, image_size, image_size))
    model.train(training)
    root = type(model).__name__
    counts = {name: sum(operations.values()) // 2 for name, operations in counter.get_flop_counts().items()}
    macs = {name.removeprefix(root).removeprefix("."): count for name, count in counts.items() if name != "Global"}
    return macs | {"": counts["Global"]}
