"""`sparse-mlp recipes`: list the recipes, or show one in full."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from sparse_mlp import jobs, recipes
from sparse_mlp.cli.output import add_row, console, table
from sparse_mlp.cli.parse import parse

_DESCRIPTION = "List the recipes, or show one in full. The name of any model of timm is a recipe too."


@dataclass(frozen=True)
class RecipesArguments:
    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RECIPE]")] = None
    """Name of a recipe. Left out: all."""


def run(arguments: list[str]) -> int:
    given = parse(RecipesArguments, arguments, prog="recipes", description=_DESCRIPTION)
    out = console()
    if given.name is None:
        shown = table("recipe", "kind", "what it is")
        for name, function in recipes.RECIPES.items():
            add_row(shown, name, recipes.get(name).kind, (inspect.getdoc(function) or "").splitlines()[0])
        out.print(shown)
        out.print("and the name of any model (sparse-mlp models --all), for images of your own", markup=False)
        return 0
    recipe = recipes.get(given.name)
    if given.name in recipes.RECIPES:
        out.print(inspect.getdoc(recipes.RECIPES[given.name]), markup=False)
    out.print_json(json.dumps(jobs.to_json(recipe)))
    return 0
