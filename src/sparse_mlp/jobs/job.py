"""The interface of a kind of run: one class that builds, finishes, evaluates, reports and predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from sparse_mlp import distributed
from sparse_mlp.engine import FREE_ON_RESUME, Evaluation, Loaders, RunFolder, Task, Trainer
from sparse_mlp.engine.config import check_configs
from sparse_mlp.errors import UserError
from sparse_mlp.jobs.model import load_weights
from sparse_mlp.jobs.recipe import Recipe, from_json
from sparse_mlp.report import write_plain_report

R = TypeVar("R", bound=Recipe)

INPUTS = "inputs.json"
"""File of a run folder: the inputs of the model and the names of its classes."""

Row = dict[str, Any]
"""One prediction as JSON and CSV hold it: names and plain values."""


@dataclass(frozen=True)
class Context:
    """What a job is built with besides its recipe."""

    run: RunFolder | None = None
    """The folder of an existing run: what it stores (a split, for example) is used instead of a new draw."""

    trusted: bool = False
    """The user named the data: sets that can execute or fetch something may be opened. Data that only a run folder
    names are not trusted."""

    datasets: tuple[Dataset, Dataset] | None = None
    """Training and test set of a user's own, in place of the set that the recipe names. UserError unless there are two.
    """

    def __post_init__(self) -> None:
        given: Any = self.datasets
        if given is not None and (not isinstance(given, tuple | list) or len(given) != 2):
            raise UserError(f"datasets are a training and a test set, (train, test), not {type(given).__name__}")


@dataclass(frozen=True)
class EvalOptions:
    """How a run is evaluated."""

    checkpoint: Path | None = None
    """Other weights than the newest of the run: a file or a run folder."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""

    trust_data: bool = False
    """Open the data that the run folder names even if that can execute or fetch something."""


@dataclass(frozen=True)
class PredictOptions:
    """How a run predicts."""

    checkpoint: Path | None = None
    """Other weights than the newest of the run: a file or a run folder."""

    trust_data: bool = False
    """Open what the run folder names even if that can execute or fetch something."""


@dataclass(frozen=True)
class ReportOptions:
    """How a run is reported: a kind may have options of its own."""


@dataclass(frozen=True)
class ProgramOptions:
    """How a run's model becomes a program for another runtime."""

    to: str = "onnx"
    """onnx or torch-export."""

    int8: bool = False
    """Weights of matrix products in 8 bits (ONNX); the accuracy that is kept on the run's test set is printed."""

    weight_only: bool = False
    """With --int8: leave the activations in float32. Left out: they are in 8 bits too, which is faster."""

    trust_data: bool = False
    """With --int8: open the data that the run folder names even if that can execute or fetch something."""


class Job(ABC, Generic[R]):
    """One run: the task and the loaders of a recipe.

    A subclass sets `recipe_type`, builds `task` and `loaders` in its constructor, and has `predict`; the rest has
    defaults. The constructor writes nothing, and raises UserError or OSError, one line, for what does not exist or fit.
    `sparse_mlp.jobs.register` makes the class available to the verbs.
    """

    recipe_type: ClassVar[type[Recipe]]
    eval_options_type: ClassVar[type[EvalOptions]] = EvalOptions
    predict_options_type: ClassVar[type[PredictOptions]] = PredictOptions
    report_options_type: ClassVar[type[ReportOptions]] = ReportOptions

    free: ClassVar[frozenset[str]] = frozenset(
        {*(f"train.{name}" for name in FREE_ON_RESUME), "mesh.data", "mesh.expert", "mesh.shard"}
    )
    """Fields that the weights do not depend on, as dotted names: they may change when a run is resumed."""

    scores: ClassVar[tuple[str, ...]] = ()
    """Metrics, shares of 1, that runs of this kind are compared by, the most important first."""

    task: Task
    loaders: Loaders

    def __init__(self, recipe: R, context: Context | None = None) -> None:
        self.recipe, self.context = recipe, context or Context()
        parts: list[Any] = [getattr(recipe, name, None) for name in ("optim", "schedule", "train")]
        if None not in parts:  # before anything is seeded, built or read with them
            check_configs(*parts)

    @classmethod
    def device_of(cls, recipe: R) -> str:
        """The device that a recipe names."""
        return recipe.train.device  # type: ignore[attr-defined]

    def inputs(self) -> dict[str, Any]:
        """JSON files of the run folder, by name, that predicting and evaluating need besides the weights.

        Written when a run begins and kept when it is resumed; None stands for no file.
        """
        return {}

    def prepare(self, run: RunFolder, device: torch.device) -> None:
        """Create the trainer, before the run's folder is written. UserError if the recipe cannot be trained here."""
        parts: dict[str, Any] = {name: getattr(self.recipe, name) for name in ("optim", "schedule", "train")}
        mesh = getattr(self.recipe, "mesh", None)
        self.trainer = Trainer(self.task, self.loaders, **parts, run=run, mesh=mesh, device=device)
        # Raises here, rather than in the first step, if the batch does not divide over the ranks.
        self.loaders.train(start_step=0, steps=0, rank=distributed.rank(), world_size=distributed.world_size())

    def fit(self, run: RunFolder, device: torch.device, *, resume: bool, show: bool) -> Evaluation:
        """Train to the end; collective. Returns the last evaluation."""
        return self.trainer.fit(resume=resume, show=show)

    def finish(self, run: RunFolder, evaluation: Evaluation) -> None:
        """Write what else a finished run leaves, besides weights and predictions; on one rank."""

    def predictions(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        """What predictions.npz of a finished run holds: arrays with one row an item."""
        return evaluation.predictions

    def summary(self, evaluation: Evaluation) -> str:
        """The result in a few words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())

    @classmethod
    def stored(cls, run: RunFolder) -> R:
        """The recipe that a run folder was created with. UserError naming the file if it does not parse."""
        try:
            return from_json(cls.recipe_type, run.config())  # type: ignore[return-value]
        except UserError as error:
            raise UserError(f"{run.config_path}: {error}") from error

    @classmethod
    def eval_options(cls, run: RunFolder) -> EvalOptions:
        """The default options of an evaluation."""
        return cls.eval_options_type()

    @classmethod
    def evaluate(cls, run: RunFolder, options: EvalOptions, device: torch.device) -> Evaluation:
        """Evaluate a run's weights on its test data; collective."""
        job = cls(cls.stored(run), Context(run, trusted=options.trust_data))
        load_weights(job.task.backbone(), options.checkpoint or run.path)
        return job.task.to(device).evaluate(evaluation_batches(job.loaders), device)

    @classmethod
    @abstractmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        """One row for each item in the files."""

    @classmethod
    def report(cls, run: RunFolder, context: Context | None = None) -> Path:
        """Write the page of a run, finished or not; `context` is the one it was trained in, where it just was."""
        return write_plain_report(run.path)

    @classmethod
    def report_with(cls, run: RunFolder, options: ReportOptions) -> Path:
        """Write the page of a run as options of its kind say; without any, `report`."""
        return cls.report(run)

    @classmethod
    def load(cls, run: RunFolder, checkpoint: Path | None = None) -> nn.Module:
        """The run's model in evaluation mode, with its newest weights or those of `checkpoint`."""
        raise UserError(f"a run of the kind {cls.recipe_type.kind} has no model to load")

    @classmethod
    def cost(cls, run: RunFolder) -> tuple[int | None, int | None]:
        """Parameters of the run's model, and its multiply-adds for one item; None where that is not known."""
        return None, None

    @classmethod
    def export(cls, run: RunFolder, target: Path) -> str:
        """Write the run's model for use without this package's commands; returns how it is loaded."""
        raise UserError(f"a run of the kind {cls.recipe_type.kind} has nothing to export")

    @classmethod
    def export_program(cls, run: RunFolder, target: Path, options: ProgramOptions) -> str:
        """Write the run's model as a program; returns how it is used."""
        raise UserError(
            f"a run of the kind {cls.recipe_type.kind} cannot be exported to {options.to}: only its weights, --to timm"
        )


def check_export_target(target: Path) -> None:
    """UserError unless the path can be a safetensors file."""
    if target.suffix != ".safetensors" or target.is_dir():
        raise UserError(f"the file to write must end in .safetensors, got {target}")


def evaluation_batches(loaders: Loaders) -> Any:
    """This rank's share of everything to evaluate on."""
    return loaders.evaluate(rank=distributed.rank(), world_size=distributed.world_size())
