"""What the studies share: a run that is started, resumed or left as it is, whichever its folder calls for."""

from __future__ import annotations

from pathlib import Path

import sparse_mlp
from sparse_mlp.engine import RunFolder
from sparse_mlp.jobs import Recipe, Run


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end."""
    return RunFolder(folder).results() is not None


def finish(recipe: Recipe, folder: Path, *, show: bool = False) -> Run:
    """The finished run of a recipe: trained, resumed from its newest checkpoint, or finished before.

    UserError if the folder holds a run of another recipe.
    """
    if is_finished(folder):
        return Run(folder)
    if (folder / "config.json").is_file():
        return sparse_mlp.resume(folder, recipe, trusted=True, show=show)
    return sparse_mlp.train(recipe, folder, show=show)
