"""What the studies share: named runs, each started, resumed or left as it is, whichever its folder calls for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import sparse_mlp
from sparse_mlp.engine import RunFolder
from sparse_mlp.jobs import Recipe, Run

R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class NamedRun(Generic[R]):
    """One run of a study; its folder is `part/arm/seed<seed>`."""

    part: str
    arm: str
    seed: int
    recipe: R
    source: str | None = None
    """Name of the run whose weights it begins with."""

    @property
    def name(self) -> str:
        return f"{self.part}/{self.arm.replace(' ', '_')}/seed{self.seed}"


def with_source(recipe: R, planned: NamedRun[Any], out: Path) -> R:
    """The recipe of a planned run with the weights it begins with, of a run in `out`.

    FileNotFoundError if that run is not finished.
    """
    if planned.source is None:
        return recipe
    source = out / planned.source
    if not is_finished(source):
        part = planned.source.partition("/")[0]
        raise FileNotFoundError(f"{planned.name} begins with {source}, which is not finished: run {part} first")
    model = replace(recipe.model, weights=str(source.resolve()))  # type: ignore[attr-defined]
    return replace(recipe, model=model)  # type: ignore[call-arg]


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
