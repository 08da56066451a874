"""What the graph programs share: Graph-MLP's settings, PyTorch Geometric's GCN and SGC, resumable results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments.runs import finish
from sparse_mlp import recipes
from sparse_mlp.data.graphs import Graph, feature_rows
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.jobs.nodes import GraphConfig, NetworkConfig, NodesRecipe
from sparse_mlp.models.graph_mlp import SparseLinear, drop_features
from sparse_mlp.tasks.nodes import NodeLossConfig

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"

_LOSSES = {
    "citeseer": NodeLossConfig(alpha=1.0, tau=0.5),
    "pubmed": NodeLossConfig(alpha=100.0, tau=1.0),
}


def published(name: str, seed: int) -> NodesRecipe:
    """The authors' setting for a graph; Cora's for one that they did not train on."""
    return NodesRecipe(
        name=name,
        data=GraphConfig(name),
        task=_LOSSES.get(name, NodeLossConfig()),
        optim=OptimConfig(opt="adam", lr=0.1 if name == "pubmed" else 1e-3, weight_decay=5e-3),
        schedule=ScheduleConfig(sched="constant"),
        train=_training(seed),
    )


def ours(name: str, seed: int) -> NodesRecipe:
    """What `sparse-mlp train NAME` trains."""
    recipe = recipes.get(name)
    assert isinstance(recipe, NodesRecipe)
    return replace(recipe, train=replace(_training(seed), steps=recipe.train.steps))


def plain(graph: Graph, seed: int) -> NodesRecipe:
    """The same network on labels alone; the batch holds the training nodes and as many others, which do nothing."""
    data = GraphConfig(graph.name, hops=1, batch_size=2 * len(graph.splits["train"]))
    return replace(published("cora", seed), name=graph.name, data=data, task=NodeLossConfig(alpha=0.0))


def with_experts(recipe: NodesRecipe) -> NodesRecipe:
    """Four experts for the second layer, at as many multiply-adds: 2 x 256 x 128 = 256 x 256."""
    return replace(recipe, model=NetworkConfig(num_experts=4, top_k=1, expert_dim=128))


def bfloat16(recipe: NodesRecipe) -> NodesRecipe:
    return replace(recipe, task=replace(recipe.task, similarity="bfloat16"))


def _training(seed: int) -> TrainConfig:
    return TrainConfig(steps=400, seed=seed, threads=1, log_every=100, eval_every=1, save_every=400)


def fit(recipe: NodesRecipe, folder: Path) -> dict[str, Any]:
    """Train in a folder what is missing there; accuracies in percent.

    Those at the first step of best validation accuracy, or at the last one where the learning rate falls to 0.
    """
    start = time.process_time()
    run = finish(recipe, folder)
    lines = map(json.loads, run.folder.metrics_path.read_text().splitlines())
    evals = [line for line in lines if line["kind"] == "eval" and line["step"]]
    last = evals[-1]
    best = last if recipe.schedule.sched == "cosine" else max(evals, key=lambda line: line["val_top1"])
    return {
        "val": 100 * best["val_top1"],
        "test": 100 * best["top1"],
        "epoch": best["step"] - 1,
        "last": 100 * last["top1"],
        "cpu_s": time.process_time() - start,
    }


def _accuracy(logits: torch.Tensor, graph: Graph, ids: np.ndarray) -> float:
    return (logits.argmax(1).numpy() == graph.labels[ids]).mean().item() * 100


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
    """A JSON file of finished runs: a program that was killed goes on where it was."""

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
