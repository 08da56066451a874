"""The input format of a model: sizes, normalisation and class names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from sparse_mlp.data.augment import eval_transform


@dataclass(frozen=True)
class InputSpec:
    """Size and colours of a model's images and the names of its classes: enough to classify a new image."""

    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """One PIL image, already grey or RGB as `channels` says -> (C, H, W), as in evaluation."""
        return eval_transform(self.image_size, self.mean, self.std, self.crop_pct)
