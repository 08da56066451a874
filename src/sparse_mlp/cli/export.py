"""`sparse-mlp export`: from a run folder to a file that timm loads without this package's commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp import jobs
from sparse_mlp.cli.output import console
from sparse_mlp.cli.parse import parse

_DESCRIPTION = """Write the backbone of a run as bare timm weights without a classifier.

    sparse-mlp export runs/digits_sparse backbone.safetensors

The newest checkpoint is taken, with the averaged weights where the run kept them. The code that loads the file is
printed, has been tried, and stands in the file's metadata."""


@dataclass(frozen=True)
class ExportArguments:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """File to write; its name ends in .safetensors."""


def run(arguments: list[str]) -> int:
    given = parse(ExportArguments, arguments, prog="export", description=_DESCRIPTION)
    console().print(jobs.Run(given.run).export(given.target), markup=False, soft_wrap=True)
    return 0
