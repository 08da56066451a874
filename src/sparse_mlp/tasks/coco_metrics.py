"""COCO's metrics by pycocotools, and what a reader asks next: which classes, which mistakes, which images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_mlp.data.coco_annotations import Annotations, quiet
from sparse_mlp.data.coco_transforms import turn_boxes, turn_masks
from sparse_mlp.models.detectors import paste_masks

__all__ = ["SHOWN_SCORE", "Outcome", "coco_metrics", "coco_rows", "outcomes"]

SHOWN_SCORE = 0.3
"""Detections of at least this score are drawn and counted as answers, as mmdetection draws them."""

_MATCHED = 0.5  # intersection over union from which a detection is of an object

Row = dict[str, Any]
"""A detection as COCO's result files have it: image_id, category_id, bbox [x, y, w, h], score, segmentation."""

_STATS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


def coco_rows(
    found: Mapping[str, Tensor], image: tuple[int, int], target: Mapping[str, Any], category_ids: Sequence[int]
) -> list[Row]:
    """Rows for the detections of an image that the detector saw as (height, width) pixels.

    Boxes and masks are in the frame of the annotations: of the stored file, whose EXIF rotation is undone.
    """
    height, width = target["size"]
    orientation = int(target["orientation"])
    upright = (width, height) if orientation >= 5 else (height, width)
    scale = torch.tensor([upright[1] / image[1], upright[0] / image[0]] * 2)
    boxes = found["boxes"].float().cpu() * scale
    rows: list[Row] = []
    stored = turn_boxes(boxes, orientation, upright[1], upright[0], back=True)
    xywh = torch.cat((stored[:, :2], stored[:, 2:] - stored[:, :2]), dim=1).tolist()
    for box, label, score in zip(xywh, found["labels"].tolist(), found["scores"].tolist(), strict=True):
        bbox = [round(value, 2) for value in box]
        rows.append(
            {
                "image_id": target["image_id"],
                "category_id": category_ids[label],
                "bbox": bbox,
                "score": round(score, 6),
            }
        )
    if "masks" in found:
        from pycocotools import mask as rle

        masks = turn_masks(paste_masks(found["masks"].float().cpu(), boxes, upright), orientation, back=True)
        for row, mask in zip(rows, masks.byte().numpy(), strict=True):
            code = rle.encode(np.asfortranarray(mask))
            row["segmentation"] = {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
    return rows


@dataclass(frozen=True)
class Curve:
    """AP of each class, NaN where a class has no object, and precision at recalls 0, 0.01, ..., 1 by IoU threshold."""

    ap: np.ndarray
    precision: dict[str, np.ndarray]


def coco_metrics(
    truth: Annotations, rows: Sequence[Row], image_ids: Sequence[int], *, masks: bool
) -> tuple[dict[str, float], dict[str, Curve]]:
    """COCOeval's numbers over these images: `box_map`, `box_map50`, ..., and with `masks` `mask_map`, ...

    Sizes of which there is no object are left out. The curves are by "box" and "mask".
    """
    from pycocotools.cocoeval import COCOeval

    reference = truth.ground_truth(image_ids)
    metrics: dict[str, float] = {}
    curves: dict[str, Curve] = {}
    for kind, of in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
        left_out = "segmentation" if kind == "box" else "bbox"  # the other's area would count for the size
        kept = [{name: value for name, value in row.items() if name != left_out} for row in rows]
        with quiet():
            evaluation = COCOeval(reference, reference.loadRes(kept) if kept else _nothing(reference), of)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = evaluation.stats[: len(_STATS)]
        metrics |= {f"{kind}_{name}": float(v) for name, v in zip(_STATS, stats, strict=True) if v > -1}
        curves[kind] = _curve(evaluation)
    return metrics, curves


def _nothing(reference: Any) -> Any:
    """Results without a detection, which loadRes does not take."""
    found = type(reference)()
    found.dataset = {**reference.dataset, "annotations": []}
    found.createIndex()
    return found


def _curve(evaluation: Any) -> Curve:
    # (IoU thresholds, recalls, classes, areas, numbers of detections): all areas, the most detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    present: Any = np.isfinite(precision).any(axis=(0, 1))
    ap = np.full(len(present), np.nan)
    ap[present] = np.nanmean(precision[:, :, present], axis=(0, 1))
    shown = {"0.50": precision[0], "0.75": precision[5], "0.50 to 0.95": precision.mean(axis=0)}
    means = {name: values[:, present].mean(axis=1) for name, values in shown.items()} if present.any() else {}
    return Curve(ap, means)


@dataclass(frozen=True)
class Outcome:
    """How one image was answered. right, missed, wrong: objects found, objects not found, answers without an object."""

    image_id: int
    right: int
    missed: int
    wrong: int

    @property
    def f1(self) -> float:
        """2 right / (2 right + missed + wrong); 1 for an image without objects and answers."""
        total = 2 * self.right + self.missed + self.wrong
        return 2 * self.right / total if total else 1.0


def outcomes(truth: Annotations, rows: Sequence[Row], image_ids: Sequence[int]) -> tuple[list[Outcome], np.ndarray]:
    """What became of each image's objects, and the confusion of classes (classes + 1, classes + 1).

    Row: the class of the object, last: none; column: the answer's, last: none. Detections from SHOWN_SCORE on are the
    answers. Each takes the object that it overlaps most, by half at least: first one of its own class, then any other.
    """
    labels = truth.labels()
    none = len(labels)
    confusion = np.zeros((none + 1, none + 1), dtype=np.int64)
    by_image: dict[int, list[Row]] = {image: [] for image in image_ids}
    for row in rows:
        if row["score"] >= SHOWN_SCORE and row["image_id"] in by_image:
            by_image[row["image_id"]].append(row)
    found = []
    for image, answers in by_image.items():
        everything = truth.objects.get(image, [])
        objects = [record for record in everything if not record["iscrowd"]]
        crowds = [record for record in everything if record["iscrowd"]]
        answers = sorted(answers, key=lambda row: -row["score"])
        given = [labels[row["category_id"]] for row in answers]
        actual = [labels[record["category_id"]] for record in objects]
        matched = _match(_overlap(answers, objects), given, actual)
        in_crowd: Any = (_overlap(answers, crowds, crowd=True) >= _MATCHED).any(axis=1)
        pairs = [(actual[m], given[a]) for a, m in matched.items()]
        missed = [label for number, label in enumerate(actual) if number not in matched.values()]
        extra = [given[a] for a in range(len(answers)) if a not in matched and not in_crowd[a]]
        for pair in (*pairs, *((label, none) for label in missed), *((none, label) for label in extra)):
            confusion[pair] += 1
        right = sum(a == g for a, g in pairs)
        found.append(Outcome(image, right, len(actual) - right, len(pairs) - right + len(extra)))
    return found, confusion


def _overlap(answers: Sequence[Row], objects: Sequence[Row], *, crowd: bool = False) -> np.ndarray:
    """Intersection over union (answers, objects) of the boxes; over the answer's area for crowds."""
    if not answers or not objects:
        return np.zeros((len(answers), len(objects)))
    from pycocotools import mask as rle

    first, second = (np.array([row["bbox"] for row in part], dtype=np.float64) for part in (answers, objects))
    return rle.iou(first, second, [int(crowd)] * len(objects))


def _match(overlap: np.ndarray, given: Sequence[int], actual: Sequence[int]) -> dict[int, int]:
    """Answer -> object, the surest answers first."""
    matched: dict[int, int] = {}
    same: Any = np.equal.outer(np.array(given), np.array(actual))
    for allowed in (same, ~same):
        for answer in range(len(overlap)):
            if answer in matched:
                continue
            free = [o for o in range(overlap.shape[1]) if allowed[answer, o] and o not in matched.values()]
            best = max(free, key=lambda o: overlap[answer, o], default=None)
            if best is not None and overlap[answer, best] >= _MATCHED:
                matched[answer] = best
    return matched
