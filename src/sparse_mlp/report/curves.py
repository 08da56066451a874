"""Figures of quantities over training: the curves of a run, the experts' load, and several runs in one panel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparse_mlp.report.run import Floats, Routing, Run
from sparse_mlp.report.style import BLUE, INK, MUTED, ORANGE, RUN_STYLES, SURFACE, expert_colours, panel, styled
from sparse_mlp.report.style import title as set_title

MAX_POINTS = 300  # a panel is about 300 pixels wide
MANY_EXPERTS = 16  # more are drawn as a heat map


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
    """Return a locator of at most so many intervals, at round numbers."""
    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], **options)


def plain(value: float, _: Any = None) -> str:
    """Format a tick without mathematics or more digits than needed."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    return f"{value:.6g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.6g} %"


@styled
def curve_figures(run: Run) -> dict[str, Figure]:
    """Return the curves of a run by name; a curve nobody logged is left out. Each has the time along its top edge."""
    train, evals, figures = run.train, run.evals, {}
    if np.isfinite(train.get("loss")).any() or np.isfinite(evals.get("loss")).any():
        figures["loss"] = _curve("Loss", run, [("train", train.step, train.get("loss"), BLUE)], plain)
        _test(figures["loss"].axes[0], evals.step, evals.get("loss"), "upper right")
    if np.isfinite(train.get("accuracy")).any() or np.isfinite(evals.get("top1")).any():
        lines = [("train", train.step, train.get("accuracy"), BLUE)]
        figures["accuracy"] = _curve("Accuracy", run, lines, percent)
        _test(figures["accuracy"].axes[0], evals.step, evals.get("top1"), "lower right")
    for name, key, title in (
        ("learning_rate", "lr", "Learning rate"),
        ("gradient_norm", "grad_norm", "Gradient norm"),
        ("first_gradient_norm", "first_grad_norm", "Gradient norm of the first layer"),
        ("momentum", "momentum", "Momentum of the key encoder"),
        ("throughput", "items_per_s", "Images per second"),
        ("balance_loss", "balance", "Balance loss, mean over layers"),
    ):
        values = train.get(key)
        if np.isfinite(values).any() and not (key == "balance" and not run.routing):
            figures[name] = _curve(title, run, [(None, train.step, values, BLUE)], plain)
            if name != "momentum":
                figures[name].axes[0].set_ylim(bottom=0)
    figures |= _pretraining_figures(run)
    return figures


def _pretraining_figures(run: Run) -> dict[str, Figure]:
    """What only pre-training logs."""
    train, evals, figures = run.train, run.evals, {}
    if np.isfinite(train.get("contrast_acc")).any():
        lines = [("train", train.step, train.get("contrast_acc"), BLUE)]
        figures["contrast"] = _curve("The other view is the nearest key", run, lines, percent)
    if np.isfinite(evals.get("knn_top1")).any():
        figures["knn"] = _curve("Accuracy of the kNN", run, [], percent)
        _test(figures["knn"].axes[0], evals.step, evals.get("knn_top1"), "lower right")
    if np.isfinite(train.get("feature_std")).any():
        lines = [("train", train.step, train.get("feature_std"), BLUE)]
        figures["feature_std"] = _curve("Spread of the features", run, lines, plain)
        figures["feature_std"].axes[0].set_ylim(bottom=0)
        _test(figures["feature_std"].axes[0], evals.step, evals.get("feature_std"), "lower right")
    if np.isfinite(evals.get("feature_rank")).any():
        figures["feature_rank"] = _curve("Directions in which features vary", run, [], plain)
        _test(figures["feature_rank"].axes[0], evals.step, evals.get("feature_rank"), "lower right")
    return figures


def _curve(
    title: str,
    run: Run,
    lines: Sequence[tuple[str | None, Floats, Floats, str]],
    ticks: Callable[..., str],
) -> Figure:
    figure, axes = panel(top=0.56)
    for label, step, values, colour in lines:
        _line(axes, step, values, colour, label)
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


def _test(axes: Axes, step: Floats, values: Floats, corner: Any) -> None:
    known = np.isfinite(values)
    if known.any():
        marker = "o" if known.sum() <= 40 else None
        axes.plot(step[known], values[known], color=ORANGE, label="test", marker=marker, markersize=2.6, clip_on=False)
    axes.legend(loc=corner, labelcolor="linecolor")


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the length of the unit in which to write so many seconds, and its name."""
    if seconds < 180:
        return 1.0, "s"
    return (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _time_axis(axes: Axes, run: Run) -> None:
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


@styled
def load_figure(routing: Routing, title: str) -> Figure:
    """Draw which share of the assignments each expert got over training: stacked areas, or rows for many experts."""
    figure, axes = panel()
    step, load = thin(routing.step), thin(routing.load)
    experts = routing.num_experts
    if len(step) == 1:
        step, load = np.array([0.0, step[0]]), np.repeat(load, 2, axis=0)
    axes.grid(False)
    if experts <= MANY_EXPERTS:
        colours = expert_colours(experts)
        axes.stackplot(step, load.T, colors=colours, edgecolor=SURFACE, linewidth=0.5)
        for border in range(1, experts):
            axes.axhline(border / experts, color=INK, linewidth=0.5, linestyle=(0, (1, 3)), alpha=0.6)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    else:
        extent = (float(step[0]), float(max(step[-1], step[0] + 1)), experts - 0.5, -0.5)
        top = max(2.0, float((load * experts).max()))
        drawn = axes.imshow(load.T * experts, aspect="auto", extent=extent, cmap="cividis", vmin=0, vmax=top)
        drawn.set_interpolation("nearest")
        axes.set_ylabel(f"expert; blue 0, yellow {top:.1f} times the fair share")
        axes.yaxis.set_major_locator(round_ticks(6, integer=True))
    axes.set_xlim(step[0], max(step[-1], step[0] + 1))
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    set_title(axes, title)
    axes.set_xlabel("step")
    return figure


@styled
def router_figure(routing: Routing) -> Figure:
    """Draw how undecided the router is (entropy over log E) and which share of the assignments found no slot."""
    figure, axes = panel()
    axes.plot(thin(routing.step), thin(routing.entropy), color=BLUE, label="router entropy")
    axes.plot(thin(routing.step), thin(routing.dropped), color=ORANGE, label="dropped share")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(routing.step[0], max(routing.step[-1], routing.step[0] + 1))
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(loc="center right", labelcolor="linecolor")
    set_title(axes, "Router entropy and drops")
    axes.set_xlabel("step")
    return figure


@styled
def importance_figure(routing: Routing) -> Figure:
    """Draw each expert's load (bar) beside its importance (dot) at the end of training, against the fair share."""
    figure, axes = panel()
    experts = routing.num_experts
    load, importance, where = routing.final_load(), routing.final_importance(), np.arange(experts)
    axes.bar(where, load, width=0.62, color=expert_colours(experts), label="load")
    axes.plot(where, importance, "o", color=INK, markersize=3.2 if experts <= MANY_EXPERTS else 1.6)
    axes.axhline(1 / experts, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    axes.set_ylim(0, max(1.25 / experts, 1.12 * float(max(load.max(), importance.max()))))
    axes.yaxis.set_major_formatter(FuncFormatter(percent))
    axes.yaxis.set_major_locator(round_ticks(5))
    axes.xaxis.set_major_locator(round_ticks(8, integer=True))
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.7, experts - 0.3)
    set_title(axes, "Load and importance at the end")
    axes.set_xlabel("expert")
    return figure


@dataclass(frozen=True)
class Line:
    """One run's curve in a comparison."""

    label: str
    x: Floats
    y: Floats


def draw_lines(axes: Axes, lines: Sequence[Line | None], title: str, xlabel: str, ticks: Callable[..., str]) -> None:
    """Draw one line per run in the run's own colour; None keeps its place."""
    for line, (colour, dash) in zip(lines, RUN_STYLES, strict=False):
        if line is not None and len(line.x):
            known = np.isfinite(line.y)
            marker = "o" if known.sum() <= 40 else None
            width = int(known.sum()) // 30
            y = smooth(line.y[known], width) if width > 1 else line.y[known]
            axes.plot(
                thin(line.x[known]),
                thin(y),
                color=colour,
                linestyle=dash,
                marker=marker,
                markersize=2.2,
                clip_on=False,  # the last point lies on the edge
                label=line.label,
            )
    set_title(axes, title, margin=0.5)
    axes.set_xlabel(xlabel)
    axes.set_xlim(left=0)
    axes.margins(y=0.06)
    axes.xaxis.set_major_locator(round_ticks(5))
    axes.yaxis.set_major_locator(round_ticks(5))
    axes.yaxis.set_major_formatter(FuncFormatter(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
