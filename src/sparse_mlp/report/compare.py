"""Several runs side by side: one table, and their curves over steps, time and multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_mlp.errors import UserError
from sparse_mlp.report import page
from sparse_mlp.report.analysis import balance
from sparse_mlp.report.curves import Line, draw_lines, percent, plain, time_unit
from sparse_mlp.report.page import Figures
from sparse_mlp.report.run import Floats, Run, Series, read_run
from sparse_mlp.report.style import RUN_STYLES, clip, css_colour, panel, save_png, styled

_COMPUTE_UNITS = ((1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"))


def write_comparison(run_dirs: Sequence[Path | str], out: Path | str, macs: Sequence[int | None] | None = None) -> Path:
    """Write `comparison.html`, `comparison.png` and `figures/*.png` into `out`; returns the page's path.

    Args:
        run_dirs: two to six run folders.
        out: folder to write into, made if missing.
        macs: multiply-adds for one image of each run's model, None where unknown.

    FileNotFoundError or ValueError, one line, for wrong folders or a wrong number of them.
    """
    if not 2 <= len(run_dirs) <= len(RUN_STYLES):
        raise UserError(f"a comparison takes 2 to {len(RUN_STYLES)} runs; got {len(run_dirs)}")
    if macs is not None and len(macs) != len(run_dirs):
        raise UserError(f"{len(run_dirs)} runs need as many numbers of multiply-adds; got {len(macs)}")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    costs = list(macs) if macs is not None else [None] * len(runs)
    labels = run_labels(runs)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    over = scales(runs, costs)
    save_png(_overview(runs, labels, over), folder / "comparison.png")
    body = _body(runs, costs, labels, over, Figures(folder / "figures"))
    target, temporary = folder / "comparison.html", folder / ".comparison.html.tmp"
    temporary.write_text(page.document("Comparison of runs", body), encoding="utf-8")
    temporary.replace(target)
    return target


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return a different name for each run: its folder's, with the parent's where two are alike."""
    names = [run.name for run in runs]
    return [
        f"{run.path.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def compute(run: Run, steps: Floats, macs: int | None, passes: float = 3.0) -> Floats | None:
    """Return the multiply-adds of training up to each step: images seen x forward x passes. None where unknown.

    A backward pass costs two forward passes, one product for the inputs and one for the weights: three in all.
    """
    data = run.config.get("data")
    batch_size = data.get("batch_size") if isinstance(data, dict) else None
    return None if macs is None or batch_size is None else steps * (passes * macs * batch_size)


def _table(runs: Sequence[Run], macs: Sequence[int | None], labels: Sequence[str]) -> str:
    columns = ["Top-1", "Parameters", "Multiply-adds", "Images/s", "Training time", "Busiest expert", "Idle experts"]
    best = max((run.top1 for run in runs if run.top1 is not None), default=None)
    lines = []
    for run, cost, label in zip(runs, macs, labels, strict=True):
        loads = [balance(routing.final_load()) for routing in run.routing.values()]
        cells = [
            page.NONE if run.top1 is None else f"{100 * run.top1:.2f} %",
            page.count(run.parameters),
            page.count(cost),
            page.NONE if run.images_per_s is None else f"{run.images_per_s:,.0f}",
            page.duration(run.seconds),
            f"{max(layer.busiest for layer in loads):.2f} {page.TIMES}" if loads else "dense",
            str(sum(len(layer.dead) for layer in loads)) if loads else page.NONE,
        ]
        marks = ["best" if best is not None and run.top1 == best else "", *[""] * 6]
        inner = "".join(
            f'<td class="{mark}">{escape(cell)}</td>' if mark else f"<td>{escape(cell)}</td>"
            for cell, mark in zip(cells, marks, strict=True)
        )
        head = f'<th scope="row">{escape(label)} <small>{escape(run.model_name)}</small></th>'
        lines.append(f"<tr>{head}{inner}</tr>")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in ["Run", *columns])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="results scroll">{table}</div>'


@dataclass(frozen=True)
class Scale:
    """What the curves run over: `x[i]` turns a series of run i into places along the axis, None where unknown."""

    name: str
    title: str
    label: str
    x: list[Callable[[Series], Floats] | None]


def scales(runs: Sequence[Run], macs: Sequence[int | None]) -> list[Scale]:
    """Return steps, training time and, where any run's multiply-adds are known, compute."""
    unit, unit_name = time_unit(max(run.seconds for run in runs))
    found = [
        Scale("step", "over steps", "step", [lambda series: series.step] * len(runs)),
        Scale("time", "over time", f"training time ({unit_name})", [lambda series: series.time / unit] * len(runs)),
    ]
    totals = [compute(run, np.array([float(run.last_step)]), cost) for run, cost in zip(runs, macs, strict=True)]
    known = [float(total[0]) for total in totals if total is not None]
    if known:
        size, name = next((pair for pair in _COMPUTE_UNITS if max(known) >= pair[0]), _COMPUTE_UNITS[-1])

        def over(run: Run, cost: int | None) -> Callable[[Series], Floats] | None:
            if compute(run, np.zeros(1), cost) is None:
                return None
            return lambda series: np.asarray(compute(run, series.step, cost)) / size

        x = [over(run, cost) for run, cost in zip(runs, macs, strict=True)]
        found.append(Scale("compute", "at equal compute", f"{name}-multiply-adds of training", x))
    return found


@dataclass(frozen=True)
class Quantity:
    """What the curves show."""

    name: str
    title: str
    ticks: Callable[..., str]
    series: Callable[[Run], Series]
    key: str

    def lines(self, runs: Sequence[Run], scale: Scale, labels: Sequence[str]) -> list[Line | None]:
        """Return each run's curve, None where the run has no place on this axis."""
        return [
            None if x is None else Line(label, x(self.series(run)), self.series(run).get(self.key))
            for run, x, label in zip(runs, scale.x, labels, strict=True)
        ]


QUANTITIES = (
    Quantity("accuracy", "Test accuracy", percent, lambda run: run.evals, "top1"),
    Quantity("loss", "Training loss", plain, lambda run: run.train, "loss"),
)
_CAPTIONS = {
    "step": "A step is one batch.",
    "time": "On the machine that each run was made on, without the evaluations.",
    "compute": "At the same place as many multiply-adds are spent; a backward pass counts as two forward passes.",
}


@styled
def _panel(runs: Sequence[Run], labels: Sequence[str], quantity: Quantity, scale: Scale) -> Figure:
    figure, axes = panel()
    draw_lines(
        axes, quantity.lines(runs, scale, labels), f"{quantity.title} {scale.title}", scale.label, quantity.ticks
    )
    return figure


@styled
def _overview(runs: Sequence[Run], labels: Sequence[str], over: Sequence[Scale]) -> Figure:
    """Draw all panels in one figure, with the key above."""
    width = 3.6 * len(over)
    figure = Figure(figsize=(width, 5.4))
    margins = {"left": 0.56 / width, "right": 1 - 0.1 / width, "bottom": 0.085, "top": 0.87}
    figure.subplots_adjust(**margins, wspace=0.22, hspace=0.48)
    for i, quantity in enumerate(QUANTITIES):
        for j, scale in enumerate(over):
            axes = figure.add_subplot(len(QUANTITIES), len(over), i * len(over) + j + 1)
            title = f"{quantity.title} {scale.title}"
            draw_lines(axes, quantity.lines(runs, scale, labels), title, scale.label, quantity.ticks)
    handles = [
        Line2D([], [], color=colour, linestyle=dash, label=f" {clip(label, 40)}")  # a leading _ would hide it
        for label, (colour, dash) in zip(labels, RUN_STYLES, strict=False)
    ]
    figure.legend(handles=handles, loc="upper left", ncols=3, fontsize=8.5, bbox_to_anchor=(0.01, 1.0))
    return figure


def _body(
    runs: Sequence[Run], macs: Sequence[int | None], labels: Sequence[str], over: Sequence[Scale], figures: Figures
) -> str:
    styles = RUN_STYLES[: len(runs)]
    kinds = ["line" if dash == "-" else "dashed" for _, dash in styles]
    key = page.colour_key([css_colour(colour) for colour, _ in styles], labels, kinds)
    sections = []
    for quantity in QUANTITIES:
        drawn = [
            figures.add(
                _panel(runs, labels, quantity, scale),
                f"{quantity.name}_{scale.name}",
                _CAPTIONS[scale.name] if quantity is QUANTITIES[0] else "",
            )
            for scale in over
        ]
        lead = {
            "accuracy": "On the test images, at every evaluation.",
            "loss": "On the training images, as optimised; long curves are moving averages.",
        }[quantity.name]
        sections.append(page.section(quantity.name, quantity.title, lead, key, page.row(drawn)))
    lead = (
        "Training speed is the median over the run. Busiest expert: the largest load of any layer over its fair share, "
        "1 is perfect; idle experts get under 5 % of theirs."
    )
    header = f"""<header>
<p class="eyebrow">Comparison</p>
<h1>{escape(" and ".join(dict.fromkeys(run.model_name for run in runs)))}</h1>
{_table(runs, macs, labels)}
<p class="lead">{escape(lead)}</p>
{page.notes(f"{label}: {note}" for run, label in zip(runs, labels, strict=True) for note in run.notes)}
</header>"""
    return "\n".join(
        [header, *sections, "<footer><p>Drawn by sparse-mlp from the files of these run folders.</p></footer>"]
    )
