"""Figures of how evenly the experts of the MoE layers are used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparse_mlp.report.curves import percent, plain, round_ticks, thin
from sparse_mlp.report.predictions import Floats
from sparse_mlp.report.run import Routing
from sparse_mlp.report.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    SURFACE,
    clip,
    expert_colours,
    key_above,
    panel,
    styled,
)
from sparse_mlp.report.style import title as set_title

MANY_EXPERTS = 16  # more are drawn as a heat map
_WRITTEN = 10  # experts whose loads can be written into the map of all layers
_WIDTH = 5.6  # inches of such a map


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
    axes.plot(thin(routing.step), thin(routing.entropy), color=BLUE, label="entropy")
    axes.plot(thin(routing.step), thin(routing.dropped), color=ORANGE, label="dropped")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(routing.step[0], max(routing.step[-1], routing.step[0] + 1))
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    key_above(axes, labelcolor="linecolor")
    set_title(axes, "Entropy and drops")
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


@styled
def layers_figure(loads: Mapping[str, Floats], where: str = "at the end") -> Figure:
    """Draw the load (E,) of every layer in one map: rows are layers, columns experts, 1 is the fair share."""
    experts = max(len(load) for load in loads.values())
    table = np.full((len(loads), experts), np.nan)
    for row, load in enumerate(loads.values()):
        table[row, : len(load)] = load * len(load)
    written = experts <= _WRITTEN
    left = _label_margin(loads)
    figure, axes = panel(_WIDTH, 0.95 + 0.24 * len(loads), left=left, right=0.75, bottom=0.45, top=0.4)
    _map(axes, table, (-0.5, experts - 0.5, len(loads) - 0.5, -0.5))
    for row, column in np.argwhere(np.isfinite(table)) if written else []:
        value = table[row, column]
        colour = SURFACE if not 0.3 < value < 1.7 else INK
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(loads)), [clip(name, 40) for name in loads], color=INK)
    axes.xaxis.set_major_locator(round_ticks(experts if written else 8, integer=True))
    axes.set_xlabel("expert")
    set_title(axes, f"Load of every expert {where}, 1 = fair share")
    return figure


@styled
def loads_over_time_figure(layers: Mapping[str, Routing]) -> Figure:
    """Draw the load of every expert of every layer over the steps: a band of rows a layer, a row an expert."""
    # layers log at the same steps; one that began later is drawn on the steps it has
    step = thin(max((routing.step for routing in layers.values()), key=len))
    rows = [
        np.stack([np.interp(step, routing.step, load, left=np.nan) for load in (routing.load * routing.num_experts).T])
        for routing in layers.values()
    ]
    borders = np.cumsum([0, *(len(part) for part in rows)])
    height = max(0.3 * len(layers), min(4.5, 0.06 * borders[-1]))
    left = _label_margin(layers)
    figure, axes = panel(_WIDTH, 0.85 + height, left=left, right=0.75, bottom=0.45, top=0.4)
    _map(axes, np.concatenate(rows), (0, float(max(step[-1], 1)), borders[-1] - 0.5, -0.5))
    for border in borders[1:-1]:
        axes.axhline(border - 0.5, color=INK, linewidth=0.8)
    axes.set_yticks((borders[1:] + borders[:-1]) / 2 - 0.5, [clip(name, 40) for name in layers], color=INK)
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("step")
    set_title(axes, "Load of every expert over training, 1 = fair share")
    return figure


def _label_margin(names: Mapping[str, object]) -> float:
    return 0.25 + 0.072 * max(min(len(name), 40) for name in names)


def _map(axes: Axes, values: Floats, extent: tuple[float, float, float, float]) -> None:
    """Draw loads as colours: white the fair share, orange more, purple less; with its scale at the right."""
    axes.grid(False)
    drawn = axes.imshow(values, aspect="auto", extent=extent, cmap="PuOr_r", vmin=0, vmax=2, interpolation="nearest")
    figure, place = axes.figure, axes.get_position()
    bar = figure.add_axes((place.x1 + 0.02, place.y0, 0.012, place.height))
    scale = figure.colorbar(drawn, cax=bar, extend="max" if np.nanmax(values) > 2 else "neither")
    scale.outline.set_visible(False)
    scale.set_ticks([0, 1, 2], labels=["idle", "fair", "twice"])
    bar.tick_params(length=0)
