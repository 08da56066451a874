"""`sparse-mlp report`: the page of a run, or the page that compares several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_mlp import jobs
from sparse_mlp.cli.compare import check_out, show_comparison
from sparse_mlp.cli.output import console
from sparse_mlp.cli.parse import asks_help, parse, split_names
from sparse_mlp.errors import UserError
from sparse_mlp.files import writing_into

_DESCRIPTION = """Write the report of a run again, or a page that compares several runs.

    sparse-mlp report RUN [options]
    sparse-mlp report RUN RUN ... [--out FOLDER]

Which options there are depends on the kind of run; a run on whole images whose model has experts takes --images
FOLDER, pictures of your own, and writes what the experts do with them, routing.html, in place of its own page."""


@dataclass(frozen=True)
class ComparisonOptions:
    out: Path | None = None
    """Of several runs: folder of the page that compares them. Left out: runs/compare."""


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if not names and not asks_help(options):
        raise UserError("report takes a run folder: sparse-mlp report RUN ...")
    if len(names) != 1:
        given = parse(ComparisonOptions, options, prog="report", description=_DESCRIPTION)
        out = given.out or Path("runs/compare")
        check_out(out)
        show_comparison([jobs.Run(Path(name)) for name in names], out)
        return 0
    if any(word.split("=")[0] == "--out" for word in options):
        raise UserError("--out would be ignored: the page of a run is in its folder")
    run = jobs.Run(Path(names[0]))
    kind = run.job.report_options_type
    chosen: Any = parse(kind, options, prog="report", description=_DESCRIPTION, default=kind())
    with writing_into(run.path):
        page = run.job.report_with(run.folder, chosen)
    console().print(f"report: {page}", markup=False, soft_wrap=True)
    return 0
