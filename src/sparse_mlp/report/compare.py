"""Several runs side by side: one table, and their curves over steps, time and multiply-adds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from sparse_mlp.errors import UserError
from sparse_mlp.report.compare_curves import QUANTITIES, Group, Scale, overview_figure, panel_figure, scales
from sparse_mlp.report.compare_table import group_runs, summary, table, write_csv
from sparse_mlp.report.header import shared_facts
from sparse_mlp.report.page import TITLES, Drawing, Figures, Head, Swatch, write_page
from sparse_mlp.report.run import read_run
from sparse_mlp.report.style import RUN_STYLES, css_colour, save_png, save_svg

_CAPTIONS = {
    "step": "A step is one batch.",
    "time": "On the machine that each run was made on, without the evaluations.",
    "compute": "At the same place as many multiply-adds are spent; a backward pass counts as two forward passes.",
}
_LEADS = {
    "accuracy": "In every evaluation, on the test set.",
    "loss": "On the training set, as optimised; long curves are moving averages.",
}
_SEEDS = " A line is the mean over the seeds of a recipe, a band runs from the lowest to the highest."


@dataclass(frozen=True)
class QuantitySection:
    """One quantity over each scale."""

    lead: str
    key: list[Swatch]
    drawings: list[Drawing]


def write_comparison(run_dirs: Sequence[Path | str], out: Path | str, macs: Sequence[int | None] | None = None) -> Path:
    """Write `comparison.html`, `.csv`, `.json`, `.png`, `.svg` and `figures/` into `out`; returns the page's path.

    Runs of one recipe whose configurations differ in nothing but the seed share a row of the table, with mean and
    standard deviation, and a curve. The CSV has a line for each run.

    Args:
        run_dirs: two or more run folders, of at most six recipes.
        out: folder to write into, created if missing.
        macs: multiply-adds for one image of each run's model, None where unknown.

    FileNotFoundError or UserError, one line, for wrong folders or a wrong number of them.
    """
    if len(run_dirs) < 2:
        raise UserError(f"a comparison takes two or more runs; got {len(run_dirs)}")
    if macs is not None and len(macs) != len(run_dirs):
        raise UserError(f"{len(run_dirs)} runs need as many numbers of multiply-adds; got {len(macs)}")
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice")
    groups = group_runs([read_run(run_dir) for run_dir in run_dirs], macs or [None] * len(run_dirs))
    if len(groups) > len(RUN_STYLES):
        raise UserError(f"a comparison shows at most {len(RUN_STYLES)} recipes; got {len(groups)} in {len(paths)} runs")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    over = scales(groups)
    _save(overview_figure(groups, over), folder / "comparison")
    write_csv(groups, folder / "comparison.csv")
    text = json.dumps(summary(groups), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    runs = [run for group in groups for run in group.runs]
    models = dict.fromkeys(run.model_name for run in runs)
    notes = [f"{group.run_name(run)}: {note}" for group in groups for run in group.runs for note in run.notes]
    head = Head("Comparison", " and ".join(models), notes=[*_unequal_steps(groups), *notes], facts=shared_facts(runs))
    columns, rows = table(groups)
    return write_page(
        folder / "comparison.html",
        "comparison.html.j2",
        head,
        sections=_sections(groups, over, Figures(folder / "figures")),
        columns=columns,
        rows=rows,
        page_title="Comparison of runs",
    )


def _save(figure: Figure, path: Path) -> None:
    save_png(figure, path.with_suffix(".png"))
    save_svg(figure, path.with_suffix(".svg"))


def _unequal_steps(groups: Sequence[Group]) -> list[str]:
    steps = {group.name: sorted({run.last_step for run in group.runs}) for group in groups}
    if len({step for found in steps.values() for step in found}) == 1:
        return []
    each = "; ".join(f"{name} {', '.join(f'{step:,}' for step in found)}" for name, found in steps.items())
    return [f"These runs trained for unequal numbers of steps: {each}."]


def _sections(groups: Sequence[Group], over: Sequence[Scale], figures: Figures) -> dict[str, QuantitySection]:
    key = [
        Swatch(css_colour(colour), group.name, "line" if dash == "-" else "dashed")
        for group, (colour, dash) in zip(groups, RUN_STYLES, strict=False)
    ]
    seeds = _SEEDS if any(len(group.runs) > 1 for group in groups) else ""
    sections = {}
    for quantity in QUANTITIES:
        drawn = [
            figures.add(
                panel_figure(groups, quantity, scale),
                f"{quantity.name}_{scale.name}",
                _CAPTIONS[scale.name] if quantity is QUANTITIES[0] else "",
            )
            for scale in over
        ]
        assert quantity.name in TITLES
        sections[quantity.name] = QuantitySection(_LEADS[quantity.name] + seeds, key, drawn)
    return sections
