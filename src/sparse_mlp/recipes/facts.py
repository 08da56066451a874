"""What a data set is like, as far as a recipe's settings depend on it, and the settings that follow."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.jobs import Context
from sparse_mlp.jobs.images import open_images

SMALL = 64
"""Side in pixels below which an image has no room for crops of a twelfth of it, RandAugment or erasing."""


@dataclass(frozen=True)
class Facts:
    """Number of training images and classes, side in pixels, colour channels."""

    images: int
    classes: int
    image_size: int
    channels: int

    @property
    def small(self) -> bool:
        return self.image_size < SMALL

    @property
    def grey(self) -> bool:
        return self.channels == 1

    def batch_size(self, largest: int) -> int:
        """A power of two: at most `largest` and the set, and at least 16 batches an epoch where there are images."""
        size = min(largest, max(8, self.images // 16), max(1, self.images))
        return 2 ** (size.bit_length() - 1)


def look_at(data: DataConfig) -> Facts:
    """Open a set that the user named and count. UserError or OSError as `build_datasets`."""
    found = open_images(data, AugmentConfig(), Context(trusted=True))
    spec = found.spec
    return Facts(len(found.train), len(spec.classes), spec.image_size, spec.channels)  # type: ignore[arg-type]
