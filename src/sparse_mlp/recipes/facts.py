"""The properties of a data set that a recipe's settings depend on."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset

from sparse_mlp.data import AugmentConfig, DataConfig
from sparse_mlp.jobs import Context
from sparse_mlp.jobs.images import open_images

SMALL = 64
"""Side in pixels below which images are too small for crops of 8 % of their area, RandAugment and erasing."""


@dataclass(frozen=True)
class DatasetFacts:
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


def inspect_dataset(data: DataConfig, datasets: tuple[Dataset, Dataset] | None = None) -> DatasetFacts:
    """Open a set that the user named, or the user's own. UserError or OSError as `build_datasets`."""
    images = open_images(data, AugmentConfig(), Context(trusted=True, datasets=datasets))
    spec = images.spec
    return DatasetFacts(len(images.train), len(spec.classes), spec.image_size, spec.channels)  # type: ignore[arg-type]
