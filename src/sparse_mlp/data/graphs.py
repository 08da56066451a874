"""Graphs with features, labels and splits; the r-hop weights of a batch of nodes, computed sparse."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from sparse_mlp.errors import UserError

__all__ = [
    "Graph",
    "NodeBatches",
    "add_similar",
    "corrupt_edges",
    "eval_batches",
    "feature_rows",
    "from_arrays",
    "hop_weights",
    "normalized_adjacency",
    "planted_graph",
    "random_split",
    "rows_sum_to_one",
    "trust_edges",
]

Sampling = Literal["published", "distinct"]
Features: TypeAlias = Any  # a SciPy CSR matrix or a NumPy array, (N, F); SciPy has no types for mypy


@dataclass(frozen=True)
class Graph:
    """N nodes: features (N, F), a symmetric adjacency without loops or repeats, labels (N,), -1 where unknown."""

    name: str
    features: Features
    adjacency: sp.csr_matrix
    labels: np.ndarray
    num_classes: int
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    row_normalized: bool = False

    @property
    def num_nodes(self) -> int:
        return self.features.shape[0]

    @property
    def num_edges(self) -> int:
        """Undirected edges."""
        return self.adjacency.nnz // 2


def from_arrays(
    name: str,
    features: Features,
    edges: np.ndarray,
    labels: np.ndarray,
    splits: dict[str, np.ndarray],
    *,
    row_normalize: bool = False,
) -> Graph:
    """Check and build. `edges` is (2, E), either direction or both; loops and repeats are dropped.

    Raises ValueError for an empty graph, ids out of range, features, labels or splits that disagree, NaN features, and
    a class without a training node.
    """
    nodes = features.shape[0]
    if features.ndim != 2 or nodes == 0 or features.shape[1] == 0:
        raise UserError(f"{name}: the graph is empty: features of shape {tuple(features.shape)}")
    if len(labels) != nodes:
        raise UserError(f"{name}: {len(labels)} labels for the features of {nodes} nodes")
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise UserError(f"{name}: edges of shape (2, E) expected, got {tuple(edges.shape)}")
    if edges.size and (edges.min() < 0 or edges.max() >= nodes):
        bad = edges.min() if edges.min() < 0 else edges.max()
        raise UserError(f"{name}: node id {bad} in the edges, but features are for nodes 0 to {nodes - 1}")
    values = features.data if sp.issparse(features) else features
    if not np.isfinite(values).all():
        raise UserError(f"{name}: {int((~np.isfinite(values)).sum())} features are NaN or infinite")
    if labels.max() < 0:
        raise UserError(f"{name}: no node has a label")
    adjacency, note = _symmetric(edges, nodes)
    graph = Graph(
        name=name,
        features=rows_sum_to_one(features, name) if row_normalize else _compact(features),
        adjacency=adjacency,
        labels=labels.astype(np.int64),
        num_classes=int(labels.max()) + 1,
        notes=(note,) if note else (),
        row_normalized=row_normalize,
    )
    return with_splits(graph, splits) if splits else graph


def with_splits(graph: Graph, splits: dict[str, np.ndarray]) -> Graph:
    """The graph with the given splits (name -> node ids), checked."""
    for split, ids in splits.items():
        if len(ids) and (ids.min() < 0 or ids.max() >= graph.num_nodes):
            raise UserError(f"{graph.name}: node id out of range in split {split!r}")
        if (graph.labels[ids] < 0).any() and split != "test":
            raise UserError(f"{graph.name}: split {split!r} holds nodes without a label")
    train = splits.get("train", np.empty(0, np.int64))
    for split in ("val", "test"):
        if shared := np.intersect1d(train, splits.get(split, train[:0])).size:
            raise UserError(f"{graph.name}: {shared} nodes are in the splits 'train' and {split!r}")
    missing = sorted(set(range(graph.num_classes)) - set(graph.labels[train].tolist()))
    if missing:
        raise UserError(f"{graph.name}: no training node of class {', '.join(map(str, missing))}")
    return replace(graph, splits={name: np.asarray(ids, np.int64) for name, ids in splits.items()})


def _symmetric(edges: np.ndarray, nodes: int) -> tuple[sp.csr_matrix, str]:
    ones = np.ones(edges.shape[1], np.float32)
    directed = sp.csr_matrix((ones, (edges[0], edges[1])), shape=(nodes, nodes))
    directed.setdiag(0)
    directed.eliminate_zeros()
    directed.data[:] = 1
    both = sp.csr_matrix(directed.maximum(directed.T))
    one_way = both.nnz - directed.nnz
    if one_way and both.nnz != 2 * directed.nnz:
        return both, f"directed graph made symmetric: {one_way} edges had one direction only"
    return both, "each edge was given once: both directions are used" if one_way else ""


def _compact(features: Features) -> Features:
    """Sparse where that is smaller, else dense; float32 either way."""
    if sp.issparse(features):
        return sp.csr_matrix(features, dtype=np.float32)
    features = np.asarray(features, np.float32)
    return sp.csr_matrix(features) if np.count_nonzero(features) < 0.25 * features.size else features


def rows_sum_to_one(features: Features, name: str) -> Features:
    """Each row over its sum; a row of zeros stays."""
    if (features.data if sp.issparse(features) else features).min(initial=0) < 0:
        raise UserError(f"{name}: negative features have no row sum to divide by; train with row_normalize off")
    total = np.asarray(features.sum(1)).reshape(-1)
    inverse = np.divide(1.0, total, out=np.zeros_like(total, dtype=np.float64), where=total > 0)
    return _compact(sp.diags(inverse) @ features if sp.issparse(features) else features * inverse[:, None])


# Splits, corruption, synthetic graphs


def random_split(graph: Graph, seed: int, train: int = 20, val: int = 30) -> Graph:
    """`train` and `val` random nodes of each class; every other labelled node is for testing (Shchur et al.)."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for label in range(graph.num_classes):
        ids = rng.permutation(np.flatnonzero(graph.labels == label))
        if len(ids) <= train + val:
            raise UserError(f"{graph.name}: class {label} has {len(ids)} nodes; a random split needs {train + val + 1}")
        for split, part in zip(parts, np.split(ids, [train, train + val]), strict=True):
            parts[split].append(part)
    return with_splits(graph, {split: np.sort(np.concatenate(ids)) for split, ids in parts.items()})


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
    return replace(graph, adjacency=_symmetric(pairs, graph.num_nodes)[0])


def trust_edges(graph: Graph, threshold: float) -> Graph:
    """Keep the edges whose ends have features of a cosine above `threshold`; the others are not believed."""
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
    return replace(graph, adjacency=_symmetric(np.stack([upper.row[keep], upper.col[keep]]), graph.num_nodes)[0])


def add_similar(graph: Graph, neighbours: int) -> Graph:
    """Add an edge from each node to the `neighbours` others with features of the highest cosine.

    Every pair of nodes is looked at, in blocks: minutes for 10^5 nodes. Nodes without features get none.
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
    return replace(graph, adjacency=_symmetric(edges, graph.num_nodes)[0])


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


# The r-hop weights of a batch


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


def feature_rows(features: Features, ids: np.ndarray | None = None) -> Tensor:
    """Rows of the features as a tensor, CSR where they are stored sparse."""
    part = features if ids is None else features[ids]
    if not sp.issparse(part):
        return torch.from_numpy(np.ascontiguousarray(part))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        arrays = (torch.from_numpy(part.indptr.astype(np.int64)), torch.from_numpy(part.indices.astype(np.int64)))
        return torch.sparse_csr_tensor(*arrays, torch.from_numpy(part.data), size=part.shape, check_invariants=False)


class NodeBatches:
    """Item `step` is the batch of that step: a pure function of (seed, step), the same for any number of ranks.

    A batch starts with the training nodes (a random half batch of them where they are more); the others are drawn
    from all nodes, with replacement ("published": repeats, also of training nodes, stay) or without ("distinct").
    Rank r gets the r-th contiguous slice of the nodes and the rows of the hop weights that belong to it.
    `soft` (N, C), if given, are class probabilities of all nodes to learn; a batch brings its nodes' rows.
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
        soft: np.ndarray | None = None,
    ) -> None:
        if sampling not in ("published", "distinct"):
            raise UserError(f"sampling must be 'published' or 'distinct', got {sampling!r}")
        if batch_size < 2:
            raise UserError(f"batch_size must be at least 2, got {batch_size}")
        self.size = min(batch_size, graph.num_nodes) if sampling == "distinct" else batch_size
        if self.size % world_size:
            raise UserError(f"a batch of {self.size} nodes does not divide among {world_size} ranks")
        self.graph, self.hops, self.seed, self.soft = graph, hops, seed, soft
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
        soft = {} if self.soft is None else {"soft": torch.from_numpy(self.soft[ids[own]])}
        return {
            **soft,
            "index": torch.from_numpy(ids[own]),
            "features": feature_rows(self.graph.features, ids[own]),
            "target": torch.from_numpy(target[own]),
            "labelled": torch.tensor(labelled),
            "rows": torch.from_numpy(rows.astype(np.int64)),
            "cols": torch.from_numpy(cols),
            "weights": torch.from_numpy(weights),
        }
