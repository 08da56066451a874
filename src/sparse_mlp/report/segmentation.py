"""The report of a segmentation run: IoU per class, confusion, the images with the best and the worst answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from sparse_mlp.report.classes import class_values_figure, name_margin
from sparse_mlp.report.experts import load_section
from sparse_mlp.report.header import balance_tile, cost_tiles, run_head
from sparse_mlp.report.overlay import class_colours, overlay
from sparse_mlp.report.page import Figures, Swatch, Tile, image
from sparse_mlp.report.run import RunData, read_run
from sparse_mlp.report.sections import CurvesSection, ExamplesSection, PictureRow, curves_section, save_page
from sparse_mlp.report.style import INK, clip, panel, styled, title

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
                class_values_figure(
                    "IoU per class", evaluated["class_iou"], _pixel_shares(evaluated["confusion"]), names
                ),
                "class_iou",
                "Intersection over union; right of it the class's share of the true pixels. The line is the mean.",
            ),
            figures.add(
                _confusion_figure(evaluated["confusion"], names),
                "confusion",
                "Where the pixels of a class (row) were put, in % of its pixels.",
            ),
        ]
        sections["iou"] = CurvesSection(f"Over all pixels of {len(evaluated['iou']):,} test images.", drawn)
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


def _examples(best: Sequence[SegmentedImage], worst: Sequence[SegmentedImage], names: Sequence[str]) -> ExamplesSection:
    colours = class_colours(len(names))
    present = sorted({int(c) for one in (*best, *worst) for part in (one.truth, one.found) for c in np.unique(part)})
    key = [Swatch("#{:02x}{:02x}{:02x}".format(*colours[c]), names[c]) for c in present if c < len(names)]
    lead = "Each row: the image, the truth, the answer. Grey counts for nothing."
    return ExamplesSection(lead, [_row(one, names) for one in best], [_row(one, names) for one in worst], key)


def _row(one: SegmentedImage, names: Sequence[str]) -> PictureRow:
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
    return PictureRow(f"{one.name} · mean IoU {100 * one.iou:.1f} %", pictures)


def _pixel_shares(confusion: NDArray[Any]) -> list[str]:
    """The share of the true pixels that each class has."""
    return [f"{share:.1%}".replace("%", " %") for share in confusion.sum(1) / max(1, confusion.sum())]


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
