"""Accuracy with a share of the edges replaced by random ones, at test time and before training.

    SPARSE_MLP_DATA=... python -m experiments.graphs.robustness [--graphs cora] [--seeds 2] [--methods ...]

Before training, three networks are trained on the corrupted graph: on all edges; on the edges whose ends have
similar features, with edges to each node's five most similar ones ("trust"); and on labels alone. "validated" is the
one of best validation accuracy. At test time Graph-MLP has no edges that could be corrupted; GCN is trained on the
clean graph and tested on the corrupted one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.graphs.common import (
    RESULTS,
    Gcn,
    Results,
    bfloat16,
    dense_features,
    edge_index,
    fit,
    fit_gcn,
    ours,
    plain,
    published,
)
from experiments.graphs.random_graphs import corrupt_edges
from sparse_mlp.data.graphs import Graph
from sparse_mlp.jobs.nodes import GraphConfig, load_configured

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
TRUST, SIMILAR = 0.1, 5  # on Cora two in three true edges are above, one in five random pairs
METHODS = ("gcn", "published", "ours", "trust", "mlp")


def before(method: str, graph: Graph, share: float, seed: int, runs: Path) -> dict[str, Any]:
    """Train on a corrupted graph; the runs read it from a file, as any graph of a user's own."""
    if method == "gcn":
        return fit_gcn(graph, seed)
    if method == "mlp":
        recipe = plain(graph, seed)
    else:
        recipe = bfloat16(published(graph.name, seed) if method == "published" else ours(graph.name, seed))
    data = replace(recipe.data, source=str(write_graph(graph, runs / f"{graph.name}-{share}-seed{seed}" / "data.pt")))
    if method == "trust":
        data = replace(data, min_similarity=TRUST, knn_edges=SIMILAR)
    folder = runs / f"{graph.name}-{share}-{method}-seed{seed}"
    return fit(replace(recipe, data=replace(data, row_normalize=False)), folder)


def write_graph(graph: Graph, path: Path) -> Path:
    """The graph as a `torch_geometric.data.Data` in a file of its own; its features are normalised already."""
    from torch_geometric.data import Data

    path.parent.mkdir(parents=True, exist_ok=True)
    masks = {}
    for split in ("train", "val", "test"):
        masks[f"{split}_mask"] = torch.zeros(graph.num_nodes, dtype=torch.bool)
        masks[f"{split}_mask"][torch.from_numpy(graph.splits[split])] = True
    data = Data(x=dense_features(graph), edge_index=edge_index(graph), y=torch.from_numpy(graph.labels), **masks)
    torch.save(data, path)
    return path


def gcn_at_test(graph: Graph, seed: int) -> dict[str, Any]:
    """GCN trained once on the clean graph, tested on every corrupted one."""
    kept: list[Gcn] = []
    fit_gcn(graph, seed, keep=kept)
    model, x, ids = kept[0].eval(), dense_features(graph), graph.splits["test"]
    found = {}
    for share in SHARES:
        model.first._cached_edge_index = model.second._cached_edge_index = None
        with torch.no_grad():
            guess = model(x, edge_index(corrupt_edges(graph, share, 1000 + seed))).argmax(1).numpy()
        found[str(share)] = float((guess[ids] == graph.labels[ids]).mean() * 100)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--graphs", nargs="+", default=["cora"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--runs", type=Path, default=Path("runs/graphs"), help="folder of the runs")
    parser.add_argument("--json", type=Path, default=RESULTS / "robustness.json", help="finished runs are here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(args.json)
    for name in args.graphs:
        clean = load_configured(GraphConfig(name))
        for seed in range(args.seeds):
            results.get(f"{name} test gcn {seed}", lambda g=clean, s=seed: gcn_at_test(g, s))
            for share in SHARES:
                graph = corrupt_edges(clean, share, 1000 + seed)
                for method in args.methods:
                    key = key_of(name, share, method, seed)
                    found = results.get(key, lambda m=method, g=graph, c=share, s=seed: before(m, g, c, s, args.runs))
                    print(f"{key}: {found['test']:.1f}", flush=True)
        if set(args.methods) == set(METHODS):
            show(name, results.runs, args.seeds)


def key_of(graph: str, share: float, method: str, seed: int) -> str:
    """The plain MLP sees no edge: one run serves every share."""
    return f"{graph} {0.0 if method == 'mlp' else share} {method} {seed}"


def show(name: str, runs: dict[str, Any], seeds: int) -> None:
    print(f"\n| {name}, trained on the corrupted graph | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    for method in (*METHODS, "validated"):
        cells = []
        for share in SHARES:
            tests = []
            for seed in range(seeds):
                tried = [runs[key_of(name, share, m, seed)] for m in ("ours", "trust", "mlp")]
                run = (
                    max(tried, key=lambda r: r["val"])
                    if method == "validated"
                    else runs[key_of(name, share, method, seed)]
                )
                tests.append(run["test"])
            cells.append(f"{np.mean(tests):.1f}")
        print(f"| {method} | " + " | ".join(cells) + " |")
    cells = [f"{np.mean([runs[f'{name} test gcn {s}'][str(share)] for s in range(seeds)]):.1f}" for share in SHARES]
    print("| gcn, corrupted at test time only | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
