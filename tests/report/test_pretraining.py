"""The page of a pre-training run: its map and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.report.pages import Page

from sparse_mlp.report.pretraining import Neighbourhood, write_pretraining_report
from sparse_mlp.report.tsne import map_figure, project

MakeRun = Callable[..., Path]


def neighbourhood(names: list[str], images: int) -> Neighbourhood:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    labels = np.arange(images) % len(names)
    near = [(pixels, 0, 0.9), (pixels, 1, 0.5)]
    return Neighbourhood(rng.normal(size=(images, 5)), labels, names, [(pixels, 0), (pixels, 1)], [near, near])


@pytest.mark.parametrize(("images", "way"), [(30, "t-SNE"), (6, "their principal components"), (1, "their principal")])
def test_a_map_with_its_legend_and_neighbours(make_run: MakeRun, images: int, way: str) -> None:
    names = ["<b>[red]", "_dog & cat"]
    page = Page(write_pretraining_report(make_run(layers={}), neighbourhood(names, images)))
    assert page.sections() == ["curves", "map", "neighbours", "classes"]
    assert way in page.text and "1 of 2 are of its class" in page.text
    assert "<b>[red]" in page.text and "b" not in {tag for tag, _ in page.tags}


def test_the_legend_names_every_class_that_occurs() -> None:
    features = np.random.default_rng(0).normal(size=(8, 4))
    (axes,) = map_figure(features, np.array([0, 2] * 4), ["a", "b", "_c"], "Map").axes
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == ["a", "_c"]
    assert axes.get_legend().get_title().get_text() == "class"
    (many,) = map_figure(
        np.random.default_rng(0).normal(size=(17, 4)), np.arange(17), [str(c) for c in range(17)], ""
    ).axes
    assert many.get_legend() is None


def test_points_of_one_dimension_and_of_none_lie_in_the_plane() -> None:
    assert project(np.array([[1.0], [-1.0], [1.0]])).shape == (3, 2)
    assert project(np.zeros((0, 4))).shape == (0, 2)


def test_features_that_are_all_one_lie_in_one_point() -> None:
    assert (project(np.ones((40, 3))) == 0).all()
