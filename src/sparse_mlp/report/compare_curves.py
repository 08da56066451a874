"""The curves of a comparison: test score and training loss over steps, time and multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from sparse_mlp.report.curves import percent, plain, round_ticks, smooth, thin, time_unit
from sparse_mlp.report.predictions import Floats
from sparse_mlp.report.run import SCORES, RunData, Series
from sparse_mlp.report.style import RUN_STYLES, clip, panel, styled
from sparse_mlp.report.style import title as set_title

_COMPUTE_UNITS = ((1e18, "exa"), (1e15, "peta"), (1e12, "tera"), (1e9, "giga"))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed; `macs` are the multiply-adds of an image, None where unknown."""

    name: str
    runs: list[RunData]
    macs: int | None

    def run_name(self, run: RunData) -> str:
        """Return the name of one of the runs."""
        return self.name if len(self.runs) == 1 else f"{self.name}, {run.name}"


def compute(run: RunData, steps: Floats, macs: int | None, passes: float = 3.0) -> Floats | None:
    """Return the multiply-adds of training up to each step: images seen x forward x passes. None where unknown.

    A backward pass costs two forward passes, one product for the inputs and one for the weights: three in all.
    """
    data = run.config.get("data")
    batch_size = data.get("batch_size") if isinstance(data, dict) else None
    return None if macs is None or batch_size is None else steps * (passes * macs * batch_size)


@dataclass(frozen=True)
class Scale:
    """What the curves run over: `x(group, run, series)` are places along the axis, None where they are unknown."""

    name: str
    title: str
    label: str
    x: Callable[[Group, RunData, Series], Floats | None]


def scales(groups: Sequence[Group]) -> list[Scale]:
    """Return steps, training time and, where any group's multiply-adds are known, compute."""
    unit, unit_name = time_unit(max(run.seconds for group in groups for run in group.runs))
    found = [
        Scale("step", "over steps", "step", lambda group, run, series: series.step),
        Scale("time", "over time", f"training time ({unit_name})", lambda group, run, series: series.time / unit),
    ]
    ends = [compute(run, np.array([float(run.last_step)]), group.macs) for group in groups for run in group.runs]
    known = [float(end[0]) for end in ends if end is not None]
    if known:
        size, name = next((pair for pair in _COMPUTE_UNITS if max(known) >= pair[0]), _COMPUTE_UNITS[-1])

        def spent(group: Group, run: RunData, series: Series) -> Floats | None:
            total = compute(run, series.step, group.macs)
            return None if total is None else total / size

        found.append(Scale("compute", "at equal compute", f"{name}-multiply-adds of training", spent))
    return found


@dataclass(frozen=True)
class Line:
    """A group's curve: the mean over its runs, and the lowest and highest of them; None of a single run."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True)
class Quantity:
    """What the curves show."""

    name: str
    title: str
    ticks: Callable[..., str]
    series: Callable[[RunData], Series]
    keys: tuple[str, ...]

    def heading(self, groups: Sequence[Group]) -> str:
        """The title, which of one score only, that is no accuracy, is its name."""
        found = {key for group in groups for run in group.runs for key in self.keys if key in self.series(run).values}
        return SCORES[found.pop()] if len(found) == 1 and found <= SCORES.keys() - {"top1"} else self.title

    def line(self, group: Group, scale: Scale) -> Line | None:
        """Return a group's curve, None where none of its runs has a place on this axis."""
        curves = []
        for run in group.runs:
            series = self.series(run)
            x = scale.x(group, run, series)
            key = next((key for key in self.keys if key in series.values), self.keys[0])
            known = np.isfinite(series.get(key))
            if x is not None and known.any():
                y = series.get(key)[known]
                width = len(y) // 30
                curves.append((x[known], smooth(y, width) if width > 1 else y))
        if not curves:
            return None
        x = min((x for x, _ in curves), key=len)
        if len(curves) == 1:
            return Line(*curves[0])
        x = x[x <= min(own[-1] for own, _ in curves)]  # what all of them reached
        y = np.stack([np.interp(x, *own) for own in curves])
        return Line(x, y.mean(axis=0), y.min(axis=0), y.max(axis=0)) if len(x) else Line(*curves[0])


QUANTITIES = (
    Quantity("accuracy", "Test accuracy", percent, lambda run: run.evals, ("top1", "knn_top1", "miou", "box_map")),
    Quantity("loss", "Training loss", plain, lambda run: run.train, ("loss",)),
)


@styled
def panel_figure(groups: Sequence[Group], quantity: Quantity, scale: Scale) -> Figure:
    """Draw one quantity over one scale."""
    figure, axes = panel()
    _draw(axes, groups, quantity, scale)
    return figure


@styled
def overview_figure(groups: Sequence[Group], over: Sequence[Scale]) -> Figure:
    """Draw all panels in one figure, with the key above."""
    lines = -(-len(groups) // 3)
    width, key = 3.6 * len(over), 0.15 + 0.2 * lines
    height = 5.0 + key
    figure = Figure(figsize=(width, height))
    margins = {
        "left": 0.56 / width,
        "right": 1 - 0.1 / width,
        "bottom": 0.45 / height,
        "top": 1 - (key + 0.35) / height,
    }
    figure.subplots_adjust(**margins, wspace=0.22, hspace=0.48)
    for i, quantity in enumerate(QUANTITIES):
        for j, scale in enumerate(over):
            axes = figure.add_subplot(len(QUANTITIES), len(over), i * len(over) + j + 1)
            _draw(axes, groups, quantity, scale)
    handles = [
        Line2D([], [], color=colour, linestyle=dash, label=f" {clip(group.name, 40)}")  # a leading _ would hide it
        for group, (colour, dash) in zip(groups, RUN_STYLES, strict=False)
    ]
    figure.legend(handles=handles, loc="upper left", ncols=3, fontsize=8.5, bbox_to_anchor=(0.01, 1.0))
    return figure


def _draw(axes: Axes, groups: Sequence[Group], quantity: Quantity, scale: Scale) -> None:
    """Draw one line per group in its own colour; a group without a place here keeps its colour."""
    for group, (colour, dash) in zip(groups, RUN_STYLES, strict=False):
        line = quantity.line(group, scale)
        if line is None:
            continue
        marker = "o" if len(line.x) <= 40 else None
        look = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 2.2}
        axes.plot(thin(line.x), thin(line.y), clip_on=False, **look)  # the last point lies on the edge
        if line.low is not None and line.high is not None:
            x, low, high = thin(line.x), thin(line.low), thin(line.high)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    set_title(axes, f"{quantity.heading(groups)} {scale.title}", margin=0.5)
    axes.set_xlabel(scale.label)
    axes.set_xlim(left=0)
    axes.margins(y=0.06)
    axes.xaxis.set_major_locator(round_ticks(5))
    axes.yaxis.set_major_locator(round_ticks(5))
    axes.yaxis.set_major_formatter(FuncFormatter(quantity.ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
