"""The graph of a recipe, and how batches are drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_mlp.data.graph_files import Split, load_graph
from sparse_mlp.data.graphs import Graph
from sparse_mlp.data.node_batches import Sampling
from sparse_mlp.errors import UserError

__all__ = ["GraphConfig", "load_configured"]


@dataclass(frozen=True)
class GraphConfig:
    """The graph, and the batches of nodes drawn from it."""

    source: str = "cora"
    """A name (cora, citeseer, pubmed, photo, computers, cs, physics) or a folder or file."""

    root: str | None = None
    """Where named graphs are. Left out: $SPARSE_MLP_DATA."""

    row_normalize: bool | None = None
    """Divide the features of a node by their sum. Left out: for named graphs and their file formats only."""

    split_seed: int = 0
    """Of the random split, where the data bring none; where masks have several columns, the column."""

    train_per_class: int = 20
    """Training nodes of each class in a random split."""

    val_per_class: int = 30
    """Validation nodes of each class in a random split; all other labelled nodes are for testing."""

    batch_size: int = 2000
    """Nodes in a step, all ranks together."""

    hops: int = 2
    """How many edges apart two nodes may be to attract each other."""

    sampling: Sampling = "published"
    """published: training nodes plus nodes drawn with repeats; distinct: no node twice."""

    min_similarity: float | None = None
    """Use only edges between nodes whose features have a cosine above this. Left out: all edges."""

    knn_edges: int | None = None
    """Add edges from each node to this many nearest neighbours by features; compares every pair of nodes."""

    def __post_init__(self) -> None:
        if self.hops < 1:
            raise UserError(
                f"hops must be at least 1, got {self.hops}; without hops there is no graph, that is task.alpha 0"
            )
        if self.batch_size < 2:
            raise UserError(f"batch_size must be at least 2, got {self.batch_size}")
        for name, least in (("split_seed", 0), ("train_per_class", 1), ("val_per_class", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.min_similarity is not None and not -1 <= self.min_similarity < 1:
            raise UserError(f"min_similarity is a cosine, at least -1 and below 1; got {self.min_similarity}")
        if self.knn_edges is not None and self.knn_edges < 1:
            raise UserError(f"knn_edges must be at least 1, got {self.knn_edges}")


def load_configured(config: GraphConfig) -> Graph:
    """Read the graph of a configuration."""
    if not config.source:
        raise UserError("which graph? --data.source FILE names the folder or file of your graph")
    root = Path(config.root) if config.root else None
    split = Split(config.split_seed, config.train_per_class, config.val_per_class)
    return load_graph(config.source, root, split=split, row_normalize=config.row_normalize)
