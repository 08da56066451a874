"""The heads of Cascade Mask R-CNN (Cai and Vasconcelos, arXiv 1906.09756) from torchvision's parts.

Three stages, each with its own box and mask head: a stage is trained on the boxes of the one before it, against a
higher overlap with the objects. As Swin Transformer and AS-MLP have it on mmdetection: box heads of four convolutions
with batch norm and a linear layer, regression by class, a GIoU loss of weight 10 on the decoded boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, generalized_box_iou_loss

__all__ = ["CascadeHeads"]

_OVERLAPS = (0.5, 0.6, 0.7)
_SCALES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
_WEIGHTS = (1.0, 0.5, 0.25)
_GIOU_WEIGHT = 10.0

Losses = dict[str, Tensor]
Found = list[dict[str, Tensor]]


class CascadeHeads(nn.Module):
    """Takes the place of torchvision's RoIHeads; `num_classes` counts the background."""

    def __init__(self, channels: int, num_classes: int, *, samples: int, max_detections: int, min_score: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            _stage(channels, num_classes, overlap, scales, samples, max_detections, min_score)
            for overlap, scales in zip(_OVERLAPS, _SCALES, strict=True)
        )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[Found, Losses]:
        """As RoIHeads: detections in evaluation, losses in training."""
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Losses:
        sums: Losses = {}
        for stage, weight in zip(cast(Sequence[RoIHeads], self.stages), _WEIGHTS, strict=True):
            proposals, matched, labels, _ = stage.select_training_samples(proposals, targets)
            logits, deltas = _boxes(stage, features, proposals, image_shapes)
            decoded = stage.box_coder.decode(deltas.float(), proposals)  # (rows, classes, 4)
            label = torch.cat(labels)
            own = [_matched_boxes(target, index) for target, index in zip(targets, matched, strict=True)]
            losses = {
                "loss_classifier": F.cross_entropy(logits, label),
                "loss_box_reg": _GIOU_WEIGHT * _box_loss(decoded, label, torch.cat(own)),
                "loss_mask": _mask_loss(stage, features, proposals, image_shapes, targets, labels, matched),
            }
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + weight * value
            chosen = torch.where(label > 0, label, logits[:, 1:].argmax(1) + 1)
            refined = _refine(decoded, chosen, proposals, image_shapes)
            # The objects themselves, which are among the proposals, join the next stage anew.
            moved = [(boxes != truth).any(1) for boxes, truth in zip(proposals, own, strict=True)]
            proposals = [boxes[kept] for boxes, kept in zip(refined, moved, strict=True)]
        return sums

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Found:
        """Scores are means over the stages, each at its own boxes; masks are means at the last boxes."""
        stages = cast(Sequence[RoIHeads], self.stages)
        scores = []
        for number, stage in enumerate(stages):
            logits, deltas = _boxes(stage, features, proposals, image_shapes)
            scores.append(logits.float().softmax(1))
            if number < len(stages) - 1:
                decoded = stage.box_coder.decode(deltas.float(), proposals)
                proposals = _refine(decoded, logits[:, 1:].argmax(1) + 1, proposals, image_shapes)
        mean = torch.stack(scores).mean(0).log()  # whose softmax is the mean again
        found = stages[-1].postprocess_detections(mean, deltas.float(), proposals, image_shapes)
        result = [dict(zip(("boxes", "scores", "labels"), one, strict=True)) for one in zip(*found, strict=True)]
        boxes, labels = ([one[name] for one in result] for name in ("boxes", "labels"))
        masks = [maskrcnn_inference(_mask_logits(stage, features, boxes, image_shapes), labels) for stage in stages]
        for number, one in enumerate(result):
            one["masks"] = torch.stack([of_stage[number] for of_stage in masks]).mean(0)
        return result


def _stage(
    channels: int,
    num_classes: int,
    overlap: float,
    scales: tuple[float, ...],
    samples: int,
    max_detections: int,
    min_score: float,
) -> RoIHeads:
    names = ["0", "1", "2", "3"]
    return RoIHeads(
        MultiScaleRoIAlign(names, 7, 2),
        FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d),
        FastRCNNPredictor(1024, num_classes),
        overlap,
        overlap,
        samples,
        0.25,
        scales,
        min_score,
        0.5,
        max_detections,
        MultiScaleRoIAlign(names, 14, 2),
        MaskRCNNHeads(channels, [256] * 4, 1),
        MaskRCNNPredictor(256, 256, num_classes),
    )


def _boxes(
    stage: RoIHeads, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Logits (rows, classes) and regression (rows, 4 classes)."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, image_shapes)))


def _matched_boxes(target: dict[str, Tensor], index: Tensor) -> Tensor:
    """The object of each sample; zeros in an image without objects."""
    boxes = target["boxes"]
    return boxes[index] if len(boxes) else boxes.new_zeros(len(index), 4)


def _box_loss(decoded: Tensor, label: Tensor, truth: Tensor) -> Tensor:
    rows = (label > 0).nonzero().flatten()
    loss = generalized_box_iou_loss(decoded[rows, label[rows]], truth[rows], reduction="sum")
    return (loss + 0 * decoded.sum()) / len(label)


def _refine(
    decoded: Tensor, chosen: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
) -> list[Tensor]:
    """The boxes of the chosen classes (rows,) by image, without gradient."""
    boxes = decoded.detach()[torch.arange(len(decoded), device=decoded.device), chosen]
    parts = boxes.split([len(part) for part in proposals])
    return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes, strict=True)]


def _mask_logits(
    stage: RoIHeads, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
) -> Tensor:
    assert stage.mask_roi_pool is not None and stage.mask_head is not None and stage.mask_predictor is not None
    return stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))


def _mask_loss(
    stage: RoIHeads,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
    targets: list[dict[str, Tensor]],
    labels: list[Tensor],
    matched: list[Tensor],
) -> Tensor:
    objects = [label > 0 for label in labels]
    boxes = [part[kept] for part, kept in zip(proposals, objects, strict=True)]
    index = [part[kept] for part, kept in zip(matched, objects, strict=True)]
    logits = _mask_logits(stage, features, boxes, image_shapes)
    masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
    return maskrcnn_loss(logits, boxes, masks, classes, index)
