"""The report of a pre-training run: curves, a map of the test features, nearest neighbours as pictures, the kNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from sparse_mlp.report import page
from sparse_mlp.report.experts import load_section
from sparse_mlp.report.page import TITLES, Figures
from sparse_mlp.report.report import class_names, classes_section, curves_section, header, save_page
from sparse_mlp.report.run import Floats, Ints, read_run
from sparse_mlp.report.samples import Pixels
from sparse_mlp.report.style import expert_colours, panel, styled

_MANY = 16  # classes that colours can tell apart
_FEW = 10  # points too few for t-SNE


@dataclass(frozen=True)
class Neighbourhood:
    """Where test images lie among the others.

    features: (N, D) of N test images. labels: (N,) their classes. names: of all classes.
    queries: examples as (pixels, class). neighbours: of each example the nearest training images, (pixels, class,
    cosine), nearest first.
    """

    features: Floats
    labels: Ints
    names: Sequence[str]
    queries: Sequence[tuple[Pixels, int]]
    neighbours: Sequence[Sequence[tuple[Pixels, int, float]]]


def write_pretraining_report(
    run_dir: Path | str, neighbourhood: Neighbourhood | None = None, *, macs: int | None = None
) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of a pre-training run, finished or not; its path.

    FileNotFoundError or ValueError, one line, for a folder that is no run or whose files do not parse.
    """
    run = read_run(run_dir)
    figures = Figures(run.path / "figures")
    parts = [("curves", curves_section(run, figures))]
    if neighbourhood is not None:
        parts += [("map", _map(neighbourhood, figures)), ("neighbours", _neighbours(neighbourhood))]
    parts += [
        ("classes", classes_section(run, figures, class_names(run, None), None)),
        ("load", load_section(run, figures)),
    ]
    present = [(anchor, html) for anchor, html in parts if html]
    body = "\n".join([header(run, macs, [anchor for anchor, _ in present]), *(html for _, html in present)])
    return save_page(run, body)


def _map(shown: Neighbourhood, figures: Figures) -> str:
    lead = (
        f"The features of {len(shown.features):,} test images in the plane, by t-SNE; colours are the true classes, "
        "which the training never saw. Islands of one colour are classes that it found by itself."
    )
    if len(shown.features) < _FEW:
        lead = lead.replace("t-SNE", "their principal components")
    present = [int(c) for c in np.unique(shown.labels)]
    many = len(present) > _MANY
    key = "" if many else page.colour_key(expert_colours(len(present)), [shown.names[c] for c in present])
    drawn = figures.add(map_figure(shown.features, shown.labels), "map", "", alt="map of the test features")
    return page.section("map", TITLES["map"], lead, key, page.row([drawn], "wide"))


@styled
def map_figure(features: Floats, labels: Ints) -> Figure:
    """Draw features (N, D) in the plane, coloured by class."""
    points = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    plane = _plane(points)
    present = np.unique(labels)
    colours = np.array(expert_colours(len(present)))[np.searchsorted(present, labels)]
    figure, axes = panel(7.5, 5.4, left=0.1, right=0.1, bottom=0.1, top=0.1)
    axes.scatter(plane[:, 0], plane[:, 1], c=colours, s=9, linewidths=0)
    axes.set_axis_off()
    return figure


def _plane(points: Floats) -> Floats:
    if len(points) < _FEW:
        return PCA(2).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0).fit_transform(points)


def _neighbours(shown: Neighbourhood) -> str:
    lead = (
        "One test image of each class, and the training images whose features are nearest to its own, with the cosine "
        "between them. Nobody told the model which images belong together."
    )
    cards = []
    for (pixels, label), near in zip(shown.queries, shown.neighbours, strict=True):
        name = shown.names[label]
        right = sum(other == label for _, other, _ in near)
        drawn = [page.image(pixels, f"test image of class {name}", "test image")]
        for other, of_class, cosine in near:
            told = shown.names[of_class] if of_class != label else "same class"
            drawn.append(
                page.image(other, f"training image of class {shown.names[of_class]}", f"{told} · {cosine:.2f}")
            )
        kind = "right" if right == len(near) else "wrong"
        head = f'{escape(name)} <span class="aside">{right} of {len(near)} are of its class</span>'
        cards.append(f'<article class="sample"><h3 class="{kind}">{head}</h3><div>{"".join(drawn)}</div></article>')
    columns = 1 + max((len(near) for near in shown.neighbours), default=0)
    grid = f'<div class="samples" style="--n:{columns}">{"".join(cards)}</div>'
    return page.section("neighbours", TITLES["neighbours"], lead, grid)
