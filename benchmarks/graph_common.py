"""What the graph benchmarks share: one training loop, PyTorch Geometric's GCN and SGC, resumable results."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from sparse_mlp.data.graphs import Graph, feature_rows
from sparse_mlp.data.node_batches import NodeBatches
from sparse_mlp.engine import RunFolder, TrainConfig
from sparse_mlp.models.graph_mlp import GraphMlp, SparseLinear, drop_features
from sparse_mlp.recipes import graphs
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig
from sparse_mlp.tasks.teacher import TeacherConfig, train_teacher


@dataclass(frozen=True)
class Setting:
    """One Graph-MLP training: everything that is not the graph."""

    lr: float = 0.001
    weight_decay: float = 5e-3
    hops: int = 2
    batch_size: int = 2000
    epochs: int = 400
    cosine: bool = False  # the learning rate falls to 0, and the last epoch counts
    sampling: str = "published"
    loss: NodeLossConfig = field(default_factory=NodeLossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Setting:
        return replace(self, **changes)


PUBLISHED = {
    "cora": Setting(),
    "citeseer": Setting(loss=NodeLossConfig(alpha=1.0, tau=0.5)),
    "pubmed": Setting(lr=0.1, loss=NodeLossConfig(alpha=100.0, tau=1.0)),
}


def ours(name: str) -> Setting:
    """What `sparse-mlp train NAME` trains."""
    recipe = getattr(graphs, name)()
    optim = {"lr": recipe.optim.lr, "weight_decay": recipe.optim.weight_decay, "epochs": recipe.train.steps}
    return Setting(**optim, cosine=recipe.schedule.sched == "cosine", loss=recipe.task, teacher=recipe.teacher)


def _accuracy(logits: torch.Tensor, graph: Graph, ids: np.ndarray) -> float:
    return (logits.argmax(1).numpy() == graph.labels[ids]).mean().item() * 100


def fit_teacher(graph: Graph, seed: int, config: TeacherConfig) -> np.ndarray:
    """Probabilities (N, C) of a teacher, trained in a folder that is deleted."""
    with tempfile.TemporaryDirectory() as folder:
        train = TrainConfig(steps=1, seed=seed)
        return train_teacher(graph, config, train, RunFolder(Path(folder)), torch.device("cpu"), show=False)


def fit_graph_mlp(graph: Graph, setting: Setting, seed: int) -> dict[str, Any]:
    """Train; accuracies at the first epoch of best validation accuracy, or at the last one if the rate falls to 0."""
    torch.manual_seed(seed)
    model = GraphMlp(graph.features.shape[1], graph.num_classes, **setting.model)
    task = NodeClassify(model, setting.loss)
    optimizer = torch.optim.Adam(task.param_groups(setting.weight_decay), lr=setting.lr)
    schedule = CosineAnnealingLR(optimizer, setting.epochs) if setting.cosine else None
    start = time.process_time()
    teacher = fit_teacher(graph, seed, setting.teacher) if setting.loss.distill else None
    batches = NodeBatches(
        graph, setting.batch_size, setting.hops, seed, sampling=setting.sampling, probabilities=teacher
    )
    rows = {split: feature_rows(graph.features, graph.splits[split]) for split in ("val", "test")}

    def score(split: str) -> float:
        with torch.no_grad():
            guess = model.eval()(rows[split]).argmax(1).numpy()
        return (guess == graph.labels[graph.splits[split]]).mean().item() * 100

    best = {"val": -1.0}
    for epoch in range(setting.epochs):
        task.train()
        loss = task(batches[epoch])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        val = score("val")
        if val > best["val"] or setting.cosine:
            best = {"val": val, "test": score("test"), "epoch": epoch}
    return {**best, "last": score("test"), "cpu_s": time.process_time() - start}


def fit_peer(
    graph: Graph, seed: int, build: Callable[[], torch.nn.Module], forward: Callable[..., torch.Tensor], **opt: Any
) -> dict[str, Any]:
    """Full-batch training of a PyG model: Adam, best validation epoch, as in PyG's own examples."""
    torch.manual_seed(seed)
    model = build()
    groups = model.groups(opt["weight_decay"]) if hasattr(model, "groups") else model.parameters()
    decay = {} if hasattr(model, "groups") else {"weight_decay": opt["weight_decay"]}
    optimizer = torch.optim.Adam(groups, lr=opt["lr"], **decay)
    train = torch.from_numpy(graph.splits["train"])
    labels = torch.from_numpy(graph.labels)
    best, start = {"val": -1.0}, time.process_time()
    for epoch in range(opt["epochs"]):
        model.train()
        loss = F.cross_entropy(forward(model)[train], labels[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = forward(model)
        val, test = (_accuracy(logits[graph.splits[s]], graph, graph.splits[s]) for s in ("val", "test"))
        if val > best["val"]:
            best = {"val": val, "test": test, "epoch": epoch}
    return {**best, "last": test, "cpu_s": time.process_time() - start}


class Gcn(torch.nn.Module):
    """Kipf and Welling's two layers from `torch_geometric.nn.GCNConv`; the normalisation is cached.

    The first product goes over the words a node has, where the features are CSR: the same sum, several times faster.
    """

    def __init__(self, features: int, classes: int, hidden: int = 16) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first = GCNConv(features, hidden, cached=True)
        weight = self.first.lin.weight
        self.first.lin = SparseLinear(features, hidden, bias=False)
        self.first.lin.weight = weight
        self.second = GCNConv(hidden, classes, cached=True)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [
            {"params": list(self.first.parameters()), "weight_decay": weight_decay},
            {"params": list(self.second.parameters()), "weight_decay": 0.0},
        ]

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = drop_features(x, 0.5) if self.training else x
        x = F.dropout(self.first(x, edge_index).relu(), 0.5, self.training)
        return self.second(x, edge_index)


def edge_index(graph: Graph) -> torch.Tensor:
    coo = graph.adjacency.tocoo()
    return torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))


def edges_for_pyg(graph: Graph) -> torch.Tensor:
    """A list of edges, as PyG's examples have it; from 10^5 on the adjacency, which its layers take too: faster, and a
    list would hold the features of every edge's source at once, 17 GB on Physics."""
    return edge_index(graph) if graph.adjacency.nnz <= 10**5 else feature_rows(graph.adjacency)


def dense_features(graph: Graph) -> torch.Tensor:
    x = feature_rows(graph.features)
    return x.to_dense() if x.layout != torch.strided else x


def fast_features(graph: Graph) -> torch.Tensor:
    """Sparse rows where few are not zero; else a dense product is the faster one."""
    x = feature_rows(graph.features)
    return x if x.layout == torch.strided or len(x.values()) < 0.05 * x.numel() else x.to_dense()


def fit_gcn(graph: Graph, seed: int, hidden: int = 16, keep: list[Gcn] | None = None) -> dict[str, Any]:
    """`keep` takes the trained model (of the last epoch)."""
    x, edges = fast_features(graph), edges_for_pyg(graph)

    def build() -> Gcn:
        model = Gcn(graph.features.shape[1], graph.num_classes, hidden)
        if keep is not None:
            keep.append(model)
        return model

    return fit_peer(graph, seed, build, lambda m: m(x, edges), lr=0.01, weight_decay=5e-4, epochs=200)


def fit_sgc(graph: Graph, seed: int) -> dict[str, Any]:
    """PyG's `SGConv` (2 hops, cached: the propagation happens once); settings of PyG's example."""
    from torch_geometric.nn import SGConv

    x, edges = dense_features(graph), edges_for_pyg(graph)
    build = lambda: SGConv(x.shape[1], graph.num_classes, K=2, cached=True)  # noqa: E731
    return fit_peer(graph, seed, build, lambda m: m(x, edges), lr=0.2, weight_decay=5e-3, epochs=100)


class Results:
    """A JSON file of finished runs: a killed benchmark goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.runs:
            result = run()
            self.runs[key] = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.runs, indent=0, sort_keys=True) + "\n")
            part.replace(self.path)
        return self.runs[key]
