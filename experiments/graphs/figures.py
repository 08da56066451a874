"""The figures of README.md from the JSON files in results/: python -m experiments.graphs.figures"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
LABELS = {
    "gcn": "GCN",
    "published": "Graph-MLP, published",
    "ours": "Graph-MLP, ours",
    "trust": "ours, similar features trusted",
    "mlp": "MLP, labels alone",
    "validated": "best of ours, trusted, labels by validation",
}


def read(name: str) -> Any:
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def key(graph: str, share: float, method: str, seed: str) -> str:
    return f"{graph} {0.0 if method == 'mlp' else share} {method} {seed}"


def robustness(graph: str = "cora") -> None:
    """Means of the seeds that every method has at every share."""
    runs = read("robustness")
    found = {tuple(key.split(" ")) for key in runs if key.startswith(graph) and " test " not in key}
    shares = sorted({float(share) for _, share, _, _ in found})
    tried = ("ours", "trust", "mlp")
    seeds = [
        seed
        for seed in sorted({seed for *_, seed in found})
        if all(
            key(graph, share, method, seed) in runs for share in shares for method in LABELS if method != "validated"
        )
    ]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    before, test = figure.subplots(1, 2, sharey=True)
    for method, label in LABELS.items():
        means = []
        for share in shares:
            tests = []
            for seed in seeds:
                names = tried if method == "validated" else (method,)
                candidates = [runs[key(graph, share, name, seed)] for name in names]
                tests.append(max(candidates, key=lambda run: run["val"])["test"])
            means.append(np.mean(tests))
        style = {"linestyle": "--", "color": "black"} if method == "validated" else {}
        before.plot([100 * share for share in shares], means, marker=".", label=label, **style)
    before.set_title(f"corrupted before training ({len(seeds)} seeds)", fontsize=9)
    corrupted = [runs[f"{graph} test gcn {seed}"] for seed in seeds]
    test.plot([100 * float(s) for s in corrupted[0]], np.mean([list(c.values()) for c in corrupted], 0), marker=".")
    test.axhline(np.mean([runs[f"{graph} 0.0 ours {seed}"]["test"] for seed in seeds]), color="C2")
    test.set_title("at test time only (Graph-MLP sees no edges)", fontsize=9)
    for axes in (before, test):
        axes.set_xlabel("edges replaced by random ones, %")
        axes.grid(alpha=0.3)
    before.set_ylabel(f"test accuracy on {graph.capitalize()}, %")
    before.legend(fontsize=6)
    figure.savefig(FOLDER / "robustness.png", dpi=90)


def scale() -> None:
    rows = read("scale")["planted"]
    edges = [row["edges"] for row in rows]
    figure = Figure(figsize=(8, 3), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    memory.loglog(edges, [row["peak GiB"] - row["imports GiB"] for row in rows], marker="o")
    memory.set_ylabel("peak memory less imports, GiB")
    seconds.loglog(edges, [row["epoch CPU s"] for row in rows], marker="o")
    seconds.set_ylabel("CPU seconds an epoch")
    for axes in (memory, seconds):
        axes.set_xlabel("edges (20 a node), two threads")
        axes.grid(alpha=0.3)
    figure.savefig(FOLDER / "scale.png", dpi=90)


def inference() -> None:
    rows = read("inference")
    names = ["GCN-16", "GCN-256", "Graph-MLP all, dense features", "Graph-MLP 1024", "Graph-MLP 1"]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        axes.bar(np.arange(len(rows)) + 0.16 * (i - 2), [row[name] for row in rows], 0.16, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [f"{row['graph']}\n{row['nodes']:,}" for row in rows], fontsize=7)
    axes.set_ylabel("CPU milliseconds, one thread")
    axes.legend(fontsize=6)
    figure.savefig(FOLDER / "inference.png", dpi=90)


if __name__ == "__main__":
    for draw in (robustness, scale, inference):
        draw()
