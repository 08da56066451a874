"""The report of a pre-training run: curves, a map of the test features, nearest neighbours as pictures, the kNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_mlp.report.experts import Card, load_section
from sparse_mlp.report.header import accuracy_tile, balance_tile, cost_tiles, run_head
from sparse_mlp.report.page import Drawing, Figures, image
from sparse_mlp.report.predictions import Floats, Ints
from sparse_mlp.report.run import read_run
from sparse_mlp.report.samples import Pixels
from sparse_mlp.report.sections import class_names, classes_section, curves_section, save_page
from sparse_mlp.report.tsne import FEW_POINTS, map_figure


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
    """Write `report.html` and `figures/` into the folder of a pre-training run, finished or not; its path.

    FileNotFoundError or UserError, one line, for a folder that is no run or whose files do not parse.
    """
    run = read_run(run_dir)
    figures = Figures(run.path / "figures")
    shown = neighbourhood
    sections: dict[str, object] = {
        "curves": curves_section(run, figures),
        "map": None if shown is None else _map(shown, figures),
        "neighbours": None if shown is None else _neighbours(shown),
        "classes": classes_section(run, figures, class_names(run)),
        "load": load_section(run, figures),
    }
    balanced = balance_tile({name: routing.final_load() for name, routing in run.routing.items()})
    head = run_head(run, [*accuracy_tile(run), *cost_tiles(run, macs), *balanced], kind="Run report · pre-training")
    return save_page(run, "pretraining.html.j2", head, sections)


@dataclass(frozen=True)
class MapSection:
    """Test images in the plane."""

    lead: str
    drawing: Drawing


def _map(shown: Neighbourhood, figures: Figures) -> MapSection:
    way = "t-SNE" if len(shown.features) >= FEW_POINTS else "their principal components"
    lead = (
        f"The features of {len(shown.features):,} test images in the plane, by {way}; colours are the true classes, "
        "which the training never saw. Islands of one colour are classes that it found by itself."
    )
    drawn = map_figure(shown.features, shown.labels, shown.names, "Features of the test images")
    return MapSection(lead, figures.add(drawn, "map", "", alt="map of the test features"))


@dataclass(frozen=True)
class NeighboursSection:
    """Nearest training images of some test images."""

    lead: str
    cards: list[Card]


def _neighbours(shown: Neighbourhood) -> NeighboursSection:
    lead = (
        "One test image of each class, and the training images whose features are nearest to its own, with the cosine "
        "between them. The training saw no labels."
    )
    cards = []
    for (pixels, label), near in zip(shown.queries, shown.neighbours, strict=True):
        name = shown.names[label]
        right = sum(other == label for _, other, _ in near)
        drawn = [image(pixels, f"test image of class {name}", "test image")]
        for other, of_class, cosine in near:
            same = "same class" if of_class == label else shown.names[of_class]
            drawn.append(image(other, f"training image of class {shown.names[of_class]}", f"{same} · {cosine:.2f}"))
        cards.append(Card(name, f"{right} of {len(near)} are of its class", right == len(near), drawn))
    return NeighboursSection(lead, cards)
