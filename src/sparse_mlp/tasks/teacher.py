"""A teacher for a Graph-MLP: it passes messages, before the training and never after it.

GRAND (Feng et al., "Graph Random Neural Networks", https://arxiv.org/abs/2005.11079) learns the labelled nodes, and to
say the same of a node whatever nodes around it are left out; the student, which sees no edges, learns the teacher's
probabilities of all nodes, as in GLNN (Zhang et al., "Graph-less Neural Networks", https://arxiv.org/abs/2110.08727).

One thing is done in another order: the first layer comes before the propagation and not after it. Both are linear, so
without dropout of features the network is the same, but it is `hidden_dim` numbers a node that travel along the edges.

Legend: N nodes, F features, S samples, D hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from sparse_mlp.data.graphs import Graph, feature_rows, normalized_adjacency
from sparse_mlp.errors import UserError
from sparse_mlp.models.graph_mlp import SparseLinear, drop_features

__all__ = ["TeacherConfig", "teach"]

DENSE_FROM = 0.05  # share of features that are not zero; from there on a dense product is the faster one


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher of `task.distill`; the defaults are GRAND's for Cora (Feng et al., appendix)."""

    hops: int = 8
    """Farthest neighbours that a node's prediction is made from: a mean over 0 to this many steps."""

    samples: int = 4
    """Random subsets of the nodes in a step, whose predictions are to agree."""

    node_drop_rate: float = 0.5
    """Share of the nodes left out of a sample."""

    input_drop_rate: float = 0.5
    """Dropout on the features."""

    drop_rate: float = 0.5
    """Dropout on the hidden layer."""

    consistency: float = 1.0
    """Weight of the agreement: squared distance of each sample's probabilities from the sharpened mean of all."""

    temperature: float = 0.5
    """Sharpening of that mean; 1 leaves it as it is."""

    unit_rows: bool = False
    """Scale the features of a node to length 1."""

    hidden_dim: int = 32
    """Width of the hidden layer."""

    lr: float = 0.01
    """Learning rate of Adam."""

    weight_decay: float = 5e-4
    """As L2, on all parameters."""

    epochs: int = 300
    """Steps over the whole graph; the first one of best validation accuracy is the teacher."""

    starts: int = 1
    """Train from so many random starts; the best one of them, by validation, is the teacher."""

    def __post_init__(self) -> None:
        for name in ("hops", "samples", "hidden_dim", "epochs", "starts"):
            if getattr(self, name) < 1:
                raise UserError(f"teacher.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("node_drop_rate", "input_drop_rate", "drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"teacher.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"teacher.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("consistency", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"teacher.{name} must be at least 0 and finite, got {getattr(self, name)}")


class RandomPropagation(nn.Module):
    """A two-layer MLP over the mean of a node's 0 to `hops` step neighbourhoods; in training, of random subsets."""

    def __init__(self, features: int, classes: int, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = SparseLinear(features, config.hidden_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.hidden_dim))  # of the first layer, after the propagation
        self.fc2 = nn.Linear(config.hidden_dim, classes)
        nn.init.xavier_uniform_(self.fc1.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Features (N, F) and the normalised adjacency (N, N, CSR) to logits (S, N, C); S is 1 in evaluation."""
        samples = self.sample(x) if self.training else [self.fc1(x)]
        hidden = self.propagate(torch.cat(samples, 1), adjacency)
        hidden_SND = hidden.unflatten(1, (len(samples), -1)).transpose(0, 1) + self.bias
        return self.fc2(F.dropout(hidden_SND.relu(), self.config.drop_rate, self.training))

    def sample(self, x: Tensor) -> list[Tensor]:
        """The first layer's outputs (N, D), `samples` times, each time without other features and other nodes."""
        config, count = self.config, self.config.samples
        if config.input_drop_rate:
            outputs = [self.fc1(drop_features(x, config.input_drop_rate)) for _ in range(count)]
        else:
            outputs = [self.fc1(x)] * count
        return [output * F.dropout(torch.ones(len(output), 1), config.node_drop_rate) for output in outputs]

    def propagate(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Mean over k = 0 .. hops of A^k x."""
        total = x
        for _ in range(self.config.hops):
            x = adjacency @ x
            total = total + x
        return total / (self.config.hops + 1)


def disagreement(logits_SNC: Tensor, temperature: float) -> Tensor:
    """Mean squared distance of the samples' probabilities from their sharpened mean, which gets no gradient."""
    probabilities = logits_SNC.softmax(-1)
    sharp = (probabilities.detach().mean(0).log() / temperature).softmax(-1)
    return (probabilities - sharp).square().sum(-1).mean()


def teach(
    graph: Graph, seed: int, config: TeacherConfig | None = None, told: Callable[[str], None] | None = None
) -> np.ndarray:
    """Probabilities (N, C), float32, of a teacher trained on the graph; a pure function of its arguments.

    They are those of the first epoch of best validation accuracy (of equal ones, that of the lowest validation loss);
    of the last epoch where there are no validation nodes. The random state of the caller stays as it is. `told` gets a
    line before it begins.
    ValueError for several starts without validation nodes to choose by.
    """
    config = config or TeacherConfig()
    if config.starts > 1 and not len(graph.splits.get("val", ())):
        raise UserError(f"{graph.name}: teacher.starts {config.starts} needs validation nodes to choose by")
    if told is not None:
        told("training the teacher first: seconds to a minute")
    adjacency, x = feature_rows(normalized_adjacency(graph.adjacency)), _features(graph, config.unit_rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [_train(graph, x, adjacency, config) for _ in range(config.starts)]
    return max(found, key=lambda scored: scored[0])[1].numpy()


def _train(graph: Graph, x: Tensor, adjacency: Tensor, config: TeacherConfig) -> tuple[tuple[float, float], Tensor]:
    """One teacher from a random start: its score, and its probabilities."""
    labels = torch.from_numpy(graph.labels)
    train, val = (torch.from_numpy(graph.splits.get(split, np.empty(0, np.int64))) for split in ("train", "val"))
    model = RandomPropagation(x.shape[1], graph.num_classes, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    best, taught = (-1.0, 0.0), torch.empty(0)
    for _ in range(config.epochs):
        model.train()
        logits_SNC = model(x, adjacency)
        loss = F.cross_entropy(logits_SNC[:, train].flatten(0, 1), labels[train].repeat(config.samples))
        loss = loss + config.consistency * disagreement(logits_SNC, config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(x, adjacency)[0]
        score = _score(logits[val], labels[val]) if len(val) else best
        if score > best or not len(val):
            best, taught = score, logits.softmax(1)
    return best, taught


def _features(graph: Graph, unit_rows: bool) -> Tensor:
    x = feature_rows(normalize(graph.features) if unit_rows else graph.features)
    few = x.layout != torch.strided and len(x.values()) < DENSE_FROM * x.numel()
    return x if few or x.layout == torch.strided else x.to_dense()


def _score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """What epochs are compared by: accuracy, then low loss."""
    right = (logits.argmax(1) == labels).float().mean().item()
    return right, -F.cross_entropy(logits, labels).item()
