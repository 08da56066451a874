"""`sparse-mlp report`: the page of a run, or the page that compares several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp import jobs
from sparse_mlp.cli.compare import check_out, show_comparison
from sparse_mlp.cli.output import console
from sparse_mlp.cli.parse import parse
from sparse_mlp.errors import UserError

_DESCRIPTION = """Write the report of a run again, or a page that compares several runs."""


@dataclass(frozen=True)
class ReportArguments:
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Folders of runs, finished or not."""

    out: Path | None = None
    """Folder of the page that compares several. Left out: runs/compare."""


def run(arguments: list[str]) -> int:
    given = parse(ReportArguments, arguments, prog="report", description=_DESCRIPTION)
    if not given.runs:
        raise UserError("report takes a run folder: sparse-mlp report RUN ...")
    if len(given.runs) > 1:
        check_out(given.out or Path("runs/compare"))
        show_comparison([jobs.Run(path) for path in given.runs], given.out or Path("runs/compare"))
        return 0
    if given.out is not None:
        raise UserError(f"--out {given.out} would be ignored: the page of a run is in its folder")
    page = jobs.Run(given.runs[0]).report()
    console().print(f"report: {page}", markup=False, soft_wrap=True)
    return 0
