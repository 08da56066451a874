"""Change the edges of a graph by feature similarity or at random; and generate random graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from sparse_mlp.data.graphs import Graph, from_arrays, random_split, symmetric
from sparse_mlp.errors import UserError

__all__ = ["add_knn_edges", "corrupt_edges", "planted_graph", "prune_edges"]


def corrupt_edges(graph: Graph, share: float, seed: int) -> Graph:
    """Replace a share (0 to 1) of the undirected edges by as many random new pairs."""
    if not 0 <= share <= 1:
        raise UserError(f"share must be between 0 and 1, got {share}")
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


def prune_edges(graph: Graph, threshold: float) -> Graph:
    """Keep the edges whose ends have features of a cosine above `threshold`; drop the others."""
    upper = sp.triu(graph.adjacency, 1).tocoo()
    features = sp.csr_matrix(graph.features)
    norms = np.sqrt(np.asarray(features.multiply(features).sum(1)).reshape(-1))
    cosine = np.empty(upper.nnz, np.float32)
    for start in range(0, upper.nnz, 2**18):
        piece = slice(start, start + 2**18)
        ends = upper.row[piece], upper.col[piece]
        dots = np.asarray(features[ends[0]].multiply(features[ends[1]]).sum(1)).reshape(-1)
        cosine[piece] = dots / np.maximum(norms[ends[0]] * norms[ends[1]], 1e-12)
    keep = cosine > threshold
    return replace(graph, adjacency=symmetric(np.stack([upper.row[keep], upper.col[keep]]), graph.num_nodes)[0])


def add_knn_edges(graph: Graph, neighbours: int) -> Graph:
    """Add an edge from each node to the `neighbours` others with features of the highest cosine.

    Every pair of nodes is compared, in blocks: minutes for 10^5 nodes. Nodes without features get none.
    """
    if not 1 <= neighbours < graph.num_nodes:
        raise UserError(f"neighbours must be between 1 and {graph.num_nodes - 1}, got {neighbours}")
    unit = torch.from_numpy(np.asarray(sp.csr_matrix(graph.features).todense(), np.float32))
    unit = torch.nn.functional.normalize(unit, dim=1)
    sources, targets = [], []
    for start in range(0, graph.num_nodes, 1024):
        cosine = unit[start : start + 1024] @ unit.t()
        cosine.diagonal(start).fill_(-1)
        value, column = cosine.topk(neighbours, dim=1)
        row, rank = (value > 0).nonzero(as_tuple=True)
        sources.append(row + start)
        targets.append(column[row, rank])
    coo = graph.adjacency.tocoo()
    new = np.stack([torch.cat(sources).numpy(), torch.cat(targets).numpy()])
    edges = np.concatenate([np.stack([coo.row, coo.col]), new], axis=1)
    return replace(graph, adjacency=symmetric(edges, graph.num_nodes)[0])


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
