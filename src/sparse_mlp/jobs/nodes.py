"""Node classification by Graph-MLP: the graph shapes the training loss, prediction needs none."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparse_mlp import distributed
from sparse_mlp.distributed import MeshConfig
from sparse_mlp.engine import Evaluation, Loaders, OptimConfig, RunFolder, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.files import read_json, write_npz
from sparse_mlp.jobs.job import INPUTS, Context, EvalOptions, Job, PredictOptions, Row, check_export_target
from sparse_mlp.jobs.model import load_weights
from sparse_mlp.jobs.recipe import Recipe
from sparse_mlp.models.graph_mlp import GraphMlp
from sparse_mlp.report import write_predictions_csv
from sparse_mlp.report.nodes import write_node_report
from sparse_mlp.weights.write import write_file

if find_spec("torch_geometric") is None:
    raise UserError("graphs need torch_geometric: pip install 'sparse-mlp[graph]'")

from sparse_mlp.data.edges import add_knn_edges, prune_edges
from sparse_mlp.data.graph_config import GraphConfig, load_configured
from sparse_mlp.data.graph_files import NAMES, check_features, read_features
from sparse_mlp.data.graphs import Graph, feature_rows, rows_sum_to_one
from sparse_mlp.data.node_batches import NodeBatches, eval_batches
from sparse_mlp.tasks.nodes import NodeClassify, NodeLossConfig
from sparse_mlp.tasks.teacher import TeacherConfig, check_teacher, train_teacher

TEACHER = "teacher.npz"
_INPUT_TYPES = {
    "name": str,
    "num_nodes": int,
    "num_edges": int,
    "num_features": int,
    "num_classes": int,
    "row_normalize": bool,
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkConfig:
    """The network; the numbers of features and classes come from the data."""

    hidden_dim: int = 256
    """Width of the hidden layer and the embedding."""

    drop_rate: float = 0.6
    """Dropout on the hidden layer."""

    input_drop_rate: float = 0.0
    """Dropout on the features."""

    num_experts: int = 0
    """Experts in place of the second layer; 0 is the dense network."""

    top_k: int = 1
    """Experts per node."""

    expert_dim: int = 128
    """Hidden width of an expert."""


@dataclass(frozen=True)
class NodesRecipe(Recipe):
    """A complete configuration of a training run on a graph."""

    kind: ClassVar[str] = "nodes"

    data: GraphConfig = field(default_factory=GraphConfig)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    task: NodeLossConfig = field(default_factory=NodeLossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The network whose probabilities are learned with the weight task.distill. Not trained where that is 0."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(opt="adam", lr=1e-3, weight_decay=5e-3))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(sched="constant"))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=400, log_every=10, eval_every=10, save_every=100)
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)


class NodesJob(Job[NodesRecipe]):
    """Graph-MLP learns the classes of a graph's nodes, after a teacher where there is one."""

    recipe_type = NodesRecipe
    scores = ("top1", "val_top1")
    free: ClassVar[frozenset[str]] = Job.free | {"data.root"}

    def __init__(self, recipe: NodesRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        _check(recipe)
        config = recipe.data
        self.graph = graph = load_configured(config)
        if not len(graph.labelled("val")) + len(graph.labelled("test")):
            raise UserError(f"{graph.name}: there are no validation or test nodes with a label to evaluate on")
        if recipe.task.distill:
            check_teacher(graph, recipe.teacher)
        if config.min_similarity is not None:
            self.graph = prune_edges(self.graph, config.min_similarity)
        if config.knn_edges is not None:
            self.graph = add_knn_edges(self.graph, config.knn_edges)
        torch.manual_seed(recipe.train.seed)
        model = build_network(recipe.model, graph.features.shape[1], graph.num_classes)
        self.task = NodeClassify(model, recipe.task)
        self.probabilities: np.ndarray | None = None
        steps = max(1, graph.num_nodes // config.batch_size)
        self.loaders = Loaders(self._batches, self._evaluation_batches, config.batch_size, steps)

    def _batches(self, *, start_step: int, steps: int, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        config = self.recipe.data
        batches = NodeBatches(
            self.graph,
            config.batch_size,
            config.hops,
            self.recipe.train.seed,
            sampling=config.sampling,
            rank=rank,
            world_size=world_size,
            probabilities=self.probabilities,
        )
        return (batches[step] for step in range(start_step, start_step + steps))

    def _evaluation_batches(self, *, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        return eval_batches(self.graph, rank=rank, world_size=world_size)

    def inputs(self) -> dict[str, Any]:
        graph = self.graph
        sizes = {"num_nodes": graph.num_nodes, "num_edges": graph.num_edges}
        model = {"num_features": graph.features.shape[1], "num_classes": graph.num_classes}
        return {INPUTS: {"name": graph.name, **sizes, **model, "row_normalize": graph.row_normalized}}

    def fit(self, run: RunFolder, device: torch.device, *, resume: bool, show: bool) -> Evaluation:
        """Train the teacher, if there is one, to its end, then the student."""
        if distributed.is_main():
            graph = self.graph
            lines = (f"{graph.name}: {graph.num_nodes} nodes, {graph.num_edges} edges", *graph.notes)
            for line in lines:
                _log.info(line)
        if self.recipe.task.distill:
            self.probabilities = self._fit_teacher(run, device, resume=resume, show=show)
        return super().fit(run, device, resume=resume, show=show)

    def _fit_teacher(self, run: RunFolder, device: torch.device, *, resume: bool, show: bool) -> np.ndarray:
        """The teacher's probabilities (N, C): those that the run folder holds, else of a teacher trained now."""
        path = run.path / TEACHER
        if not resume:
            distributed.on_main(lambda: _remove_teacher(run))
        elif distributed.on_main(path.is_file):
            return _read_probabilities(path, self.graph)
        recipe = self.recipe
        probabilities = train_teacher(self.graph, recipe.teacher, recipe.train, run, device, resume=resume, show=show)
        distributed.on_main(lambda: write_npz(path, {"probabilities": probabilities}))
        return probabilities

    def finish(self, run: RunFolder, evaluation: Evaluation) -> None:
        write_predictions_csv(run.path / "predictions.csv", evaluation.predictions)

    def summary(self, evaluation: Evaluation) -> str:
        parts = [("validation", "val_top1"), ("test", "top1")]
        shown = [f"{name} {evaluation.metrics[key]:.2%}" for name, key in parts if key in evaluation.metrics]
        return f"accuracy: {', '.join(shown)} of the nodes"

    @classmethod
    def evaluate(cls, run: RunFolder, options: EvalOptions, device: torch.device) -> Evaluation:
        """On the validation and test nodes of the run's graph."""
        recipe = cls.stored(run)
        model, graph = _load_network(run, recipe, options.checkpoint), load_configured(recipe.data)
        check_features(graph.features, read_inputs(run)["num_features"], graph.name)
        batches = eval_batches(graph, rank=distributed.rank(), world_size=distributed.world_size())
        return NodeClassify(model, recipe.task).to(device).evaluate(batches, device)

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """For each row of the files of features (.npy, .npz, .csv) the likeliest class and its probability."""
        inputs = read_inputs(run)
        model = _load_network(run, cls.stored(run), options.checkpoint)
        rows: list[Row] = []
        for file in files:
            features = read_features(Path(file), inputs["num_features"])
            if inputs["row_normalize"]:
                features = rows_sum_to_one(features, file)
            with torch.no_grad():
                probabilities = model(feature_rows(features)).softmax(1).numpy()
            name = {"file": file} if len(files) > 1 else {}
            for node, row in enumerate(probabilities):
                rows.append(
                    name | {"node": node, "class": int(row.argmax()), "probability": round(float(row.max()), 6)}
                )
        return rows

    @classmethod
    def report(cls, run: RunFolder, context: Context | None = None) -> Path:
        """The page of a run, finished or not; test nodes are shown where weights and the graph are available."""
        if not run.metrics_path.is_file():
            raise UserError(f"{run.path} has nothing to report yet: the training has not begun")
        recipe, inputs = cls.stored(run), read_inputs(run)
        test = target = np.empty(0, np.int64)
        embedding, logits = np.empty((0, recipe.model.hidden_dim)), np.empty((0, inputs["num_classes"]))
        try:
            graph = load_configured(recipe.data) if run.has_checkpoint() else None
        except (UserError, OSError) as error:
            _log.warning("the report of %s shows no nodes: %s", run.path, error)
            graph = None
        if graph is not None:
            model, test = _load_network(run, recipe), graph.labelled("test")
            target = graph.labels[test]
            with torch.no_grad():
                hidden = model.forward_features(feature_rows(graph.features, test))
                embedding, logits = hidden.numpy(), model.forward_head(hidden).numpy()
        predictions = {"index": test, "target": target, "logits": logits}
        sizes = inputs["num_nodes"], inputs["num_edges"]
        return write_node_report(run.path, inputs["name"], *sizes, embedding, predictions)

    @classmethod
    def export(cls, run: RunFolder, target: Path) -> str:
        """The weights as a safetensors file; the names are those of the authors' code."""
        check_export_target(target)
        recipe, inputs = cls.stored(run), read_inputs(run)
        model = _load_network(run, recipe)
        write_file(model.state_dict(), target)
        changed = {name: value for name, value in vars(recipe.model).items() if value != getattr(NetworkConfig, name)}
        values = [str(inputs["num_features"]), str(inputs["num_classes"])]
        values += [f"{name}={value!r}" for name, value in changed.items()]
        lines = [
            "import safetensors.torch",
            "from sparse_mlp.models.graph_mlp import GraphMlp",
            f"model = GraphMlp({', '.join(values)})",
            f"model.load_state_dict(safetensors.torch.load_file({str(target)!r}))",
        ]
        return "\n".join(lines)


def _check(recipe: NodesRecipe) -> None:
    """UserError for settings that a run on a graph cannot have, or that would be ignored."""
    train = recipe.train
    if train.grad_accum != 1:
        raise UserError(
            f"train.grad_accum {train.grad_accum}: a batch of nodes contrasts all its nodes, it cannot be split"
        )
    if train.amp is not None:
        raise UserError(f"train.amp {train.amp} is not for node runs; task.similarity bfloat16 is where the time goes")
    # The recipes of named graphs have a teacher of their own, which is not used where a user turns distillation off.
    if not recipe.task.distill and recipe.teacher != TeacherConfig() and recipe.data.source.lower() not in NAMES:
        raise UserError("the options of teacher would be ignored: task.distill is 0, there is no teacher")


def build_network(config: NetworkConfig, features: int, classes: int) -> GraphMlp:
    """UserError for options that would be ignored."""
    default = NetworkConfig()
    if not config.num_experts and (config.top_k, config.expert_dim) != (default.top_k, default.expert_dim):
        raise UserError("model.top_k and model.expert_dim would be ignored: model.num_experts is 0")
    try:
        return GraphMlp(features, classes, **vars(config))
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def read_inputs(run: RunFolder) -> dict[str, Any]:
    """What the run's graph was like. FileNotFoundError if the run has not begun, UserError if the file is damaged."""
    path = run.path / INPUTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has not begun")
    inputs = read_json(path)
    for name, kind in _INPUT_TYPES.items():
        if type(inputs.get(name)) is not kind:
            raise UserError(f"{path}: {name} is {inputs.get(name)!r}, not of type {kind.__name__}")
    return inputs


def _load_network(run: RunFolder, recipe: NodesRecipe, checkpoint: Path | None = None) -> GraphMlp:
    """The network of a run with its newest weights, or those of a file or another run; in evaluation mode."""
    inputs = read_inputs(run)
    model = build_network(recipe.model, inputs["num_features"], inputs["num_classes"])
    load_weights(model, checkpoint or run.path)
    return model.eval()


def _remove_teacher(run: RunFolder) -> None:
    """What an earlier run that did not take a step left in the folder."""
    (run.path / TEACHER).unlink(missing_ok=True)
    shutil.rmtree(run.path / "teacher", ignore_errors=True)


def _read_probabilities(path: Path, graph: Graph) -> np.ndarray:
    """UserError if the file is damaged or of another graph."""
    try:
        with np.load(path, allow_pickle=False) as file:
            probabilities = file["probabilities"]
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not the probabilities of a teacher ({error}); without the file it is trained again"
        ) from error
    if probabilities.shape != (graph.num_nodes, graph.num_classes) or not np.isfinite(probabilities).all():
        raise UserError(
            f"{path}: probabilities of shape {probabilities.shape} for {graph.num_nodes} nodes of {graph.num_classes} "
            "classes"
        )
    return probabilities
