"""`sparse-mlp convert`: a published checkpoint in, a safetensors file in our layout out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp import recipes
from sparse_mlp.cli.output import console
from sparse_mlp.cli.parse import parse
from sparse_mlp.jobs.segment import SegmentRecipe, convert_mmseg
from sparse_mlp.weights import convert_file


@dataclass(frozen=True)
class ConvertArguments:
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Checkpoint of the authors or of ours: .pth, .pt or .safetensors."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """File to write; its name ends in .safetensors."""

    model: str
    """Name of the model that the weights belong to; for a segmenter of mmsegmentation's, of the recipe
    (ade20k_as_mlp_tiny_upernet, ...)."""

    use_ema: bool = True
    """Take the averaged weights where the checkpoint has both, as timm does."""


def run(arguments: list[str]) -> int:
    description = "Convert a published checkpoint to safetensors in the layout of one of our models."
    given = parse(ConvertArguments, arguments, prog="convert", description=description)
    if given.model in recipes.RECIPES and isinstance(recipe := recipes.get(given.model), SegmentRecipe):
        count = convert_mmseg(given.source, recipe, given.target)
    else:
        count = convert_file(given.source, given.model, given.target, given.use_ema)
    console().print(f"{count} tensors: {given.target}", markup=False, soft_wrap=True)
    return 0
