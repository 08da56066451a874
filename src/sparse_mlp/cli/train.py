"""`sparse-mlp train`: a recipe, with any of its fields changed, into a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from sparse_mlp import recipes
from sparse_mlp.cli.parse import option, parse, split_names
from sparse_mlp.cli.running import check_resume, train
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import Recipe

R = TypeVar("R", bound=Any)

_DESCRIPTION = f"""Train a model by a recipe.

    sparse-mlp train RECIPE [--out DIR] [--any.field VALUE ...]

    sparse-mlp train --resume RUN

RECIPE is one of {", ".join(recipes.RECIPES)}. Its fields, or the defaults if none is named, are the options below.

On several GPUs or processes: torchrun --nproc-per-node N -m sparse_mlp train RECIPE ...

Ctrl-C saves; --resume goes on exactly where the run was."""


@dataclass(frozen=True)
class TrainArguments:
    out: Path | None = None
    """Folder of the new run. Left out: runs/ and the recipe's name, numbered if that exists."""

    resume: Path | None = None
    """Go on with the run in this folder, to the bit as if it had never stopped. Its recipe is taken from there; only
    what does not touch the weights may be changed (saving, logging, workers, device, threads)."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if len(names) > 1:
        raise UserError(f"train takes one recipe, not {len(names)} ({', '.join(names)}); compare takes several")
    resumed = resumed_folder(options)
    if not names and not resumed and not {"-h", "--help"} & set(options):
        raise UserError(f"which recipe? sparse-mlp train RECIPE, with one of {', '.join(recipes.RECIPES)}")
    stored = recipes.load(resumed) if resumed else None
    default = recipes.get(names[0]) if names else stored
    given = parse_recipe(options, default)
    if resumed and stored:
        if given.out is not None:
            raise UserError(f"--out {given.out} would be ignored: --resume goes on in {resumed}")
        check_resume(resumed, stored, given.recipe)
        train(given.recipe, resumed, resume=True)
        return 0
    train(given.recipe, given.out)
    return 0


def parse_recipe(options: list[str], default: Recipe | None, kind: Any = TrainArguments, prog: str = "train") -> Any:
    """The options over a recipe; model arguments join those of the recipe while the model stays the same."""
    default = default or Recipe()
    given = parse(kind, options, prog=prog, description=_DESCRIPTION, default=kind(recipe=default))
    return replace(given, recipe=join_model_arguments(given.recipe, default))


def join_model_arguments(recipe: R, default: R) -> R:
    """Model arguments join those of the default while the model stays the same."""
    if recipe.model.name != default.model.name:
        dropped = recipe.model.args == default.model.args
        return replace(recipe, model=replace(recipe.model, args={})) if dropped else recipe
    return replace(recipe, model=replace(recipe.model, args={**default.model.args, **recipe.model.args}))


def resumed_folder(options: list[str]) -> Path | None:
    """The folder of --resume, which has to be known before the other options have their defaults."""
    named = option(options, "resume")
    return None if named is None else Path(named)
