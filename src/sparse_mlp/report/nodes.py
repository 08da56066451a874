"""The report of a run on a graph: embeddings in the plane, accuracy over time, confusion."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix

_MOST_POINTS = 2000  # t-SNE takes seconds for these


def write_node_report(run_dir: Path, name: str, embedding: np.ndarray, predictions: dict[str, np.ndarray]) -> Path:
    """Write figures/*.png and report.html; `embedding` (N, D) belongs to the rows of `predictions`."""
    figures = run_dir / "figures"
    figures.mkdir(exist_ok=True)
    target, guess = predictions["target"], predictions["logits"].argmax(1)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    made = {
        "embedding": ("Test nodes by their embedding (t-SNE), coloured by true class", _map(embedding, target)),
        "accuracy": ("Accuracy over the training", _accuracy(lines)),
        "confusion": ("Confusion: true class by row, predicted by column, share of the row", _confusion(target, guess)),
    }
    parts = []
    for key, (caption, figure) in made.items():
        figure.savefig(figures / f"{key}.png", dpi=90)
        parts.append(
            f'<figure><img src="figures/{key}.png" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        )
    right = float((target == guess).mean())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>
<style>body{{font-family:sans-serif;max-width:60em;margin:2em auto}}img{{max-width:100%}}figure{{margin:2em 0}}</style>
<h1>{html.escape(name)}</h1>
<p>Test accuracy {right:.1%} on {len(target)} nodes, with the last weights; none were chosen by test accuracy.</p>
{"".join(parts)}</html>
"""
    path = run_dir / "report.html"
    path.write_text(page)
    return path


def _map(embedding: np.ndarray, target: np.ndarray) -> Figure:
    rows = np.random.default_rng(0).permutation(len(embedding))[:_MOST_POINTS]
    points = embedding[rows] / np.maximum(np.linalg.norm(embedding[rows], axis=1, keepdims=True), 1e-12)
    few = len(rows) < 10
    plane = PCA(2).fit_transform(points) if few else _tsne(points)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(plane[:, 0], plane[:, 1], c=target[rows], cmap="tab10", s=6)
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def _tsne(points: np.ndarray) -> np.ndarray:
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(points)


def _accuracy(lines: list[dict]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind, key, label in (
        ("train", "accuracy", "training nodes"),
        ("eval", "val_top1", "validation nodes"),
        ("eval", "top1", "test nodes"),
    ):
        points = [(line["step"], line[key]) for line in lines if line["kind"] == kind and key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy")
    axes.legend()
    return figure


def _confusion(target: np.ndarray, guess: np.ndarray) -> Figure:
    counts = confusion_matrix(target, guess)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 15:
        for (row, column), share in np.ndenumerate(shares):
            dark = "white" if share > 0.6 else "black"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=dark)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure
