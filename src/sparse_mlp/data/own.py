"""Training and test set from a user's own torch datasets of (image, label)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from sparse_mlp.data.config import AugmentConfig, DataConfig, check_configs
from sparse_mlp.data.decode import MODES, image_from
from sparse_mlp.data.files import listed_name
from sparse_mlp.data.sets import ImageData, build_files, finish_data
from sparse_mlp.errors import UserError

_MOST_CLASSES = 1_000_000

_NAMED = ("root", "download", "train_split", "test_split", "num_samples", "test_share")


class DatasetSource:
    """(image, label) pairs of a map-style dataset, or of those of its items that `items` lists."""

    def __init__(self, dataset: Any, items: Sequence[int] | None = None) -> None:
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.dataset) if self.items is None else len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return _pair(self.dataset[index if self.items is None else self.items[index]])

    def file_name(self, index: int) -> str | None:
        return listed_name(self.dataset, index if self.items is None else self.items[index])

    @property
    def labels(self) -> list[int]:
        """Known labels, else those that reading every item gives."""
        own = range(len(self.dataset)) if self.items is None else self.items
        known = _known_labels(self.dataset)
        return [_label(_pair(self.dataset[i])[1] if known is None else known[i], i) for i in own]

    def subset(self, indices: Sequence[int]) -> DatasetSource:
        return DatasetSource(self.dataset, [i if self.items is None else self.items[i] for i in indices])


def image_data_from(
    train: Dataset,
    test: Dataset,
    *,
    classes: Sequence[str] | None = None,
    config: DataConfig | None = None,
    augment: AugmentConfig | None = None,
) -> ImageData:
    """Training and test set from map-style datasets of (image, label), for the loaders as any named set.

    An image is a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C), of any size and not normalised. A
    label is an integer. Class names are `classes`, else `train.classes`, else the numbers up to the largest label.
    What `config` leaves out is taken from the first image: grey or colour, and its side up to 224 pixels. The
    generators of Python, numpy and torch are seeded from (seed, epoch, item) before an item is read.

    Raises UserError for streams, other images, and options that are for named sets.
    """
    config, augment = config or DataConfig(), augment or AugmentConfig()
    check_configs(config, augment)
    for option in _NAMED:
        value = getattr(config, option)
        if value != getattr(DataConfig(), option):
            raise UserError(f"data.{option} {value!r} would be ignored: the images come from datasets of your own")
    for name, dataset in (("train", train), ("test", test)):
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise UserError(f"the {name} dataset has to have a length and items by index, which {dataset!r} has not")
        if len(dataset) == 0:
            raise UserError(f"the {name} dataset is empty")
    first = _first_image(train)
    channels = config.channels or (1 if first.mode in ("1", "L", "LA", "I;16", "I;16B") else 3)
    size = config.image_size or min(224, *first.size)
    names = list(classes) if classes is not None else _class_names(train, test, config)
    filled = replace(config, name="own", channels=channels, image_size=size)
    built = build_files(filled, augment, DatasetSource(train), DatasetSource(test), names)
    return finish_data(built, filled, augment, None)


def _first_image(dataset: Any) -> Image.Image:
    image, _ = _pair(dataset[0])
    checked = image_from(image, _planes(image), "image 0")
    return image if isinstance(image, Image.Image) else checked


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"a {type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
        raise UserError(f"an item of a dataset has to be (image, label), not {what}")
    return item[0], item[1]


def _planes(image: Any) -> int:
    """1 or 3, for a tensor (C, H, W) or an array (H, W, C); 3 for an image of PIL."""
    if isinstance(image, Image.Image):
        return max(MODES)
    shape = np.shape(image)
    side = 0 if hasattr(image, "permute") else -1
    return 1 if len(shape) == 2 or (len(shape) == 3 and shape[side] == 1) else max(MODES)


def _class_names(train: Any, test: Any, config: DataConfig) -> list[str]:
    names = getattr(train, "classes", None)
    if names:
        return [str(name) for name in names]
    if config.num_classes is not None:
        return [str(number) for number in range(config.num_classes)]
    most = max(DatasetSource(train).labels + DatasetSource(test).labels)
    if most >= _MOST_CLASSES:
        raise UserError(f"labels up to {most:,} are more classes than a classifier has: number them from 0")
    return [str(number) for number in range(most + 1)]


def _label(value: Any, index: int) -> int:
    """UserError for anything but a whole number from 0 on."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(f"the label of image {index} is {value!r}, not a whole number from 0 on")
    return number


def _known_labels(dataset: Any) -> Any:
    """The labels that a dataset has without reading its images, by torchvision's names; None if it has none."""
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and hasattr(values, "__getitem__") and len(values) == len(dataset):
            return values
    return None
