from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse_mlp.cli.main import main
from sparse_mlp.data.graph_files import load_graph
from sparse_mlp.data.graphs import planted_graph

SHORT = ["--train.steps", "12", "--train.threads", "1", "--data.batch-size", "200", "--train.eval-every", "6"]


def save_graph(path, left_out=()):
    """A graph as a saved `Data`, some of its masks empty."""
    data = pytest.importorskip("torch_geometric.data")
    graph = planted_graph(400, 2000, classes=3, features=8)
    coo = graph.adjacency.tocoo()
    masks = {f"{name}_mask": torch.zeros(400, dtype=torch.bool) for name in graph.splits}
    for name, ids in graph.splits.items():
        masks[f"{name}_mask"][ids] = name not in left_out
    edges = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    made = data.Data(x=torch.from_numpy(graph.features), edge_index=edges, y=torch.from_numpy(graph.labels), **masks)
    torch.save(made, path / "data.pt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_graph(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["nodes", "train", str(folder), "--out", str(out), *SHORT]) == 0
    return out


def test_training_leaves_metrics_weights_and_a_report(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [6, 12]
    assert {"top1", "val_top1", "loss"} <= next(line for line in lines if line["kind"] == "eval").keys()
    page = (run / "report.html").read_text()
    assert "Test accuracy" in page and page.count("<svg") == 5
    assert {path.stem for path in (run / "figures").iterdir()} == {
        "accuracy",
        "calibration",
        "class_accuracy",
        "confusion_matrix",
        "embedding",
    }


def test_nodes_are_not_called_images(folder, tmp_path, capsys):
    assert main(["nodes", "train", str(folder), "--out", str(tmp_path / "run"), *SHORT]) == 0
    told = capsys.readouterr().err
    assert "nodes/s" in told and "images" not in told


def test_evaluation_repeats_the_last_one(run, capsys):
    assert main(["nodes", "eval", str(run)]) == 0
    again = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert again["top1"] == last["top1"] and again["val_top1"] == last["val_top1"]


def test_a_resumed_run_ends_with_the_same_weights(folder, run, tmp_path, monkeypatch):
    from sparse_mlp.engine import TrainingStopped
    from sparse_mlp.engine.learner import Learner

    out = tmp_path / "cut"
    update = Learner.update

    def die(self, batch, step, steps, *, measure):
        if step == 8:
            raise TrainingStopped("killed")
        return update(self, batch, step, steps, measure=measure)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", die)
        main(["nodes", "train", str(folder), "--out", str(out), *SHORT, "--train.save-every", "5"])
    assert not (out / "model.safetensors").exists()
    assert main(["nodes", "train", "--resume", str(out)]) == 0
    whole, resumed = (load_file(path / "model.safetensors") for path in (run, out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_teacher_is_an_option_of_any_graph(folder, tmp_path, capsys):
    """With it the run learns something else; without it a recipe's teacher is in nobody's way."""
    teacher = ["--task.distill", "10", "--teacher.epochs", "5", "--teacher.hops", "2"]
    assert main(["nodes", "train", str(folder), "--out", str(tmp_path / "taught"), *SHORT, *teacher]) == 0
    lines = [json.loads(line) for line in (tmp_path / "taught" / "metrics.jsonl").read_text().splitlines()]
    assert all("distill" in line for line in lines if line["kind"] == "train")


def test_a_teacher_that_cannot_be_is_not_announced(tmp_path, capsys):
    """Several starts, and no validation node to choose the best by: one line, before any training."""
    options = ["--task.distill", "10", "--teacher.starts", "2", "--out", str(tmp_path / "run")]
    assert main(["nodes", "train", str(save_graph(tmp_path, left_out=["val"])), *options]) == 2
    error = capsys.readouterr().err
    assert "teacher.starts 2 needs validation nodes" in error and error.count("\n") == 1


def test_prediction_needs_features_only(run, folder, tmp_path):
    graph = load_graph(str(folder))
    np.save(tmp_path / "new.npy", graph.features[graph.splits["test"]])
    assert main(["nodes", "predict", str(run), str(tmp_path / "new.npy"), "--out", str(tmp_path / "out.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    stored = np.load(run / "predictions.npz")
    assert [int(row["class"]) for row in rows] == stored["logits"].argmax(1).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "cora"], "unknown action 'trian' of nodes; allowed are train, eval, predict; nearest: train"),
        (["train"], "which graph?"),
        (["train", "coar"], "did you mean 'cora'"),
        (["train", "cora", "--train.grad-accum", "2"], "it cannot be cut"),
        (["train", "cora", "--train.amp", "bf16"], "task.similarity bfloat16"),
        (["train", "cora", "--data.hops", "0"], "hops must be at least 1, got 0"),
        (["train", "cora", "--data.batch-size", "1"], "batch_size must be at least 2, got 1"),
        (["train", "cora", "--data.trust", "2"], "trust is a cosine"),
        (["train", "cora", "--data.similar", "0"], "similar must be at least 1, got 0"),
        (["train", "cora", "--data.split-seed", "1"], "would be ignored: cora brings its split"),
        (["train", "cora", "--model.hidden-dim", "0"], "hidden_dim must be at least 1, got 0"),
        (["train", "cora", "--model.drop-rate", "1.5"], "drop_rate must be at least 0 and below 1, got 1.5"),
        (["train", "cora", "--model.top-k", "2"], "would be ignored: model.num_experts is 0"),
        (["train", "cora", "--task.distill", "0", "--teacher.hops", "3"], "would be ignored: task.distill is 0"),
        (["train", "cora", "--teacher.temperature", "0"], "teacher.temperature must be positive and finite, got 0.0"),
        (["eval"], "nodes eval takes one argument"),
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["predict", "nowhere"], "nodes predict takes a run"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "coar" not in arguments and "SPARSE_MLP_DATA" not in os.environ and "cora" in arguments:
        pytest.skip("SPARSE_MLP_DATA is not set: no Cora to train on")
    assert main(["nodes", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_graph_without_test_nodes_trains_one_without_any_held_out_does_not(folder, tmp_path, capsys):
    data = pytest.importorskip("torch_geometric.data")
    graph = load_graph(str(folder))
    coo = graph.adjacency.tocoo()
    edges = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    masks = {}
    for split in ("train", "val"):
        masks[f"{split}_mask"] = torch.zeros(400, dtype=torch.bool)
        masks[f"{split}_mask"][graph.splits[split]] = True
        made = data.Data(
            x=torch.from_numpy(graph.features), edge_index=edges, y=torch.from_numpy(graph.labels), **masks
        )
        torch.save(made, tmp_path / "data.pt")
        code = main(["nodes", "train", str(tmp_path), "--out", str(tmp_path / split), *SHORT])
        assert code == (2 if split == "train" else 0)
    assert "there are no validation or test nodes" in capsys.readouterr().err
    assert "Validation accuracy" in (tmp_path / "val" / "report.html").read_text()
    assert not (tmp_path / "train").exists()


def test_features_that_do_not_fit_are_named(run, tmp_path, capsys):
    np.save(tmp_path / "wide.npy", np.zeros((2, 9), np.float32))
    assert main(["nodes", "predict", str(run), str(tmp_path / "wide.npy")]) == 2
    assert "features of shape (2, 9), but the run was trained on 8 a node" in capsys.readouterr().err
