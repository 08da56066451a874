"""The data set and its augmentation: two frozen dataclasses, every field a command-line option."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sparse_mlp.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Which images, where they are and how they are loaded.

    Every field is for every set unless it says which. A value that the named set would ignore is an error.
    """

    name: str = "digits"
    """digits, cifar10, cifar100, folder (any folder of images, one subfolder a class),
    or any name timm's create_dataset takes: torch/..., hfds/..., hfids/..., tfds/..., wds/... Sets that are fetched
    or can run a program are opened only where a command line names them, not because a run's settings do."""

    root: str | None = None
    """Folder that holds the set. Left out: $SPARSE_MLP_DATA/NAME where that variable is set, else data/NAME. Not for
    digits, which come with scikit-learn."""

    image_size: int | None = None
    """Side in pixels of the images the model sees. Left out: the set's own size (folder and timm sets: 224)."""

    channels: Literal[1, 3] | None = None
    """1 reads images as grey, 3 as RGB (folder and timm sets; elsewhere it must agree with the set). Left out: the
    set's own (folder and timm sets: 3)."""

    batch_size: int = 128
    """Images in one optimiser step, all ranks and accumulation steps together."""

    repeats: int = 1
    """Times an image comes in a batch, each time augmented differently: 3 is the repeated augmentation of DeiT's
    recipe. An epoch has the same number of steps, and so 1 / repeats of the images. Not for streams (hfids/, tfds/,
    wds/)."""

    eval_batch_size: int = 256
    """Images in one evaluation batch, on each rank."""

    workers: int = 0
    """Processes that prepare images. 0 prepares them in the training process, which is fastest for small sets in
    memory. The batches do not depend on this number (streams excepted)."""

    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be read: `error` stops and names it; `skip` names it, takes the next readable image in its
    place (training) or leaves it out (evaluation), and counts it. For sets read one by one (folder, torch/, hfds/);
    a stream skips with a warning."""

    test_share: float | None = None
    """Share of each class that becomes the test set, where a folder has no train/ and val/ subfolders of its own; 1
    tests on all and trains on none. For folders without train/. Left out: 0.2."""

    label_share: float | None = None
    """Train on this share of each class's images only, 0.01 or 0.1 for instance (semi-supervised learning). The images
    are drawn with label_seed, independent of the seed of the run. Not for timm sets. Left out: all."""

    label_seed: int = 0
    """Which images label_share draws. Only with label_share."""

    download: bool = False
    """Fetch the set from its public address where it is not in the folder. For cifar10, cifar100, torch/, hfids/ and
    tfds/."""

    train_split: str = "train"
    """Name of the training split of a timm set."""

    test_split: str = "validation"
    """Name of the evaluation split of a timm set."""

    num_classes: int | None = None
    """Number of classes. Needed only where a timm set does not have it; elsewhere it must agree with the set."""

    num_samples: int | None = None
    """Training images in a streamed set (hfids/, tfds/, wds/) whose length is unknown."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel, in 0..1, that becomes 0. Left out: the set's own (folder and timm sets: ImageNet's)."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, in 0..1, that becomes 1. Left out: as for the mean."""

    crop_pct: float | None = None
    """Evaluation of folder and timm sets: the centre crop's side over the resized image's shorter side. Left out:
    0.875."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images. Everything is drawn from (seed, epoch, image), mixing from (seed, step)."""

    pad: int = 0
    """Shift by up to this many of the model's pixels in each direction, black outside (pad and crop)."""

    rotate: float = 0.0
    """Rotate by up to this many degrees to either side, black outside."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest share of the image's area that a random resized crop keeps."""

    crop_ratio: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest width / height of a random resized crop."""

    flip: float = 0.0
    """Probability of a left-right flip."""

    color_jitter: float = 0.0
    """Strength, from 0 to 1, of random brightness, contrast and saturation (without auto_augment)."""

    auto_augment: str | None = None
    """Policy in timm's notation, for example rand-m9-mstd0.5-inc1 (RandAugment); colour images only."""

    erase: float = 0.0
    """Probability that a random rectangle is replaced by the mean colour (random erasing)."""

    mixup: float = 0.0
    """Alpha of mixup; 0 is none. Needs an even batch size on each rank."""

    cutmix: float = 0.0
    """Alpha of cutmix; 0 is none. With both, each batch gets one of the two."""

    mix_probability: float = 1.0
    """Share of the batches that are mixed, where mixup or cutmix is on."""

    cutmix_share: float = 0.5
    """Share of the mixed batches that get cutmix rather than mixup, where both are on."""


def check_configs(data: DataConfig, augment: AugmentConfig) -> None:
    """UserError, one line, for values that are out of range for every data set."""
    for name, least in (("image_size", 1), ("batch_size", 1), ("repeats", 1), ("eval_batch_size", 1), ("workers", 0)):
        check_range(f"data.{name}", getattr(data, name), least, math.inf)
    processes = max(64, 8 * (os.cpu_count() or 1))
    if data.workers > processes:  # each is a process with its own memory: thousands take the machine down
        raise UserError(
            f"data.workers {data.workers} is more than the {processes} processes that this machine should start"
        )
    for name in ("num_classes", "num_samples"):
        check_range(f"data.{name}", getattr(data, name), 1, math.inf)
    check_range("data.label_seed", data.label_seed, 0, math.inf)
    if data.label_seed and data.label_share is None:
        raise UserError(f"data.label_seed {data.label_seed} would be ignored: data.label_share is not set")
    check_range("data.crop_pct", data.crop_pct, 0, 1, open_below=True)
    for value in data.mean or ():
        check_range("data.mean", value, 0, 1)
    for value in data.std or ():
        check_range("data.std", value, 0, math.inf, open_below=True)
    for name, most in (("pad", math.inf), ("rotate", 180), ("flip", 1), ("color_jitter", 1), ("erase", 1)):
        check_range(f"augment.{name}", getattr(augment, name), 0, most)
    for name, most in (("mixup", math.inf), ("cutmix", math.inf), ("mix_probability", 1), ("cutmix_share", 1)):
        check_range(f"augment.{name}", getattr(augment, name), 0, most)
    check_rising("augment.crop_scale", augment.crop_scale, 1)
    check_rising("augment.crop_ratio", augment.crop_ratio, math.inf)
    check_range("augment.crop_scale", augment.crop_scale[0], 0.01, 1)
    for value in augment.crop_ratio:
        check_range("augment.crop_ratio", value, 0.1, 10)
    if augment.pad and (augment.crop_scale, augment.crop_ratio) != ((1.0, 1.0), (1.0, 1.0)):
        raise UserError("augment.pad and augment.crop_scale (or crop_ratio) both crop; set one of them")
    if augment.color_jitter and augment.auto_augment:
        raise UserError("augment.color_jitter is not used together with augment.auto_augment; set one of them")


def check_range(name: str, value: float | None, least: float, most: float, *, open_below: bool = False) -> None:
    """UserError for a number out of range, NaN or infinity."""
    if value is None or (math.isfinite(value) and least <= value <= most and not (open_below and value == least)):
        return
    low = f"above {least}" if open_below else f"at least {least}"
    raise UserError(f"{name} {value} must be {low}" + (f" and at most {most}" if most < math.inf else ""))


def check_rising(name: str, values: Iterable[float], most: float) -> None:
    low, high = values
    if not 0 < low <= high <= most or not math.isfinite(high):
        limit = f" <= {most}" if most < math.inf else ""
        raise UserError(f"{name} {low} {high} must be two numbers with 0 < first <= second{limit}")
