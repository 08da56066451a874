"""Pictures of the routing: patches coloured by expert, channels by expert, and what the experts' channels look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sparse_mlp.report.curves import round_ticks
from sparse_mlp.report.predictions import Floats, Ints
from sparse_mlp.report.routing import ChannelRouting, PatchRouting, dominant_expert
from sparse_mlp.report.samples import Pixels
from sparse_mlp.report.style import INK, MUTED, TITLE, clip, expert_colours, panel, styled, title, wrap

_FULL_QUANTILE = 0.9
_FULL_SIDE = 0.8  # of a patch's side that the largest square takes
_PATCH_PIXELS = 10  # least side of a patch: its square has this many sizes


def full_scale(routing: PatchRouting) -> float:
    """Return the strength from which on a patch has the largest square: a tenth of all patches reach it.

    Where the routing is exact it is 1, the whole of the patch's gates.
    """
    return 1.0 if routing.exact else max(float(np.quantile(dominant_expert(routing)[1], _FULL_QUANTILE)), 1e-12)


def overlays(routing: PatchRouting, pictures: Sequence[Pixels]) -> list[Pixels]:
    """Draw over each picture which expert its patches went to: colour = expert, area of a square = how strongly."""
    experts, strength = dominant_expert(routing)
    area = np.clip(strength / full_scale(routing), 0, 1)
    colours = np.array([to_rgb(colour) for colour in expert_colours(routing.num_experts)])
    return [
        paint(pixels, colours[experts[image]].reshape(*routing.grid, 3), area[image].reshape(routing.grid))
        for image, pixels in enumerate(pictures)
    ]


def paint(pixels: Pixels, colours: Floats, area: Floats) -> Pixels:
    """Lay squares over a picture in pale greys, one in the middle of each patch of a grid.

    colours: (h, w, 3), areas: (h, w), all in 0..1. The squares are opaque, so that their colours are exactly those of
    the legend: blended with a picture a colour could not be told from another. A picture with few pixels a patch grows.
    """
    grow = max(1, -(-_PATCH_PIXELS * max(area.shape) // max(pixels.shape[:2])))
    pixels = pixels.repeat(grow, axis=0).repeat(grow, axis=1)
    row, down = _cells(pixels.shape[0], len(area))
    column, across = _cells(pixels.shape[1], area.shape[1])
    half = _FULL_SIDE / 2 * np.sqrt(area)[np.ix_(row, column)]
    inside = np.maximum(down[:, None], across[None, :]) < half
    grey = 0.35 + 0.5 * (pixels.astype(np.float64) @ (0.299, 0.587, 0.114) / 255)
    mixed = np.where(inside[..., None], colours[np.ix_(row, column)], grey[..., None])
    return np.round(255 * mixed).astype(np.uint8)


def _cells(length: int, cells: int) -> tuple[Ints, Floats]:
    """Return for each pixel its cell, and how far from the cell's middle it lies, in cells."""
    place = (np.arange(length) + 0.5) * cells / length
    return place.astype(int), np.abs(place % 1 - 0.5)


@styled
def patches_figure(layers: Sequence[PatchRouting], pictures: Sequence[Pixels], names: Sequence[str]) -> Figure:
    """Draw the pictures in the first row and under them, a row for each layer, where their patches went."""
    rows, columns = 1 + len(layers), len(pictures)
    heads = [wrap(name, 12) for name in names]
    labels = ["image", *(clip(layer.layer.replace(".mlp_channels", ""), 40) for layer in layers)]
    cell, left, bottom = 0.95, 0.25 + 0.075 * max(len(label) for label in labels), 0.35
    top = 0.16 + 0.14 * max(head.count("\n") + 1 for head in heads)
    figure = Figure(figsize=(left + max(cell * columns, 4.2) + 0.1, top + cell * rows + bottom))
    width, height = figure.get_size_inches()
    drawn = [list(pictures), *(overlays(layer, pictures) for layer in layers)]
    for row, line in enumerate(drawn):
        for column, pixels in enumerate(line):
            x, y = left + column * cell, height - top - (row + 1) * cell
            axes = figure.add_axes((x / width, (y + 0.04) / height, 0.91 * cell / width, 0.91 * cell / height))
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(heads[column], loc="center", fontsize=8, pad=4, fontweight="normal")
            if column == 0:
                axes.text(-0.08, 0.5, labels[row], transform=axes.transAxes, ha="right", va="center")
    experts = max((layer.num_experts for layer in layers), default=0)
    if experts > 16:
        words = f"colours run from expert 0 (dark) to expert {experts - 1} (bright)"
        figure.text(left / width, 0.125 / height, words, fontsize=7.5)
        return figure
    figure.text(left / width, 0.125 / height, "expert", fontsize=7.5)
    step = min(0.4, (width - left - 0.5) / max(experts, 1))
    for expert, colour in enumerate(expert_colours(experts)):
        x = left + 0.5 + step * expert
        figure.text(x / width, 0.12 / height, "\N{BLACK SQUARE}", color=colour, fontsize=10)
        figure.text((x + 0.13) / width, 0.125 / height, str(expert), fontsize=7.5)
    return figure


@styled
def channels_figure(routing: ChannelRouting) -> Figure:
    """Draw in how many of the images a channel goes to an expert: rows are experts, columns channels; with the load."""
    images, channels, experts = routing.gates.shape
    order = routing.order()
    share = (routing.gates > 0).mean(axis=0)[order].T
    height = max(0.16 * experts, 0.9)
    figure, axes = panel(7.6, height + 1.35, left=0.85, right=0.75, bottom=0.95, top=0.4)
    drawn = axes.imshow(
        share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=(0, channels, experts, 0)
    )
    axes.grid(False)
    axes.tick_params(length=0)
    shown: Ints = np.arange(experts) if experts <= 24 else np.linspace(0, experts - 1, 9).astype(int)
    axes.set_yticks(shown + 0.5, [f"expert {e}" for e in shown], fontsize=7)
    axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    axes.set_xlabel("channel, sorted by the expert it goes to most often")
    load = routing.load()
    for expert in shown:
        place = axes.get_yaxis_transform()
        axes.text(1.012, expert + 0.5, f"{100 * load[expert]:.1f} %", transform=place, va="center", fontsize=7)
    axes.text(1.012, 1.03, "load", transform=axes.transAxes, fontsize=7, color=MUTED)
    bar = figure.add_axes((0.85 / 7.6, 0.3 / (height + 1.35), 1.6 / 7.6, 0.07 / (height + 1.35)))
    scale = figure.colorbar(drawn, cax=bar, orientation="horizontal")
    scale.outline.set_visible(False)
    scale.set_ticks([0, 0.5, 1], labels=["no", "half", f"all {images} images"])
    bar.tick_params(labelsize=6.5, length=0)
    title(axes, "Which experts mix a channel")
    return figure


@styled
def patterns_figure(routing: ChannelRouting) -> Figure:
    """Draw for each expert where its channels are stronger (orange) or weaker (purple) than all channels are."""
    experts = routing.num_experts
    columns = min(experts, 4)
    rows = -(-experts // columns)
    figure = Figure(figsize=(3.75, 0.42 + rows * 0.98 + 0.45))
    width, height = figure.get_size_inches()
    scale = max(float(np.nanmax(np.abs(routing.patterns), initial=0.0)), 1e-12)
    cell = 0.8
    step = (width - 0.2) / columns
    for expert, colour in enumerate(expert_colours(experts)):
        x, y = 0.02 + (expert % columns) * step, height - 0.5 - 0.98 * (expert // columns + 1)
        axes = figure.add_axes((x / width, (y + 0.08) / height, cell / width, cell / height))
        pattern = routing.patterns[expert].reshape(routing.grid)
        drawn = axes.imshow(pattern, cmap="PuOr_r", vmin=-scale, vmax=scale, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=colour, linewidth=1.6)
        if np.isnan(pattern).all():
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.text(0.0, 1.06, f"expert {expert}", transform=axes.transAxes, fontsize=7, color=INK)
    bar = figure.add_axes((0.2 / width, 0.3 / height, 1.2 / width, 0.07 / height))
    scale_bar = figure.colorbar(drawn, cax=bar, orientation="horizontal")
    scale_bar.outline.set_visible(False)
    scale_bar.set_ticks([-scale, 0, scale], labels=[f"\N{MINUS SIGN}{100 * scale:.2g} %", "0", f"+{100 * scale:.2g} %"])
    bar.tick_params(labelsize=6.5, length=0)
    heading = figure.text(0.02 / width, 1 - 0.26 / height, "Where each expert's channels are strong", fontsize=9)
    heading.set(weight="bold", gid=TITLE)
    return figure
