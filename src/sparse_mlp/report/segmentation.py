"""The report of a segmentation run: IoU per class, confusion, the images with the best and the worst answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from sparse_mlp.report.classes import name_margin
from sparse_mlp.report.curves import percent
from sparse_mlp.report.experts import load_section
from sparse_mlp.report.header import balance_tile, cost_tiles, run_head
from sparse_mlp.report.overlay import class_colours, overlay
from sparse_mlp.report.page import Drawing, Figures, Picture, Swatch, Tile, image
from sparse_mlp.report.run import RunData, read_run
from sparse_mlp.report.sections import curves_section, save_page
from sparse_mlp.report.style import BLUE, GRID, INK, MUTED, ORANGE, clip, panel, styled, title

__all__ = ["SegmentedImage", "write_segmentation_report"]

_SIDE = 420  # pixels of a picture's longer side on the page


@dataclass(frozen=True)
class SegmentedImage:
    """A test image (RGB) with the true and the found classes of its pixels (H, W)."""

    name: str
    picture: Image.Image
    truth: NDArray[np.uint8]
    found: NDArray[np.uint8]
    iou: float


@dataclass(frozen=True)
class _Row:
    title: str
    pictures: list[Picture]


@dataclass(frozen=True)
class _Examples:
    lead: str
    key: list[Swatch]
    best: list[_Row]
    worst: list[_Row]


@dataclass(frozen=True)
class _Classes:
    lead: str
    drawings: list[Drawing]


def write_segmentation_report(
    run_dir: Path | str,
    class_names: Sequence[str],
    evaluated: dict[str, NDArray[Any]] | None,
    *,
    best: Sequence[SegmentedImage] = (),
    worst: Sequence[SegmentedImage] = (),
    macs: int | None = None,
) -> Path:
    """Write `report.html` and `figures/` into the folder of a run; returns the page's path.

    `evaluated` holds what `tasks.Segment.evaluate` predicts: `iou` (N,), `confusion` (classes, classes) and `class_iou`
    (classes,); None for a run that has not finished. `macs` are multiply-adds at the training size.
    """
    run = read_run(run_dir)
    figures = Figures(run.path / "figures")
    names = [str(name) for name in class_names]
    sections: dict[str, object] = {"curves": curves_section(run, figures)}
    if evaluated is not None:
        drawn = [
            figures.add(
                _iou_figure(evaluated["class_iou"], evaluated["confusion"], names),
                "class_iou",
                "Intersection over union; right of it the class's share of the true pixels. The line is the mean.",
            ),
            figures.add(
                _confusion_figure(evaluated["confusion"], names),
                "confusion",
                "Where the pixels of a class (row) were put, in % of its pixels.",
            ),
        ]
        sections["iou"] = _Classes(f"Over all pixels of {len(evaluated['iou']):,} test images.", drawn)
    if best or worst:
        sections["examples"] = _examples(best, worst, names)
    sections["load"] = load_section(run, figures)
    head = run_head(run, _tiles(run, evaluated, macs), kind="Run report · segmentation")
    return save_page(run, "segmentation.html.j2", head, sections)


def _tiles(run: RunData, evaluated: dict[str, NDArray[Any]] | None, macs: int | None) -> list[Tile]:
    tiles = []
    if evaluated is not None:
        confusion, iou = evaluated["confusion"], evaluated["class_iou"]
        tiles.append(Tile("Mean IoU", f"{100 * np.nanmean(iou):.1f} %", f"of {np.isfinite(iou).sum()} classes"))
        tiles.append(Tile("Pixel accuracy", f"{100 * np.trace(confusion) / confusion.sum():.1f} %"))
    loads = {name: routing.final_load() for name, routing in run.routing.items()}
    return [*tiles, *cost_tiles(run, macs), *balance_tile(loads)]


def _examples(best: Sequence[SegmentedImage], worst: Sequence[SegmentedImage], names: Sequence[str]) -> _Examples:
    colours = class_colours(len(names))
    present = sorted({int(c) for one in (*best, *worst) for part in (one.truth, one.found) for c in np.unique(part)})
    key = [Swatch("#{:02x}{:02x}{:02x}".format(*colours[c]), names[c]) for c in present if c < len(names)]
    lead = "Each row: the image, the truth, the answer. Grey counts for nothing."
    return _Examples(lead, key, [_row(one, names) for one in best], [_row(one, names) for one in worst])


def _row(one: SegmentedImage, names: Sequence[str]) -> _Row:
    parts = [
        (one.picture, "image"),
        (overlay(one.picture, one.truth, len(names)), "truth"),
        (overlay(one.picture, one.found, len(names)), "answer"),
    ]
    pictures = []
    for part, what in parts:
        small = part.copy()
        small.thumbnail((_SIDE, _SIDE))
        pictures.append(image(np.asarray(small.convert("RGB")), f"{one.name}: {what}", what, photo=True))
    return _Row(f"{one.name} · mean IoU {100 * one.iou:.1f} %", pictures)


@styled
def _iou_figure(iou: NDArray[Any], confusion: NDArray[Any], names: Sequence[str]) -> Figure:
    order = [int(c) for c in np.argsort(-np.nan_to_num(iou, nan=-1)) if np.isfinite(iou[c])]
    shown = order[:15] + order[-15:] if len(order) > 30 else order
    labels = [clip(names[c], 28) for c in shown]
    figure, axes = panel(5.6, 0.98 + 0.175 * max(len(shown), 4), left=name_margin(labels), right=0.62)
    truth = confusion.sum(1) / max(1, confusion.sum())
    for row, c in enumerate(shown):
        axes.plot([0, iou[c]], [row, row], color=GRID, linewidth=0.8)
        axes.plot(iou[c], row, "o", color=BLUE, markersize=4, clip_on=False)
        axes.text(1.015, row, f"{100 * truth[c]:.1f} %", transform=axes.get_yaxis_transform(), va="center", color=MUTED)
    axes.axvline(float(np.nanmean(iou)), color=ORANGE, linewidth=1.0)
    axes.set_yticks(range(len(shown)), labels, color=INK)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    cut = f": the 15 best and the 15 worst of {len(order)}" if len(order) > 30 else ""
    title(axes, f"IoU per class{cut}")
    return figure


@styled
def _confusion_figure(confusion: NDArray[Any], names: Sequence[str]) -> Figure:
    """Shares of each true class's pixels; of many classes those with the most pixels."""
    shown = np.sort(np.argsort(-confusion.sum(1), kind="stable")[:20])
    part = confusion[np.ix_(shown, shown)] / np.maximum(confusion.sum(1)[shown, None], 1)
    labels = [clip(names[c], 28) for c in shown]
    margin = name_margin(labels)
    side = 5.6 - margin - 0.35
    figure, axes = panel(5.6, side + margin + 0.67, left=margin + 0.2, right=0.15, bottom=0.25 + margin, top=0.42)
    axes.imshow(part, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for i, j in np.argwhere(part >= 0.005):
        axes.text(j, i, f"{100 * part[i, j]:.0f}", ha="center", va="center", fontsize=6.5, color=INK)
    axes.set_xticks(range(len(shown)), labels, rotation=90)
    axes.set_yticks(range(len(shown)), labels)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    of = f", {len(shown)} largest of {len(confusion)} classes" if len(shown) < len(confusion) else ""
    title(axes, f"Confusion of classes{of}")
    return figure
