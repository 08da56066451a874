"""Semantic segmentation: cross-entropy of every pixel, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from sparse_mlp.data.segmentation import IGNORE
from sparse_mlp.distributed import broadcast, gather
from sparse_mlp.engine import Batch, Evaluation, Task
from sparse_mlp.errors import UserError
from sparse_mlp.models.segmenters import Segmenter
from sparse_mlp.models.smp_segmenter import SmpSegmenter
from sparse_mlp.tasks.metrics import gather_columns, sorted_by_index

_MULTIPLE = 32  # images are padded to a multiple of the coarsest stride


@dataclass(frozen=True)
class SegmentConfig:
    """What a segmenter learns from."""

    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss, where the head has one."""


@dataclass(frozen=True)
class InferenceConfig:
    """How the classes of a whole image are found."""

    window: int | None = None
    """Side of a window that slides over the image; where windows overlap, logits are averaged. Left out: the whole
    image at once; models that take one image size only always slide a window of that size."""

    stride: float = 2 / 3
    """Step of the window, as a share of its side."""

    scales: tuple[float, ...] = (1.0,)
    """Sizes of the image whose probabilities are averaged; 0.5 0.75 1 1.25 1.5 1.75 is the papers' multi-scale test."""

    flip: bool = False
    """Average over the mirrored image too."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < _MULTIPLE:
            raise UserError(f"inference.window {self.window} is below {_MULTIPLE}")
        if not 0 < self.stride <= 1:
            raise UserError(f"inference.stride {self.stride} is not a share in (0, 1]")
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            raise UserError(f"inference.scales {self.scales} are not numbers above 0 and at most 8")


class Segment(Task):
    """A model that learns the class of every pixel.

    Training batches hold `image` (B, 3, S, S) and `target` (B, S, S) classes, 255 where a pixel counts for nothing;
    evaluation batches lists of images (3, h, w), of targets (H, W) at the masks' own sizes, and `index` (B,).
    """

    items = "images"

    def __init__(
        self,
        model: Segmenter | SmpSegmenter,
        class_names: Sequence[str],
        config: SegmentConfig | None = None,
        inference: InferenceConfig | None = None,
    ) -> None:
        super().__init__()
        self.model, self.class_names = model, list(class_names)
        self.config, self.inference = config or SegmentConfig(), inference or InferenceConfig()
        if self.config.auxiliary_weight < 0:
            raise UserError(f"task.auxiliary_weight {self.config.auxiliary_weight} is negative")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits, auxiliary = self.model(batch["image"], auxiliary=True)
        target = batch["target"]
        loss = pixel_loss(logits, target)
        if auxiliary is not None:
            loss = loss + self.config.auxiliary_weight * pixel_loss(auxiliary, target)
        counted = target != IGNORE
        right = (logits.argmax(dim=1) == target) & counted
        return {"loss": loss, "pixel_accuracy": right.sum() / counted.sum().clamp(min=1)}

    def backbone(self) -> nn.Module:
        return self.model

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        if layer_decay is not None:
            raise UserError(f"optim.layer_decay {layer_decay} would be ignored: a segmenter has no order of layers")
        model = self.model.model
        names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
        no_decay = {*(f"*.{name}" for name in names), "*.bias"}
        return param_groups_weight_decay(self.model, weight_decay, no_weight_decay_list=no_decay)

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """`miou`, `class_accuracy` (means over the classes that there are), `pixel_accuracy`, `images`; of all ranks.

        Predictions: `index` (N,), `iou` (N,) of each image, `confusion` (classes, classes), rows the truth, and
        `class_iou` (classes,), NaN for a class that is neither there nor predicted. Metrics by torchmetrics.
        """
        training, classes = self.training, len(self.class_names)
        self.eval()
        own, rows = np.zeros((classes, classes), dtype=np.int64), []
        try:
            for batch in loader:
                found = self._found(batch, device)
                for index, target, classified in zip(batch["index"], batch["target"], found, strict=True):
                    truth = target[None].to(device).long()
                    matrix = multiclass_confusion_matrix(classified[None], truth, classes, ignore_index=IGNORE)
                    one = matrix.cpu().numpy()
                    own += one
                    rows.append((index[None], torch.tensor([mean_iou(one)])))
        finally:
            self.train(training)
        confusions, columns = gather(own), gather_columns(rows)
        if columns is None or confusions is None:
            return Evaluation(broadcast(dict[str, float]()))
        if not columns:
            raise UserError("there are no images to evaluate on")
        confusion, order = sum(confusions[1:], confusions[0]), sorted_by_index(columns[0])
        index, iou = (column[order] for column in columns)
        metrics = confusion_metrics(confusion) | {"images": float(len(index))}
        arrays = {"index": index, "iou": iou, "confusion": confusion, "class_iou": class_iou(confusion)}
        return Evaluation(broadcast(metrics), arrays)

    def _found(self, batch: Batch, device: torch.device) -> Iterator[Tensor]:
        """The classes (H, W) of each image of a batch, at the size of its target."""
        images: list[Tensor] = list(batch["image"])
        sizes = [tuple(target.shape) for target in batch["target"]]
        together = len({image.shape for image in images}) == 1 and len(set(sizes)) == 1
        groups = [range(len(images))] if together else [[i] for i in range(len(images))]
        for group in groups:
            x = torch.stack([images[i] for i in group]).to(device)
            yield from segment_images(self.model, x, sizes[group[0]], self.inference).argmax(dim=1)


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels that count, divided by all pixels, as mmsegmentation averages: the mean over
    micro-batches and ranks is then that over the batch."""
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum") / target.numel()


def segment_images(
    model: Segmenter | SmpSegmenter, images: Tensor, size: tuple[int, ...], config: InferenceConfig
) -> Tensor:
    """Probabilities (B, classes, *size) of normalised images (B, 3, h, w), averaged over scales and flips."""
    total: Tensor | float = 0.0
    for scale in config.scales:
        sides = [max(1, round(scale * side)) for side in images.shape[-2:]]
        scaled = images if scale == 1 else F.interpolate(images, size=sides, mode="bilinear", align_corners=False)
        for flipped in (False, True) if config.flip else (False,):
            logits = _whole_or_sliding(model, scaled.flip(-1) if flipped else scaled, config)
            logits = F.interpolate(logits.float(), size=list(size), mode="bilinear", align_corners=False)
            total = total + (logits.flip(-1) if flipped else logits).softmax(dim=1)
    assert isinstance(total, Tensor)
    return total / (len(config.scales) * (2 if config.flip else 1))


def _whole_or_sliding(model: Segmenter | SmpSegmenter, images: Tensor, config: InferenceConfig) -> Tensor:
    """Logits (B, classes, h, w) of images of any size."""
    height, width = images.shape[-2:]
    window = model.fixed_size or ((config.window, config.window) if config.window is not None else None)
    if window is None:
        window = (_MULTIPLE * math.ceil(height / _MULTIPLE), _MULTIPLE * math.ceil(width / _MULTIPLE))
    # Black, after normalisation: zero is the mean colour.
    padded = F.pad(images, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    rows, columns = (_starts(side, part, config.stride) for side, part in zip(padded.shape[-2:], window, strict=True))
    total, count = None, padded.new_zeros(padded.shape[-2:])
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(padded[place])
            assert isinstance(logits, Tensor)
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], *padded.shape[-2:]))
            total[place] += logits
            count[place] += 1
    assert total is not None
    return (total / count)[..., :height, :width]


def _starts(side: int, window: int, stride: float) -> list[int]:
    """Where windows begin: evenly, `stride` of a window apart at most, the last one at the end."""
    steps = math.ceil((side - window) / max(1, int(stride * window)))
    return [round(i * (side - window) / max(1, steps)) for i in range(steps + 1)]


def mean_iou(confusion: np.ndarray) -> float:
    """Mean over the classes that are there or predicted; NaN if there is none."""
    iou = class_iou(confusion)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else math.nan


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """(classes,) from a confusion matrix; NaN for a class that is neither there nor predicted."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)


def confusion_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Mean IoU, pixel accuracy and mean accuracy of the classes, from a confusion matrix with the truth in its rows."""
    hits, truth = np.diag(confusion).astype(np.float64), confusion.sum(1)
    if not truth.sum():
        raise UserError("no pixel of the images to evaluate on has a class")
    return {
        "miou": mean_iou(confusion),
        "pixel_accuracy": float(hits.sum() / truth.sum()),
        "class_accuracy": float((hits[truth > 0] / truth[truth > 0]).mean()),
    }
