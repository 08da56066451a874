from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from experiments.graphs.random_graphs import planted_graph
from sparse_mlp.data.graphs import feature_rows
from sparse_mlp.data.node_batches import NodeBatches, eval_batches, normalized_adjacency
from sparse_mlp.engine import RunFolder, TrainConfig
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig
from sparse_mlp.tasks.teacher import RandomPropagation, TeacherConfig, disagreement, train_teacher

CONFIG = TeacherConfig(hops=3, epochs=60, input_drop_rate=0.0)


def fit(graph, seed, config):
    """Probabilities of a teacher, trained in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        train = TrainConfig(steps=1, seed=seed)
        return train_teacher(graph, config, train, RunFolder(Path(folder)), torch.device("cpu"), show=False)


@pytest.fixture(scope="module")
def graph():
    return planted_graph(400, 2000, classes=3, features=24)


@pytest.fixture(scope="module")
def probabilities(graph):
    return fit(graph, 0, CONFIG)


@pytest.mark.parametrize("hops", [1, 4])
def test_without_dropout_it_is_the_papers_network(graph, hops):
    """Section 3.1: an MLP over the mean of A^0 X .. A^K X; the first layer may come before the mean."""
    torch.manual_seed(0)
    rates = {"node_drop_rate": 0.0, "input_drop_rate": 0.0, "drop_rate": 0.0}
    model = RandomPropagation(24, 3, TeacherConfig(hops=hops, samples=2, **rates)).double()
    torch.nn.init.normal_(model.bias)
    x, a = torch.from_numpy(graph.features).double(), normalized_adjacency(graph.adjacency).toarray().astype(float)
    mean = sum(torch.from_numpy(np.linalg.matrix_power(a, k)) @ x for k in range(hops + 1)) / (hops + 1)
    expected = model.fc2(F.relu(model.fc1(mean) + model.bias))
    adjacency = feature_rows(sp.csr_matrix(a))
    torch.testing.assert_close(model.eval()(x, adjacency)[0], expected)
    torch.testing.assert_close(model.train()(x, adjacency), expected.expand(2, -1, -1))


def test_samples_leave_out_whole_nodes_and_keep_the_expectation(graph):
    torch.manual_seed(0)
    model = RandomPropagation(24, 3, TeacherConfig(node_drop_rate=0.25, input_drop_rate=0.0)).train()
    x = torch.from_numpy(graph.features)
    whole, samples = model.fc1(x), model.sample(x)
    first, second = samples[:2]
    assert len(samples) == 4 and not torch.equal(first, second)
    gone = (first == 0).all(1)
    assert 0.15 < gone.float().mean() < 0.35
    torch.testing.assert_close(first[~gone], whole[~gone] / 0.75)


def test_disagreement_by_hand():
    """Probabilities (0.9, 0.1) and (0.5, 0.5): mean (0.7, 0.3), squared and normalised (0.49, 0.09) / 0.58."""
    logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log().requires_grad_()
    sharp = torch.tensor([0.49, 0.09]) / 0.58
    distances = [(torch.tensor(p) - sharp).square().sum() for p in ([0.9, 0.1], [0.5, 0.5])]
    torch.testing.assert_close(disagreement(logits, 0.5), sum(distances) / 2)
    assert disagreement(torch.zeros(3, 5, 2), 0.1) == 0
    disagreement(logits, 0.5).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("hops", 0), ("samples", 0), ("node_drop_rate", 1.0), ("temperature", 0.0), ("consistency", float("nan"))],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"teacher.{field} must be .*, got {value}"):
        TeacherConfig(**{field: value})


def test_sparse_and_unit_features_give_the_teacher_of_dense_ones(graph):
    """Stored sparse, the same features give the same teacher, to rounding."""
    config = replace(CONFIG, epochs=3)
    sparse = replace(graph, features=sp.csr_matrix(graph.features))
    np.testing.assert_allclose(fit(sparse, 0, config), fit(graph, 0, config), atol=1e-5)
    unit = replace(graph, features=graph.features / np.linalg.norm(graph.features, axis=1, keepdims=True))
    np.testing.assert_allclose(fit(graph, 0, replace(config, unit_rows=True)), fit(unit, 0, config), atol=1e-5)


def test_it_depends_on_graph_and_seed_only(graph, probabilities):
    torch.manual_seed(123)
    np.testing.assert_array_equal(fit(graph, 0, CONFIG), probabilities)
    assert not np.array_equal(fit(graph, 1, CONFIG), probabilities)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_the_student_learns_what_labels_alone_do_not_fit(graph, probabilities):
    scores = {}
    for distill in (0.0, 10.0):
        torch.manual_seed(0)
        model = GraphMlp(24, 3, hidden_dim=16, drop_rate=0.0)
        task = NodeClassify(model, NodeLossConfig(alpha=0.0, distill=distill))
        optimizer = torch.optim.Adam(task.param_groups(5e-4), lr=0.01)
        batches = NodeBatches(graph, 400, 1, 0, probabilities=probabilities)
        for step in range(60):
            task(batches[step])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        scores[distill] = task.evaluate(eval_batches(graph), torch.device("cpu")).metrics["top1"]
    assert scores[10.0] > scores[0.0] + 0.03


def test_of_several_starts_the_best_by_validation_is_taken(graph):
    config, val = replace(CONFIG, epochs=2), graph.splits["val"]
    scores = []
    for starts in (1, 2, 6):
        guess = fit(graph, 0, replace(config, starts=starts))[val].argmax(1)
        scores.append((guess == graph.labels[val]).mean())
    assert scores == sorted(scores) and scores[-1] > scores[0]


def test_without_validation_nodes_the_last_epoch_counts(graph, probabilities):
    blind = fit(replace(graph, splits={"train": graph.splits["train"]}), 0, CONFIG)
    assert blind.shape == probabilities.shape and np.isfinite(blind).all()
    with pytest.raises(ValueError, match=r"teacher\.starts 2 needs validation nodes"):
        fit(replace(graph, splits={"train": graph.splits["train"]}), 0, replace(CONFIG, starts=2))
