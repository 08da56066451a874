"""Accuracy against multiply-adds of one trained model whose experts take fewer and fewer items."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparse_mlp.engine.run import read_json
from sparse_mlp.errors import UserError
from sparse_mlp.report.curves import percent, round_ticks
from sparse_mlp.report.page import Drawing, Figures, count
from sparse_mlp.report.style import BLUE, INK, panel, styled
from sparse_mlp.report.style import title as set_title

CURVE = "capacity_curve.json"
"""File of a run folder that `sparse-mlp eval RUN --curve` writes."""


@dataclass(frozen=True)
class Point:
    """One evaluation: capacity over the even share, None for dropless; multiply-adds of one image; top-1."""

    ratio: float | None
    macs: int
    top1: float


@dataclass(frozen=True)
class CapacitySection:
    lead: str
    drawings: list[Drawing]


def read_curve(folder: Path) -> list[Point]:
    """The points of a run folder, none where none were measured. UserError naming a file that does not parse."""
    path = folder / CURVE
    if not path.is_file():
        return []
    try:
        return [Point(point["ratio"], int(point["macs"]), float(point["top1"])) for point in read_json(path)["points"]]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} should hold points with ratio, macs and top1") from None


def capacity_section(folder: Path, figures: Figures) -> CapacitySection | None:
    """The figure of a run that was evaluated at several capacities."""
    points = read_curve(folder)
    if not points:
        return None
    lead = (
        "The same weights with less computation: each expert takes at most so many items of an image, as a multiple of "
        "an even share, those with the largest gates first (Batch Prioritized Routing); the others pass by."
    )
    return CapacitySection(lead, [figures.add(capacity_figure(points), "capacity", "")])


@styled
def capacity_figure(points: list[Point]) -> Figure:
    """Draw top-1 over multiply-adds, each point with its capacity."""
    figure, axes = panel()
    ordered = sorted(points, key=lambda point: point.macs)
    axes.plot([point.macs for point in ordered], [point.top1 for point in ordered], "o-", color=BLUE, markersize=3.5)
    for point in ordered:
        name = "dropless" if point.ratio is None else f"{point.ratio:g}"
        axes.annotate(name, (point.macs, point.top1), xytext=(0, 5), textcoords="offset points", ha="center", color=INK)
    axes.margins(x=0.12, y=0.2)
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.yaxis.set_major_locator(round_ticks(5))
    axes.xaxis.set_major_locator(round_ticks(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlabel("multiply-adds of an image")
    set_title(axes, "Top-1 by capacity of the experts")
    return figure
