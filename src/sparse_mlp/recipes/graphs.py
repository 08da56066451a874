"""Graph-MLP on the papers' graphs: complete configurations, and the objects a trainer takes.

Accuracy over ten seeds, hardware and the search behind these numbers: docs/graph.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_mlp.data.graph_files import load_graph
from sparse_mlp.data.graphs import Graph, NodeBatches, Sampling, add_similar, eval_batches, trust_edges
from sparse_mlp.engine import Loaders, OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig
from sparse_mlp.tasks.teacher import TeacherConfig, teach

__all__ = ["GraphConfig", "NetworkConfig", "NodeJob", "NodeRecipe", "build_nodes", "node_recipe"]


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
class NodeRecipe:
    """A complete configuration of a training run on a graph."""

    name: str = "nodes"
    """What the run folder is called if --out does not say."""

    data: GraphConfig = field(default_factory=GraphConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    task: NodeLossConfig = field(default_factory=NodeLossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(opt="adam", lr=1e-3, weight_decay=5e-3))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(sched="constant"))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=400, log_every=10, eval_every=10, save_every=100)
    )


@dataclass(frozen=True)
class NodeJob:
    """What a node recipe describes, built."""

    graph: Graph
    task: NodeClassify
    loaders: Loaders


def cora() -> NodeRecipe:
    """Cora: the published losses, and a teacher's probabilities to learn. sparse-mlp nodes train cora"""
    return _taught("cora", NodeLossConfig(distill=10.0), TeacherConfig())


def citeseer() -> NodeRecipe:
    """Citeseer: the published losses, and a teacher's probabilities to learn. sparse-mlp nodes train citeseer"""
    # GRAND's for Citeseer
    teacher = TeacherConfig(hops=2, samples=2, input_drop_rate=0.0, drop_rate=0.2, consistency=0.7, temperature=0.3)
    return _taught("citeseer", NodeLossConfig(alpha=1.0, tau=0.5, distill=10.0), teacher)


def pubmed() -> NodeRecipe:
    """Pubmed: the published losses, and a teacher's probabilities to learn. sparse-mlp nodes train pubmed"""
    teacher = TeacherConfig(
        hops=5, samples=2, input_drop_rate=0.0, temperature=0.2, unit_rows=True, weight_decay=2e-3, epochs=120, starts=4
    )
    return _taught("pubmed", NodeLossConfig(alpha=100.0, tau=1.0, distill=10.0), teacher, lr=0.01)


def shops_and_authors(name: str) -> NodeRecipe:
    """Photo, Computers, CS, Physics: as Cora, its teacher with fewer hops. sparse-mlp nodes train photo"""
    teacher = TeacherConfig(hops=2, samples=2, input_drop_rate=0.0, unit_rows=True, epochs=150)
    return _taught(name, NodeLossConfig(distill=10.0), teacher, lr=0.01)


def _taught(name: str, task: NodeLossConfig, teacher: TeacherConfig, lr: float = 1e-3) -> NodeRecipe:
    """The rate falls to 0, for the last weights are the ones kept."""
    optim, schedule = OptimConfig(opt="adam", lr=lr, weight_decay=5e-4), ScheduleConfig(sched="cosine")
    return NodeRecipe(name, GraphConfig(name), task=task, teacher=teacher, optim=optim, schedule=schedule)


_RECIPES: dict[str, Callable[[], NodeRecipe]] = {"cora": cora, "citeseer": citeseer, "pubmed": pubmed}
_RECIPES |= {name: partial(shops_and_authors, name) for name in ("photo", "computers", "cs", "physics")}


def node_recipe(source: str) -> NodeRecipe:
    """The recipe of a named graph; for a folder or a file Cora's published setting, without a teacher."""
    recipe = _RECIPES.get(source.lower())
    return recipe() if recipe else NodeRecipe(Path(source).stem, GraphConfig(source))


def build_nodes(recipe: NodeRecipe, told: Callable[[str], None] | None = None) -> NodeJob:
    """Read the graph, draw the weights from the seed, train the teacher if there is one, and join them.

    `told` gets a line before the teacher is trained, once everything else is known to be right. ValueError or
    FileNotFoundError, one line.
    """
    config, train = recipe.data, recipe.train
    if train.grad_accum != 1:
        raise UserError(
            f"train.grad_accum {train.grad_accum}: a batch of nodes contrasts all its nodes, it cannot be cut"
        )
    if train.amp is not None:
        raise UserError(f"train.amp {train.amp} is not for node runs; task.similarity bfloat16 is where the time goes")
    graph = load_nodes(config)
    if not any(len(graph.splits.get(split, ())) for split in ("val", "test")):
        raise UserError(f"{graph.name}: there are no validation or test nodes to evaluate on")
    if config.trust is not None:
        graph = trust_edges(graph, config.trust)
    if config.similar is not None:
        graph = add_similar(graph, config.similar)
    torch.manual_seed(train.seed)
    task = NodeClassify(build_network(recipe.model, graph.features.shape[1], graph.num_classes), recipe.task)

    if not recipe.task.distill and recipe.teacher != node_recipe(config.source).teacher:
        raise UserError("the options of teacher would be ignored: task.distill is 0, there is no teacher")
    soft = teach(graph, train.seed, recipe.teacher, told) if recipe.task.distill else None

    def batches(*, start_step: int, steps: int, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        made = NodeBatches(
            graph,
            config.batch_size,
            config.hops,
            train.seed,
            sampling=config.sampling,
            rank=rank,
            world_size=world_size,
            soft=soft,
        )
        return (made[step] for step in range(start_step, start_step + steps))

    def evaluate(*, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        return eval_batches(graph, rank=rank, world_size=world_size)

    steps = max(1, graph.num_nodes // config.batch_size)
    return NodeJob(graph, task, Loaders(batches, evaluate, config.batch_size, steps))


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
