"""Figures of what a classifier gets right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from sparse_mlp.report.analysis import Calibration, ClassAccuracy, confused_classes
from sparse_mlp.report.curves import percent, plain, round_ticks
from sparse_mlp.report.predictions import Ints
from sparse_mlp.report.style import BLUE, GRID, INK, MUTED, ORANGE, clip, panel, styled, title

MANY_CLASSES = 30  # more, and only the worst are shown
WORST_BARS = 25
WORST_MATRIX = 20
_NAME_WIDTH = 28  # characters


def name_margin(names: Sequence[str]) -> float:
    """Inches that the longest name takes at the labels' size."""
    return 0.22 + 0.075 * max((len(name) for name in names), default=1)


@styled
def class_accuracy_figure(stats: ClassAccuracy, classes: Sequence[str], mean: float) -> Figure:
    """Draw the accuracy of each class with its 95 % interval, best on top; of many classes the worst."""
    many = len(stats.order) > MANY_CLASSES
    shown = stats.order[-WORST_BARS:] if many else stats.order
    names = [clip(classes[c], _NAME_WIDTH) for c in shown]
    height = 0.98 + 0.175 * max(len(shown), 4)
    figure, axes = panel(5.6, height, left=name_margin(names), right=0.62)
    low = min(float(stats.low[shown].min()), mean) if len(shown) else 0.0
    start = np.floor(max(0.0, low - 0.02) * 20) / 20
    for row, c in enumerate(shown):
        axes.plot([start, stats.accuracy[c]], [row, row], color=GRID, linewidth=0.8)
        axes.plot(
            [stats.low[c], stats.high[c]], [row, row], color=BLUE, linewidth=3.2, alpha=0.3, solid_capstyle="butt"
        )
        axes.plot(stats.accuracy[c], row, "o", color=BLUE, markersize=4, clip_on=False)
        axes.text(1.015, row, f"{100 * stats.accuracy[c]:.1f} %", transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(mean, color=ORANGE, linewidth=1.0)
    axes.set_yticks(range(len(shown)), names, color=INK)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(start, 1.0)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    axes.xaxis.set_major_locator(round_ticks(5))
    title(axes, f"Accuracy per class: the {len(shown)} worst of {len(stats.order)}" if many else "Accuracy per class")
    return figure


@styled
def class_values_figure(
    what: str,
    values: NDArray[Any],
    asides: Sequence[str],
    classes: Sequence[str],
    rings: NDArray[Any] | None = None,
) -> Figure:
    """Draw a share of 1 for each class as a dot, the best on top, with a text beside it and a line at the mean.

    `rings`: a second share of each class. Classes without a value, NaN, are left out; of many the best and the worst
    are shown.
    """
    order = [int(c) for c in np.argsort(-np.nan_to_num(values, nan=-1), kind="stable") if np.isfinite(values[c])]
    half = MANY_CLASSES // 2
    shown = order[:half] + order[-half:] if len(order) > MANY_CLASSES else order
    names = [clip(classes[c], _NAME_WIDTH) for c in shown]
    figure, axes = panel(5.6, 0.98 + 0.175 * max(len(shown), 4), left=name_margin(names), right=0.62)
    for row, c in enumerate(shown):
        axes.plot([0, values[c]], [row, row], color=GRID, linewidth=0.8)
        if rings is not None:
            axes.plot(rings[c], row, "o", color=ORANGE, markersize=4, fillstyle="none", clip_on=False)
        axes.plot(values[c], row, "o", color=BLUE, markersize=4, clip_on=False)
        axes.text(1.015, row, asides[c], transform=axes.get_yaxis_transform(), va="center", color=MUTED)
    axes.axvline(float(np.nanmean(values)), color=ORANGE, linewidth=1.0)
    axes.set_yticks(range(len(shown)), names, color=INK)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    cut = f": the {half} best and the {half} worst of {len(order)}" if len(order) > MANY_CLASSES else ""
    title(axes, f"{what}{cut}")
    return figure


@styled
def class_profile_figure(stats: ClassAccuracy, mean: float) -> Figure:
    """Draw the accuracies of all classes in falling order: how even a model with many classes is."""
    figure, axes = panel(5.6, 2.6)
    values = stats.accuracy[stats.order]
    axes.fill_between(np.arange(1, len(values) + 1), values, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(np.arange(1, len(values) + 1), values, color=BLUE)
    axes.axhline(mean, color=ORANGE, linewidth=1.0)
    axes.set_xlim(1, max(2, len(values)))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    title(axes, f"All {len(values)} classes, best to worst")
    axes.set_xlabel("rank of the class")
    return figure


@styled
def confusion_figure(confusion: Ints, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix, of many classes the part with the worst mistakes; counts where they fit."""
    limit = WORST_MATRIX if len(confusion) > MANY_CLASSES else len(confusion)
    shown = confused_classes(confusion, limit)
    part = confusion[np.ix_(shown, shown)]
    images = np.maximum(confusion.sum(axis=1)[shown], 1)
    names = [clip(classes[c], _NAME_WIDTH) for c in shown]
    margin = name_margin(names)
    short = max((len(name) for name in names), default=1) <= 3
    bottom = 0.5 if short else 0.25 + margin
    side = 5.6 - margin - 0.15 - 0.2
    figure, axes = panel(5.6, side + bottom + 0.42, left=margin + 0.2, right=0.15, bottom=bottom, top=0.42)
    worst = max(float(np.max(np.where(np.eye(len(part), dtype=bool), 0, part / images[:, None]), initial=0)), 1e-9)
    written = len(shown) <= WORST_MATRIX
    for i, j in np.argwhere(part > 0):
        share = part[i, j] / images[i]
        colour, alpha = (BLUE, 0.08 + 0.27 * share) if i == j else (ORANGE, 0.12 + 0.63 * min(1.0, share / worst))
        axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, facecolor=colour, alpha=alpha, linewidth=0))
        if written:
            size = 7.5 if len(shown) <= 12 else 6
            axes.text(j, i, f"{part[i, j]}", ha="center", va="center", fontsize=size)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    size = 7.5 if len(shown) <= WORST_MATRIX else 6
    axes.set_xticks(range(len(shown)), names, rotation=0 if short else 90, fontsize=size)
    axes.set_yticks(range(len(shown)), names, fontsize=size)
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    part_of = f", {len(shown)} most confused of {len(confusion)} classes" if len(shown) < len(confusion) else ""
    title(axes, f"Confusion matrix{part_of}")
    return figure


@styled
def calibration_figure(bins: Calibration) -> Figure:
    """Draw accuracy against the probability given, with the number of images in each bin below."""
    figure, axes = panel(5.6, 2.6)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    known = bins.images > 0
    share = bins.images / max(1, bins.images.sum())
    width = bins.edges[1] - bins.edges[0]
    axes.bar(bins.edges[:-1] + width / 2, share, width=0.9 * width, color=GRID)
    axes.plot(bins.confidence[known], bins.accuracy[known], color=BLUE, marker="o", markersize=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    title(axes, f"Calibration: expected error {plain(round(100 * bins.error, 1))} %")
    axes.set_xlabel("probability of the predicted class")
    return figure
