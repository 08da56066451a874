"""`sparse-mlp recipes`: what can be trained by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from sparse_mlp import recipes
from sparse_mlp.cli.parse import parse
from sparse_mlp.cli.showing import console, table
from sparse_mlp.recipes.pretrain import PRETRAIN_RECIPES


@dataclass(frozen=True)
class RecipesArguments:
    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[RECIPE]")] = None
    """Show this recipe in full: its description and every field."""


def run(arguments: list[str]) -> int:
    given = parse(RecipesArguments, arguments, prog="recipes", description="List the recipes, or show one in full.")
    out = console()
    known: dict[str, Callable[[], Any]] = {**recipes.RECIPES, **PRETRAIN_RECIPES}
    if given.name is None:
        shown = table("recipe", "what it trains")
        for name, function in known.items():
            shown.add_row(name, (inspect.getdoc(function) or "").splitlines()[0])
        out.print(shown)
        return 0
    recipe = known[given.name]() if given.name in known else recipes.get(given.name)
    out.print(inspect.getdoc(known[given.name]), markup=False)
    out.print_json(json.dumps(recipes.to_json(recipe)))
    return 0
