"""Random graphs with planted classes, and random edges in the place of a graph's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from sparse_mlp.data.graphs import Graph, from_arrays, random_split, symmetric


def corrupt_edges(graph: Graph, share: float, seed: int) -> Graph:
    """Replace a share (0 to 1) of the undirected edges by as many random new pairs."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    upper = sp.triu(graph.adjacency, 1).tocoo()
    edges = np.stack([upper.row, upper.col]).astype(np.int64)
    count = round(share * edges.shape[1])
    keep = np.ones(edges.shape[1], bool)
    keep[rng.choice(edges.shape[1], count, replace=False)] = False
    taken = set((edges[0] * graph.num_nodes + edges[1]).tolist())
    new: list[int] = []
    while len(new) < count:
        low, high = sorted(rng.integers(0, graph.num_nodes, 2).tolist())
        key = low * graph.num_nodes + high
        if low != high and key not in taken:
            taken.add(key)
            new.append(key)
    fresh = np.array(new, np.int64)
    pairs = np.concatenate([edges[:, keep], np.stack([fresh // graph.num_nodes, fresh % graph.num_nodes])], axis=1)
    return replace(graph, adjacency=symmetric(pairs, graph.num_nodes)[0])


def planted_graph(nodes: int, edges: int, classes: int = 10, features: int = 64, seed: int = 0) -> Graph:
    """A graph with power-law degrees and planted classes: 4 of 5 edges stay within the class. Features are noisy.

    About `edges` undirected edges (repeats collapse); 20 training and 30 validation nodes per class.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, nodes)
    by_class = np.argsort(labels, kind="stable").astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=classes))])

    def pick(low: Any, high: Any) -> np.ndarray:
        # u**2 on ranks gives degrees with a power-law tail of exponent 3
        return (low + (high - low) * rng.random(edges, dtype=np.float32) ** 2).astype(np.int64)

    source = (
        by_class[np.minimum(pick(0, nodes), nodes - 1)] if classes == 1 else rng.integers(0, nodes, edges, np.int32)
    )
    inside = rng.random(edges, dtype=np.float32) < 0.8
    group = np.where(inside, labels[source], rng.integers(0, classes, edges))
    target = by_class[np.minimum(pick(starts[group], starts[group + 1]), nodes - 1)]
    centers = rng.standard_normal((classes, features), dtype=np.float32)
    x = 0.3 * centers[labels] + rng.standard_normal((nodes, features), dtype=np.float32)
    graph = from_arrays(f"planted-{nodes}", x, np.stack([source, target]), labels, {})
    return random_split(graph, seed)
