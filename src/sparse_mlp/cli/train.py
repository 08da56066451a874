"""`sparse-mlp train`: a recipe, with any of its fields changed, into a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparse_mlp import jobs, recipes
from sparse_mlp.cli.parse import HELP_ALL, parse, parse_known, split_names
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import Recipe

_FIELDS = "Every field of the recipe is an option; the defaults shown are the recipe's."


@dataclass(frozen=True)
class TrainOptions:
    out: Path | None = None
    """Folder of the new run. Left out: runs/ and the recipe's name, numbered if that exists."""

    resume: Path | None = None
    """Go on with the run in this folder, to the bit as if it had never stopped. Its recipe is taken from there; only
    what does not touch the weights may be changed (saving, logging, workers, device, threads), and a finished run can
    be given a larger length where its schedule allows it."""

    trust_data: bool = False
    """With --resume: open the data that the run folder names even if that can execute or fetch something."""


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    everything = HELP_ALL in options
    given, rest = parse_known(TrainOptions, [word for word in options if word != HELP_ALL], prog="train")
    rest += [HELP_ALL] * everything
    if len(names) > 1:
        raise UserError(f"train takes one recipe, not {len(names)} ({', '.join(names)}); compare takes several")
    if given.resume is not None:
        _resume(given, names, rest)
        return 0
    if not names:
        raise UserError("which recipe? sparse-mlp train RECIPE (see sparse-mlp recipes), or MODEL --data.root FOLDER")
    if given.trust_data:
        raise UserError("--trust-data would be ignored: a new run's data are named by you")
    recipe = recipes.resolve(names[0], partial(change, options=rest))
    jobs.train(recipe, given.out)
    return 0


def change(recipe: Recipe, options: Sequence[str], prog: str = "train") -> Recipe:
    """The recipe with the options of a command line in it, and what follows from them."""
    return jobs.adjust_dependent(recipe, parse(type(recipe), options, prog=prog, description=_FIELDS, default=recipe))


def _resume(given: TrainOptions, names: list[str], options: list[str]) -> None:
    if names:
        raise UserError(f"{names[0]} would be ignored: --resume takes the recipe from {given.resume}")
    if given.out is not None:
        raise UserError(f"--out {given.out} would be ignored: --resume goes on in {given.resume}")
    assert given.resume is not None
    stored = jobs.Run(given.resume).recipe
    jobs.resume(given.resume, change(stored, options), trusted=given.trust_data)
