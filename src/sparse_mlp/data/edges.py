"""Change the edges of a graph by the similarity of their ends' features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch

from sparse_mlp.data.graphs import Graph, symmetric
from sparse_mlp.errors import UserError

__all__ = ["add_knn_edges", "prune_edges"]


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
