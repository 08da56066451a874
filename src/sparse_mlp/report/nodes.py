"""The report of a run on a graph: accuracy over time, embeddings in the plane, confusion, the paper's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from sparse_mlp.errors import UserError
from sparse_mlp.report.curves import percent
from sparse_mlp.report.experts import load_section
from sparse_mlp.report.header import balance_tile, cost_tiles, run_head
from sparse_mlp.report.page import Figures, Tile
from sparse_mlp.report.predictions import reduce_predictions
from sparse_mlp.report.run import RunData, read_run
from sparse_mlp.report.sections import CurvesSection, classes_section, save_page
from sparse_mlp.report.style import BLUE, INK, MUTED, ORANGE, key_above, panel, styled, title
from sparse_mlp.report.tsne import map_figure

__all__ = ["write_node_report"]

# Hu et al., table 2: test accuracy in %, mean of ten runs on the public split.
_METHODS = ("DeepWalk", "AdaLNet", "LNet", "GCN", "GAT", "DGI", "SGC", "MLP", "Graph-MLP")
_PAPER = {
    "cora": (70.7, 80.4, 79.5, 81.5, 83.0, 82.3, 81.0, 57.8, 79.5),
    "citeseer": (51.4, 68.7, 66.2, 70.3, 72.5, 71.8, 71.9, 54.7, 73.1),
    "pubmed": (76.8, 78.1, 78.3, 79.0, 79.0, 76.8, 78.9, 73.3, 79.7),
}
# The Planetoid files number the classes without names; the names are those whose papers are as many in the original
# data sets: cora 351, 217, 418, 818, 426, 298, 180; citeseer 264 (249 and 15 without features), 590, 668, 701, 596,
# 508; pubmed 4103, 7739, 7875.
_CLASSES = {
    "cora": (
        "theory",
        "reinforcement learning",
        "genetic algorithms",
        "neural networks",
        "probabilistic methods",
        "case-based",
        "rule learning",
    ),
    "citeseer": ("AI", "machine learning", "information retrieval", "databases", "agents", "HCI"),
    "pubmed": ("diabetes, experimental", "diabetes, type 1", "diabetes, type 2"),
}


def write_node_report(
    run_dir: Path | str,
    graph: str,
    nodes: int,
    edges: int,
    embedding: NDArray[Any],
    predictions: Mapping[str, NDArray[Any]],
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write `report.html` and `figures/` into the folder of a run on a graph; returns the page's path.

    Args:
        run_dir: the run's folder, with config.json and metrics.jsonl.
        graph: its name; one of the paper's graphs is compared with the paper's table.
        nodes, edges: its size.
        embedding: (N, D), of the nodes in `predictions`.
        predictions: `index` (N,), `target` (N,), negative for a node without a label, and `logits` (N, C) of the test
            nodes; N may be 0.
        class_names: names of the C classes; default those of the folder's inputs.json, of one of the paper's graphs its
            own, else the numbers.

    UserError for names that are not as many as the classes.
    """
    run = read_run(run_dir)
    notes = [note for note in run.notes if "predictions.npz" not in note]  # they are given
    run = replace(run, config=run.config | {"kind": "nodes"}, notes=notes)
    classes = predictions["logits"].shape[1]
    known = class_names or run.classes or _CLASSES.get(graph, ())
    if class_names is not None and len(class_names) != classes:
        raise UserError(f"the graph has {classes} classes, but {len(class_names)} class names are given")
    names = [str(name) for name in known] if len(known) == classes else [str(c) for c in range(classes)]
    figures = Figures(run.path / "figures")
    found = reduce_predictions({"index": np.arange(len(embedding))} | dict(predictions)).labelled()
    accuracy = float(found.correct.mean()) if len(found.target) else None
    caption = "Test nodes are evaluated, but nothing is chosen by them: the last weights are kept."
    curves = [figures.add(_accuracy(run), "accuracy", caption)]
    if graph in _PAPER and accuracy is not None:
        caption = "Means of ten runs by the paper's table 2; this run is one seed, at its last step."
        curves.append(figures.add(_comparison(graph, 100 * accuracy), "comparison", caption))
    extra = []
    if accuracy is not None:
        labelled = predictions["target"] >= 0
        drawn = map_figure(embedding[labelled].astype(np.float64), found.target, names, "Embedding of the test nodes")
        extra = [figures.add(drawn, "embedding", "Test nodes by their embedding (t-SNE), coloured by true class.")]
    sections: dict[str, object] = {
        "curves": CurvesSection("Accuracy over the steps.", curves),
        "classes": classes_section(replace(run, predictions=found), figures, names, extra=extra),
        "load": load_section(run, figures),
    }
    head = run_head(run, _tiles(run, nodes, edges, accuracy, len(found.target)), kind="Run report · graph", title=graph)
    return save_page(run, "nodes.html.j2", head, sections)


def _tiles(run: RunData, nodes: int, edges: int, accuracy: float | None, tested: int) -> list[Tile]:
    tiles = []
    if accuracy is not None:
        tiles.append(Tile("Test accuracy", f"{100 * accuracy:.1f} %", f"of {tested:,} nodes"))
    val = run.evals.get("val_top1")
    if np.isfinite(val).any():
        tiles.append(Tile("Validation accuracy", f"{100 * val[np.isfinite(val)][-1]:.1f} %", "last evaluation"))
    tiles += [Tile("Nodes", f"{nodes:,}"), Tile("Edges", f"{edges:,}", "used in the training only")]
    loads = {name: routing.final_load() for name, routing in run.routing.items()}
    return [*tiles, *cost_tiles(run), *balance_tile(loads)]


@styled
def _accuracy(run: RunData) -> Figure:
    figure, axes = panel(5.6, 2.9)
    for series, key, label, colour in (
        (run.train, "accuracy", "training nodes", MUTED),
        (run.evals, "val_top1", "validation nodes", BLUE),
        (run.evals, "top1", "test nodes", ORANGE),
    ):
        values = series.get(key)
        known = np.isfinite(values)
        if known.any():
            axes.plot(
                series.step[known], values[known], label=label, color=colour, marker="." if known.sum() < 3 else ""
            )
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.set_xlabel("step")
    key_above(axes, labelcolor="linecolor")
    title(axes, "Accuracy")
    return figure


@styled
def _comparison(graph: str, accuracy: float) -> Figure:
    bars = sorted([*zip(_METHODS, _PAPER[graph], strict=True), ("this run", accuracy)], key=lambda bar: bar[1])
    figure, axes = panel(5.6, 2.9, left=0.85, right=0.4)
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
