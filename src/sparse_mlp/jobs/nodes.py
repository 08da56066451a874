"""Node classification by Graph-MLP: the graph shapes the training loss, prediction needs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import scipy.sparse as sp

from sparse_mlp.data.graph_files import load_graph
from sparse_mlp.data.graphs import (
    Graph,
    Sampling,
)
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs.job import Context, Job
from sparse_mlp.jobs.recipe import Recipe
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeLossConfig
from sparse_mlp.tasks.teacher import TeacherConfig

INPUTS = "inputs.json"


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
    """Of the random split, 20 training and 30 validation nodes per class, where the data bring none; where masks have
    several columns, the column."""

    batch_size: int = 2000
    """Nodes in a step, all ranks together."""

    hops: int = 2
    """How many edges apart two nodes may be to attract each other."""

    sampling: Sampling = "published"
    """published: training nodes plus nodes drawn with repeats; distinct: no node twice."""

    trust: float | None = None
    """Use only edges whose ends have features of a cosine above this. Left out: all edges."""

    similar: int | None = None
    """Add edges from each node to so many of the most similar features; looks at every pair of nodes."""

    def __post_init__(self) -> None:
        if self.hops < 1:
            raise UserError(
                f"hops must be at least 1, got {self.hops}; without hops there is no graph, that is task.alpha 0"
            )
        if self.batch_size < 2:
            raise UserError(f"batch_size must be at least 2, got {self.batch_size}")
        if self.trust is not None and not -1 <= self.trust < 1:
            raise UserError(f"trust is a cosine, at least -1 and below 1; got {self.trust}")
        if self.similar is not None and self.similar < 1:
            raise UserError(f"similar must be at least 1, got {self.similar}")


@dataclass(frozen=True)
class NetworkConfig:
    """The network; features and classes come from the data."""

    hidden_dim: int = 256
    """Width of the hidden layer and the embedding."""

    drop_rate: float = 0.6
    """Dropout on the hidden layer."""

    input_drop_rate: float = 0.0
    """Dropout on the features."""

    num_experts: int = 0
    """Experts in place of the second layer; 0 is the dense network."""

    top_k: int = 1
    """Experts per node."""

    expert_dim: int = 128
    """Hidden width of an expert."""


@dataclass(frozen=True)
class NodesRecipe(Recipe):
    """A complete configuration of a training run on a graph."""

    kind: ClassVar[str] = "nodes"

    data: GraphConfig = field(default_factory=GraphConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    task: NodeLossConfig = field(default_factory=NodeLossConfig)
    teacher: TeacherConfig | None = None
    """The network whose probabilities are learned with the weight task.distill; None without one."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(opt="adam", lr=1e-3, weight_decay=5e-3))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(sched="constant"))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=400, log_every=10, eval_every=10, save_every=100)
    )


class NodesJob(Job[NodesRecipe]):
    """Graph-MLP learns the classes of a graph's nodes."""

    recipe_type = NodesRecipe
    scores = ("top1", "val_top1")
    free: ClassVar[frozenset[str]] = Job.free | {"data.root"}

    def __init__(self, recipe: NodesRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        raise NotImplementedError


def load_nodes(config: GraphConfig) -> Graph:
    """The graph of a configuration, as its files have it."""
    root = Path(config.root) if config.root else None
    return load_graph(config.source, root, split_seed=config.split_seed, row_normalize=config.row_normalize)


def build_network(config: NetworkConfig, features: int, classes: int) -> GraphMlp:
    """ValueError for options that would be ignored."""
    default = NetworkConfig()
    if not config.num_experts and (config.top_k, config.expert_dim) != (default.top_k, default.expert_dim):
        raise UserError("model.top_k and model.expert_dim would be ignored: model.num_experts is 0")
    return GraphMlp(features, classes, **vars(config))


def _read_features(path: Path, width: int) -> sp.csr_matrix | np.ndarray:
    try:
        if path.suffix == ".npz":
            features = sp.csr_matrix(sp.load_npz(path), dtype=np.float32)
        elif path.suffix == ".npy":
            features = np.load(path, allow_pickle=False).astype(np.float32)
        elif path.suffix == ".csv":
            features = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
        else:
            raise UserError("features are read from .npy, .npz (scipy.sparse.save_npz) and .csv")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of features {path}") from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
    if features.ndim != 2 or features.shape[1] != width:
        raise UserError(f"{path}: features of shape {features.shape}, but the run was trained on {width} a node")
    if not np.isfinite(features.data if sp.issparse(features) else features).all():
        raise UserError(f"{path}: features are NaN or infinite")
    return features
