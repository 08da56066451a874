"""Detection data in COCO's format: annotation files beside image folders or zips, as batches by (seed, step)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_mlp.data.coco_annotations import Annotations, Record, decode_mask, read_annotations
from sparse_mlp.data.coco_transforms import (
    Scene,
    clip_boxes,
    crop,
    fitted_size,
    flip,
    resize,
    to_tensor,
    turn_boxes,
    turn_masks,
)
from sparse_mlp.data.decode import BadImageError, decode_image, display_name, read_orientation
from sparse_mlp.data.randomness import epoch_seeds
from sparse_mlp.data.sets import default_root
from sparse_mlp.data.tree import Tree
from sparse_mlp.errors import UserError

__all__ = ["CocoConfig", "CocoData", "CocoImages", "check_coco_config", "load_image", "open_coco"]

_log = logging.getLogger(__name__)

# Swin's and AS-MLP's alternative to the multi-scale resize: to one of these sides, a crop of this range, then resized.
_CROP_SHORT, _CROP_SIDES = (400, 500, 600), (384, 600)

_ANNOTATIONS = ("annotations/instances_{}2017.json", "annotations/instances_{}.json", "instances_{}.json")
_IMAGES = ("{}2017", "{}", "images/{}2017", "images/{}", "{}2017.zip", "{}.zip")


@dataclass(frozen=True)
class CocoConfig:
    """Which images with boxes and masks, where they are and how they are loaded.

    Annotations are in the pixel frame of the stored image file, as in COCO. An image with an EXIF rotation is turned
    upright together with its boxes and masks; results are turned back into the frame of the annotations.
    """

    name: str = "coco"
    """Name of the set in messages."""

    root: str | None = None
    """Folder that holds annotations and images. Left out: $SPARSE_MLP_DATA/NAME where that variable is set, else
    data/NAME."""

    train_annotations: str | None = None
    """Annotation file of the training images, relative to root. Left out: the first that exists of
    annotations/instances_train2017.json, annotations/instances_train.json, instances_train.json."""

    test_annotations: str | None = None
    """The same for the images to evaluate on: instances_val2017.json, ..."""

    train_images: str | None = None
    """Folder or .zip of the training images, relative to root. Left out: the first that exists of train2017, train,
    images/train2017, images/train, and of train2017.zip, train.zip."""

    test_images: str | None = None
    """The same for the images to evaluate on: val2017, ..."""

    limit: int | None = None
    """Train on the first so many images that can be trained on. Left out: all."""

    test_on: Literal["val", "train"] = "val"
    """Images to evaluate on: val, or those trained on, to see whether a model can learn them at all."""

    keep_empty: bool = False
    """Train on images without an object too."""

    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Training images are resized to a shorter side drawn from these."""

    max_side: int = 1333
    """The longer side of an image in pixels, at most, in training and evaluation."""

    test_short_side: int = 800
    """The shorter side of an image in evaluation."""

    crop: bool = False
    """Half of the training images are cropped before: resized to a shorter side of 400, 500 or 600, of which a
    rectangle with sides of 384 to 600 is cut (DETR's augmentation)."""

    flip: float = 0.5
    """Probability of a left-right flip."""

    mean: tuple[float, ...] | None = None
    """Mean of the colours, in 0..1. Left out: that of the model's published weights."""

    std: tuple[float, ...] | None = None
    """Standard deviation of the colours. Left out: that of the model's published weights."""

    batch_size: int = 16
    """Images in one optimiser step, all ranks and accumulation steps together."""

    eval_batch_size: int = 1
    """Images in one evaluation batch, on each rank."""

    workers: int = 0
    """Processes that prepare images. The batches do not depend on this number."""

    on_bad_record: Literal["error", "skip"] = "error"
    """A malformed annotation, or an image that is missing or cannot be read: `error` stops and names it; `skip` leaves
    it out and counts it."""

    @property
    def repeats(self) -> int:
        """Times an image comes in a batch, for the loader."""
        return 1


def check_coco_config(config: CocoConfig) -> None:
    """UserError, one line, for values that are out of range or would be ignored."""
    least = {"batch_size": 1, "eval_batch_size": 1, "workers": 0, "limit": 1, "max_side": 32, "test_short_side": 32}
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UserError(f"data.{name} {value} must be at least {minimum}")
    most = max(64, 8 * (os.cpu_count() or 1))
    if config.workers > most:
        raise UserError(f"data.workers {config.workers} is more than the {most} processes this machine should start")
    if not config.short_sides or min(config.short_sides) < 32:
        raise UserError(f"data.short_sides {config.short_sides} must be one or more sides of at least 32 pixels")
    for side in (*config.short_sides, config.test_short_side):
        if side > config.max_side:
            raise UserError(f"data.max_side {config.max_side} is less than a shorter side of {side}")
    if not 0 <= config.flip <= 1:
        raise UserError(f"data.flip {config.flip} is not in [0, 1]")
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and (len(values) != 3 or not all(math.isfinite(v) and v >= 0 for v in values)):
            raise UserError(f"data.{name} {values} must be three numbers of at least 0")
    if config.std is not None and 0 in config.std:
        raise UserError(f"data.std {config.std} must be above 0")
    if config.test_on == "train" and (config.test_annotations or config.test_images):
        raise UserError("data.test_annotations and data.test_images would be ignored: data.test_on is train")


@dataclass
class CocoData:
    """Training images, images to evaluate on, and their ground truth."""

    train: CocoImages
    test: CocoImages
    truth: Annotations
    notes: list[str] = field(default_factory=list)
    mixer: None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.truth.classes

    def bad_images(self) -> list[str]:
        """Names of the images that were skipped because they cannot be read, so far."""
        found = (images.file_name(i) for images in (self.train, self.test) for i in images.bad_images)
        return list(dict.fromkeys(found))


def open_coco(config: CocoConfig, *, masks: bool) -> CocoData:
    """Open the set that the configuration names; with `masks` every object needs one.

    UserError or FileNotFoundError, one line, for what does not exist or fit.
    """
    check_coco_config(config)
    root = Path(config.root) if config.root else default_root(config.name)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root {root} is no folder with images and annotations in COCO's format")
    train, train_source = _open_split(config, root, "train", masks)
    notes = train.notes
    usable = (
        train.images if config.keep_empty else [i for i in train.images if trainable(train.objects.get(i["id"], []))]
    )
    usable = usable[: config.limit]
    if not usable:
        raise UserError(f"{train.path} has no image with an object to train on")
    train = train.subset(usable)
    truth, test_source = train, train_source
    if config.test_on == "val":
        truth, test_source = _open_split(config, root, "val", masks)
        notes = [*notes, *truth.notes]
        if (truth.category_ids, truth.classes) != (train.category_ids, train.classes):
            raise UserError(f"the categories of {truth.path} are not those of {train.path}")
    if not truth.images:
        raise UserError(f"{truth.path} has no images to evaluate on")
    return CocoData(
        CocoImages(train, train_source, config, train=True, masks=masks),
        CocoImages(truth, test_source, config, train=False, masks=masks),
        truth,
        notes,
    )


def trainable(objects: Sequence[Record]) -> bool:
    """Whether there is an object that is no crowd."""
    return any(not record["iscrowd"] for record in objects)


def _open_split(config: CocoConfig, root: Path, split: str, masks: bool) -> tuple[Annotations, Tree]:
    test = split == "val"
    given = config.test_annotations if test else config.train_annotations
    path = _find(root, given, _ANNOTATIONS, split, "annotations")
    images = _find(root, config.test_images if test else config.train_images, _IMAGES, split, "images")
    # Objects are evaluated by their boxes where they have no masks.
    found = read_annotations(path, on_bad_record=config.on_bad_record, masks=masks)
    source = Tree(images)
    missing = [image for image in found.images if image["file_name"] not in source]
    if missing:
        named = [f"image {image['id']}: there is no {image['file_name']} in {images}" for image in missing]
        if config.on_bad_record == "error":
            raise UserError(f"{path}: {named[0]}; data.on_bad_record skip leaves such records out")
        gone = {image["id"] for image in missing}
        found = found.subset([image for image in found.images if image["id"] not in gone])
        found.left_out["images without a file"] = named
    return found, source


def _find(root: Path, given: str | None, names: Sequence[str], split: str, what: str) -> Path:
    if given is not None:
        path = root / given
        if not path.exists():
            part = "test" if split == "val" else "train"
            raise FileNotFoundError(f"data.{part}_{what} {given}: there is no {path}")
        return path
    tried = [root / name.format(split) for name in names]
    for path in tried:
        if path.exists():
            return path
    listed = ", ".join(str(path.relative_to(root)) for path in tried)
    raise FileNotFoundError(f"{root} has no {split} {what}; looked for {listed}")


class CocoImages:
    """Images with their objects by index.

    `batch` gives lists, one entry an image: `image` (C, H, W) uint8 of any size; `target`, a dict of `image_id`,
    `size` (height, width) of the stored image, its EXIF `orientation` and, in training, `boxes` (N, 4) x1, y1, x2, y2
    in pixels of `image`, `labels` (N,) from 0 and `masks` (N, H, W) uint8; and `index` (B,).
    """

    def __init__(self, annotations: Annotations, source: Tree, config: CocoConfig, *, train: bool, masks: bool) -> None:
        self.annotations, self.source, self.config = annotations, source, config
        self.train, self.masks = train, masks
        self.labels = annotations.labels()
        # In shared memory, so that worker processes report here which images they could not read.
        self._bad = torch.zeros(max(1, len(self)), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.annotations.images)

    def file_name(self, index: int) -> str:
        return self.annotations.images[index]["file_name"]

    @property
    def bad_images(self) -> list[int]:
        return self._bad.nonzero().flatten().tolist()

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> dict[str, Any]:
        """The images at `indices`: augmented as (seed, epoch) says, or as they are evaluated where it is None.

        A bad image is replaced by the next readable one in training, left out in evaluation.
        """
        seeds = epoch_seeds(len(self), *epoch) if epoch is not None else None
        items = []
        for index in indices:
            tries = range(int(index), int(index) + (len(self) if seeds is not None else 1))
            found = (self._item(i % len(self), seeds) for i in tries)
            items.append(next((item for item in found if item is not None), None))
            if items[-1] is None and seeds is not None:
                raise OSError(f"none of the {len(self)} images can be read")
        kept = [item for item in items if item is not None]
        return {
            "image": [image for image, _, _ in kept],
            "target": [target for _, target, _ in kept],
            "index": torch.tensor([index for _, _, index in kept], dtype=torch.long),
        }

    def _item(self, index: int, seeds: np.ndarray | None) -> tuple[Tensor, dict[str, Any], int] | None:
        record = self.annotations.images[index]
        try:
            scene, orientation = self.load(index, objects=seeds is not None)
        except OSError as error:
            if self.config.on_bad_record == "error":
                raise
            if not self._bad[index]:
                _log.warning("skipped: %s", error)
            self._bad[index] = True
            return None
        target: dict[str, Any] = {
            "image_id": record["id"],
            "size": (record["height"], record["width"]),
            "orientation": orientation,
        }
        if seeds is None:
            size = fitted_size(scene.image.size, self.config.test_short_side, self.config.max_side)
            return to_tensor(resize(scene, size).image), target, index
        scene = self._augment(scene, np.random.default_rng(int(seeds[index])))
        target |= {"boxes": scene.boxes, "labels": scene.labels}
        if scene.masks is not None:
            target["masks"] = scene.masks
        return to_tensor(scene.image), target, index

    def load(self, index: int, *, objects: bool = True) -> tuple[Scene, int]:
        """An image upright, as it is stored otherwise, with its objects but the crowds, and its EXIF orientation."""
        record = self.annotations.images[index]
        name = record["file_name"]
        with self.source.open(name) as file:
            image, orientation = load_image(file, record, self.source.display(name))
        found = [o for o in self.annotations.objects.get(record["id"], []) if objects and not o["iscrowd"]]
        xywh = torch.tensor([o["bbox"] for o in found], dtype=torch.float32).reshape(-1, 4)
        boxes = torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), dim=1)
        labels = torch.tensor([self.labels[o["category_id"]] for o in found], dtype=torch.long)
        masks = None
        if self.masks and objects:
            decoded = [torch.from_numpy(decode_mask(o["segmentation"], record)) for o in found]
            masks = torch.stack(decoded) if decoded else torch.zeros(0, record["height"], record["width"]).byte()
            masks = turn_masks(masks, orientation)
        boxes = turn_boxes(boxes, orientation, record["width"], record["height"])
        return clip_boxes(Scene(image, boxes, labels, masks)), orientation

    def _augment(self, scene: Scene, draw: np.random.Generator) -> Scene:
        config = self.config
        if config.crop and draw.random() < 0.5:
            scene = _random_crop(scene, draw)
        short = int(draw.choice(config.short_sides))
        if draw.random() < config.flip:
            scene = flip(scene)
        return clip_boxes(resize(scene, fitted_size(scene.image.size, short, config.max_side)))


def load_image(file: IO[bytes], record: Record, name: str) -> tuple[Image.Image, int]:
    """The image of a record upright, and the orientation that leads from the frame of its annotations to it.

    The size that the record states tells the frame: that of the stored pixels, or of a tool that turned them already.
    BadImageError if it is neither.
    """
    shown = display_name(name)
    orientation = read_orientation(file)
    image = decode_image(file, 3, shown)
    upright, stated = image.size, (record["width"], record["height"])
    stored = upright[::-1] if orientation >= 5 else upright
    if stored == stated:
        return image, orientation
    if upright == stated:
        return image, 1
    found = f"{stored[0]} x {stored[1]}"
    raise BadImageError(f"{shown} is {found} pixels, its annotations are for {stated[0]} x {stated[1]}")


def _random_crop(scene: Scene, draw: np.random.Generator) -> Scene:
    """DETR's crop, in the pixels of the original: the resize in between is left out."""
    scale = int(draw.choice(_CROP_SHORT)) / min(scene.image.size)
    sides = draw.integers(_CROP_SIDES[0], _CROP_SIDES[1] + 1, size=2)
    width, height = (
        min(whole, max(1, round(side / scale))) for whole, side in zip(scene.image.size, sides, strict=True)
    )
    left = int(draw.integers(0, scene.image.width - width + 1))
    top = int(draw.integers(0, scene.image.height - height + 1))
    return crop(scene, left, top, width, height)
