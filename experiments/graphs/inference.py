"""Inference of Graph-MLP beside PyG's GCN (normalisation cached), one thread: a batch of nodes, and the whole graph.

    SPARSE_MLP_DATA=... python -m experiments.graphs.inference

GCN has to run over the graph whatever the number of nodes asked for. All
interleaved in one process; medians of CPU time, which waiting for a shared core does not change.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from experiments.graphs.common import Gcn, dense_features, edge_index
from experiments.graphs.random_graphs import planted_graph
from sparse_mlp.data.graphs import feature_rows
from sparse_mlp.jobs.nodes import GraphConfig, load_configured
from sparse_mlp.models.graph_mlp import GraphMlp

RESULTS = Path(__file__).parent / "results" / "inference.json"


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in runs.items():
            start = time.process_time()
            run()
            taken[name].append((time.process_time() - start) * 1e3)
    return {name: round(statistics.median(values[1:]), 3) for name, values in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    graphs = [load_configured(GraphConfig(name)) for name in ("cora", "citeseer", "pubmed", "photo", "computers")]
    graphs += [planted_graph(nodes, 10 * nodes) for nodes in (10_000, 100_000)]
    rows = []
    for graph in graphs:
        x, edges = dense_features(graph), edge_index(graph)
        models = {width: Gcn(x.shape[1], graph.num_classes, width).eval() for width in (16, 256)}
        mlp = GraphMlp(x.shape[1], graph.num_classes).eval()
        runs: dict[str, Callable[[], object]] = {
            f"GCN-{width}": (lambda m=model, x=x, e=edges: m(x, e)) for width, model in models.items()
        }
        sparse = feature_rows(graph.features)
        runs["Graph-MLP all, dense features"] = lambda m=mlp, x=x: m(x)
        if sparse.layout == torch.sparse_csr:
            runs["Graph-MLP all, sparse features"] = lambda m=mlp, s=sparse: m(s)
        for batch in (1, 32, 1024):
            part = feature_rows(graph.features, np.arange(batch))
            runs[f"Graph-MLP {batch}"] = lambda m=mlp, p=part: m(p)
        with torch.no_grad():
            row = {"graph": graph.name, "nodes": graph.num_nodes, "edges": graph.num_edges, **medians(runs, 7)}
        rows.append(row)
        print(row, flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
