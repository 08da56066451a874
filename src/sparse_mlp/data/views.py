"""Two views of every image for contrastive pre-training, each a pure function of (seed, epoch, image, view).

The augmentation is MoCo v3's (arXiv 2104.02057, section 5, after BYOL): random resized crop, colour jitter, grey, blur,
solarisation, flip; the two views differ in blur and solarisation. Images in memory are varied a batch at a time, those
that are read one by one by torchvision's transforms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms import v2

from sparse_mlp.data.augment import DRAWS, BatchAugment, normalize
from sparse_mlp.data.config import AugmentConfig, DataConfig
from sparse_mlp.data.images import ArrayImages, Batch, FileImages
from sparse_mlp.data.loader import train_loader
from sparse_mlp.data.randomness import epoch_draws
from sparse_mlp.data.sets import ImageData, build_datasets
from sparse_mlp.errors import UserError

__all__ = ["BatchView", "ViewsConfig", "build_views", "view_loader", "view_transform"]

# Columns of the uniform draws of one view of an image; the first DRAWS are BatchAugment's.
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(DRAWS, DRAWS + 10)
VIEW_DRAWS = DRAWS + 10

_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
_LUMINANCE = (0.2989, 0.587, 0.114)  # torchvision's


@dataclass(frozen=True)
class ViewsConfig:
    """How the two views of an image are made; pairs are (first view, second view). The defaults are MoCo v3's."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random resized crop keeps."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop."""

    flip: float = 0.5
    """Probability of a left-right flip."""

    rotate: float = 0.0
    """Rotate by up to this many degrees to either side (sets in memory only; 0 is published)."""

    jitter: float = 0.8
    """Probability that the colours are jittered."""

    brightness: float = 0.4
    """Strength: a factor of 1 - strength to 1 + strength."""

    contrast: float = 0.4
    """Strength, as for the brightness."""

    saturation: float = 0.2
    """Strength, as for the brightness; colour images only."""

    hue: float = 0.1
    """Largest turn of the hue, in turns; colour images only."""

    grey: float = 0.2
    """Probability that the colours are taken away; colour images only."""

    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of a Gaussian blur."""

    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view. 0.1 to 2 is for 224 pixels: on 32 it
    would take most of the image away; leave the blur out there, as others do."""

    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability that values from 128 of 255 on are inverted."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarize", "crop_scale"):
            value = getattr(self, name)
            if not all(0 <= share <= 1 for share in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"views.{name} {value} is not in [0, 1]")
        for name in ("brightness", "contrast", "saturation", "rotate"):
            if getattr(self, name) < 0:
                raise UserError(f"views.{name} {getattr(self, name)} is negative")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"views.hue {self.hue} is not in [0, 0.5]")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"views.{name} {(low, high)} is not a range of positive numbers")
        default = (0.1, 2.0)
        if not any(self.blur) and self.blur_sigma != default:
            raise UserError(f"views.blur_sigma {self.blur_sigma} would be ignored: views.blur is {self.blur}")


def build_views(data: DataConfig, views: ViewsConfig) -> ImageData:
    """The sets that `data` names, the training images in two views. Errors as `build_datasets`, and options unused."""
    return in_two_views(build_datasets(data, AugmentConfig()), views)


def in_two_views(built: ImageData, views: ViewsConfig) -> ImageData:
    """The same sets, the training images in two views. ValueError for options that such images would ignore."""
    spec = built.spec
    if spec.channels == 1 and (views.saturation or views.hue or views.grey):
        raise UserError("views.saturation, views.hue and views.grey are for colour images; set them to 0")
    if isinstance(built.train, ArrayImages):
        return replace(built, train=ArrayViews(built.train, views))
    if views.rotate:
        raise UserError(f"views.rotate {views.rotate} is for sets in memory (digits, cifar...)")
    pair = _Pair(*(view_transform(views, number, spec.image_size, spec.mean, spec.std) for number in (0, 1)))
    if isinstance(built.train, FileImages):
        return replace(built, train=FileViews(built.train, pair))
    built.train.transform = pair  # type: ignore[attr-defined]
    return built


def view_loader(data: ImageData, config: DataConfig, seed: int, *, steps: int, **where: int) -> Iterable[Batch]:
    """As `train_loader`, with its arguments; batches hold `view1`, `view2` (B, C, H, W), `target` and `index`."""
    batches = train_loader(data, config, seed, steps=steps, **where)
    return _Split(batches) if isinstance(data.train, IterableDataset) else batches


class _Split:
    """A stream's batches, whose transform made pairs."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return map(_split, self.batches)


def _split(batch: Batch) -> Batch:
    pair = batch.pop("image")
    return {"view1": pair[:, 0], "view2": pair[:, 1], **batch}


class ArrayViews(ArrayImages):
    """Images in memory, of which training sees two views."""

    def __init__(self, images: ArrayImages, views: ViewsConfig) -> None:
        numbers = images.images.numpy(), images.labels.numpy(), images.image_size, images.mean, images.std
        super().__init__(*numbers)
        self.views = [BatchView(views, number, images.image_size, images.mean, images.std) for number in (0, 1)]

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        if epoch is None:
            return super().batch(indices)
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        images = self.images[index]
        draws = epoch_draws(len(self), 2 * VIEW_DRAWS, *epoch)[index.numpy()]
        first, second = (view(images, own) for view, own in zip(self.views, np.split(draws, 2, axis=1), strict=True))
        return {"view1": first, "view2": second, "target": self.labels[index], "index": index}


class FileViews(FileImages):
    """Images read one by one, of which training sees two views; a file is read once for both."""

    def __init__(self, images: FileImages, pair: Callable[[Image.Image], Tensor]) -> None:
        channels = 1 if images.mode == "L" else 3
        super().__init__(images.source, pair, images.eval_transform, channels, images.skip_bad)

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        batch = super().batch(indices, epoch)
        return batch if epoch is None else _split(batch)


class _Pair:
    """Both views of one image: (2, C, H, W)."""

    def __init__(self, first: Callable[[Image.Image], Tensor], second: Callable[[Image.Image], Tensor]) -> None:
        self.first, self.second = first, second

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack((self.first(image), self.second(image)))


def view_transform(
    views: ViewsConfig, number: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """torchvision's transforms for view `number` (0 or 1) of an image that is read alone: (C, H, W), normalised."""
    jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    width = 2 * round(0.05 * image_size) + 1  # a tenth of the side, odd: SimCLR's
    steps: list[Callable] = [
        v2.ToImage(),
        v2.RandomResizedCrop(image_size, views.crop_scale, views.crop_ratio, antialias=True),
        v2.RandomApply([jitter], views.jitter),
    ]
    steps += [v2.RandomGrayscale(views.grey)] if len(mean) == 3 else []
    steps += [
        v2.RandomApply([v2.GaussianBlur(max(3, width), views.blur_sigma)], views.blur[number]),
        v2.RandomSolarize(128, views.solarize[number]),
        v2.RandomHorizontalFlip(views.flip),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(tuple(mean), tuple(std)),
        v2.ToPureTensor(),
    ]
    return v2.Compose(steps)


class BatchView:
    """One view of a batch of equally large square uint8 images, without a loop over the images.

    Image i's view depends on its own pixels and its own row of draws alone. Each colour operation is torchvision's
    (the order of the jitter's four is drawn anew for every image), with a number an image in the place of one for all.
    """

    def __init__(
        self, views: ViewsConfig, number: int, image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        crop = AugmentConfig(
            crop_scale=views.crop_scale, crop_ratio=views.crop_ratio, flip=views.flip, rotate=views.rotate
        )
        self.crop = BatchAugment(crop, image_size, mean, std)
        self.views, self.mean, self.std = views, mean, std
        self.blur, self.solarize = views.blur[number], views.solarize[number]

    def __call__(self, images: Tensor, draws: np.ndarray) -> Tensor:
        """Images (B, C, H, W) uint8 and draws (B, VIEW_DRAWS) in [0, 1) -> (B, C, size, size) float32, normalised."""
        u = torch.from_numpy(draws)
        x = self.crop.warp(images.float(), u[:, :DRAWS].T.reshape(DRAWS, -1, 1, 1), outside="border") / 255
        _apply(x, u[:, _JITTER] < self.views.jitter, self._jitter, u)
        if x.shape[1] == 3:
            _apply(x, u[:, _GREY] < self.views.grey, lambda part, _: luminance(part).expand_as(part), u)
        _apply(x, u[:, _BLUR] < self.blur, self._blur, u)
        _apply(x, u[:, _SOLARIZE] < self.solarize, lambda part, _: torch.where(part >= 128 / 255, 1 - part, part), u)
        return normalize(x * 255, self.mean, self.std)

    def _jitter(self, x: Tensor, u: Tensor) -> Tensor:
        """Brightness, contrast, saturation and hue, in the order that an image drew."""
        v = self.views
        strengths = {_BRIGHTNESS: v.brightness, _CONTRAST: v.contrast, _SATURATION: v.saturation}
        factors = {n: max(0.0, 1 - s) + (1 + s - max(0.0, 1 - s)) * u[:, n] for n, s in strengths.items()}
        operations: list[Callable[[Tensor, Tensor], Tensor] | None] = [
            lambda part, rows: blend(part, torch.zeros(()), factors[_BRIGHTNESS][rows]) if v.brightness else part,
            lambda part, rows: blend(part, luminance(part).mean((1, 2, 3), keepdim=True), factors[_CONTRAST][rows]),
            lambda part, rows: blend(part, luminance(part), factors[_SATURATION][rows]) if v.saturation else part,
            lambda part, rows: turn_hue(part, (2 * u[rows, _HUE] - 1) * v.hue) if v.hue else part,
        ]
        orders = _ORDERS[(u[:, _ORDER] * len(_ORDERS)).long()]
        for place in range(4):
            for number, operation in enumerate(operations):
                rows = (orders[:, place] == number).nonzero().flatten()
                if len(rows) and operation is not None:
                    x[rows] = operation(x[rows], rows)
        return x

    def _blur(self, x: Tensor, u: Tensor) -> Tensor:
        low, high = self.views.blur_sigma
        return gaussian_blur(x, low + (high - low) * u[:, _SIGMA], radius=int(3 * high + 1))


def _apply(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor], u: Tensor) -> None:
    """`operation` in place on the chosen images, with their draws."""
    rows = chosen.nonzero().flatten()
    if len(rows):
        x[rows] = operation(x[rows], u[rows])


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor x + (1 - factor) other, factor (B,), in 0..1."""
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def luminance(x: Tensor) -> Tensor:
    """(B, 3 or 1, H, W) -> (B, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return _LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 with their hue turned by `turn` (B,), in turns; value and saturation stay (HSV)."""
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


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Images (B, C, H, W) blurred with standard deviations `sigma` (B,) in pixels; reflected at the borders."""
    radius = min(radius, x.shape[-1] - 1, x.shape[-2] - 1)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)
    planes = F.pad(x, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, taps[:, None, None, :], groups=len(taps))
    return F.conv2d(planes, taps[:, None, :, None], groups=len(taps)).view_as(x)
