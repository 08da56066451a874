"""`sparse-mlp nodes train | eval | predict`: Graph-MLP on graphs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.sparse as sp
import torch
import tyro
from rich.console import Console
from safetensors.torch import load_file, save_file

from sparse_mlp import distributed
from sparse_mlp.cli.parse import parse, run_action, split_names
from sparse_mlp.cli.running import choose_folder
from sparse_mlp.data.graph_files import NAMES
from sparse_mlp.data.graphs import Graph, eval_batches, feature_rows, rows_sum_to_one
from sparse_mlp.engine import RunFolder, Trainer
from sparse_mlp.engine.run import write_json
from sparse_mlp.errors import UserError
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.recipes.graphs import NodeRecipe, build_network, build_nodes, load_nodes, node_recipe
from sparse_mlp.recipes.recipe import decode, to_json
from sparse_mlp.tasks.nodes import NodeClassify

_FREE = ("log_every", "eval_every", "save_every", "keep", "device", "threads", "deterministic")

_HELP = f"""usage: sparse-mlp nodes ACTION ...

Classify the nodes of a graph without message passing: the graph shapes the training loss, prediction needs none.

  sparse-mlp nodes train GRAPH [--out DIR] [--any.field VALUE ...]   GRAPH: {", ".join(NAMES)}, or a folder
  sparse-mlp nodes train --resume RUN
  sparse-mlp nodes eval RUN
  sparse-mlp nodes predict RUN FEATURES [--out FILE]                FEATURES: .npy, .npz (SciPy) or .csv, a row a node
"""


@dataclass(frozen=True)
class TrainArguments:
    out: Path | None = None
    """Folder of the new run. Left out: runs/ and the graph's name, numbered if that exists."""

    resume: Path | None = None
    """Go on with the run in this folder, to the bit as if it had never stopped."""

    recipe: Annotated[NodeRecipe, tyro.conf.arg(name="")] = field(default_factory=NodeRecipe)


@dataclass(frozen=True)
class PredictArguments:
    out: Path | None = None
    """CSV file to write; left out: standard output."""


def run(arguments: list[str]) -> int:
    return run_action("nodes", {"train": _train, "eval": _eval, "predict": _predict}, arguments, _HELP)


def _train(arguments: list[str]) -> None:
    names, options = split_names(arguments)
    if len(names) > 1:
        raise UserError(f"nodes train takes one graph, not {len(names)} ({', '.join(names)})")
    resuming = any(word == "--resume" or word.startswith("--resume=") for word in options)
    if bool(names) == resuming and "--help" not in options and "-h" not in options:
        raise UserError(f"which graph? sparse-mlp nodes train GRAPH, one of {', '.join(NAMES)} or a folder")
    start = TrainArguments(recipe=node_recipe(names[0]) if names else NodeRecipe())
    given = parse(TrainArguments, options, prog="nodes train", description=_HELP, default=start)
    if given.resume is None:
        _run(given.recipe, given.out, resume=False)
        return
    stored = _stored(given.resume)
    start = TrainArguments(resume=given.resume, recipe=stored)
    given = parse(TrainArguments, options, prog="nodes train", description=_HELP, default=start)
    if given.out is not None:
        raise UserError(f"--out {given.out} would be ignored: --resume goes on in {given.resume}")
    before, after = to_json(stored), to_json(given.recipe)  # type: ignore[arg-type]
    for values in (before, after):
        for name in _FREE:
            values["train"].pop(name)
    if before != after:
        raise UserError(f"{given.resume} cannot be resumed with another configuration than it began with")
    assert given.resume is not None
    _run(given.recipe, given.resume, resume=True)


def _run(recipe: NodeRecipe, folder: Path | None, *, resume: bool) -> None:
    with distributed.join(recipe.train.device) as device:
        run = RunFolder(distributed.on_main(lambda: choose_folder(recipe.name, folder, resume)))
        job = build_nodes(recipe, told=_say if distributed.is_main() else None)
        parts = {"optim": recipe.optim, "schedule": recipe.schedule, "train": recipe.train}
        trainer = Trainer(job.task, job.loaders, **parts, run=run, device=device)  # type: ignore[arg-type]
        if not resume:
            distributed.on_main(lambda: RunFolder.create(run.path, to_json(recipe)))  # type: ignore[arg-type]
        if distributed.is_main():
            graph = job.graph
            _say(f"{graph.name}: {graph.num_nodes} nodes, {graph.num_edges} edges", *graph.notes)
            write_json(run.path / "inputs.json", _inputs(graph))
        result = trainer.fit(resume=resume)
        distributed.on_main(lambda: _finish(run, recipe, job.graph, result.predictions, result.metrics))


def _inputs(graph: Graph) -> dict[str, Any]:
    sizes = {"features": graph.features.shape[1], "classes": graph.num_classes}
    return {**sizes, "row_normalize": graph.row_normalized}


def _finish(
    run: RunFolder, recipe: NodeRecipe, graph: Graph, predictions: dict[str, np.ndarray], metrics: dict[str, float]
) -> None:
    from sparse_mlp.report.nodes import write_node_report

    weights = load_file(run.weights())
    save_file(weights, run.path / "model.safetensors")
    np.savez_compressed(run.path / "predictions.npz", **predictions)  # type: ignore[arg-type]
    model = _network(run, recipe)
    with torch.no_grad():
        embedding = model.forward_features(feature_rows(graph.features, predictions["index"])).numpy()
    report = write_node_report(run.path, graph.name, graph.num_nodes, graph.num_edges, embedding, predictions)
    scores = ", ".join(f"{name} {metrics[name]:.2%}" for name in ("val_top1", "top1") if name in metrics)
    _say(f"{scores}; report: {report}")


def _eval(arguments: list[str]) -> None:
    folder = _one(arguments, "eval", "RUN")
    recipe = _stored(Path(folder))
    model, graph = _network(RunFolder.open(folder), recipe), load_nodes(recipe.data)
    result = NodeClassify(model, recipe.task).evaluate(eval_batches(graph), torch.device("cpu"))
    sys.stdout.write(json.dumps(result.metrics) + "\n")


def _predict(arguments: list[str]) -> None:
    names, options = split_names(arguments)
    if len(names) != 2 and "--help" not in options:
        raise UserError(
            "nodes predict takes a run folder and a file of features: sparse-mlp nodes predict RUN FEATURES"
        )
    given = parse(PredictArguments, options, prog="nodes predict", description=_HELP, default=PredictArguments())
    run = RunFolder.open(names[0])
    model, inputs = _network(run, _stored(run.path)), _read_inputs(run)
    features = _read_features(Path(names[1]), inputs["features"])
    if inputs["row_normalize"]:
        features = rows_sum_to_one(features, names[1])
    with torch.no_grad():
        shares = model(feature_rows(features)).softmax(1).numpy()
    rows = [["node", "class", "probability"]]
    rows += [[str(i), str(row.argmax()), f"{row.max():.6f}"] for i, row in enumerate(shares)]
    if given.out is None:
        csv.writer(sys.stdout).writerows(rows)
    else:
        with given.out.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def _read_features(path: Path, width: int) -> sp.csr_matrix | np.ndarray:
    try:
        if path.suffix == ".npz":
            features = sp.csr_matrix(sp.load_npz(path), dtype=np.float32)
        elif path.suffix == ".npy":
            features = np.load(path, allow_pickle=False).astype(np.float32)
        elif path.suffix == ".csv":
            features = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
        else:
            raise UserError("features are read from .npy, .npz (scipy.sparse.save_npz) and .csv")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of features {path}") from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}: {error}") from error
    if features.ndim != 2 or features.shape[1] != width:
        raise UserError(f"{path}: features of shape {features.shape}, but the run was trained on {width} a node")
    if not np.isfinite(features.data if sp.issparse(features) else features).all():
        raise UserError(f"{path}: features are NaN or infinite")
    return features


def _stored(folder: Path) -> NodeRecipe:
    run = RunFolder.open(folder)
    try:
        return decode(NodeRecipe, run.config())
    except ValueError as error:
        raise UserError(f"{run.config_path}: not a run on a graph: {error}") from error


def _read_inputs(run: RunFolder) -> dict[str, Any]:
    path = run.path / "inputs.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run was not started by `sparse-mlp nodes train`")
    return json.loads(path.read_text())


def _network(run: RunFolder, recipe: NodeRecipe) -> GraphMlp:
    inputs = _read_inputs(run)
    model = build_network(recipe.model, inputs["features"], inputs["classes"])
    model.load_state_dict(load_file(run.weights()))
    return model.eval()


def _one(arguments: list[str], action: str, what: str) -> str:
    if len(arguments) != 1:
        raise UserError(f"nodes {action} takes one argument: sparse-mlp nodes {action} {what}")
    return arguments[0]


def _say(*lines: str) -> None:
    console = Console(stderr=True, highlight=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
