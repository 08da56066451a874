"""The report of a detector's run: AP per class, precision against recall, confusion, the best and the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from sparse_mlp.report.boxes import draw_objects
from sparse_mlp.report.classes import class_values_figure, confusion_figure
from sparse_mlp.report.curves import percent
from sparse_mlp.report.experts import load_section
from sparse_mlp.report.header import balance_tile, cost_tiles, run_head
from sparse_mlp.report.page import Drawing, Figures, Tile, image
from sparse_mlp.report.run import RunData, read_run
from sparse_mlp.report.sections import ExamplesSection, PictureRow, curves_section, save_page
from sparse_mlp.report.style import BLUE, MUTED, ORANGE, key_above, panel, styled, title

__all__ = ["DetectedImage", "Objects", "write_detection_report"]

_SIDE = 600  # pixels of a picture's longer side on the page


@dataclass(frozen=True)
class Objects:
    """Objects of an image: boxes (N, 4) x1, y1, x2, y2 in its pixels, labels (N,), masks (N, height, width) or None;
    scores (N,) of those that were found."""

    boxes: np.ndarray
    labels: list[int]
    scores: list[float] | None = None
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class DetectedImage:
    """An image (RGB) with its true and its found objects, and how many of them were right, missed and wrong."""

    name: str
    picture: Image.Image
    truth: Objects
    found: Objects
    right: int
    missed: int
    wrong: int


@dataclass(frozen=True)
class _Classes:
    lead: str
    columns: list[list[Drawing]]


def write_detection_report(
    run_dir: Path | str,
    class_names: Sequence[str],
    analysis: Mapping[str, Any] | None,
    *,
    best: Sequence[DetectedImage] = (),
    worst: Sequence[DetectedImage] = (),
    macs: int | None = None,
) -> Path:
    """Write `report.html` and `figures/` into the folder of a run; returns the page's path.

    `analysis` is that of `tasks.detect.DetectionEvaluation`; None for a run that has not finished. `macs` are those of
    the whole detector for one image.
    """
    run = read_run(run_dir)
    figures = Figures(run.path / "figures")
    names = [str(name) for name in class_names]
    sections: dict[str, object] = {
        "curves": curves_section(
            run, figures, {"loss": "The sum of the losses of the detector's parts on the training images."}
        )
    }
    if analysis is not None:
        sections["ap"] = _classes(analysis, names, figures)
    if best or worst:
        lead = "Left: the objects as annotated, crowds left out. Right: what was found, with its score."
        sections["examples"] = ExamplesSection(
            lead, [_row(one, names) for one in best], [_row(one, names) for one in worst]
        )
    sections["load"] = load_section(run, figures)
    head = run_head(run, _tiles(run, macs), kind="Run report · detection")
    return save_page(run, "detection.html.j2", head, sections)


def _tiles(run: RunData, macs: int | None) -> list[Tile]:
    tiles = []
    for label, key, small in (
        ("Box mAP", "box_map", "overlaps 0.5 to 0.95"),
        ("Box AP50", "box_map50", "overlap 0.5"),
        ("Mask mAP", "mask_map", "overlaps 0.5 to 0.95"),
    ):
        values = run.evals.get(key)
        if len(values) and np.isfinite(values[-1]):
            tiles.append(Tile(label, f"{100 * values[-1]:.1f} %", small))
    loads = {name: routing.final_load() for name, routing in run.routing.items()}
    return [*tiles, *cost_tiles(run, macs), *balance_tile(loads)]


def _classes(analysis: Mapping[str, Any], names: Sequence[str], figures: Figures) -> _Classes:
    curves, confusion = analysis["curves"], np.array(analysis["confusion"])
    ap = {kind: np.array([np.nan if v is None else v for v in curve["ap"]]) for kind, curve in curves.items()}
    answers, right = int(confusion[:, :-1].sum()), int(np.trace(confusion[:-1, :-1]))
    objects = int(np.sum(analysis["objects"]))
    lead = (
        f"{objects:,} objects in {len(analysis['images']):,} images. Detections with a score of 30 % and more count as "
        f"answers: {answers:,}, of which {right:,} are right, so that {objects - right:,} objects are missed or taken "
        "for something else."
    )
    drawings, counts = [], [f"{count:,}" for count in analysis["objects"]]
    if np.isfinite(ap["box"]).any():
        drawings = [
            figures.add(
                class_values_figure("AP per class", ap["box"], counts, names, ap.get("mask")),
                "class_ap",
                "Average precision of the boxes"
                + (" (dot) and of the masks (ring)" if "mask" in ap else "")
                + "; right of it the number of objects. The line is the mean.",
            ),
            figures.add(
                _precision_figure({kind: curve["precision"] for kind, curve in curves.items()}),
                "precision_recall",
                "Mean over the classes: the share of right answers while the score is lowered until a share of the "
                "objects is found, by the overlap that makes an answer right.",
            ),
        ]
    drawings.append(
        figures.add(
            confusion_figure(confusion, [*names, "nothing"]),
            "confusion",
            "Rows are the objects, columns the answers. Row “nothing”: answers where no object is; column “nothing”: "
            "objects without an answer. Of many classes only those in the most frequent mistakes.",
        )
    )
    return _Classes(lead, [drawings[:1], drawings[1:]])


@styled
def _precision_figure(curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Figure:
    figure, axes = panel(5.6, 3.4)
    recall = np.linspace(0, 1, 101)
    for colour, overlap in ((BLUE, "0.50"), (ORANGE, "0.75"), (MUTED, "0.50 to 0.95")):
        for kind, line in (("box", "-"), ("mask", (0, (3, 2)))):
            values = curves.get(kind, {}).get(overlap)
            if values:
                name = overlap if kind == "box" else f"{overlap} masks"
                axes.plot(recall, np.array(values, dtype=float), color=colour, linestyle=line, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(percent))
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    if len(curves) == 1:
        key_above(axes)
    else:
        axes.legend(loc="upper right")
    title(axes, "Precision against recall")
    return figure


def _row(one: DetectedImage, names: Sequence[str]) -> PictureRow:
    pictures = []
    for objects, what in ((one.truth, "annotated"), (one.found, "found")):
        small = _draw(one.picture, objects, names)
        pictures.append(image(np.asarray(small), f"{one.name}: {what}", what, photo=True))
    return PictureRow(f"{one.name} · {one.right} right, {one.missed} missed, {one.wrong} wrong", pictures)


def _draw(picture: Image.Image, objects: Objects, names: Sequence[str]) -> Image.Image:
    """The picture at the size of the page with the objects over it."""
    scale = min(1.0, _SIDE / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS)
    masks = objects.masks
    if masks is not None:
        shrunk = [Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST) for mask in masks]
        masks = np.stack([np.asarray(mask) for mask in shrunk]) if shrunk else None
    captions = [names[label] for label in objects.labels]
    if objects.scores is not None:
        captions = [f"{name} {score:.0%}" for name, score in zip(captions, objects.scores, strict=True)]
    return draw_objects(small, objects.boxes * scale, objects.labels, captions, len(names), masks)
