"""Memory and time of training on planted graphs of 10^4 to 10^6 nodes, 20 edges a node, each size in a fresh process.

    SPARSE_MLP_DATA=... python -m experiments.graphs.scale [--threads 2]      # writes results/scale.json

An epoch is nodes / 2,000 steps of 2,000 nodes each. Beside it a whole published run on Pubmed, in float32 and with
bfloat16 similarities, on one thread: the authors' code takes 184 CPU s and 2.7 GB for that (imports included).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.graphs.common import bfloat16, published
from sparse_mlp.data.edges import planted_graph
from sparse_mlp.data.node_batches import NodeBatches, eval_batches
from sparse_mlp.jobs.nodes import NodesJob
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig

RESULTS = Path(__file__).parent / "results" / "scale.json"
SIZES = (10_000, 100_000, 1_000_000)


def peak_gib() -> float:
    """Most memory this process has had. Linux; getrusage's figure would begin with that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def epoch(nodes: int) -> dict[str, float]:
    imports, start = peak_gib(), time.perf_counter()
    graph = planted_graph(nodes, 20 * nodes)
    made = time.perf_counter() - start
    batches = NodeBatches(graph, 2000, 2, 0)
    torch.manual_seed(0)
    task = NodeClassify(GraphMlp(64, 10), NodeLossConfig(alpha=1.0, tau=2.0, similarity="bfloat16"))
    optimizer = torch.optim.Adam(task.param_groups(0.0), lr=1e-3)
    steps = nodes // 2000
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
        "threads": torch.get_num_threads(),
        "epoch s": round(spent, 1),
        "epoch CPU s": round(cpu, 1),
        "top1": round(top1, 3),
    }


def pubmed(similarity: str) -> dict[str, float | str]:
    """The published training, evaluated at every step, without what a run writes."""
    imports, recipe = peak_gib(), published("pubmed", seed=0)
    job = NodesJob(bfloat16(recipe) if similarity == "bfloat16" else recipe)
    optimizer = torch.optim.Adam(job.task.param_groups(recipe.optim.weight_decay, None), lr=recipe.optim.lr)
    start, best = time.process_time(), {"val_top1": -1.0}
    for batch in job.loaders.train(start_step=0, steps=recipe.train.steps, rank=0, world_size=1):
        job.task.train()
        optimizer.zero_grad()
        job.task(batch)["loss"].backward()
        optimizer.step()
        found = job.task.evaluate(job.loaders.evaluate(rank=0, world_size=1), torch.device("cpu")).metrics
        best = max(best, found, key=lambda metrics: metrics["val_top1"])
    return {
        "similarity": similarity,
        "imports GiB": round(imports, 2),
        "peak GiB": round(peak_gib(), 2),
        "training CPU s": round(time.process_time() - start, 1),
        "CPU s with imports and load": round(time.process_time(), 1),
        "test": round(100 * best["top1"], 1),
    }


def alone(job: str, threads: int) -> dict[str, float]:
    """One measurement in a process of its own: the peak of memory is that of the process."""
    command = [sys.executable, "-m", "experiments.graphs.scale", "--job", job, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--job", help="one measurement only, printed: a number of nodes, float32 or bfloat16 (Pubmed)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.job:
        print(json.dumps(epoch(int(args.job)) if args.job.isdigit() else pubmed(args.job)))
        return
    found = {
        "planted": [alone(str(nodes), args.threads) for nodes in SIZES],
        "pubmed": [alone(similarity, 1) for similarity in ("float32", "bfloat16")],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
