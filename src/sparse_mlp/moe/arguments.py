"""What `MoeMlp` says about its arguments: errors for wrong ones, a warning where a capacity is rounded."""

from __future__ import annotations

import warnings


def check_arguments(
    *,
    sizes: dict[str, int],
    ratios: dict[str, float | None],
    not_negative: dict[str, float | None],
    capacity_group: str,
    prioritized: bool,
    scores: str,
    gate: str | None,
) -> None:
    """ValueError naming the argument, its value and what is allowed."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    if sizes["top_k"] > sizes["num_experts"]:
        raise ValueError(f"top_k must be at most num_experts ({sizes['num_experts']}); got {sizes['top_k']}")
    for name, value in not_negative.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative; got {value}")
    for name, ratio in ratios.items():
        if ratio is not None and not 0 < ratio < float("inf"):
            raise ValueError(f"{name} must be above 0, or None for dropless; got {ratio}")
    if capacity_group not in ("image", "batch"):
        raise ValueError(f'capacity_group must be "image" or "batch"; got {capacity_group!r}')
    if prioritized and all(ratio is None for ratio in ratios.values()):
        raise ValueError("prioritized=True needs a capacity_ratio: without a capacity nothing is dropped")
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f'scores must be "softmax" or "sigmoid"; got {scores!r}')
    if gate not in (None, "first", "last"):
        raise ValueError(f'gate must be "first" or "last", the half that is gated, or None; got {gate!r}')


def warn_if_rounded(ratio: float, items: int, capacity: int, num_experts: int, top_k: int) -> None:
    """Warn where the capacity that results is more than 1 % off the ratio."""
    actual = capacity * num_experts / (items * top_k)
    if abs(actual / ratio - 1) > 0.01:
        warnings.warn(
            f"capacity ratio {ratio:g} over groups of {items} items rounds to {capacity} slots for each of "
            f"{num_experts} experts: the actual ratio is {actual:.3g}",
            stacklevel=4,
        )
