"""Augmentation of whole batches in memory, and timm's transforms for images that are read one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from torch import Tensor

from sparse_mlp.data.config import AugmentConfig, DataConfig
from sparse_mlp.data.randomness import seed_generators
from sparse_mlp.errors import UserError

# Columns of the table of uniform draws that BatchAugment consumes, one row an image.
_X, _Y, _FLIP, _ANGLE, _AREA, _RATIO, _POLICY, _ERASE, _ERASE_AREA, _ERASE_RATIO, _ERASE_X, _ERASE_Y = range(12)
DRAWS = 12


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
    """Training augmentation of a batch of equally large square uint8 images, without a loop over the images.

    Shift or resized crop, flip and rotation are one affine map an image, sampled once; then erasing. Only the policy of
    `auto_augment` goes image by image. Image i's outcome depends on its own pixels and its own row of draws alone.
    """

    def __init__(self, config: AugmentConfig, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises ValueError for settings that do not go together or that sets in memory do not know."""
        if config.pad and config.crop_scale != (1.0, 1.0):
            raise UserError("augment.pad and augment.crop_scale both crop; set one of them")
        if config.color_jitter:
            raise UserError("augment.color_jitter is for folder and timm sets; sets in memory take auto_augment")
        if config.auto_augment and len(mean) != 3:
            raise UserError("augment.auto_augment needs colour images; leave it out for grey ones")
        self.config, self.image_size, self.mean, self.std = config, image_size, mean, std
        self.policy = _policy(config.auto_augment, image_size, mean) if config.auto_augment else None

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Images (B, C, H, W) uint8 and draws (B, DRAWS) in [0, 1) -> (B, C, size, size) float32, normalised."""
        if self.policy:
            images = self._apply_policy(images, draws[:, _POLICY])
        u = torch.from_numpy(draws).T.view(DRAWS, -1, 1, 1)
        pixels = self.warp(images.float(), u) if self._warps() else resize(images, self.image_size)
        pixels = normalize(pixels, self.mean, self.std)
        return self._erase(pixels, u) if self.config.erase else pixels

    def _warps(self) -> bool:
        c = self.config
        return bool(c.pad or c.rotate or c.flip) or c.crop_scale != (1.0, 1.0) or c.crop_ratio != (1.0, 1.0)

    def _apply_policy(self, images: Tensor, draws: np.ndarray) -> Tensor:
        assert self.policy is not None
        varied = []
        for image, draw in zip(images.permute(0, 2, 3, 1).numpy(), draws, strict=True):
            seed_generators(int(draw * 2**32))
            varied.append(np.asarray(self.policy(Image.fromarray(image))))
        return torch.from_numpy(np.stack(varied)).permute(0, 3, 1, 2)

    def warp(self, images: Tensor, u: Tensor, outside: Literal["zeros", "border"] = "zeros") -> Tensor:
        """Sample every (square) image through its own map from output to input coordinates, both in -1..1.

        Images (B, C, H, W) float and draws (DRAWS, B, 1, 1); `outside` is what lies around an image.
        """
        native = images.shape[-1]
        size = max(native, self.image_size)
        c = self.config
        window_y, window_x = _window(u[_AREA], u[_RATIO], c.crop_scale, c.crop_ratio)
        if c.pad:
            shift_x = torch.floor(u[_X] * (2 * c.pad + 1)).sub(c.pad) * (2 / native)
            shift_y = torch.floor(u[_Y] * (2 * c.pad + 1)).sub(c.pad) * (2 / native)
        else:
            shift_x, shift_y = (2 * u[_X] - 1) * (1 - window_x), (2 * u[_Y] - 1) * (1 - window_y)
        mirror = torch.where(u[_FLIP] < c.flip, -1.0, 1.0)
        angle = (2 * u[_ANGLE] - 1) * math.radians(c.rotate)
        cos, sin = torch.cos(angle), torch.sin(angle)
        centres = (torch.arange(size) * 2 + 1) / size - 1
        x, y = centres.view(1, 1, -1) * mirror, centres.view(1, -1, 1)
        grid = torch.stack(((x * cos - y * sin) * window_x + shift_x, (x * sin + y * cos) * window_y + shift_y), -1)
        return resize(F.grid_sample(images, grid, "bilinear", outside, align_corners=False), self.image_size)

    def _erase(self, images: Tensor, u: Tensor) -> Tensor:
        """Set a rectangle of 2 to 33 % of the area, sides 0.3 to 3.3 to one, to the mean colour (which is 0 here)."""
        height, width = _window(u[_ERASE_AREA], u[_ERASE_RATIO], (0.02, 1 / 3), (0.3, 1 / 0.3))
        top, left = u[_ERASE_Y] * (1 - height), u[_ERASE_X] * (1 - width)
        size = images.shape[-1]
        position = (torch.arange(size) + 0.5) / size
        y, x = position.view(1, -1, 1), position.view(1, 1, -1)
        erased = (y >= top) & (y < top + height) & (x >= left) & (x < left + width) & (u[_ERASE] < self.config.erase)
        return images.masked_fill(erased.unsqueeze(1), 0.0)


def _window(
    area_draw: Tensor, ratio_draw: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Height and width, as shares of the image's sides, of rectangles of random area and (log-uniform) aspect ratio.

    A side that would leave the image is cut to it (torchvision draws anew instead).
    """
    area = scale[0] + (scale[1] - scale[0]) * area_draw
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_draw)
    return torch.sqrt(area / aspect).clamp(max=1), torch.sqrt(area * aspect).clamp(max=1)


def _policy(name: str, image_size: int, mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    fill = tuple(min(255, round(255 * value)) for value in mean)
    settings = {"translate_const": int(image_size * 0.45), "img_mean": fill}
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    maker = makers.get(name.split("-")[0], auto_augment_transform)
    try:
        return _keep_a_bit(maker(name, settings))
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"augment.auto_augment {name!r} is no policy of timm's; examples: rand-m9-mstd0.5-inc1, original, v0, 3a"
        ) from error


def _keep_a_bit(policy: Any) -> Any:
    """Let a policy's posterize keep at least one bit a colour.

    At full strength timm keeps none, which made the image black and which Pillow 13 refuses.
    """
    nested = getattr(policy, "policy", ())
    for operation in [*getattr(policy, "ops", ()), *(operation for group in nested for operation in group)]:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **options)


def train_transform(
    data: DataConfig, augment: AugmentConfig, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """timm's training transform for images read one by one; ValueError for options that only sets in memory know."""
    for option, value in (("pad", augment.pad), ("rotate", augment.rotate)):
        if value:
            raise UserError(f"augment.{option} is for sets in memory (digits, cifar...); {data.name} has crop_scale")
    if augment.color_jitter and augment.auto_augment:
        raise UserError("augment.color_jitter is not used together with augment.auto_augment; set one of them")
    if augment.auto_augment:
        _policy(augment.auto_augment, image_size, mean)
    transform = create_transform(
        (len(mean), image_size, image_size),
        is_training=True,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.flip,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=augment.auto_augment,
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        re_prob=augment.erase,
    )
    for step in transform.transforms:
        _keep_a_bit(step)
    return transform


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
