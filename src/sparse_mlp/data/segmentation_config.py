"""Images with a class for every pixel and their augmentation: a frozen dataclass, every field an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparse_mlp.data.config import check_range, check_rising
from sparse_mlp.errors import UserError


@dataclass(frozen=True)
class SegmentationConfig:
    """Which images and masks, and how they are loaded and augmented.

    Augmentation as in the papers' mmsegmentation configurations: a random scale, a random crop, a flip, photometric
    distortion. Everything is drawn from (seed, epoch, image).
    """

    name: Literal["folder", "camvid", "ade20k", "cityscapes"] = "folder"
    """Layout of the folder. folder: images/ and masks/, each with a subfolder for every split, or the other way round
    (train/images, train/masks), or train.zip with both in it; without splits a share of the images becomes the test
    set; classes.txt names the classes, a line each, the first for mask value 0. camvid: the same, with CamVid's 11
    classes. ade20k: images/training, annotations/training, ...; cityscapes: leftImg8bit/, gtFine/."""

    root: str | None = None
    """Folder that holds the set. Left out: $SPARSE_MLP_DATA/NAME where that variable is set, else data/NAME."""

    train_split: str | None = None
    """Name of the training split. Left out: train (ade20k: training)."""

    test_split: str | None = None
    """Name of the split to evaluate on. Left out: val (ade20k: validation; camvid: test)."""

    test_share: float | None = None
    """Share of the images that becomes the test set, where a folder has no splits. An image's name decides on which
    side it is, so that images which are added later move no others. Left out: 0.2."""

    num_images: int | None = None
    """Train on the first images only. Left out: on all."""

    ignore: int | None = None
    """Mask value of pixels that count for nothing. Left out: 255 (camvid: 11; ade20k: 0; cityscapes: its void ids)."""

    image_size: int = 512
    """Side in pixels of the square crops that the model is trained on."""

    short_side: int | None = None
    """Resize every image so that its shorter side has this many pixels, in training before the random scale. The score
    is always taken at the mask's own size. Left out: the images' own size."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest random scale."""

    flip: float = 0.5
    """Probability of a left-right flip."""

    photometric: float = 0.5
    """Probability of each of brightness, contrast, saturation and hue to be changed (torchvision's
    RandomPhotometricDistort)."""

    max_class_share: float = 0.75
    """A crop of which one class has a larger share is drawn again, ten times at most."""

    batch_size: int = 16
    """Images in one optimiser step, all ranks and accumulation steps together."""

    eval_batch_size: int = 1
    """Images in one evaluation batch, on each rank. Those of one size are evaluated together."""

    workers: int = 0
    """Processes that prepare images; the batches do not depend on this number."""

    on_bad_image: Literal["error", "skip"] = "error"
    """An image or mask that cannot be read or used: `error` stops and names it; `skip` names it, takes the next one in
    its place (training) or leaves it out (evaluation), and counts it."""

    repeats: ClassVar[int] = 1


def check_segmentation(config: SegmentationConfig) -> None:
    """UserError, one line, for values that are out of range or would be ignored."""
    for name, least in (("image_size", 32), ("batch_size", 1), ("eval_batch_size", 1), ("workers", 0)):
        check_range(f"data.{name}", getattr(config, name), least, float("inf"))
    for name in ("short_side", "num_images"):
        check_range(f"data.{name}", getattr(config, name), 1, float("inf"))
    for name in ("flip", "photometric"):
        check_range(f"data.{name}", getattr(config, name), 0, 1)
    check_range("data.max_class_share", config.max_class_share, 0, 1, open_below=True)
    check_range("data.test_share", config.test_share, 0, 1, open_below=True)
    check_range("data.ignore", config.ignore, 0, 255)
    check_rising("data.scale", config.scale, 10)
    if config.ignore is not None and config.name != "folder":
        raise UserError(f"data.ignore {config.ignore} would be ignored: {config.name} has values of its own")
