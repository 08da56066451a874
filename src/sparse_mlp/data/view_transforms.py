"""The two views of MoCo v3 (arXiv 2104.02057, section 5, after BYOL): random resized crop, colour jitter, grey, blur,
solarisation, flip; the views differ in blur and solarisation.

Images that are read one by one are varied by torchvision's transforms, those in memory a batch at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from sparse_mlp.data.augment import DRAWS, normalize, warp
from sparse_mlp.data.config import AugmentConfig
from sparse_mlp.errors import UserError

# Columns of the uniform draws of one view of an image; the first DRAWS are `warp`'s.
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(DRAWS, DRAWS + 10)
VIEW_DRAWS = DRAWS + 10

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))


@dataclass(frozen=True)
class ViewsConfig:
    """Augmentation of the two views of an image; pairs are (first view, second view). The defaults are MoCo v3's."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random resized crop keeps."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop."""

    flip: float = 0.5
    """Probability of a left-right flip."""

    rotate: float = 0.0
    """Rotate by up to this many degrees to either side; the border is repeated outside (0 is published)."""

    jitter: float = 0.8
    """Probability that the colours are jittered."""

    brightness: float = 0.4
    """Strength, from 0 to 1: a factor of 1 - strength to 1 + strength."""

    contrast: float = 0.4
    """Strength, as for the brightness."""

    saturation: float = 0.2
    """Strength, as for the brightness; colour images only."""

    hue: float = 0.1
    """Largest turn of the hue, in turns; colour images only."""

    grey: float = 0.2
    """Probability that the colours are taken away; colour images only."""

    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of a Gaussian blur, its kernel a tenth of the side wide."""

    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view. 0.1 to 2 is for 224 pixels: on 32 it
    would take most of the image away; leave the blur out there, as others do."""

    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability that values from 128 of 255 on are inverted."""

    def __post_init__(self) -> None:
        strengths = ("brightness", "contrast", "saturation")
        for name in ("flip", "jitter", "grey", "blur", "solarize", "crop_scale", *strengths):
            value = getattr(self, name)
            if not all(0 <= share <= 1 for share in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"views.{name} {value} is not in [0, 1]")
        for name, most in (("hue", 0.5), ("rotate", 180)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"views.{name} {getattr(self, name)} is not in [0, {most}]")
        for name, least, most in (("crop_scale", 0.01, 1), ("crop_ratio", 0.1, 10), ("blur_sigma", 0.01, 100)):
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise UserError(f"views.{name} {(low, high)} must be two rising numbers in [{least}, {most}]")
        if not any(self.blur) and self.blur_sigma != (0.1, 2.0):
            raise UserError(f"views.blur_sigma {self.blur_sigma} would be ignored: views.blur is {self.blur}")


def view_transform(
    views: ViewsConfig, number: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """torchvision's transforms for view `number` (0 or 1) of a single image: (C, H, W), normalised."""
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    steps: list[Callable] = [v2.ToImage()]
    steps += [_RotationWithBorder(views.rotate, v2.InterpolationMode.BILINEAR)] if views.rotate else []
    steps += [
        v2.RandomResizedCrop(image_size, views.crop_scale, views.crop_ratio, antialias=True),
        v2.RandomApply([jitter], views.jitter),
    ]
    steps += [v2.RandomGrayscale(views.grey)] if len(mean) == 3 else []
    steps += [
        v2.RandomApply([v2.GaussianBlur(_blur_width(image_size), views.blur_sigma)], views.blur[number]),
        v2.RandomSolarize(128, views.solarize[number]),
        v2.RandomHorizontalFlip(views.flip),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(tuple(mean), tuple(std)),
        v2.ToPureTensor(),
    ]
    return v2.Compose(steps)


class _RotationWithBorder(v2.RandomRotation):
    """Rotation of an image tensor of which the border, not black, is repeated outside."""

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        size = list(image.shape[-2:])
        margin = math.ceil((math.hypot(*size) - min(size)) / 2)
        return tv.center_crop(super().transform(tv.pad(image, [margin], padding_mode="edge"), params), size)


def _blur_width(image_size: int) -> int:
    """Kernel width in pixels: a tenth of the side, odd (SimCLR's)."""
    return max(3, 2 * round(0.05 * image_size) + 1)


class BatchView:
    """One view of a batch of equally large square uint8 images in memory; every option as in `view_transform`.

    Image i's view depends on its own pixels and its own row of draws alone.

    torchvision's jitter takes one strength for all images of a call. With one call an image a view takes 15 (CIFAR-10)
    to 60 (digits) times as long: both views 7 % of a step of cifar10_moco_sparse, 80 % of one of digits_moco_sparse, on
    one thread (benchmarks/pretrain.py). So brightness, contrast, saturation and hue stand here for a whole batch.
    """

    def __init__(
        self, views: ViewsConfig, number: int, image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.crop = AugmentConfig(
            crop_scale=views.crop_scale, crop_ratio=views.crop_ratio, flip=views.flip, rotate=views.rotate
        )
        self.views, self.image_size, self.mean, self.std = views, image_size, mean, std
        self.blur, self.solarize = views.blur[number], views.solarize[number]

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Images (B, C, H, W) uint8 and draws (B, VIEW_DRAWS) in [0, 1) -> (B, C, size, size) float32, normalised.

        Draws from Python's global generator: the caller preserves it.
        """
        u = torch.from_numpy(draws)
        x = warp(images.float(), draws, self.crop, self.image_size, outside="border") / 255
        _apply(x, u[:, _JITTER] < self.views.jitter, self._jitter, u)
        if x.shape[1] == 3:
            _apply(x, u[:, _GREY] < self.views.grey, lambda part, _: tv.rgb_to_grayscale(part, 3), u)
        _apply(x, u[:, _BLUR] < self.blur, self._blur, u)
        _apply(x, u[:, _SOLARIZE] < self.solarize, lambda part, _: tv.solarize(part, 128 / 255), u)
        return normalize(x * 255, self.mean, self.std)

    def _jitter(self, x: Tensor, u: Tensor) -> Tensor:
        """Brightness, contrast, saturation and hue, in the order that an image drew."""
        v = self.views
        strengths = {_BRIGHTNESS: v.brightness, _CONTRAST: v.contrast, _SATURATION: v.saturation}
        factors = {n: 1 - s + 2 * s * u[:, n] for n, s in strengths.items()}
        operations: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda part, rows: adjust_brightness(part, factors[_BRIGHTNESS][rows]) if v.brightness else part,
            lambda part, rows: adjust_contrast(part, factors[_CONTRAST][rows]) if v.contrast else part,
            lambda part, rows: adjust_saturation(part, factors[_SATURATION][rows]) if v.saturation else part,
            lambda part, rows: adjust_hue(part, (2 * u[rows, _HUE] - 1) * v.hue) if v.hue else part,
        ]
        orders = _ORDERS[(u[:, _ORDER] * len(_ORDERS)).long()]
        for place in range(4):
            for number, operation in enumerate(operations):
                rows = (orders[:, place] == number).nonzero().flatten()
                if len(rows):
                    x[rows] = operation(x[rows], rows)
        return x

    def _blur(self, x: Tensor, u: Tensor) -> Tensor:
        (low, high), width = self.views.blur_sigma, [_blur_width(self.image_size)] * 2
        sigmas = (low + (high - low) * u[:, _SIGMA]).tolist()
        return torch.stack([tv.gaussian_blur(image, width, [s, s]) for image, s in zip(x, sigmas, strict=True)])


def _apply(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], u: Tensor) -> None:
    """`operation` in place on the chosen images, with their draws."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        x[rows] = operation(x[rows], u[rows])


# torchvision's functions of these names for images (B, C, H, W) in 0..1, with one factor an image (B,).


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, torch.zeros(()), factor)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, tv.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, tv.rgb_to_grayscale(x), factor)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Hue turned by `turn` (B,), in turns; value and saturation stay (HSV). Images (B, 3, H, W)."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    red, green, blue = x.unbind(1)
    blue_or_green = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixths = torch.where(value == red, (green - blue) / safe, blue_or_green)
    sixths = sixths + 6 * turn.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):  # Smith 1978 in closed form: each channel is the value less a clipped tent of the hue
        k = (sixths + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)
