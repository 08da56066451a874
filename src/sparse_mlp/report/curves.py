"""Figures of quantities over training: the curves of a run, and several runs in one panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparse_mlp.report.predictions import Floats
from sparse_mlp.report.run import RunData
from sparse_mlp.report.style import BLUE, ORANGE, key_above, panel, styled
from sparse_mlp.report.style import title as set_title

_ABOVE_TIME = 0.3  # inches over the axes, above the labels of the time axis
MAX_POINTS = 300  # a panel is about 300 pixels wide


def smooth(values: Floats, width: int) -> Floats:
    """Return the centred moving average over `width` points, fewer at the ends; NaNs are left out."""
    known = np.isfinite(values)
    ones = np.ones(2 * (width // 2) + 1)
    total = np.convolve(np.where(known, values, 0.0), ones)
    count = np.convolve(known.astype(float), ones)
    half = width // 2
    inner = slice(half, half + len(values))
    with np.errstate(invalid="ignore"):
        return total[inner] / count[inner]


def thin(values: Floats, limit: int = MAX_POINTS) -> Floats:
    """Return at most `limit` means of consecutive entries along the first axis."""
    if len(values) <= limit:
        return values
    starts = np.linspace(0, len(values), limit + 1).astype(int)[:-1]
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts, axis=0) / counts.reshape(-1, *[1] * (values.ndim - 1))


def round_ticks(count: int, **options: bool) -> MaxNLocator:
    """Return a tick locator with at most `count` intervals, at round numbers."""
    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], **options)


def plain(value: float, _: Any = None) -> str:
    """Format a tick in plain text with as few digits as needed."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    return f"{value:.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.6g} %"


# What the pages of known kinds draw: name, title, key of the training lines, key of the evaluations, how to write it.
_CURVES: tuple[tuple[str, str, str | None, str | None, Callable[..., str]], ...] = (
    ("loss", "Loss", "loss", "loss", plain),
    ("accuracy", "Accuracy", "accuracy", "top1", percent),
    ("pixel_accuracy", "Pixel accuracy", "pixel_accuracy", "pixel_accuracy", percent),
    ("miou", "Mean IoU", None, "miou", percent),
    ("box_map50", "AP of the boxes at an overlap of 0.5", None, "box_map50", percent),
    ("box_map", "mAP of the boxes", None, "box_map", percent),
    ("mask_map", "mAP of the masks", None, "mask_map", percent),
    ("learning_rate", "Learning rate", "lr", None, plain),
    ("gradient_norm", "Gradient norm", "grad_norm", None, plain),
    ("first_gradient_norm", "Gradient norm of the first layer", "first_grad_norm", None, plain),
    ("momentum", "Momentum of the key encoder", "momentum", None, plain),
    ("throughput", "", "", None, plain),
    ("balance_loss", "Balance loss, mean over layers", "balance", None, plain),
    ("contrast", "The other view is the nearest key", "contrast_acc", None, percent),
    ("knn", "Accuracy of the kNN", None, "knn_top1", percent),
    ("feature_std", "Spread of the features", "feature_std", "feature_std", plain),
    ("feature_rank", "Directions in which features vary", None, "feature_rank", plain),
)
_FROM_ZERO = {"learning_rate", "gradient_norm", "first_gradient_norm", "throughput", "balance_loss", "feature_std"}


def curve_figures(run: RunData) -> dict[str, Figure]:
    """Return the curves that a run logged, by name. Each has the training time along its top edge."""
    figures = {}
    for name, title, train_key, test_key, ticks in _CURVES:
        if name == "throughput":
            title, train_key = f"{run.items.capitalize()} per second", "items_per_s"
        if name == "balance_loss" and not run.routing:
            continue  # logged as 0 where there is nothing to balance
        train = run.train.get(train_key) if train_key else None
        test = run.evals.get(test_key) if test_key else None
        if any(values is not None and np.isfinite(values).any() for values in (train, test)):
            figures[name] = curve_figure(title, run, train, test, ticks)
            if name in _FROM_ZERO:
                figures[name].axes[0].set_ylim(bottom=0)
    return figures


@styled
def curve_figure(
    title: str, run: RunData, train: Floats | None, test: Floats | None, ticks: Callable[..., str] = plain
) -> Figure:
    """Draw a quantity over the steps: `train` at those of the training lines, `test` at those of the evaluations.

    Where only the training has it there is no legend.
    """
    figure, axes = panel(top=0.56)
    if train is not None:
        _line(axes, run.train.step, train, BLUE, None if test is None else "train")
    if test is not None:
        _points(axes, run.evals.step, test)
        key_above(axes, pad=_ABOVE_TIME, labelcolor="linecolor")
    set_title(axes, title, pad=19)
    axes.set_xlabel("step")
    axes.set_xlim(0, max(run.last_step, 1))
    axes.margins(y=0.06)
    axes.yaxis.set_major_formatter(FuncFormatter(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_major_locator(round_ticks(5))
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    _time_axis(axes, run)
    return figure


def _line(axes: Axes, step: Floats, values: Floats, colour: str, label: str | None) -> None:
    """Draw a series; a long one as its moving average over a pale line of what was logged."""
    known = np.isfinite(values)
    if not known.any():
        return
    step, values = step[known], values[known]
    width = len(values) // 30
    if width > 1:
        axes.plot(thin(step), thin(values), color=colour, alpha=0.28, linewidth=0.8)
        values = smooth(values, width)
    marker = "o" if len(values) == 1 else None
    axes.plot(thin(step), thin(values), color=colour, label=label, marker=marker, markersize=3)


def _points(axes: Axes, step: Floats, values: Floats) -> None:
    """Draw what evaluations measured."""
    known = np.isfinite(values)
    if known.any():
        marker = "o" if known.sum() <= 40 else None
        axes.plot(step[known], values[known], color=ORANGE, label="test", marker=marker, markersize=2.6, clip_on=False)


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit for a duration: its length in seconds, and its name."""
    if seconds < 180:
        return 1.0, "s"
    return (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _time_axis(axes: Axes, run: RunData) -> None:
    """Write the training time along the top edge, at the steps where it was reached."""
    series = run.train if len(run.train) else run.evals
    if not len(series) or run.seconds <= 0:
        return
    unit, name = time_unit(run.seconds)
    marks = [t for t in MaxNLocator(4, steps=[1, 2, 3, 5, 10]).tick_values(0, run.seconds / unit) if t > 0]
    marks = [t for t in marks if t <= run.seconds / unit]
    where = np.interp(np.array(marks) * unit, np.append(0.0, series.time), np.append(0.0, series.step))
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(where, [f"{t:g} {name}" for t in marks])
    top.tick_params(axis="x", length=2.5, labelsize=6.5, pad=1.5)
    top.grid(False)
    top.spines["top"].set_visible(True)
    top.spines["top"].set_linewidth(0.4)
