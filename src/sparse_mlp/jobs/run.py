"""Start, resume and use a run of any kind; the commands and the Python API share these functions."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from sparse_mlp import distributed
from sparse_mlp.engine import LENGTHS, Evaluation, RunFolder, check_longer
from sparse_mlp.errors import UserError
from sparse_mlp.files import write_json, write_npz, writing_into
from sparse_mlp.jobs.job import Context, Job, ProgramOptions, Row
from sparse_mlp.jobs.kinds import job_type
from sparse_mlp.jobs.recipe import Recipe, change_fields, differences, override, to_json

_log = logging.getLogger(__name__)

_STARTED = itertools.count()  # runs of this process


@dataclass(frozen=True)
class Run:
    """A run folder and what can be done with it."""

    path: Path

    @property
    def folder(self) -> RunFolder:
        """FileNotFoundError if the path is no run folder."""
        return RunFolder.open(self.path)

    @property
    def job(self) -> type[Job]:
        """The job class of the run's kind."""
        return job_type(kind_of(self.folder))

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return self.job.stored(self.folder)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the last evaluation. FileNotFoundError if the run has not finished."""
        results = self.folder.results()
        if results is None:
            raise FileNotFoundError(f"{self.path} has not finished: go on with --resume {self.path}")
        return results["metrics"]

    def evaluate(self, **options: Any) -> dict[str, float]:
        """Metrics of the newest weights; options as in `sparse-mlp eval`: `evaluate(data={"root": "photos/"})`."""
        job, folder = self.job, self.folder
        given = change_fields(job.eval_options(folder), options)
        with distributed.join(given.device) as device:
            return job.evaluate(folder, given, device).metrics

    def predict(self, *files: str | Path, **options: Any) -> list[Row]:
        """One row for each item in the files; options as in `sparse-mlp predict`."""
        job, folder = self.job, self.folder
        if not files or not all(isinstance(file, str | os.PathLike) for file in files):
            given = ", ".join(type(file).__name__ for file in files) or "nothing"
            raise UserError(f"predict takes the names of files or folders, not {given}")
        return job.predict(
            folder, [os.fspath(file) for file in files], change_fields(job.predict_options_type(), options)
        )

    def load(self, checkpoint: str | Path | None = None) -> nn.Module:
        """The model in evaluation mode, with the newest weights or those of a file."""
        return self.job.load(self.folder, Path(checkpoint) if checkpoint is not None else None)

    def report(self, **options: Any) -> Path:
        """Write the run's page; returns its path. Options as in `sparse-mlp report`: `report(images="photos/")`."""
        given = change_fields(self.job.report_options_type(), options)
        with writing_into(self.path):
            return self.job.report_with(self.folder, given)

    def export(self, target: str | Path, to: str = "timm", **options: Any) -> str:
        """Write the run's model as bare weights for timm, or `to` "onnx" or "torch-export"; returns the code that
        loads it. Options as in `sparse-mlp export`: `export("model.onnx", to="onnx", int8=True)`."""
        if to == "timm":
            if options:
                raise UserError(f"{', '.join(options)} would be ignored: weights for timm have no options")
            return self.job.export(self.folder, Path(target))
        return self.job.export_program(self.folder, Path(target), change_fields(ProgramOptions(to), options))


def kind_of(folder: RunFolder) -> str:
    """The kind that a run's config.json names. UserError if it names none."""
    kind = folder.config().get("kind")
    if not isinstance(kind, str):
        raise UserError(f"{folder.config_path} names no kind of run")
    return kind


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    datasets: tuple[Dataset, Dataset] | None = None,
    show: bool = True,
) -> Run:
    """Run a recipe to its end in a new folder: metrics, checkpoints, predictions, weights, report. Collective.

    Args:
        recipe: of any kind; `sparse_mlp.recipe` makes one by name.
        out: the folder; left out, runs/ and the recipe's name, numbered if that exists.
        datasets: a training and a test set of your own, `torch.utils.data.Dataset`s of (image, label), in place of the
            set that the recipe names.
        show: a progress bar.

    UserError or OSError in one line for what does not exist or fit; FileExistsError if the folder holds a run. When
    torchrun starts the processes again after a failure, the run goes on from its newest checkpoint.
    """
    if not isinstance(recipe, Recipe):
        raise UserError(f"train takes a recipe, not {recipe!r}: sparse_mlp.recipe(NAME, ...) gives one")
    context = Context(trusted=True, datasets=datasets)
    return _start(recipe, context, Path(out) if out is not None else None, resume=False, show=show)


def resume(
    path: str | Path,
    changes: Mapping[str, Any] | Recipe | None = None,
    *,
    datasets: tuple[Dataset, Dataset] | None = None,
    trusted: bool = False,
    show: bool = True,
) -> Run:
    """Go on with a run exactly where it was. Collective.

    Args:
        path: the run's folder.
        changes: fields to change, as in `sparse_mlp.recipe`, or the changed recipe: those that the weights do not
            depend on, and a larger train.epochs or train.steps where the schedule can go on.
        datasets: those of a run that was trained on datasets of your own.
        trusted: open the data that the folder names even if that can execute or fetch something.
    """
    run = Run(Path(path))
    stored = run.recipe
    if not isinstance(changes, Recipe | Mapping | None):
        raise UserError(f"changes are a dictionary of fields or a recipe, not {changes!r}")
    requested = changes if isinstance(changes, Recipe) else override(stored, changes or {})
    check_resume(run.path, stored, requested)
    context = Context(run.folder, trusted=trusted, datasets=datasets)
    return _start(requested, context, run.path, resume=True, show=show)


def check(recipe: Recipe, out: Path) -> None:
    """UserError or OSError if a recipe cannot be trained in a new folder; nothing is written."""
    kind = job_type(recipe.kind)
    with distributed.join(kind.device_of(recipe)) as device:
        kind(recipe, Context(trusted=True)).prepare(RunFolder(choose_folder(recipe.name, out, resume=False)), device)


def _start(recipe: Recipe, context: Context, out: Path | None, *, resume: bool, show: bool) -> Run:
    kind = job_type(recipe.kind)
    # The device is known before the job is built, so that all ranks build it as one group.
    with distributed.join(kind.device_of(recipe)) as device:
        # What this job began before torchrun started its processes again; a job may train several recipes.
        key = f"run {next(_STARTED)}"
        begun = distributed.on_main(lambda: distributed.recall(key))
        if begun is not None:
            out, resume, context = Path(begun), True, replace(context, run=RunFolder.open(begun))
        # Chosen by one rank: the others could see the folder that it has already created.
        run = RunFolder(distributed.on_main(lambda: choose_folder(recipe.name, out, resume)))
        job = kind(recipe, context)
        job.prepare(run, device)
        # Written after `prepare`, so that a recipe that cannot be trained leaves no folder.
        distributed.on_main(lambda: _write_start(run, job, resume))
        distributed.on_main(lambda: distributed.remember(key, str(run.path.absolute())))
        evaluation = job.fit(run, device, resume=resume, show=show)
        distributed.on_main(lambda: _finish(run, job, evaluation))
        return Run(run.path)


def _write_start(run: RunFolder, job: Job, resume: bool) -> None:
    if not resume:
        RunFolder.create(run.path, to_json(job.recipe))
    elif run.config() != to_json(job.recipe):
        if is_longer(job.stored(run), job.recipe):
            run.results_path.unlink(missing_ok=True)  # it has not finished any more
        write_json(run.config_path, to_json(job.recipe))
    for name, content in job.inputs().items():
        if content is None:
            if not resume:
                (run.path / name).unlink(missing_ok=True)  # of an earlier run that did not take a step
        elif not resume or not (run.path / name).is_file():
            write_json(run.path / name, content)


def _finish(run: RunFolder, job: Job, evaluation: Evaluation) -> None:
    """Write the final weights, predictions, results and report into the run folder."""
    if run.has_checkpoint():
        _link(run.weights(), run.path / "model.safetensors")
    write_npz(run.path / "predictions.npz", job.predictions(evaluation))
    with writing_into(run.path):
        job.finish(run, evaluation)
        write_json(run.results_path, {"metrics": evaluation.metrics})
        page = type(job).report(run, replace(job.context, run=run))
    _log.info(f"{job.summary(evaluation)}; report: {page}")


def check_resume(folder: Path, stored: Recipe, requested: Recipe) -> None:
    """UserError if a run would go on with other settings than it began with, or longer than its schedule allows.

    Of all fields of a recipe, before anything is built; `engine.resume` compares what the checkpoint was saved with,
    also for a Trainer without a recipe and for a config.json that was edited since.
    """
    free = job_type(stored.kind).free | {f"train.{name}" for name in LENGTHS}
    changed = {name: values for name, values in differences(stored, requested).items() if name not in free}
    if changed:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in list(changed.items())[:5])
        raise UserError(f"{folder} cannot be resumed with another configuration: {listed}")
    is_longer(stored, requested)


def is_longer(stored: Recipe, requested: Recipe) -> bool:
    """Whether a run becomes longer. UserError if its schedule does not allow that, or if it becomes shorter."""
    train = getattr(requested, "train", None)
    if train is None:
        return False
    return check_longer(asdict(stored.train), asdict(train), requested.schedule.sched)  # type: ignore[attr-defined]


def _numbered(name: str) -> Iterator[Path]:
    """runs/NAME, runs/NAME-2, runs/NAME-3, ..."""
    return (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))


def choose_folder(name: str, folder: Path | None, resume: bool) -> Path:
    """The requested folder, else runs/NAME, or the first of NAME-2, NAME-3, ... that does not exist."""
    if folder is None:
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"name {name!r} is no name of a folder in runs/: give another, or --out")
        return next(path for path in _numbered(name) if not path.exists())
    if not folder.name:  # "" and ".": the run's dozen files would lie among others
        raise UserError(f"--out {str(folder)!r} names no folder of its own")
    blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        raise FileExistsError(f"{folder} cannot be a run folder: {blocking} is a file")
    if not resume and RunFolder(folder).is_begun():
        raise FileExistsError(f"{folder} holds a run already; go on with --resume {folder} or name another --out")
    return folder


def _link(source: Path, target: Path) -> None:
    """Hard-link the final weights under a fixed name; copy them where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
