"""`sparse-mlp transfer`: a pre-trained model on CIFAR by the published recipe."""

from __future__ import annotations

import difflib

from sparse_mlp import recipes
from sparse_mlp.cli.finetune import FinetuneArguments
from sparse_mlp.cli.parse import split_names
from sparse_mlp.cli.pretrained import AFTERWARDS, SOURCES, recipe_from
from sparse_mlp.cli.running import train
from sparse_mlp.errors import UserError

_SETS = ("cifar10", "cifar100", "cifar100_fifth")
_DESCRIPTION = f"""Fine-tune a pre-trained model on CIFAR by the published recipe: 100 epochs, batch 1024, AdamW.

    sparse-mlp transfer SOURCE SET [--out DIR] [--any.field VALUE ...]

SET is cifar10, cifar100, or cifar100_fifth (a class-balanced fifth, whose figures compare with nobody's).

{SOURCES.replace(" and --data.name", "")}

{AFTERWARDS}"""


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    asked_for_help = "--help" in options or "-h" in options
    if len(names) != 2 and not asked_for_help:
        raise UserError(f"transfer takes SOURCE and a set ({', '.join(_SETS)}), not {len(names)} names")
    source, data = names if len(names) == 2 else ("", "cifar10")
    if data not in _SETS:
        near = difflib.get_close_matches(data, _SETS, n=1, cutoff=0.5)
        raise UserError(
            f"no transfer to {data!r}; " + (f"nearest: {near[0]}" if near else f"known: {', '.join(_SETS)}")
        )
    given = recipe_from(
        source,
        recipes.get(f"transfer_{data}"),
        options,
        FinetuneArguments,
        own_data=False,
        prog="transfer",
        description=_DESCRIPTION,
    )
    train(given.recipe, given.out)
    return 0
