"""Training runs as the commands start, resume and finish them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparse_mlp import distributed, recipes
from sparse_mlp.cli.showing import console, write_run_report
from sparse_mlp.data import ImageData
from sparse_mlp.engine import FREE_ON_RESUME, Evaluation, RunFolder, Trainer
from sparse_mlp.engine.run import naming
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import Recipe

# Fields that the weights do not depend on: they may change when a run is resumed.
FREE = frozenset(f"train.{name}" for name in FREE_ON_RESUME) | frozenset(
    ("data.root", "data.download", "data.workers", "data.eval_batch_size")
)


def train(
    recipe: Any,
    folder: Path | None,
    *,
    resume: bool = False,
    build: Callable[[Any], Any] = recipes.build,
    finish: Callable[[RunFolder, Any, ImageData, Evaluation], None] | None = None,
) -> Path:
    """Run a recipe in a folder to its end: metrics, checkpoints, predictions, weights and report. Collective.

    `build` makes data, task and loaders of the recipe; `finish` is called on one rank with the last evaluation. Without
    a folder a new one under runs/ is taken; which one is returned. FileExistsError if a new run would go into the
    folder of another.
    """
    with distributed.join(recipe.train.device) as device:
        # Decided by one rank: the others may look when it has made the folder already.
        run = RunFolder(distributed.on_main(lambda: choose_folder(recipe.name, folder, resume)))
        job = build(recipe)
        trainer = Trainer(
            job.task,
            job.loaders,
            optim=recipe.optim,
            schedule=recipe.schedule,
            train=recipe.train,
            run=run,
            device=device,
        )
        # Said now rather than by the first step: a batch that does not divide.
        job.loaders.train(start_step=0, steps=0, rank=distributed.rank(), world_size=distributed.world_size())
        if not resume:  # only now, so that a recipe that cannot be trained leaves no folder
            distributed.on_main(lambda: RunFolder.create(run.path, recipes.to_json(recipe)))
        if distributed.is_main():
            recipes.save_inputs(run.path, job.data.spec)
        result = trainer.fit(resume=resume)
        distributed.on_main(lambda: (finish or _finish)(run, recipe, job.data, result))
        return run.path


def check_resume(folder: Path, stored: Any, asked: Any) -> None:
    """ValueError if a run would go on with other settings than it began with."""
    changed = {name: values for name, values in recipes.differences(stored, asked).items() if name not in FREE}
    if changed:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in list(changed.items())[:5])
        raise UserError(f"{folder} cannot be resumed with another configuration: {listed}")


def choose_folder(name: str, folder: Path | None, resume: bool) -> Path:
    """The folder asked for, else runs/NAME, or the first of NAME-2, NAME-3, ... that does not exist."""
    if folder is None:
        tries = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
        return next(path for path in tries if not path.exists())
    in_the_way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise FileExistsError(f"{folder} cannot be a run folder: {in_the_way} is a file")
    if not resume and (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds a run already; go on with --resume {folder} or name another --out")
    return folder


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder was trained and evaluated to its end."""
    return (folder / "predictions.npz").is_file()


def _finish(run: RunFolder, recipe: Recipe, data: ImageData, result: Evaluation) -> None:
    save_results(run, data, result)
    write_run_report(run.path, recipe, data)
    told = f"top-1 {result.metrics['top1']:.2%}; everything is in {run.path}"
    console(stderr=True).print(told, markup=False, soft_wrap=True)


def save_results(run: RunFolder, data: ImageData, result: Evaluation) -> None:
    """The weights and predictions of a finished run into its folder; says which images could not be read."""
    bad = data.bad_images()
    if bad:
        some = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        told = f"{len(bad)} images could not be read and were skipped: {some}"
        console(stderr=True).print(told, markup=False, soft_wrap=True)
    _link(run.weights(), run.path / "model.safetensors")
    temporary = run.path / ".predictions.tmp.npz"
    with naming(run.path / "predictions.npz"):
        np.savez_compressed(temporary, **result.predictions)  # type: ignore[arg-type]
    temporary.replace(run.path / "predictions.npz")


def _link(source: Path, target: Path) -> None:
    """The final weights under a lasting name; no second copy on the disk where the file system can do without."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
