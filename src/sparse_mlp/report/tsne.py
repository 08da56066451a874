"""Features projected to two dimensions by t-SNE, and the figure of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from sparse_mlp.report.predictions import Floats, Ints
from sparse_mlp.report.style import clip, expert_colours, panel, styled, title

MANY_CLASSES = 16  # more cannot be told apart by colour
FEW_POINTS = 10  # too few for t-SNE
MAX_POINTS = 2000  # t-SNE takes seconds for these


def project(features: Floats) -> Floats:
    """Project the l2-normalised features (N, D) to (N, 2) by t-SNE, or for few points by PCA."""
    points = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if len(points) < 2 or np.ptp(points, axis=0).max() < 1e-9:  # all alike: a collapse
        return np.zeros((len(points), 2))
    if len(points) < FEW_POINTS:
        plane = PCA(min(2, points.shape[1])).fit_transform(points)
        return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(points)


@styled
def map_figure(features: Floats, labels: Ints, names: Sequence[str], heading: str) -> Figure:
    """Draw features (N, D) in the plane, coloured by class; of many points a fixed choice of 2,000.

    Up to 16 classes have a legend; more are drawn in one ramp of colours, without one.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(features))[:MAX_POINTS])
    plane, labels = project(features[rows]), labels[rows]
    present = np.unique(labels)
    colours = expert_colours(len(present))
    legend = len(present) <= MANY_CLASSES
    shown = [clip(names[c], 40) for c in present]
    right = 0.45 + 0.075 * max((len(name) for name in shown), default=0) if legend else 0.1
    figure, axes = panel(5.6 + right, 4.6, left=0.1, right=right, bottom=0.1, top=0.4)
    for label, colour, name in zip(present, colours, shown, strict=True):
        own = labels == label
        # a label that begins with "_" would be left out of the legend
        axes.scatter(plane[own, 0], plane[own, 1], s=9, linewidths=0, color=colour, label=f" {name}")
    axes.set_axis_off()
    if legend and len(present):
        look = {"title": "class", "alignment": "left", "markerscale": 1.8, "handletextpad": 0}
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), **look)
    title(axes, heading)
    return figure
