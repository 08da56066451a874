"""What `MoeMlp` says about its arguments: errors for wrong ones, a warning where a capacity is rounded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def check_arguments(given: Mapping[str, Any]) -> None:
    """ValueError naming the argument, its value and what is allowed; `given` are all of them by name."""
    for name in ("dim", "hidden_dim", "num_experts", "top_k"):
        if given[name] < 1:
            raise ValueError(f"{name} must be at least 1; got {given[name]}")
    if given["top_k"] > given["num_experts"]:
        raise ValueError(f"top_k must be at most num_experts ({given['num_experts']}); got {given['top_k']}")
    for name in ("noise_std", "balance_weight", "bias_rate", "z_loss_weight", "shared_experts"):
        if given[name] is not None and given[name] < 0:
            raise ValueError(f"{name} must not be negative; got {given[name]}")
    ratios = {name: given[name] for name in ("capacity_ratio", "eval_capacity_ratio")}
    for name, ratio in ratios.items():
        if ratio is not None and not 0 < ratio < float("inf"):
            raise ValueError(f"{name} must be above 0, or None for dropless; got {ratio}")
    if given["capacity_group"] not in ("image", "batch"):
        raise ValueError(f'capacity_group must be "image" or "batch"; got {given["capacity_group"]!r}')
    if given["prioritized"] and all(ratio is None for ratio in ratios.values()):
        raise ValueError("prioritized=True needs a capacity_ratio: without a capacity nothing is dropped")
    if given["scores"] not in ("softmax", "sigmoid"):
        raise ValueError(f'scores must be "softmax" or "sigmoid"; got {given["scores"]!r}')
    if given["gate"] not in (None, "first", "last"):
        raise ValueError(f'gate must be "first" or "last", the half that is gated, or None; got {given["gate"]!r}')


def warn_if_rounded(ratio: float, items: int, capacity: int, num_experts: int, top_k: int) -> None:
    """Warn where the capacity that results is more than 1 % off the ratio."""
    actual = capacity * num_experts / (items * top_k)
    if abs(actual / ratio - 1) > 0.01:
        warnings.warn(
            f"capacity ratio {ratio:g} over groups of {items} items rounds to {capacity} slots for each of "
            f"{num_experts} experts: the actual ratio is {actual:.3g}",
            stacklevel=4,
        )
