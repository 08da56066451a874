"""A segmenter on images and masks of your own: `sparse-mlp train segment --data.root FOLDER`."""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace

from PIL import Image

from sparse_mlp.data.segmentation import open_segmentation
from sparse_mlp.data.segmentation_config import SegmentationConfig
from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig
from sparse_mlp.jobs.segment import HeadConfig, SegmentRecipe
from sparse_mlp.recipes.own_images import can_fetch

_log = logging.getLogger(__name__)

_SAMPLED_FILES = 32
_IMAGES_SEEN = 8000  # that a run sees, all epochs together, between the limits on the epochs
_LARGE_SIDE = 512  # images of a longer shorter side are resized to it


def segment(given: SegmentRecipe | None = None) -> SegmentRecipe:
    """A segmenter on a folder of your images and masks, with settings that fit it; published weights where there are.

    FOLDER has images/ and masks/ (PNGs of class numbers), in train/ and val/ or not, and classes.txt.

    sparse-mlp train segment --data.root FOLDER
    """
    default = SegmentRecipe(
        name="segment",
        model=ModelConfig("cycle_mlp_b1", {"drop_path_rate": 0.1}),
        head=HeadConfig("semantic_fpn"),
        data=SegmentationConfig(batch_size=8),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=1),
        train=TrainConfig(epochs=30, clip_grad=1.0),
    )
    if given is None:
        return default
    if given.data.root is None and given.data.name == default.data.name:
        raise UserError("which images? --data.root FOLDER names a folder of images and masks")
    found = open_segmentation(replace(given.data, image_size=32, batch_size=1))
    count = len(found.train)
    sides = [_short_side(found.train.pairs[i].image) for i in range(0, count, max(1, count // _SAMPLED_FILES))]
    side = round(statistics.median(known)) if (known := [side for side in sides if side]) else _LARGE_SIDE
    resized = min(side, _LARGE_SIDE)
    pretrained = given.model.weights is None and can_fetch(given.model)
    from_weights = pretrained or given.model.weights is not None
    epochs = min(200, max(10, round(_IMAGES_SEEN / count)))
    recipe = replace(
        default,
        model=replace(default.model, pretrained=pretrained),
        data=replace(
            default.data,
            name=given.data.name,
            image_size=max(64, resized // 32 * 32),
            short_side=resized if side > _LARGE_SIDE else None,
            batch_size=min(8, max(1, count // 2)),
        ),
        optim=replace(default.optim, lr=2e-4 if from_weights else 1e-3),
        schedule=ScheduleConfig(warmup_epochs=epochs / 20),
        train=replace(default.train, epochs=epochs),
    )
    _log.info(
        "%s + %s on %s: %s training images, %s classes, crops of %s pixels; %s",
        given.model.name,
        given.head.name,
        given.data.root or given.data.name,
        count,
        len(found.classes),
        recipe.data.image_size,
        "published weights" if pretrained else given.model.weights or "from scratch",
    )
    return recipe


def _short_side(place: tuple) -> int | None:
    """Pixels of an image's shorter side; None for one that cannot be read, which is named when it is trained on."""
    tree, name = place
    try:
        with tree.open(name) as file, Image.open(file) as image:
            return min(image.size)
    except (OSError, Image.DecompressionBombError):
        return None
