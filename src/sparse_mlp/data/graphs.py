"""Graphs with features, labels and splits: checked, symmetric, sparse.

PyTorch Geometric's transforms are not used here because their results differ: `NormalizeFeatures` does not scale rows
whose sum is below 1, `RandomNodeSplit` draws validation nodes regardless of their class. Those that would give the
same edges (`to_undirected`, `remove_self_loops`, `gcn_norm`) take lists of edges, where everything here is a SciPy
matrix, and importing them takes seconds.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.preprocessing import normalize
from torch import Tensor

from sparse_mlp.errors import UserError

__all__ = ["Graph", "feature_rows", "from_arrays", "random_split", "rows_sum_to_one", "symmetric", "with_splits"]

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
    """Node ids of "train", "val" and "test". Only test nodes may be without a label; they are predicted, not scored."""
    notes: tuple[str, ...] = ()
    """What was changed to make the graph usable, a sentence each."""
    row_normalized: bool = False

    @property
    def num_nodes(self) -> int:
        return self.features.shape[0]

    @property
    def num_edges(self) -> int:
        """Undirected edges."""
        return self.adjacency.nnz // 2

    def labelled(self, split: str) -> np.ndarray:
        """Ids of the nodes of a split that have a label."""
        ids = self.splits.get(split, np.empty(0, np.int64))
        return ids[self.labels[ids] >= 0]


def from_arrays(
    name: str,
    features: Features,
    edges: np.ndarray,
    labels: np.ndarray,
    splits: dict[str, np.ndarray],
    *,
    row_normalize: bool = False,
) -> Graph:
    """Check and build.

    Args:
        name: what errors call the graph.
        features: (N, F), dense or SciPy sparse.
        edges: (2, E) node ids, either direction or both; loops and repeats are dropped.
        labels: (N,) whole numbers from 0, of any type, or (N, C) one-hot; negative, NaN or a row of zeros: no label.
        splits: node ids by the names "train", "val", "test"; left empty for `random_split`.
        row_normalize: divide the features of a node by their sum.

    Raises UserError for an empty graph, ids out of range, features, labels or splits that disagree, NaN features,
    labels that are no class numbers, and a class without a training node.
    """
    nodes = features.shape[0]
    if features.ndim != 2 or nodes == 0 or features.shape[1] == 0:
        raise UserError(f"{name}: the graph is empty: features of shape {tuple(features.shape)}")
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise UserError(f"{name}: edges of shape (2, E) expected, got {tuple(edges.shape)}")
    if edges.size and (edges.min() < 0 or edges.max() >= nodes):
        bad = edges.min() if edges.min() < 0 else edges.max()
        raise UserError(f"{name}: node id {bad} in the edges, but features are for nodes 0 to {nodes - 1}")
    values = features.data if sp.issparse(features) else features
    if not np.isfinite(values).all():
        raise UserError(f"{name}: {int((~np.isfinite(values)).sum())} features are NaN or infinite")
    classes = _class_numbers(labels, nodes, name)
    adjacency, note = symmetric(edges, nodes)
    graph = Graph(
        name=name,
        features=rows_sum_to_one(features, name) if row_normalize else _compact(features),
        adjacency=adjacency,
        labels=classes,
        num_classes=int(classes.max()) + 1,
        notes=(note,) if note else (),
        row_normalized=row_normalize,
    )
    return with_splits(graph, splits) if splits else graph


def _class_numbers(labels: np.ndarray, nodes: int, name: str) -> np.ndarray:
    """Labels as class numbers (N,), int64, -1 where there is none."""
    labels = np.asarray(labels)
    if labels.size == nodes:
        labels = labels.reshape(-1)
    if len(labels) != nodes:
        raise UserError(f"{name}: {len(labels)} labels for the features of {nodes} nodes")
    if labels.ndim == 2:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) <= 1).all()):
            raise UserError(f"{name}: labels of shape {labels.shape} are not one-hot: a node has one class or none")
        labels = np.where(labels.any(1), labels.argmax(1), -1)
    if labels.ndim != 1 or labels.dtype.kind not in "biuf":
        raise UserError(f"{name}: labels of shape {labels.shape} and type {labels.dtype} are not class numbers")
    labels = labels.astype(np.float64)
    labels[np.isnan(labels) | (labels < 0)] = -1
    wrong = (labels != np.floor(labels)) | np.isinf(labels)
    if wrong.any():
        node = int(wrong.argmax())
        raise UserError(f"{name}: the label of node {node} is {labels[node]:g}; classes are whole numbers from 0")
    if labels.max() < 0:
        raise UserError(f"{name}: no node has a label")
    if labels.max() >= nodes:
        raise UserError(f"{name}: the label {labels.max():.0f} is no class number: there are {nodes} nodes only")
    return labels.astype(np.int64)


def with_splits(graph: Graph, splits: dict[str, np.ndarray]) -> Graph:
    """The graph with the given splits (name -> node ids), checked; training and validation nodes lose those without a
    label, which is noted."""
    notes = []
    for split, ids in splits.items():
        if len(ids) and (ids.min() < 0 or ids.max() >= graph.num_nodes):
            raise UserError(f"{graph.name}: node id out of range in split {split!r}")
        unlabelled = int((graph.labels[ids] < 0).sum())
        if unlabelled and split != "test":
            splits = {**splits, split: ids[graph.labels[ids] >= 0]}
            notes.append(f"{unlabelled} nodes of the split {split!r} have no label and are left out of it")
        elif unlabelled:
            notes.append(f"{unlabelled} test nodes have no label and are not counted in the accuracy")
    train = splits.get("train", np.empty(0, np.int64))
    for split in ("val", "test"):
        if shared := np.intersect1d(train, splits.get(split, train[:0])).size:
            raise UserError(f"{graph.name}: {shared} nodes are in the splits 'train' and {split!r}")
    missing = np.setdiff1d(np.arange(graph.num_classes), graph.labels[train])
    if len(missing):
        listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{graph.name}: no training node of class {listed}")
    splits = {name: np.asarray(ids, np.int64) for name, ids in splits.items()}
    return replace(graph, splits=splits, notes=(*graph.notes, *notes))


def symmetric(edges: np.ndarray, nodes: int) -> tuple[sp.csr_matrix, str]:
    """The adjacency (N, N) of edges (2, E) in both directions, without loops and repeats; and a note on changes."""
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
    """Each row over its sum; a row of zeros stays. UserError for negative features."""
    if (features.data if sp.issparse(features) else features).min(initial=0) < 0:
        raise UserError(f"{name}: negative features have no row sum to divide by; train with row_normalize off")
    return _compact(normalize(features.astype(np.float64), norm="l1"))


def feature_rows(features: Features, ids: np.ndarray | None = None) -> Tensor:
    """Rows of the features as a tensor, CSR where they are stored sparse."""
    part = features if ids is None else features[ids]
    if not sp.issparse(part):
        return torch.from_numpy(np.ascontiguousarray(part))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        arrays = (torch.from_numpy(part.indptr.astype(np.int64)), torch.from_numpy(part.indices.astype(np.int64)))
        return torch.sparse_csr_tensor(*arrays, torch.from_numpy(part.data), size=part.shape, check_invariants=False)


def random_split(graph: Graph, seed: int, train: int = 20, val: int = 30) -> Graph:
    """`train` and `val` random nodes of each class; every other labelled node is for testing (Shchur et al.)."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for label in range(graph.num_classes):
        ids = rng.permutation(np.flatnonzero(graph.labels == label))
        if len(ids) <= train + val:
            raise UserError(
                f"{graph.name}: class {label} has {len(ids)} nodes; {train} training and {val} validation nodes of "
                f"each class and one to test on are {train + val + 1}"
            )
        for split, part in zip(parts, np.split(ids, [train, train + val]), strict=True):
            parts[split].append(part)
    return with_splits(graph, {split: np.sort(np.concatenate(ids)) for split, ids in parts.items()})
