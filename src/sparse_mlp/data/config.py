"""What a data set is and how its images are varied: two frozen dataclasses, every field a command-line option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which images, where they lie and how they are served."""

    name: str = "digits"
    """digits, cifar10, cifar100, cifar100_fifth, folder (any folder of images, one subfolder a class),
    or any name timm's create_dataset takes: torch/..., hfds/..., hfids/..., tfds/..., wds/..."""

    root: str | None = None
    """Folder that holds the set. Left out: $SPARSE_MLP_DATA/NAME where that variable is set, else data/NAME."""

    image_size: int | None = None
    """Side in pixels of the images the model sees. Left out: the set's own size (folder and timm sets: 224)."""

    channels: Literal[1, 3] | None = None
    """1 reads images as grey, 3 as RGB. Left out: the set's own (folder and timm sets: 3)."""

    batch_size: int = 128
    """Images in one optimiser step, all ranks and accumulation steps together."""

    eval_batch_size: int = 256
    """Images in one evaluation batch, on each rank."""

    workers: int = 0
    """Processes that prepare images. 0 prepares them in the training process, which is fastest for small sets in
    memory. The batches do not depend on this number (streams excepted)."""

    on_bad_image: Literal["error", "skip"] = "error"
    """An image of a folder that cannot be read: `error` stops and names it; `skip` names it, takes the next readable
    image in its place (training) or leaves it out (evaluation), and counts it."""

    test_share: float | None = None
    """Share of each class that becomes the test set, where a folder has no train/ and val/ subfolders of its own.
    Left out: 0.2."""

    download: bool = False
    """Fetch the set from its public address where it is not in the folder (cifar10, cifar100 and some timm sets)."""

    train_split: str = "train"
    """Name of the training split of a timm set."""

    test_split: str = "validation"
    """Name of the evaluation split of a timm set."""

    num_classes: int | None = None
    """Number of classes. Needed only where a timm set does not tell it; elsewhere it must agree with the set."""

    num_samples: int | None = None
    """Training images in a streamed set (hfids/, tfds/, wds/) that does not tell its length."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel, in 0..1, that becomes 0. Left out: the set's own (folder and timm sets: ImageNet's)."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, in 0..1, that becomes 1. Left out: as for the mean."""

    crop_pct: float | None = None
    """Evaluation of folder and timm sets: the centre crop's side over the resized image's shorter side. Left out:
    0.875."""


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied. Everything is drawn from (seed, epoch, image), mixing from (seed, step)."""

    pad: int = 0
    """Shift by up to this many pixels in each direction, black outside (pad-and-crop; sets in memory only)."""

    rotate: float = 0.0
    """Rotate by up to this many degrees to either side (sets in memory only)."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest share of the image's area that a random resized crop keeps."""

    crop_ratio: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest width / height of a random resized crop."""

    flip: float = 0.0
    """Probability of a left-right flip."""

    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation (folder and timm sets only, without auto_augment)."""

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
