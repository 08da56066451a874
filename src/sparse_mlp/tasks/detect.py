"""Detection and instance segmentation: the losses of torchvision's detectors, COCO's metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from sparse_mlp.data.coco_annotations import Annotations
from sparse_mlp.distributed import broadcast, gather
from sparse_mlp.engine import Batch, Evaluation, Task
from sparse_mlp.errors import UserError
from sparse_mlp.models.detectors import Detector
from sparse_mlp.tasks.coco_metrics import Row, coco_metrics, coco_rows, outcomes

_NAMES = {"classification": "loss_classifier", "bbox_regression": "loss_box_reg"}  # RetinaNet's by those of the R-CNNs


@dataclass(frozen=True)
class DetectionEvaluation(Evaluation):
    """Evaluation with the detections; both fields are empty on ranks other than 0."""

    results: list[Row] = field(default_factory=list)
    """The detections as COCO's result files have them."""

    analysis: dict[str, Any] = field(default_factory=dict)
    """What the report shows, as JSON: AP of each class, precision, confusion, the outcome of each image."""


class Detect(Task):
    """A detector that learns the objects of images. Batches are those of `data.coco.CocoImages`."""

    items = "images"

    def __init__(self, detector: Detector, truth: Annotations) -> None:
        """`truth`: the objects of the images to evaluate on. UserError if the model has another number of classes."""
        super().__init__()
        if detector.num_classes != len(truth.classes):
            raise UserError(f"the model has {detector.num_classes} classes, {truth.path} has {len(truth.classes)}")
        self.detector, self.truth = detector, truth

    def backbone(self) -> nn.Module:
        """The detector: its heads are of no less use than its backbone."""
        return self.detector

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        """Norms and biases do not decay; layers are those of the backbone, the pyramid and the heads have rate 1."""
        model = self.detector.maps.model
        names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
        no_decay = {*names, "*.bias"}
        if layer_decay is None:
            groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
        else:
            groups = param_groups_layer_decay(model, weight_decay, no_decay, layer_decay=layer_decay)
        own = {id(parameter) for parameter in model.parameters()}
        rest = [p for p in self.detector.parameters() if p.requires_grad and id(p) not in own]
        return [
            *groups,
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Their sum is the loss: `loss_classifier`, `loss_box_reg`, of an R-CNN those of its proposals, `loss_mask`."""
        targets = [{name: t[name] for name in ("boxes", "labels", "masks") if name in t} for t in batch["target"]]
        losses = self.detector(_pixels(batch["image"]), targets)
        parts = {_NAMES.get(name, name): value.detach() for name, value in losses.items()}
        return {"loss": torch.stack([value.float() for value in losses.values()]).sum(), **parts}

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> DetectionEvaluation:
        """COCO's metrics of boxes (`box_map`, `box_map50`, ...) and masks over all ranks' images, and `images`.

        An image that could not be read is left out. Predictions are `image_id`, `label`, `score`, `box` of each
        detection, best first within an image.
        """
        training = self.training
        self.eval()
        found: dict[int, list[Row]] = {}
        try:
            for batch in loader:
                images = _pixels([image.to(device) for image in batch["image"]])
                for image, target, objects in zip(images, batch["target"], self.detector(images), strict=True):
                    size = (image.shape[1], image.shape[2])
                    found[target["image_id"]] = coco_rows(objects, size, target, self.truth.category_ids)
        finally:
            self.train(training)
        parts = gather(found)
        if parts is None:
            return DetectionEvaluation(broadcast(dict[str, float]()))
        everything = {image: rows for part in parts for image, rows in part.items()}
        if not everything:
            raise UserError("there are no images to evaluate on")
        return self._score(dict(sorted(everything.items())))

    def _score(self, found: dict[int, list[Row]]) -> DetectionEvaluation:
        """The metrics of the detections by image, on every rank."""
        truth, masks, ids = self.truth, self.detector.has_masks, list(found)
        results = [row for rows in found.values() for row in rows]
        metrics, curves = coco_metrics(truth, results, ids, masks=masks)
        metrics["images"] = len(ids)
        answered, confusion = outcomes(truth, results, ids)
        names = {image["id"]: image["file_name"] for image in truth.images}
        analysis = {
            "classes": list(truth.classes),
            "objects": _count_objects(truth, ids),
            "curves": {
                kind: {"ap": _plain(curve.ap), "precision": {t: _plain(p) for t, p in curve.precision.items()}}
                for kind, curve in curves.items()
            },
            "confusion": confusion.tolist(),
            "images": [{**vars(o), "f1": round(o.f1, 4), "file": names[o.image_id]} for o in answered],
        }
        labels = truth.labels()
        predictions: dict[str, np.ndarray] = {
            "image_id": np.array([row["image_id"] for row in results], dtype=np.int64),
            "label": np.array([labels[row["category_id"]] for row in results], dtype=np.int64),
            "score": np.array([row["score"] for row in results], dtype=np.float32),
            "box": np.array([row["bbox"] for row in results], dtype=np.float32).reshape(-1, 4),
        }
        return DetectionEvaluation(broadcast(metrics), predictions, results, analysis)


def _pixels(images: Iterable[Tensor]) -> list[Tensor]:
    return [image.float() / 255 for image in images]


def _count_objects(truth: Annotations, image_ids: Iterable[int]) -> list[int]:
    labels = truth.labels()
    counts = np.zeros(len(labels), dtype=int)
    for image in image_ids:
        for record in truth.objects.get(image, []):
            counts[labels[record["category_id"]]] += not record["iscrowd"]
    return counts.tolist()


def _plain(values: np.ndarray) -> list[float | None]:
    """As JSON: a class without an object has no number."""
    return [None if np.isnan(value) else round(float(value), 5) for value in values]
