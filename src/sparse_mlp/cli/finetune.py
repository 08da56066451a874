"""`sparse-mlp finetune`: a pre-trained model, trained further on labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp import recipes
from sparse_mlp.cli.parse import split_names
from sparse_mlp.cli.pretrained import AFTERWARDS, SOURCES, recipe_from
from sparse_mlp.cli.running import train
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import Recipe

_RECIPE = "finetune_deit"
_DESCRIPTION = f"""Train a pre-trained model further, all of it, with a new classifier where their number is another.

    sparse-mlp finetune SOURCE [RECIPE] [--out DIR] [--any.field VALUE ...]

    sparse-mlp finetune runs/pretrained --data.label-share 0.01 --optim.layer-decay 0.75

{SOURCES}

RECIPE is any recipe of `sparse-mlp recipes`; of its model only drop path and dropout are taken. Left out:
{_RECIPE}, on the images that the run was made with. --data.label-share trains on a share of the labels.

{AFTERWARDS}"""


@dataclass(frozen=True)
class FinetuneArguments:
    out: Path | None = None
    """Folder of the new run. Left out: runs/ and the recipe's name, numbered if that exists."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if len(names) > 2:
        raise UserError(f"finetune takes SOURCE and one recipe, not {len(names)} names ({', '.join(names)})")
    source, recipe = (*names, "", "")[:2]
    given = recipe_from(
        source,
        recipes.get(recipe or _RECIPE),
        options,
        FinetuneArguments,
        own_data=not recipe or recipe == _RECIPE,
        prog="finetune",
        description=_DESCRIPTION,
    )
    train(given.recipe, given.out)
    return 0
