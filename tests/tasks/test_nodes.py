from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.graphs.random_graphs import planted_graph
from sparse_mlp.data.node_batches import NodeBatches, eval_batches
from sparse_mlp.models.graph_mlp import GraphMlp, n_contrast
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig


@pytest.fixture(scope="module")
def graph():
    return planted_graph(400, 2000, classes=3, features=8)


def make(config, **options):
    torch.manual_seed(0)
    return NodeClassify(GraphMlp(8, 3, hidden_dim=16, drop_rate=0.0, **options), config)


def test_the_total_is_the_sum_of_its_parts(graph):
    teacher = np.random.default_rng(0).dirichlet([1, 1, 1], graph.num_nodes).astype(np.float32)
    task = make(NodeLossConfig(alpha=3.0, tau=0.7, distill=0.5))
    batch = NodeBatches(graph, 200, 2, 0, probabilities=teacher)[0]
    out = task(batch)
    z = task.model.forward_features(batch["features"])
    logits = task.model.forward_head(z)
    labelled = batch["target"] >= 0
    nll = torch.nn.functional.cross_entropy(logits[labelled], batch["target"][labelled])
    contrast = n_contrast(z, batch["rows"], batch["cols"], batch["weights"], 0.7)
    wanted = torch.from_numpy(teacher[batch["index"]])
    distill = -(wanted * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(out["loss"], nll + 3 * contrast + 0.5 * distill)
    assert out["accuracy"].item() == pytest.approx(
        (logits[labelled].argmax(1) == batch["target"][labelled]).float().mean().item()
    )
    assert not any(value.requires_grad for name, value in out.items() if name != "loss")


def test_the_graph_adds_accuracy_to_the_labels():
    graph = planted_graph(400, 2000, classes=3, features=24)
    scores = {}
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        task = NodeClassify(GraphMlp(24, 3, hidden_dim=16, drop_rate=0.0), NodeLossConfig(alpha=alpha))
        optimizer = torch.optim.Adam(task.param_groups(5e-3), lr=0.01)
        batches = NodeBatches(graph, 400, 2, 0)
        for step in range(100):
            task(batches[step])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        scores[alpha] = task.evaluate(eval_batches(graph), torch.device("cpu")).metrics["top1"]
    assert scores[1.0] > scores[0.0] + 0.03


def test_evaluation_keeps_the_mode_and_the_order(graph):
    task = make(NodeLossConfig()).train()
    result = task.evaluate(eval_batches(graph, size=7), torch.device("cpu"))
    assert task.training and task.model.training
    np.testing.assert_array_equal(result.predictions["index"], graph.splits["test"])
    right = result.predictions["logits"].argmax(1) == graph.labels[graph.splits["test"]]
    assert result.metrics["top1"] == pytest.approx(right.mean())
    assert 0 <= result.metrics["val_top1"] <= 1
    with pytest.raises(ValueError, match="no validation or test nodes"):
        task.evaluate(eval_batches(replace(graph, splits={})), torch.device("cpu"))


def test_only_labelled_nodes_are_counted(graph):
    """Half of the test nodes lose their label: the accuracy is that of the others; all of them are predicted."""
    task = make(NodeLossConfig())
    labels, test = graph.labels.copy(), graph.splits["test"]
    labels[test[::2]] = -1
    half = task.evaluate(eval_batches(replace(graph, labels=labels)), torch.device("cpu"))
    logits, kept = half.predictions["logits"], np.arange(len(test)) % 2 == 1
    assert half.metrics["top1"] == pytest.approx((logits.argmax(1) == graph.labels[test])[kept].mean())
    assert half.metrics["nodes"] == kept.sum() and len(logits) == len(test)
    labels[test] = -1
    none = task.evaluate(eval_batches(replace(graph, labels=labels)), torch.device("cpu"))
    assert "top1" not in none.metrics and none.metrics["nodes"] == 0 and "val_top1" in none.metrics


def test_two_ranks_learn_what_one_learns(launch, tmp_path):
    program = Path(__file__).with_name("nodes_on_ranks.py")
    results = {}
    for ranks in (1, 2):
        out, errors = str(tmp_path / f"{ranks}.pt"), []
        assert launch(program, {"out": out}, ranks=ranks, errors=errors) == [0] * ranks, errors
        results[ranks] = torch.load(out, weights_only=True)
    # a loss near 60: two units in float32's last place are 8e-6, and how many it takes depends on the processor
    assert results[2][0] == pytest.approx(results[1][0], rel=1e-6, abs=1e-5)
    for name, value in results[1][1].items():
        torch.testing.assert_close(results[2][1][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "must be at least 0 and finite, got -1.0"),
        ({"distill": float("nan")}, "must be at least 0 and finite, got 10.0 and nan"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": 1e9}, "above 40.0 float32 runs out of range"),
        ({"alpha": 0.0, "similarity": "bfloat16"}, "would be ignored: alpha is 0"),
        ({"similarity": "int8"}, "'float32' or 'bfloat16', got 'int8'"),
    ],
)
def test_wrong_losses_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        NodeLossConfig(**options)
    with pytest.raises(ValueError, match="layer_decay"):
        make(NodeLossConfig()).param_groups(0.1, 0.5)
