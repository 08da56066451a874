"""`sparse-mlp predict`: what a run sees in files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_mlp import jobs
from sparse_mlp.cli.output import add_row, console, table
from sparse_mlp.cli.parse import asks_help, parse, parse_known
from sparse_mlp.errors import UserError
from sparse_mlp.files import replacing
from sparse_mlp.jobs import PredictOptions, Row

_DESCRIPTION = """Predict with a trained run.

    sparse-mlp predict RUN FILE|FOLDER ... [--out FILE] [options]

A run on images takes image files, folders with their subfolders, and quoted patterns such as 'photos/*.jpg'; a run on a
graph takes a file of features (.npy, .npz, .csv)."""

_FORMATS = (".csv", ".json")
_COLUMNS = 12  # in the printed table; a file has all of them


@dataclass(frozen=True)
class OutOptions:
    out: Path | None = None
    """File to write all of it to, .csv or .json. Left out: a table is printed."""


def run(arguments: list[str]) -> int:
    count = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    names, options = list(arguments[:count]), list(arguments[count:])
    if asks_help(options) or "-h" in arguments:
        kind = jobs.Run(Path(names[0])).job.predict_options_type if names else PredictOptions
        parse(kind, ["--help"], prog="predict", description=f"{_DESCRIPTION}\n\n--out FILE: write .csv or .json.")
    if len(names) < 2:
        raise UserError("predict takes a run folder and files: sparse-mlp predict RUN FILE ...")
    output, rest = parse_known(OutOptions, options, prog="predict")
    if output.out is not None:
        _check_target(output.out)
    found = jobs.Run(Path(names[0]))
    given: Any = parse(found.job.predict_options_type, rest, prog="predict", default=found.job.predict_options_type())
    rows = found.job.predict(found.folder, names[1:], given)
    if output.out is None:
        _show(rows)
    else:
        _write(rows, output.out)
        sys.stderr.write(f"sparse-mlp: {len(rows)} rows: {output.out}\n")
    return 2 if any("error" in row for row in rows) else 0


def _show(rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = table(*names[:_COLUMNS], *(["..."] if len(names) > _COLUMNS else []))
    for row in rows:
        add_row(shown, *(_cell(name, row.get(name)) for name in names[:_COLUMNS]))
    console().print(shown)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if name.startswith("probability") else f"{value:.4g}"
    return "" if value is None else str(value)


def _check_target(path: Path) -> None:
    """UserError, FileNotFoundError if a file cannot be of this name: said before the images are read."""
    if path.suffix not in _FORMATS:
        raise UserError(f"--out {path} must end in {' or '.join(_FORMATS)}")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")


def _write(rows: Sequence[Row], path: Path) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            json.dump(list(rows), file, indent=1, ensure_ascii=False)
            return
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
