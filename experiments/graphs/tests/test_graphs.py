from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch_geometric")

from experiments.graphs import common, figures, robustness, table
from experiments.graphs.random_graphs import corrupt_edges, planted_graph
from sparse_mlp.jobs.nodes import GraphConfig, load_configured


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Graph-MLP with five steps, every teacher with two."""

    def fit(recipe, folder, fit=common.fit):  # type: ignore[no-untyped-def]
        if recipe.task.distill:
            recipe = replace(recipe, teacher=replace(recipe.teacher, epochs=2))
        return fit(replace(recipe, train=replace(recipe.train, steps=5)), folder)

    for program in (table, robustness):
        monkeypatch.setattr(program, "fit", fit)


def test_a_written_graph_is_read_as_it_was(tmp_path: Path):
    graph = planted_graph(1000, 3000)
    path = robustness.write_graph(graph, tmp_path / "planted" / "data.pt")
    found = load_configured(GraphConfig(str(path), row_normalize=False))
    assert (found.adjacency != graph.adjacency).nnz == 0
    assert np.array_equal(found.labels, graph.labels)
    dense = common.dense_features
    assert np.allclose(dense(found), dense(graph))
    assert all(np.array_equal(np.sort(found.splits[name]), np.sort(graph.splits[name])) for name in graph.splits)


def test_results_are_kept_and_not_made_again(tmp_path: Path):
    results = common.Results(tmp_path / "a.json")
    assert results.get("one", lambda: {"test": 81.23456, "epoch": 3}) == {"test": 81.235, "epoch": 3}
    again = common.Results(tmp_path / "a.json")
    assert again.get("one", lambda: pytest.fail("made again")) == {"test": 81.235, "epoch": 3}


def test_the_published_results_have_every_run_of_their_tables():
    runs = json.loads((common.RESULTS / "table.json").read_text())
    for graph in table.CITATION:
        for method in ("ours", "published", "mlp", "sgc", "gcn"):
            assert all(f"{graph} {method} {seed}" in runs for seed in range(10)), (graph, method)
    ours = [runs[f"cora ours {seed}"]["test"] for seed in range(10)]
    assert f"{np.mean(ours):.2f} ± {np.std(ours):.2f}" in (common.FOLDER / "README.md").read_text()


def test_the_figures_are_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    monkeypatch.setattr(figures, "read", lambda name: json.loads((common.RESULTS / f"{name}.json").read_text()))
    for draw in (figures.robustness, figures.scale, figures.inference):
        draw()
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 3


@pytest.mark.slow  # trains on Cora: about 20 s
def test_every_method_has_a_row(
    short: None, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    where = ["--runs", str(tmp_path), "--json", str(tmp_path / "table.json")]
    options = ["--seeds", "1", "--graphs", "cora", "--methods", *table.METHODS]
    monkeypatch.setattr("sys.argv", ["table", *options, *where])
    table.main()
    rows = capsys.readouterr().out
    assert all(f"| {method} | " in rows for method in table.METHODS)
    runs = json.loads((tmp_path / "table.json").read_text())
    assert len(runs) == len(table.METHODS) and all(0 < run["test"] < 100 for run in runs.values())
    assert runs["cora gcn 0"]["test"] > 75


@pytest.mark.slow  # trains on Cora: about 20 s
def test_corrupted_edges_reach_the_training(short: None, data_root: Path, tmp_path: Path):
    clean = load_configured(GraphConfig("cora"))
    graph = corrupt_edges(clean, 1.0, 1000)
    found = {method: robustness.before(method, graph, 1.0, 0, tmp_path) for method in robustness.METHODS}
    assert found["gcn"]["test"] < 50
    assert all(0 < run["test"] < 100 for run in found.values())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_corruption_replaces_that_share_of_the_edges(share):
    graph = planted_graph(400, 1200, classes=3, features=8)
    changed = corrupt_edges(graph, share, seed=0)
    assert changed.num_edges == graph.num_edges
    kept = graph.adjacency.multiply(changed.adjacency).nnz // 2
    assert kept == graph.num_edges - round(share * graph.num_edges)
    assert (changed.adjacency != changed.adjacency.T).nnz == 0 and changed.adjacency.diagonal().sum() == 0
