"""Memory and time of training on planted graphs of 10^4 to 10^6 nodes, 20 edges a node, each size in a fresh process.

    python benchmarks/graph_scale.py            # writes docs/graph/scale.json
    python benchmarks/graph_scale.py pubmed     # a whole run on Pubmed: CPU seconds and peak memory

An epoch is nodes / 2,000 steps of 2,000 nodes each.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from graph_common import PUBLISHED, fit_graph_mlp
from sparse_mlp.data.graph_files import load_graph
from sparse_mlp.data.graphs import NodeBatches, eval_batches, planted_graph
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig

RESULTS = Path(__file__).parent.parent / "docs" / "graph" / "scale.json"
SIZES = (10_000, 100_000, 1_000_000)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def epoch(nodes: int, steps: int | None = None) -> dict[str, float]:
    imports, start = peak_gib(), time.perf_counter()
    graph = planted_graph(nodes, 20 * nodes)
    made = time.perf_counter() - start
    batches = NodeBatches(graph, 2000, 2, 0)
    torch.manual_seed(0)
    task = NodeClassify(GraphMlp(64, 10), NodeLossConfig(alpha=1.0, tau=2.0, similarity="bfloat16"))
    optimizer = torch.optim.Adam(task.param_groups(0.0), lr=1e-3)
    steps = steps or nodes // 2000
    start, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        task(batches[step])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    top1 = task.evaluate(eval_batches(graph), torch.device("cpu")).metrics["top1"]
    return {
        "nodes": nodes,
        "edges": graph.num_edges,
        "largest degree": int(graph.adjacency.getnnz(1).max()),
        "imports GiB": round(imports, 2),
        "peak GiB": round(peak_gib(), 2),
        "making the graph s": round(made, 1),
        "steps": steps,
        "epoch s": round(spent, 1),
        "epoch CPU s": round(cpu, 1),
        "top1": round(top1, 3),
    }


def pubmed() -> dict[str, float]:
    imports, start = peak_gib(), time.process_time()
    result = fit_graph_mlp(load_graph("pubmed"), PUBLISHED["pubmed"], 0)
    return {
        "imports GiB": round(imports, 2),
        "peak GiB": round(peak_gib(), 2),
        "CPU s with load, without imports": round(time.process_time() - start, 1),
        "CPU s in all": round(time.process_time(), 1),
        "test": result["test"],
    }


def main() -> None:
    torch.set_num_threads(2 if len(sys.argv) < 2 else 1)
    if sys.argv[1:] == ["pubmed"]:
        print(json.dumps(pubmed()))
    elif len(sys.argv) > 1:
        torch.set_num_threads(2)
        print(json.dumps(epoch(int(sys.argv[1]))))
    else:
        rows = []
        for nodes in SIZES:
            done = subprocess.run([sys.executable, __file__, str(nodes)], capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
