"""The page of a run on a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.report.pages import Page

from sparse_mlp.report.nodes import write_node_report

MakeRun = Callable[..., Path]


def predictions(classes: int, nodes: int = 40) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    target = rng.integers(classes, size=nodes)
    logits = rng.normal(size=(nodes, classes)).astype(np.float32)
    logits[np.arange(nodes), target] += 2
    return rng.normal(size=(nodes, 6)), {"index": np.arange(nodes), "target": target, "logits": logits}


def test_a_graph_of_the_paper_has_its_class_names_and_the_papers_table(make_run: MakeRun) -> None:
    run = make_run(predictions=False, layers={}, classes=0)
    embedding, found = predictions(7)
    page = Page(write_node_report(run, "cora", 2708, 5278, embedding, found))
    assert "of 40 test nodes are taken" in page.text and "images" not in page.text
    assert "neural networks" in page.text and "Nodes 2,708" in page.text
    assert {path.stem for path in (run / "figures").glob("*.png")} >= {"accuracy", "comparison", "embedding"}


def test_nodes_without_a_label_do_not_count(make_run: MakeRun) -> None:
    embedding, found = predictions(3)
    found["target"] = np.where(np.arange(40) < 10, found["logits"].argmax(1), -1)
    page = Page(
        write_node_report(make_run(predictions=False, classes=0), "mine", 50, 60, embedding, found, list("xyz"))
    )
    assert "Test accuracy 100.0 % of 10 nodes" in page.text


def test_no_labelled_test_node_leaves_the_classes_out(make_run: MakeRun) -> None:
    embedding, found = predictions(3, nodes=0)
    page = Page(write_node_report(make_run(predictions=False, layers={}), "mine", 50, 60, embedding, found))
    assert page.sections() == ["curves"] and "Test accuracy" not in page.text


def test_hostile_names(make_run: MakeRun) -> None:
    embedding, found = predictions(2)
    names = ["<script>[red]&", '"_b']
    run = make_run(predictions=False, classes=0)
    page = Page(write_node_report(run, "<i>[g]", 50, 60, embedding, found, names))
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(name in page.text for name in (*names, "<i>[g]"))


def test_names_that_do_not_fit(make_run: MakeRun) -> None:
    embedding, found = predictions(3)
    with pytest.raises(ValueError, match="3 classes, but 1 class names"):
        write_node_report(make_run(predictions=False), "mine", 50, 60, embedding, found, ["a"])
