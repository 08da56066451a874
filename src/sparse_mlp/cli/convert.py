"""`sparse-mlp convert`: a published checkpoint in, a safetensors file in our layout out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp.cli.output import console
from sparse_mlp.cli.parse import parse
from sparse_mlp.weights import convert_file


@dataclass(frozen=True)
class ConvertArguments:
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Checkpoint of the authors or of ours: .pth, .pt or .safetensors."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """File to write; its name ends in .safetensors."""

    model: str
    """Name of the model that the weights belong to."""

    use_ema: bool = True
    """Take the averaged weights where the checkpoint has both, as timm does."""


def run(arguments: list[str]) -> int:
    description = "Convert a published checkpoint to safetensors in the layout of one of our models."
    given = parse(ConvertArguments, arguments, prog="convert", description=description)
    count = convert_file(given.source, given.model, given.target, given.use_ema)
    console().print(f"{count} tensors: {given.target}", markup=False, soft_wrap=True)
    return 0
