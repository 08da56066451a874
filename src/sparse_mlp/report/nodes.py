"""The report of a run on a graph: embeddings in the plane, accuracy over time, confusion, the paper's table."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix

from sparse_mlp.report import page
from sparse_mlp.report.classes import confusion_figure
from sparse_mlp.report.curves import percent
from sparse_mlp.report.style import BLUE, INK, MUTED, ORANGE, expert_colours, panel, styled, title

__all__ = ["write_node_report"]

_MOST_POINTS = 2000  # t-SNE takes seconds for these

# Hu et al., table 2: test accuracy in %, mean of ten runs on the public split.
_METHODS = ("DeepWalk", "AdaLNet", "LNet", "GCN", "GAT", "DGI", "SGC", "MLP", "Graph-MLP")
_PAPER = {
    "cora": (70.7, 80.4, 79.5, 81.5, 83.0, 82.3, 81.0, 57.8, 79.5),
    "citeseer": (51.4, 68.7, 66.2, 70.3, 72.5, 71.8, 71.9, 54.7, 73.1),
    "pubmed": (76.8, 78.1, 78.3, 79.0, 79.0, 76.8, 78.9, 73.3, 79.7),
}


def write_node_report(
    run_dir: Path, graph: str, nodes: int, edges: int, embedding: np.ndarray, predictions: dict[str, np.ndarray]
) -> Path:
    """Write figures/*.png and report.html, all in one file; returns the page's path.

    Args:
        run_dir: the run's folder, with config.json and metrics.jsonl.
        graph: its name; one of the paper's graphs is compared with the paper's table.
        nodes, edges: its size.
        embedding: (N, D), of the nodes in `predictions`.
        predictions: `target` (N,) and `logits` (N, C) of the test nodes; N may be 0.
    """
    figures = page.Figures(run_dir / "figures")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    target, guess = predictions["target"], predictions["logits"].argmax(1)
    accuracy = float((target == guess).mean()) if len(target) else None
    caption = "Test nodes are looked at, but nothing is chosen by them: the last weights are kept."
    curves = [figures.add(_accuracy(lines), "accuracy", caption)]
    if graph in _PAPER and accuracy is not None:
        caption = "Means of ten runs by the paper's table 2; this run is one seed, at its last step."
        curves.append(figures.add(_comparison(graph, 100 * accuracy), "comparison", caption))
    parts = [page.section("curves", "Training", "Accuracy over the steps.", page.row(curves, "two"))]
    if accuracy is not None:
        lead = "Where the test nodes lie by their embedding (t-SNE), and which classes are taken for each other."
        names = [str(label) for label in range(predictions["logits"].shape[1])]
        counts = confusion_matrix(target, guess, labels=range(len(names)))
        shown = [figures.add(_map(embedding, target, names), "embedding", "Coloured by true class.")]
        shown.append(figures.add(confusion_figure(counts, names), "confusion", "Nodes by true and predicted class."))
        parts.append(page.section("classes", "Right and wrong", lead, page.row(shown, "two")))
    parts.append(page.config_table(json.loads((run_dir / "config.json").read_text())))
    path = run_dir / "report.html"
    body = "\n".join([_header(run_dir.name, graph, nodes, edges, lines, accuracy, len(target)), *parts])
    path.write_text(page.document(f"{graph} · {run_dir.name}", body), encoding="utf-8")
    return path


def _header(
    run: str, graph: str, nodes: int, edges: int, lines: list[dict[str, Any]], accuracy: float | None, tested: int
) -> str:
    val = [line["val_top1"] for line in lines if line["kind"] == "eval" and "val_top1" in line]
    numbers = []
    if accuracy is not None:
        numbers.append(("Test accuracy", f"{100 * accuracy:.1f} %", f"of {tested:,} nodes"))
    if val:
        numbers.append(("Validation accuracy", f"{100 * val[-1]:.1f} %", "last evaluation"))
    numbers += [("Nodes", f"{nodes:,}", ""), ("Edges", f"{edges:,}", "used in the training only")]
    return f"""<header>
<p class="eyebrow">Run report · Graph-MLP</p>
<h1>{escape(graph)}</h1>
<p class="eyebrow">{escape(run)}</p>
{page.headline(numbers)}
</header>"""


@styled
def _map(embedding: np.ndarray, target: np.ndarray, names: list[str]) -> Figure:
    rows = np.random.default_rng(0).permutation(len(embedding))[:_MOST_POINTS]
    points = embedding[rows] / np.maximum(np.linalg.norm(embedding[rows], axis=1, keepdims=True), 1e-12)
    plane = PCA(2).fit_transform(points) if len(rows) >= 2 else np.zeros((len(rows), 2))
    if len(rows) >= 10:
        perplexity = min(30.0, (len(points) - 1) / 3)
        plane = TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(points)
    figure, axes = panel(3.75, 3.4, left=0.1, right=0.7, bottom=0.1)
    for label, colour in enumerate(expert_colours(len(names))):
        own = target[rows] == label
        if own.any():
            axes.scatter(plane[own, 0], plane[own, 1], s=4, linewidths=0, color=colour, label=names[label])
    axes.set_axis_off()
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2.5, handletextpad=0.1)
    title(axes, "Embedding", margin=0.1)
    return figure


@styled
def _accuracy(lines: list[dict[str, Any]]) -> Figure:
    figure, axes = panel(3.75, 2.9)
    for kind, key, label, colour in (
        ("train", "accuracy", "training nodes", MUTED),
        ("eval", "val_top1", "validation nodes", BLUE),
        ("eval", "top1", "test nodes", ORANGE),
    ):
        points = [(line["step"], line[key]) for line in lines if line["kind"] == kind and key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="." if len(points) < 3 else "")
    axes.yaxis.set_major_formatter(percent)
    axes.set_xlabel("step")
    axes.legend(loc="lower right")
    title(axes, "Accuracy")
    return figure


@styled
def _comparison(graph: str, accuracy: float) -> Figure:
    bars = sorted([*zip(_METHODS, _PAPER[graph], strict=True), ("this run", accuracy)], key=lambda bar: bar[1])
    figure, axes = panel(3.75, 2.9, left=0.85, right=0.4)
    names, values = zip(*bars, strict=True)
    colours = [ORANGE if name == "this run" else BLUE if name == "Graph-MLP" else "#a9b0ba" for name in names]
    axes.scatter(values, range(len(values)), c=colours, s=28)
    axes.set_yticks(range(len(values)), names)
    for place, value in enumerate(values):
        axes.text(value + 0.9, place, f"{value:.1f}", va="center", fontsize=7, color=INK)
    axes.set_xlim(min(values) - 2, max(values) + 3)
    axes.set_xlabel("test accuracy, %")
    title(axes, "Beside the paper's table")
    return figure
