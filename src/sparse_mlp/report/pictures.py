"""Pictures of the routing: patches coloured by expert, channels by expert, and what the experts' channels look like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter

from sparse_mlp.report.curves import percent, round_ticks
from sparse_mlp.report.routing import ChannelRouting, PatchRouting, dominant_expert
from sparse_mlp.report.run import Floats, Ints
from sparse_mlp.report.samples import Pixels
from sparse_mlp.report.style import INK, MUTED, clip, expert_colours, styled, title

MAX_OPACITY = 0.85
_FULL_QUANTILE = 0.9


def full_scale(routing: PatchRouting) -> float:
    """Return the strength from which on a patch is drawn with full opacity: a tenth of all patches reach it.

    Where the routing is exact it is 1, the whole of the patch's gates.
    """
    return 1.0 if routing.exact else max(float(np.quantile(dominant_expert(routing)[1], _FULL_QUANTILE)), 1e-12)


def overlays(routing: PatchRouting, pictures: Sequence[Pixels], grid: tuple[int, int]) -> list[Pixels]:
    """Draw over each picture which expert its patches went to: colour = expert, opacity = how strongly."""
    experts, strength = dominant_expert(routing)
    opacity = MAX_OPACITY * np.clip(strength / full_scale(routing), 0, 1)
    colours = np.array([to_rgb(colour) for colour in expert_colours(routing.num_experts)])
    return [
        paint(pixels, colours[experts[image]].reshape(*grid, 3), opacity[image].reshape(grid))
        for image, pixels in enumerate(pictures)
    ]


def paint(pixels: Pixels, colours: Floats, opacity: Floats) -> Pixels:
    """Lay a grid of colours (h, w, 3) with opacities (h, w), both in 0..1, over a picture in middle greys.

    On black or white a colour could not be told from another.
    """
    height, width = pixels.shape[:2]
    rows = np.arange(height) * len(colours) // height
    columns = np.arange(width) * colours.shape[1] // width
    grey = 0.3 + 0.45 * (pixels.astype(np.float64) @ (0.299, 0.587, 0.114) / 255)
    alpha = opacity[np.ix_(rows, columns)][..., None]
    mixed = alpha * colours[np.ix_(rows, columns)] + (1 - alpha) * grey[..., None]
    return np.round(255 * np.clip(mixed, 0, 1)).astype(np.uint8)


@styled
def patches_figure(
    layers: Sequence[PatchRouting], pictures: Sequence[Pixels], names: Sequence[str], grid: tuple[int, int]
) -> Figure:
    """Draw the pictures in the first row and under them, a row for each layer, where their patches went."""
    rows, columns = 1 + len(layers), len(pictures)
    cell, left, top, bottom = 0.95, 1.0, 0.3, 0.35
    figure = Figure(figsize=(left + cell * columns + 0.1, top + cell * rows + bottom))
    width, height = figure.get_size_inches()
    drawn = [list(pictures), *(overlays(layer, pictures, grid) for layer in layers)]
    labels = ["image", *(layer.layer.replace(".mlp_channels", "") for layer in layers)]
    for row, line in enumerate(drawn):
        for column, pixels in enumerate(line):
            x, y = left + column * cell, height - top - (row + 1) * cell
            axes = figure.add_axes((x / width, (y + 0.04) / height, 0.91 * cell / width, 0.91 * cell / height))
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(clip(names[column], 14), loc="center", fontsize=8, pad=4, fontweight="normal")
            if column == 0:
                axes.text(-0.08, 0.5, clip(labels[row], 16), transform=axes.transAxes, ha="right", va="center")
    experts = max((layer.num_experts for layer in layers), default=0)
    step = min(0.85, (width - left) / max(experts, 1))
    for expert, colour in enumerate(expert_colours(experts) if experts <= 16 else []):
        x = (left + 0.02 + step * expert) / width
        figure.text(x, 0.12 / height, "■", color=colour, fontsize=10)
        figure.text(x + 0.14 / width, 0.125 / height, f"expert {expert}" if step > 0.7 else str(expert), fontsize=7.5)
    return figure


@styled
def channels_figure(routing: ChannelRouting, names: Sequence[str]) -> Figure:
    """Draw where the channels went: above, a row per image; below, the mean gate of every expert, with its load."""
    images, channels, experts = routing.gates.shape
    colours = np.array([to_rgb(colour) for colour in expert_colours(experts)])
    order = routing.order()
    upper, lower = max(0.17 * images, 0.6), max(0.15 * experts, 0.6)
    height = upper + lower + 1.35
    figure = Figure(figsize=(7.6, height))
    layout = GridSpec(
        2,
        2,
        figure=figure,
        width_ratios=(5, 1),
        height_ratios=(upper, lower),
        wspace=0.04,
        hspace=0.62 / ((upper + lower) / 2),
        left=1.0 / 7.6,
        right=1 - 0.2 / 7.6,
        top=1 - 0.42 / height,
        bottom=0.42 / height,
    )
    stripes, rows, load = (figure.add_subplot(layout[place]) for place in ((0, 0), (1, 0), (1, 1)))
    for axes in (stripes, rows):
        axes.grid(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(round_ticks(6, integer=True))
    extent = (0, channels)
    favourite = routing.gates.argmax(axis=-1)[:, order]
    stripes.imshow(colours[favourite], aspect="auto", interpolation="nearest", extent=(*extent, images - 0.5, -0.5))
    stripes.set_yticks(range(images), [clip(name, 14) for name in names], fontsize=min(7.5, 95 / images))
    stripes.set_xticks([])
    title(stripes, "Expert of each channel, image by image")
    mean = routing.gates.mean(axis=0)[order].T
    painted = np.concatenate(
        [np.broadcast_to(colours[:, None], (experts, channels, 3)), (mean / max(mean.max(), 1e-12))[..., None]], axis=-1
    )
    rows.imshow(painted, aspect="auto", interpolation="nearest", extent=(*extent, experts - 0.5, -0.5))
    _expert_ticks(rows, experts)
    title(rows, "Mean gate of each expert")
    rows.set_xlabel("channel, sorted by favourite expert")
    load.barh(range(experts), routing.load(), height=0.7, color=colours)
    load.axvline(1 / experts, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    load.set_ylim(experts - 0.5, -0.5)
    load.set_yticks([])
    load.grid(False)
    load.xaxis.set_major_locator(round_ticks(2))
    load.xaxis.set_major_formatter(FuncFormatter(percent))
    load.set_title("Load")
    return figure


def _expert_ticks(axes: object, experts: int) -> None:
    shown: Ints = np.arange(experts) if experts <= 16 else np.linspace(0, experts - 1, 9).astype(int)
    axes.set_yticks(shown, [f"expert {e}" for e in shown], fontsize=7)  # type: ignore[attr-defined]


@styled
def patterns_figure(routing: ChannelRouting, grid: tuple[int, int]) -> Figure:
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
        pattern = routing.patterns[expert].reshape(grid)
        drawn = axes.imshow(pattern, cmap="PuOr_r", vmin=-scale, vmax=scale, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set(visible=True, color=colour, linewidth=1.6)
        if np.isnan(pattern).all():
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.text(0.0, 1.06, str(expert), transform=axes.transAxes, fontsize=7, color=INK)
    bar = figure.add_axes((0.2 / width, 0.3 / height, 1.2 / width, 0.07 / height))
    scale_bar = figure.colorbar(drawn, cax=bar, orientation="horizontal")
    scale_bar.outline.set_visible(False)
    scale_bar.set_ticks([-scale, 0, scale], labels=[f"\N{MINUS SIGN}{100 * scale:.2g} %", "0", f"+{100 * scale:.2g} %"])
    bar.tick_params(labelsize=6.5, length=0)
    figure.text(0.02 / width, 1 - 0.26 / height, "Where each expert's channels are strong", fontsize=9, weight="bold")
    return figure
