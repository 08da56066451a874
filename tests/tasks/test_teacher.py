from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_mlp.data.graphs import NodeBatches, eval_batches, normalized_adjacency, planted_graph
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig

pytest.importorskip("torch_geometric")
from sparse_mlp.tasks.teacher import Appnp, teach


@pytest.fixture(scope="module")
def graph():
    return planted_graph(400, 2000, classes=3, features=24)


@pytest.fixture(scope="module")
def taught(graph):
    return teach(graph, 0)


def test_it_propagates_predictions_ten_steps(graph):
    """Eq. 5 of the paper, naively: Z = 0.9 A Z + 0.1 H."""
    torch.manual_seed(0)
    model = Appnp(24, 3).eval()
    coo = graph.adjacency.tocoo()
    x, edges = torch.from_numpy(graph.features), torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    with torch.no_grad():
        z = h = model.fc2(F.relu(model.fc1(x)))
        dense = torch.from_numpy(normalized_adjacency(graph.adjacency).toarray())
        for _ in range(10):
            z = 0.9 * dense @ z + 0.1 * h
        torch.testing.assert_close(model(x, edges), z, atol=1e-5, rtol=1e-4)


def test_it_depends_on_graph_and_seed_only(graph, taught):
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(teach(graph, 0), taught)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not np.array_equal(teach(graph, 1), taught)
    np.testing.assert_allclose(taught.sum(1), 1, atol=1e-5)


def test_the_student_learns_what_labels_alone_do_not_teach(graph, taught):
    scores = {}
    for distill in (0.0, 10.0):
        torch.manual_seed(0)
        model = GraphMlp(24, 3, hidden_dim=16, drop_rate=0.0)
        task = NodeClassify(model, NodeLossConfig(alpha=0.0, distill=distill))
        optimizer = torch.optim.Adam(task.param_groups(5e-4), lr=0.01)
        batches = NodeBatches(graph, 400, 1, 0, soft=taught)
        for step in range(60):
            task(batches[step])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        scores[distill] = task.evaluate(eval_batches(graph), torch.device("cpu")).metrics["top1"]
    assert scores[10.0] > scores[0.0] + 0.03


def test_without_validation_nodes_the_last_epoch_counts(graph, taught):
    blind = teach(replace(graph, splits={"train": graph.splits["train"]}), 0)
    assert blind.shape == taught.shape and np.isfinite(blind).all()
