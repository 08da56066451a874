"""The plan of a layer with a capacity: over which groups it is counted, and what is said where it is rounded."""

from __future__ import annotations

import math

import torch

from sparse_mlp.moe import dispatch
from sparse_mlp.moe.arguments import warn_if_rounded
from sparse_mlp.moe.router import Routing


def plan(
    routing: Routing, shape: torch.Size, ratio: float, group: str, prioritized: bool, warned: set[tuple[float, int]]
) -> dispatch.Plan:
    """Where the items of an input of this shape (..., D) go. `warned`: the cases that a warning was given for."""
    num_experts, top_k = routing.logits_NE.shape[1], routing.experts_NK.shape[1]
    groups, items = 1, math.prod(shape[:-1])
    if group == "image" and len(shape) >= 3:
        groups, items = shape[0], math.prod(shape[1:-1])
    experts_GNK, gates_GNK = (t.view(groups, items, top_k) for t in (routing.experts_NK, routing.gates_NK))
    capacity = dispatch.capacity(items, num_experts, top_k, ratio)
    if not torch.compiler.is_compiling() and (ratio, items) not in warned:
        warned.add((ratio, items))
        warn_if_rounded(ratio, items, capacity, num_experts, top_k)
    return dispatch.limited(experts_GNK, gates_GNK, num_experts, capacity, prioritized)
