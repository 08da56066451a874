"""Augmentation of training images: torchvision's and timm's transforms for images that are read one by one, and a
whole-batch form of the same for images in memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from sparse_mlp.data.config import AugmentConfig
from sparse_mlp.data.randomness import seed_generators
from sparse_mlp.errors import UserError

# The columns in use of the table of uniform draws, one row an image. Crops, colours and erasing are drawn by the
# libraries, seeded with the draw of their column.
_X, _Y, _FLIP, _ANGLE, _CROP, _, _COLOUR, _ERASE = range(8)
DRAWS = 12
"""Columns of the table. Another number would give every image other draws: runs of a known seed would change."""


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) in 0..255 -> float32 with the given mean and standard deviation (in 0..1) a channel at 0 and 1."""
    shift = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) * 255
    scale = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1) * 255
    return (images.float() - shift) / scale


def resize(images: Tensor, size: int) -> Tensor:
    """(B, C, H, W) in 0..255 -> float32 (B, C, size, size), bilinear, smoothed where it shrinks."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)


class BatchAugment:
    """Training augmentation of a batch of equally large square uint8 images in memory.

    Every option means what it means in `train_transform`. Geometry is one affine map an image, sampled for the whole
    batch (`warp`); colours and erasing are the library's, image by image. Image i's outcome depends on its own pixels
    and its own row of draws alone. Draws from the global generators: the caller preserves them.
    """

    def __init__(self, config: AugmentConfig, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises UserError for settings that do not go together or do not fit the images."""
        _, self.colour, final = _stages(config, image_size, mean, std)
        self.erase = final.transforms[-1] if config.erase else None
        self.config, self.image_size, self.mean, self.std = config, image_size, mean, std

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Images (B, C, H, W) uint8 and draws (B, DRAWS) in [0, 1) -> (B, C, size, size) float32, normalised."""
        pixels = warp(images.float(), draws, self.config, self.image_size)
        if self.colour.transforms:
            pixels = self._recolour(pixels, draws[:, _COLOUR])
        pixels = normalize(pixels, self.mean, self.std)
        if self.erase:
            for image, draw in zip(pixels, draws[:, _ERASE], strict=True):
                random.seed(_seed(draw))
                self.erase(image)
        return pixels

    def _recolour(self, images: Tensor, draws: np.ndarray) -> Tensor:
        varied = []
        for image, draw in zip(images.round().byte(), draws, strict=True):
            seed_generators(_seed(draw))
            varied.append(tv.pil_to_tensor(self.colour(tv.to_pil_image(image))))
        return torch.stack(varied)


def warp(
    images: Tensor,
    draws: np.ndarray,
    config: AugmentConfig,
    image_size: int,
    outside: Literal["zeros", "border"] | None = None,
) -> Tensor:
    """Shift or resized crop, flip and rotation of (square) images, each by its own row of draws.

    One affine map an image, from output to input coordinates, both in -1..1. This form stays beside torchvision's
    transforms because it is 6 (shift and flip of 256 CIFAR-10 images) to 120 (shift and rotation of as many digits)
    times as fast; benchmarks/pretrain.py compares them.

    Images (B, C, H, W) float, draws (B, DRAWS or more) -> (B, C, image_size, image_size). `outside` is what lies around
    an image; left out: black where images are shifted or rotated.
    """
    native, crop = images.shape[-1], (config.crop_scale, config.crop_ratio)
    cropped = crop != ((1.0, 1.0), (1.0, 1.0))
    if not (config.pad or config.rotate or config.flip or cropped):
        return resize(images, image_size)
    u = torch.from_numpy(draws).T.unsqueeze(-1).unsqueeze(-1)
    mirror = torch.where(u[_FLIP] < config.flip, -1.0, 1.0)
    angle = (2 * u[_ANGLE] - 1) * math.radians(config.rotate)
    cos, sin = torch.cos(angle), torch.sin(angle)
    size = max(native, image_size)
    centres = (torch.arange(size) * 2 + 1) / size - 1
    x, y = centres.view(1, 1, -1) * mirror, centres.view(1, -1, 1)
    x, y = x * cos - y * sin, x * sin + y * cos
    if config.pad:
        x, y = (
            grid + torch.floor(u[column] * (2 * config.pad + 1)).sub(config.pad) * (2 / image_size)
            for grid, column in ((x, _X), (y, _Y))
        )
    if cropped:
        top, left, height, width = _crops(draws[:, _CROP], *crop)
        x, y = x * width + (2 * left + width - 1), y * height + (2 * top + height - 1)
    outside = outside or ("zeros" if config.pad or config.rotate else "border")
    sampled = F.grid_sample(images, torch.stack((x, y), -1), "bilinear", outside, align_corners=False)
    return resize(sampled, image_size)


def _crops(draws: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Random resized crops as timm draws them: top, left, height and width (4, B, 1, 1) as shares of the side.

    timm rounds to whole pixels. Drawn on a frame as large as a photo, the crops of an image of 8 pixels are not a few.
    """
    frame, crops = torch.empty(1, 1, 1).expand(1, 1024, 1024), []
    for draw in draws:
        random.seed(_seed(draw))
        crops.append(RandomResizedCropAndInterpolation.get_params(frame, scale, ratio))
    return torch.tensor(crops, dtype=torch.float32).T.view(4, -1, 1, 1) / frame.shape[-1]


def _seed(draw: float) -> int:
    return int(draw * 2**32)


def train_transform(
    augment: AugmentConfig, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """Training transform of one PIL image: timm's, with shift and rotation by torchvision.

    Raises UserError for settings that do not go together or do not fit the images.
    """
    geometry, colour, final = _stages(augment, image_size, mean, std)
    before = [v2.RandomRotation(augment.rotate, v2.InterpolationMode.BILINEAR)] if augment.rotate else []
    after = [v2.RandomCrop(image_size, padding=augment.pad)] if augment.pad else []
    return v2.Compose([*before, *geometry.transforms, *after, *colour.transforms, *final.transforms])


def _stages(config: AugmentConfig, image_size: int, mean: Sequence[float], std: Sequence[float]) -> tuple[Any, ...]:
    """timm's training transform in three stages: crop and flip; colours; to a tensor, normalised, erased."""
    if config.pad > image_size:
        raise UserError(f"augment.pad {config.pad} is more than the image's side, {image_size}")
    if config.auto_augment and len(mean) != 3:
        raise UserError("augment.auto_augment needs colour images; leave it out for grey ones")
    try:
        stages = create_transform(
            (len(mean), image_size, image_size),
            is_training=True,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            hflip=config.flip,
            color_jitter=config.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=config.auto_augment,
            interpolation="bicubic",
            mean=tuple(mean),
            std=tuple(std),
            re_prob=config.erase,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        if not config.auto_augment:
            raise
        raise UserError(
            f"augment.auto_augment {config.auto_augment!r} is no policy of timm's; "
            "examples: rand-m9-mstd0.5-inc1, original, v0, 3a"
        ) from error
    for policy in stages[1].transforms:
        _clamp_posterize(policy)
    return stages


def _clamp_posterize(policy: Any) -> None:
    """Make a policy's posterize keep at least one bit per colour.

    At full strength timm keeps none: the image is black, and Pillow 13 raises an error.
    """
    nested = getattr(policy, "policy", ())
    for operation in [*getattr(policy, "ops", ()), *(operation for group in nested for operation in group)]:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **options)


def eval_transform(
    image_size: int, mean: Sequence[float], std: Sequence[float], crop_pct: float
) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform: resize the shorter side to image_size / crop_pct, crop the centre, normalise."""
    return create_transform(
        (len(mean), image_size, image_size),
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        crop_pct=crop_pct,
    )
