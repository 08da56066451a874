from __future__ import annotations

import csv
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

from experiments.graphs.random_graphs import planted_graph
from sparse_mlp.cli.main import main
from sparse_mlp.data.graph_config import GraphConfig
from sparse_mlp.data.graph_files import NAMES, load_graph
from sparse_mlp.engine import TrainConfig, TrainingStopped
from sparse_mlp.engine.learner import Learner
from sparse_mlp.jobs.nodes import NetworkConfig, NodesRecipe
from sparse_mlp.jobs.recipe import from_json, to_json
from sparse_mlp.jobs.run import Run, resume, train
from sparse_mlp.recipes import graphs
from sparse_mlp.tasks.nodes import NodeLossConfig
from sparse_mlp.tasks.teacher import TeacherConfig

SHORT = TrainConfig(steps=12, log_every=10, eval_every=6, save_every=100, threads=1, device="cpu")
TEACHER = TeacherConfig(hops=2, epochs=8, starts=2, samples=2)


def save_graph(path: Path, left_out: tuple[str, ...] = (), nodes: int = 400) -> Path:
    """A graph as a saved `Data`, some of its masks empty."""
    data = pytest.importorskip("torch_geometric.data")
    graph = planted_graph(nodes, 2000, classes=3, features=8)
    coo = graph.adjacency.tocoo()
    masks = {f"{name}_mask": torch.zeros(nodes, dtype=torch.bool) for name in graph.splits}
    for name, ids in graph.splits.items():
        masks[f"{name}_mask"][ids] = name not in left_out
    edges = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    saved = data.Data(x=torch.from_numpy(graph.features), edge_index=edges, y=torch.from_numpy(graph.labels), **masks)
    torch.save(saved, path / "data.pt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_graph(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def recipe(folder):
    return NodesRecipe("planted", GraphConfig(str(folder), batch_size=200), train=SHORT)


@pytest.fixture(scope="module")
def distilled(recipe):
    """The same with a teacher."""
    return replace(recipe, task=NodeLossConfig(distill=10.0), teacher=TEACHER)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("runs") / "plain", show=False)


@pytest.fixture(scope="module")
def whole(distilled, tmp_path_factory):
    """A run with a teacher that nobody disturbed."""
    return train(distilled, tmp_path_factory.mktemp("runs") / "whole", show=False)


def lines(run: Run, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model.safetensors")


def test_training_leaves_metrics_weights_predictions_and_a_report(run):
    assert [line["step"] for line in lines(run, "eval")] == [6, 12]
    assert {"top1", "val_top1", "loss"} <= lines(run, "eval")[0].keys()
    assert set(run.metrics) == {"loss", "top1", "val_top1", "nodes"}
    stored = np.load(run.path / "predictions.npz")
    assert (stored["logits"].argmax(1) == stored["target"]).mean() == pytest.approx(run.metrics["top1"])
    rows = list(csv.DictReader((run.path / "predictions.csv").read_text().splitlines()))
    assert [int(row["predicted"]) for row in rows] == stored["logits"].argmax(1).tolist()
    page = (run.path / "report.html").read_text()
    assert "Test accuracy" in page and not (run.path / "teacher.npz").exists()
    config = json.loads((run.path / "config.json").read_text())
    assert config["kind"] == "nodes" and from_json(NodesRecipe, config) == run.recipe


def test_nodes_are_not_called_images(recipe, tmp_path, capsys):
    train(recipe, tmp_path / "run")
    printed = capsys.readouterr().err
    assert "nodes/s" in printed and "images" not in printed


def test_evaluation_repeats_the_last_one(run, whole):
    for one in (run, whole):
        again = one.evaluate(device="cpu")
        assert again["top1"] == one.metrics["top1"] and again["val_top1"] == one.metrics["val_top1"]


def test_prediction_needs_features_only(run, folder, tmp_path):
    graph = load_graph(str(folder))
    features = graph.features[graph.splits["test"]]
    np.save(tmp_path / "new.npy", features)
    sp.save_npz(tmp_path / "new.npz", sp.csr_matrix(features))
    np.savetxt(tmp_path / "new.csv", features, delimiter=",", fmt="%.9g")
    rows = run.predict(tmp_path / "new.npy")
    assert [row["class"] for row in rows] == np.load(run.path / "predictions.npz")["logits"].argmax(1).tolist()
    assert list(rows[0]) == ["node", "class", "probability"] and rows[7]["node"] == 7
    assert all(1 / 3 <= row["probability"] <= 1 for row in rows)
    for other in ("new.npz", "new.csv"):
        assert [row["class"] for row in run.predict(tmp_path / other)] == [row["class"] for row in rows]
    both = run.predict(tmp_path / "new.npy", tmp_path / "new.csv")
    assert [row["file"] for row in both[:: len(rows)]] == [str(tmp_path / "new.npy"), str(tmp_path / "new.csv")]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.save(path, np.zeros((2, 9), np.float32)), r"features of shape \(2, 9\), but .* trained on 8"),
        (lambda path: np.save(path, np.full((2, 8), np.nan)), "features are NaN or infinite"),
        (lambda path: path.write_bytes(b"nothing"), "features.npy: "),
        (lambda path: None, "there is no file of features"),
    ],
)
def test_features_that_do_not_fit_are_named(run, tmp_path, write, message):
    write(tmp_path / "features.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.predict(tmp_path / "features.npy")


def test_a_network_of_nodes_is_no_program(run, tmp_path, capsys):
    assert main(["export", str(run.path), str(tmp_path / "network.pt2"), "--to", "torch-export"]) == 2
    assert "of the kind nodes cannot be exported to torch-export" in " ".join(capsys.readouterr().err.split())


def test_an_exported_network_loads_as_is_printed(run, tmp_path, folder):
    code = run.export(tmp_path / "network.safetensors")
    names: dict = {}
    exec(code, names)
    model, graph = names["model"].eval(), load_graph(str(folder))
    stored = np.load(run.path / "predictions.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(graph.features[stored["index"]]))
    np.testing.assert_allclose(logits.numpy(), stored["logits"], atol=1e-5)


def test_the_report_of_a_run_whose_graph_is_gone_shows_no_nodes(recipe, tmp_path, caplog):
    graph = tmp_path / "graph"
    graph.mkdir()
    run = train(replace(recipe, data=replace(recipe.data, source=str(save_graph(graph)))), tmp_path / "run", show=False)
    (graph / "data.pt").unlink()
    page = run.report().read_text()
    assert "Validation accuracy" in page and "shows no nodes" in caplog.text
    assert "holds none of" in caplog.text


def kill_at(monkeypatch, update_number):
    """The process ends before its update of that number, counted over all trainings."""
    update, count = Learner.update, [0]

    def die(self, *args, **options):
        count[0] += 1
        if count[0] == update_number:
            raise KeyboardInterrupt
        return update(self, *args, **options)

    monkeypatch.setattr(Learner, "update", die)


def test_a_resumed_run_ends_with_the_same_weights(recipe, run, tmp_path, monkeypatch):
    often = replace(recipe, train=replace(SHORT, save_every=5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 9)
        train(often, tmp_path / "run", show=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    again = weights(resume(tmp_path / "run", show=False))
    assert all(torch.equal(again[name], value) for name, value in weights(run).items())


# Two teachers of eight steps, then twelve steps of the student.
@pytest.mark.parametrize("dies_at", [6, 13, 17, 24])
def test_a_run_killed_during_or_after_its_teacher_ends_with_the_same_weights(
    distilled, whole, tmp_path, monkeypatch, dies_at
):
    monkeypatch.setattr("sparse_mlp.tasks.teacher._SAVE_EVERY", 3)
    often = replace(distilled, train=replace(SHORT, save_every=5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, dies_at)
        train(often, tmp_path / "run", show=False)
    assert (tmp_path / "run" / "teacher.npz").exists() == (dies_at > 16)
    resumed = resume(tmp_path / "run", show=False)
    again, files = weights(resumed), [np.load(path / "teacher.npz") for path in (whole.path, resumed.path)]
    np.testing.assert_array_equal(files[0]["probabilities"], files[1]["probabilities"])
    assert all(torch.equal(again[name], value) for name, value in weights(whole).items())


def test_the_student_learns_what_the_folder_holds_and_nothing_else(distilled, tmp_path, monkeypatch):
    """A changed teacher.npz changes the student; no teacher is trained where there is one."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 17)  # the student's first step
        train(distilled, tmp_path / "run", show=False)
    path = tmp_path / "run" / "teacher.npz"
    first = np.full((400, 3), [1, 0, 0], np.float32)
    np.savez_compressed(path, probabilities=first)
    resumed = resume(tmp_path / "run", show=False)
    assert (np.load(resumed.path / "predictions.npz")["logits"].argmax(1) == 0).mean() > 0.9


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_damaged_teacher_is_one_line(distilled, tmp_path, monkeypatch, content):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at(patch, 17)
        train(distilled, tmp_path / "run", show=False)
    path = tmp_path / "run" / "teacher.npz"
    if content:
        path.write_bytes(content)
    else:
        np.savez(path, probabilities=np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"teacher\.npz: .*probabilities") as error:
        resume(tmp_path / "run", show=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow  # three processes that start
def test_two_ranks_have_the_teacher_of_one_and_learn_what_one_learns(launch, distilled, tmp_path):
    """Of an odd number of nodes, all of which every rank's teacher sees; the student's batches are divided."""
    data = replace(distilled.data, source=str(save_graph(tmp_path, nodes=401)))
    recipe = to_json(replace(distilled, data=data, model=NetworkConfig(drop_rate=0.0)))
    for ranks in (1, 2):
        errors: list[str] = []
        spec = {"out": str(tmp_path / f"{ranks}"), "recipe": recipe}
        program = Path(__file__).with_name("nodes_on_ranks.py")
        assert launch(program, spec, ranks=ranks, errors=errors) == [0] * ranks, errors
    one, two = (Run(tmp_path / f"{ranks}") for ranks in (1, 2))
    files = [np.load(run.path / "teacher.npz")["probabilities"] for run in (one, two)]
    np.testing.assert_array_equal(*files)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-4, rtol=1e-3)


def test_ctrl_c_during_the_teacher_names_the_run(distilled, tmp_path, monkeypatch):
    stop = TrainingStopped("stopped after step 1 of 8 and saved; go on with --resume somewhere")
    monkeypatch.setattr("sparse_mlp.engine.trainer.Trainer._loop", lambda self: (_ for _ in ()).throw(stop))
    with pytest.raises(TrainingStopped, match=f"while the teacher was trained.*--resume {tmp_path / 'run'}$") as error:
        train(distilled, tmp_path / "run", show=False)
    assert error.value.exit_code == stop.exit_code


def test_a_teacher_is_part_of_the_loss(whole):
    assert all("distill" in line for line in lines(whole, "train"))
    assert np.load(whole.path / "teacher.npz")["probabilities"].sum(1) == pytest.approx(np.ones(400), abs=1e-5)


def test_a_graph_without_test_nodes_trains_one_without_any_held_out_does_not(recipe, tmp_path):
    for left_out in (("test",), ("val", "test")):
        data = replace(recipe.data, source=str(save_graph(tmp_path, left_out)))
        if left_out == ("test",):
            run = train(replace(recipe, data=data), tmp_path / "val", show=False)
            assert set(run.metrics) == {"val_top1", "nodes"} and run.metrics["nodes"] == 0
            assert "Validation accuracy" in (run.path / "report.html").read_text()
        else:
            with pytest.raises(ValueError, match="no validation or test nodes with a label"):
                train(replace(recipe, data=data), tmp_path / "none", show=False)
    assert not (tmp_path / "none").exists()


def test_a_teacher_that_cannot_be_leaves_no_folder(distilled, tmp_path):
    """Several starts, and no validation node to choose the best by."""
    data = replace(distilled.data, source=str(save_graph(tmp_path, ("val",))))
    with pytest.raises(ValueError, match=r"teacher\.starts 2 needs validation nodes"):
        train(replace(distilled, data=data), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("train", {"grad_accum": 2}, "it cannot be split"),
        ("train", {"amp": "bf16"}, "task.similarity bfloat16"),
        ("data", {"split_seed": 1}, "split_seed 1 would be ignored: .* brings its split"),
        ("data", {"train_per_class": 5}, "train_per_class 5 would be ignored: .* brings its split"),
        ("data", {"source": ""}, r"which graph\? --data.source FILE"),
        ("data", {"source": "coar"}, "did you mean 'cora'"),
        ("model", {"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ("model", {"drop_rate": 1.5}, "drop_rate must be at least 0 and below 1, got 1.5"),
        ("model", {"top_k": 2}, "would be ignored: model.num_experts is 0"),
        ("model", {"num_experts": 2, "top_k": 3}, "top_k"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(recipe, tmp_path, part, changes, message):
    wrong = replace(recipe, **{part: replace(getattr(recipe, part), **changes)})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train(wrong, tmp_path / "run", show=False)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_options_of_a_teacher_that_is_not_trained_are_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"teacher would be ignored: task\.distill is 0"):
        train(replace(recipe, teacher=TEACHER), tmp_path / "run", show=False)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (GraphConfig, {"hops": 0}, "hops must be at least 1, got 0"),
        (GraphConfig, {"batch_size": 1}, "batch_size must be at least 2, got 1"),
        (GraphConfig, {"min_similarity": 2.0}, "min_similarity is a cosine"),
        (GraphConfig, {"knn_edges": 0}, "knn_edges must be at least 1, got 0"),
        (GraphConfig, {"train_per_class": 0}, "train_per_class must be at least 1, got 0"),
        (GraphConfig, {"val_per_class": -1}, "val_per_class must be at least 0, got -1"),
    ],
)
def test_impossible_settings_name_the_value(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_recipe_goes_through_json(distilled):
    for recipe in (distilled, graphs.pubmed(), graphs.graph(), NodesRecipe(model=NetworkConfig(num_experts=4))):
        assert from_json(NodesRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe


def test_the_verbs_serve_it(folder, tmp_path, capsys):
    """The options of graph, teacher and network on the command line; a CSV of predictions."""
    options = ["--data.source", str(folder), "--data.batch-size", "200", "--train.steps", "4", "--train.device", "cpu"]
    options += ["--task.distill", "10", "--teacher.epochs", "5", "--teacher.hops", "2", "--train.threads", "1"]
    assert main(["train", "graph", "--out", str(tmp_path / "run"), *options]) == 0
    run = Run(tmp_path / "run")
    assert run.recipe.teacher == TeacherConfig(epochs=5, hops=2)
    capsys.readouterr()
    assert main(["eval", str(run.path)]) == 0 and f"{run.metrics['loss']:.4f}" in capsys.readouterr().out
    assert main(["report", str(run.path)]) == 0
    np.save(tmp_path / "new.npy", np.zeros((3, 8), np.float32))
    assert main(["predict", str(run.path), str(tmp_path / "new.npy"), "--out", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == "node,class,probability"
    capsys.readouterr()
    assert main(["train", "graph"]) == 2
    error = capsys.readouterr().err
    assert "which graph? --data.source FILE" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_named_graph_has_a_recipe_with_a_teacher(name):
    recipe = getattr(graphs, name)()
    assert (recipe.name, recipe.data.source) == (name, name)
    assert recipe.task.distill > 0 and recipe.schedule.sched == "cosine"
    assert f"sparse-mlp train {name}" in getattr(graphs, name).__doc__


def test_a_graph_of_ones_own_has_the_published_setting():
    recipe = graphs.graph()
    assert (recipe.task.distill, recipe.optim.weight_decay) == (0.0, 5e-3)


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)  # an import of it fails
    monkeypatch.delitem(sys.modules, "sparse_mlp.jobs.nodes")
    with pytest.raises(ValueError, match=r"graphs need torch_geometric: pip install 'sparse-mlp\[graph\]'"):
        importlib.import_module("sparse_mlp.jobs.nodes")
