"""torchvision's detectors over the feature maps of any timm model.

Faster R-CNN, Mask R-CNN, Cascade Mask R-CNN (Ren et al. 2015, He et al. 2017, Cai and Vasconcelos 2019) and RetinaNet
(Lin et al. 2017) with the feature pyramid network of Lin et al. 2016, in the settings that the papers of these
backbones took from mmdetection: 256 channels, five levels, for the R-CNNs by a pooling of the coarsest, for RetinaNet
from stride 8 with two more convolutions on the backbone's last map. What remains torchvision's: the smooth L1 loss of
the R-CNNs (mmdetection: L1), two samples a bin in RoIAlign, the focal loss divided by the objects of each image rather
than of the batch, and the ReLU between the two additional convolutions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from sparse_mlp.models.cascade_rcnn import CascadeHeads
from sparse_mlp.models.feature_maps import FeatureMaps

__all__ = ["DETECTORS", "WITH_MASKS", "Detector", "DetectorName", "paste_masks"]

DetectorName = Literal["mask_rcnn", "faster_rcnn", "retinanet", "cascade_mask_rcnn"]
DETECTORS: tuple[DetectorName, ...] = get_args(DetectorName)
WITH_MASKS: tuple[DetectorName, ...] = ("mask_rcnn", "cascade_mask_rcnn")

_RATIOS = (0.5, 1.0, 2.0)
_LEVELS = 5


class Detector(nn.Module):
    """Finds objects of `num_classes` classes, numbered from 0, and with the Mask R-CNNs their masks."""

    def __init__(
        self,
        maps: FeatureMaps,
        name: DetectorName,
        num_classes: int,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        fpn_channels: int = 256,
        anchor_size: int = 32,
        samples: int = 512,
        max_detections: int = 100,
        min_score: float = 0.05,
    ) -> None:
        """`anchor_size`: side in pixels of the smallest anchors, those of the finest level; each level doubles it.

        `samples`: regions of an image that an R-CNN's heads are trained on, a quarter of them objects at most.
        `max_detections` of an image are kept, those with a score of at least `min_score`. ValueError for a name that is
        not one of DETECTORS.
        """
        super().__init__()
        if name not in DETECTORS:
            raise ValueError(f"unknown detector {name!r}; known: {', '.join(DETECTORS)}")
        self.name, self.num_classes = name, num_classes
        self.offset = 0 if name == "retinanet" else 1  # the R-CNNs' class 0 is the background
        if name == "retinanet":
            self.net = _retinanet(maps, num_classes, fpn_channels, anchor_size, max_detections, min_score)
        else:
            kind = MaskRCNN if name == "mask_rcnn" else FasterRCNN
            self.net = _rcnn(kind, maps, num_classes, fpn_channels, anchor_size, samples, max_detections, min_score)
        if name == "cascade_mask_rcnn":
            limits = {"samples": samples, "max_detections": max_detections, "min_score": min_score}
            self.net.roi_heads = CascadeHeads(fpn_channels, num_classes + 1, **limits)  # type: ignore[arg-type]
        self.net.transform = _Batch(mean, std, maps.fixed_size)

    @property
    def maps(self) -> FeatureMaps:
        return cast(FeatureMaps, cast(_Backbone, self.net.backbone).maps)

    @property
    def has_masks(self) -> bool:
        return self.name in WITH_MASKS

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.maps.set_grad_checkpointing(enable)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile the backbone; boxes come in numbers that no graph knows before."""
        self.maps.compile(*args, **kwargs)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """Images (C, H, W) in 0..1, each of its own size and used at that size.

        In training: the losses by name; targets have `boxes` (N, 4) x1, y1, x2, y2 in pixels, `labels` (N,) from 0 and,
        for masks, `masks` (N, H, W). In evaluation: for each image `boxes`, `labels`, `scores`, best first, and for
        masks `masks` (N, 1, 28, 28), probabilities within the boxes, which `paste_masks` lays over an image.
        """
        if self.training:
            assert targets is not None, "training needs targets"
            moved = [{**target, "labels": target["labels"] + self.offset} for target in targets]
            return self.net(list(images), moved)
        return [{**found, "labels": found["labels"] - self.offset} for found in self.net(list(images))]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Masks (N, 1, 28, 28) within their boxes (N, 4) -> (N, height, width) bool."""
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool)
    return paste_masks_in_image(masks, boxes, size)[:, 0] > threshold


class _Backbone(nn.Module):
    """A model's feature maps through a feature pyramid network, as torchvision's detectors take them."""

    def __init__(self, maps: FeatureMaps, fpn_channels: int, first: int, extra: nn.Module) -> None:
        super().__init__()
        self.maps, self.first, self.out_channels = maps, first, fpn_channels
        for unused in range(first):
            _drop(maps, unused)
        self.fpn = FeaturePyramidNetwork(list(maps.channels[first:]), fpn_channels, extra)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.maps(x)[self.first :]
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))


def _drop(maps: FeatureMaps, level: int) -> None:
    """Leave out the weights of a map that is not used: without a gradient, DistributedDataParallel stops at them."""
    for layers in (maps.scales, getattr(maps.model, "output_norms", None)):
        if layers is not None:
            layers[level] = nn.Identity()


class _LastLevels(LastLevelP6P7):
    """The two coarsest maps of RetinaNet, on CPUs in float32.

    There the gradient of a strided bfloat16 convolution over a single pixel is uninitialised memory (torch 2.14), and
    images of 64 pixels have such a map.
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        if p[-1].device.type != "cpu":
            return super().forward(p, c, names)
        with torch.autocast("cpu", enabled=False):
            return super().forward([x.float() for x in p], [x.float() for x in c], names)


class _Batch(GeneralizedRCNNTransform):
    """Normalises images and pads them to one size; they keep their scale, and masks stay within their boxes."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], fixed_size: tuple[int, int] | None) -> None:
        super().__init__(0, 0, list(mean), list(std))
        self.padded_size = fixed_size

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        batch, targets = super().forward(images, targets)
        if self.padded_size is not None:
            missing = [side - own for side, own in zip(self.padded_size, batch.tensors.shape[-2:], strict=True)]
            if min(missing) < 0:
                own = " x ".join(map(str, batch.tensors.shape[-2:]))
                raise ValueError(f"an image is {own} pixels, the model takes {self.padded_size} at most")
            batch.tensors = nn.functional.pad(batch.tensors, (0, missing[1], 0, missing[0]))
        return batch, targets

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        return result


def _rcnn(
    kind: type[FasterRCNN],
    maps: FeatureMaps,
    num_classes: int,
    fpn_channels: int,
    anchor_size: int,
    samples: int,
    max_detections: int,
    min_score: float,
) -> nn.Module:
    backbone = _Backbone(maps, fpn_channels, 0, LastLevelMaxPool())
    sizes = tuple((anchor_size * 2**level,) for level in range(_LEVELS))
    return kind(
        backbone,
        num_classes + 1,
        rpn_anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * _LEVELS),
        rpn_post_nms_top_n_train=1000,
        box_batch_size_per_image=samples,
        box_detections_per_img=max_detections,
        box_score_thresh=min_score,
    )


def _retinanet(
    maps: FeatureMaps,
    num_classes: int,
    fpn_channels: int,
    anchor_size: int,
    max_detections: int,
    min_score: float,
) -> nn.Module:
    backbone = _Backbone(maps, fpn_channels, 1, _LastLevels(maps.channels[-1], fpn_channels))
    octave = [2 ** (step / 3) for step in range(3)]
    sizes = tuple(tuple(round(anchor_size * 2**level * share) for share in octave) for level in range(_LEVELS))
    return RetinaNet(
        backbone,
        num_classes,
        anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * _LEVELS),
        detections_per_img=max_detections,
        score_thresh=min_score,
    )
