"""`sparse-mlp report`: the report of a run, written anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp import recipes
from sparse_mlp.cli import pretrain
from sparse_mlp.cli.parse import parse
from sparse_mlp.cli.showing import console, write_run_report
from sparse_mlp.data import AugmentConfig, build_datasets
from sparse_mlp.recipes.pretrain import is_pretraining, load_pretraining


@dataclass(frozen=True)
class ReportArguments:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, finished or not."""


def run(arguments: list[str]) -> int:
    description = "Write the report of a run: report.html to open in a browser, and its figures as PNG files."
    given = parse(ReportArguments, arguments, prog="report", description=description)
    if is_pretraining(given.run):
        page = pretrain.write_report(given.run, load_pretraining(given.run))
    else:
        recipe = recipes.load(given.run)
        page = write_run_report(given.run, recipe, build_datasets(recipe.data, AugmentConfig()))
    console().print(f"report: {page}", markup=False, soft_wrap=True)
    return 0
