"""The report of a run of any kind: a figure for every logged scalar."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sparse_mlp.report.curves import curve_figure, plain
from sparse_mlp.report.experts import load_section
from sparse_mlp.report.header import balance_tile, cost_tiles, run_head
from sparse_mlp.report.page import Drawing, Figures, Tile
from sparse_mlp.report.run import RunData, read_run
from sparse_mlp.report.sections import save_page
from sparse_mlp.report.style import clip

_MAX_TILES = 4


@dataclass(frozen=True)
class ScalarsSection:
    """Every logged scalar over the steps, and the last evaluation as (name, value)."""

    lead: str
    drawings: list[Drawing]
    table: list[tuple[str, str]]


def write_plain_report(run_dir: Path | str) -> Path:
    """Write `report.html` and `figures/` into a run folder of any kind, finished or not; returns the page's path.

    It draws every logged scalar, the last evaluation, the load of experts where it was measured, the configuration and
    the environment. FileNotFoundError or UserError, one line, for a folder that is no run or whose files do not parse.
    """
    run = read_run(run_dir)
    run.notes[:] = [note for note in run.notes if "predictions.npz" not in note]  # a kind of run may have none
    figures = Figures(run.path / "figures")
    last = last_evaluation(run)
    drawn = [
        figures.add(figure, "scalar_" + re.sub(r"[^A-Za-z0-9_-]+", "_", key), "", alt=key)
        for key, figure in _curves(run).items()
    ]
    lead = "Every number the run logged, over its steps; the scale on the upper edge is the training time."
    table = [(key, plain(value)) for key, value in last.items()]
    sections: dict[str, object] = {
        "last": ScalarsSection("", [], table) if table else None,
        "curves": ScalarsSection(lead, drawn, []) if drawn else None,
        "load": load_section(run, figures),
    }
    tiles = [Tile(key, plain(value), "last evaluation") for key, value in list(last.items())[:_MAX_TILES]]
    balanced = balance_tile({name: routing.final_load() for name, routing in run.routing.items()})
    recipe = str(run.config.get("name") or run.name)
    kind = f"Run report · {run.kind}" if run.kind else "Run report"
    head = run_head(run, [*tiles, *cost_tiles(run), *balanced], kind=kind, title=recipe)
    return save_page(run, "plain.html.j2", head, sections)


def last_evaluation(run: RunData) -> dict[str, float]:
    """Return the last value of everything that evaluations measured, rounded to six digits."""
    values_by_name = {}
    for key, values in run.evals.values.items():
        known = values[np.isfinite(values)]
        if len(known):
            values_by_name[key] = float(f"{known[-1]:.6g}")
    return values_by_name


def _curves(run: RunData) -> dict[str, Figure]:
    """Return a figure for every scalar; one that training and evaluation share has both lines."""
    keys = dict.fromkeys([*run.train.values, *run.evals.values])
    figures = {}
    for key in keys:
        if np.isfinite(run.train.get(key)).any() or np.isfinite(run.evals.get(key)).any():
            test = run.evals.get(key) if key in run.evals.values else None
            figures[key] = curve_figure(clip(key, 40), run, run.train.get(key), test)
    return figures
