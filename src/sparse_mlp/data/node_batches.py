"""Batches of nodes: their features, their labels, and the r-hop weights between them, computed sparse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparse_mlp.data.graphs import Graph, feature_rows
from sparse_mlp.errors import UserError

__all__ = ["NodeBatches", "Sampling", "eval_batches", "hop_weights", "normalized_adjacency"]

Sampling = Literal["published", "distinct"]


def normalized_adjacency(adjacency: sp.csr_matrix) -> sp.csr_matrix:
    """D^-1/2 (A + I) D^-1/2 with D the degrees of A + I."""
    with_loops = sp.csr_matrix(adjacency + sp.identity(adjacency.shape[0], dtype=np.float32, format="csr"))
    scale = (1 / np.sqrt(np.diff(with_loops.indptr))).astype(np.float32)
    with_loops.data = scale[with_loops.indices] * np.repeat(scale, np.diff(with_loops.indptr))
    return with_loops


def hop_weights(
    normalized: sp.csr_matrix, batch: np.ndarray, hops: int, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-zeros (row, column, weight) of the `hops`-th power of `normalized` at the batch's rows and columns.

    Positions count from 0 within the batch, which may repeat nodes; `rows` restricts the rows. A walk of r steps
    between two batch nodes is cut in the middle: only ceil(r / 2) hops are followed from either end, so that for r = 2
    only the batch's own edges are looked at.
    """
    if hops < 1:
        raise UserError(f"hops must be at least 1, got {hops}; without hops there is no graph, that is alpha 0")
    start = normalized[batch]
    left = start[rows]
    for _ in range((hops + 1) // 2 - 1):
        left = left @ normalized
    right = start
    if hops == 1:
        ones = np.ones(len(batch), np.float32)
        right = sp.csr_matrix((ones, (np.arange(len(batch)), batch)), shape=(len(batch), normalized.shape[0]))
    for _ in range(hops // 2 - 1):
        right = right @ normalized
    power = sp.csr_matrix(left @ right.T)
    power.sort_indices()
    heights = np.diff(power.indptr)
    first = rows.indices(len(batch))[0]
    return np.repeat(np.arange(len(heights)) + first, heights), power.indices.astype(np.int64), power.data


def eval_batches(graph: Graph, size: int = 4096, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
    """Features and labels of the validation and test nodes, each once over all ranks; `val` tells which is which."""
    for split in ("val", "test"):
        ids = graph.splits.get(split, np.empty(0, np.int64))[rank::world_size]
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            yield {
                "features": feature_rows(graph.features, piece),
                "target": torch.from_numpy(graph.labels[piece]),
                "index": torch.from_numpy(piece),
                "val": torch.full((len(piece),), split == "val"),
            }


class NodeBatches:
    """Item `step` is the batch of that step: a pure function of (seed, step), the same for any number of ranks.

    A batch starts with the training nodes (a random half batch of them where they are more); the others are drawn
    from all nodes, with replacement ("published": repeats, also of training nodes, stay) or without ("distinct").
    Rank r gets the r-th contiguous slice of the nodes and the rows of the hop weights that belong to it.
    `probabilities` (N, C), if given, are a teacher's, of all nodes; a batch brings its nodes' rows.
    """

    def __init__(
        self,
        graph: Graph,
        batch_size: int,
        hops: int,
        seed: int,
        *,
        sampling: Sampling = "published",
        rank: int = 0,
        world_size: int = 1,
        probabilities: np.ndarray | None = None,
    ) -> None:
        if sampling not in ("published", "distinct"):
            raise UserError(f"sampling must be 'published' or 'distinct', got {sampling!r}")
        if batch_size < 2:
            raise UserError(f"batch_size must be at least 2, got {batch_size}")
        self.size = min(batch_size, graph.num_nodes) if sampling == "distinct" else batch_size
        if self.size % world_size:
            raise UserError(f"a batch of {self.size} nodes does not divide among {world_size} ranks")
        self.graph, self.hops, self.seed, self.probabilities = graph, hops, seed, probabilities
        self.sampling, self.rank, self.world_size = sampling, rank, world_size
        self.normalized = normalized_adjacency(graph.adjacency)

    def ids(self, step: int) -> tuple[np.ndarray, int]:
        """The whole batch's node ids and how many of them, at the front, are there for their label."""
        rng = np.random.default_rng((self.seed, step))
        train = self.graph.splits["train"]
        if len(train) > self.size // 2:
            train = rng.choice(train, self.size // 2, replace=False)
        if self.sampling == "published":
            others = rng.integers(0, self.graph.num_nodes, self.size - len(train))
        else:
            drawn = rng.choice(self.graph.num_nodes, self.size, replace=False)
            others = drawn[~np.isin(drawn, train)][: self.size - len(train)]
        return np.concatenate([train, others]), len(train)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        ids, labelled = self.ids(step)
        share = len(ids) // self.world_size
        own = slice(self.rank * share, (self.rank + 1) * share)
        rows, cols, weights = hop_weights(self.normalized, ids, self.hops, own)
        target = np.full(len(ids), -1, np.int64)
        target[:labelled] = self.graph.labels[ids[:labelled]]
        return {
            **self._teacher(ids[own]),
            "index": torch.from_numpy(ids[own]),
            "features": feature_rows(self.graph.features, ids[own]),
            "target": torch.from_numpy(target[own]),
            "labelled": torch.tensor(labelled),
            "rows": torch.from_numpy(rows.astype(np.int64)),
            "cols": torch.from_numpy(cols),
            "weights": torch.from_numpy(weights),
        }

    def _teacher(self, ids: np.ndarray) -> dict[str, Tensor]:
        return {} if self.probabilities is None else {"teacher": torch.from_numpy(self.probabilities[ids])}
