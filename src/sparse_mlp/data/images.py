"""Sets of labelled images with random access to batches: in memory, or read file by file."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_mlp.data.augment import DRAWS, BatchAugment, normalize, resize
from sparse_mlp.data.decode import MODES, image_from
from sparse_mlp.data.files import listed_name
from sparse_mlp.data.randomness import epoch_draws, epoch_seeds, preserved_generators, seed_generators
from sparse_mlp.errors import UserError

_log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""`image` (B, C, H, W) float32, `target` (B,) long or (B, classes) float32 where mixed, `index` (B,) long."""


class ImageSet(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        """The images at `indices`: augmented as (seed, epoch) says, or as they are evaluated where it is None."""
        ...

    def file_name(self, index: int) -> str | None:
        """The file that an image was read from, relative to the folder of the set; None for one that has no file."""
        ...


class ArrayImages:
    """Equally large images in memory, augmented a whole batch at a time."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: BatchAugment | None = None,
    ) -> None:
        """Images (N, C, H, W) uint8, labels (N,)."""
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        self.image_size, self.mean, self.std, self.augment = image_size, mean, std, augment

    def __len__(self) -> int:
        return len(self.images)

    def file_name(self, index: int) -> None:
        """As ImageSet.file_name: images in memory have no files."""

    def subset(self, indices: np.ndarray) -> ArrayImages:
        """Only the images at `indices`, renumbered from 0."""
        images, labels = self.images.numpy()[indices], self.labels.numpy()[indices]
        return ArrayImages(images, labels, self.image_size, self.mean, self.std, self.augment)

    def relabelled(self, label_map: Sequence[int]) -> ArrayImages:
        """The same images, with label i replaced by label_map[i]."""
        images, labels = self.images.numpy(), np.asarray(label_map)[self.labels.numpy()]
        return ArrayImages(images, labels, self.image_size, self.mean, self.std, self.augment)

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        images = self.images[index]
        if epoch is not None and self.augment is not None:
            with preserved_generators():
                pixels = self.augment(images, epoch_draws(len(self), DRAWS, *epoch)[index.numpy()])
        else:
            pixels = normalize(resize(images, self.image_size), self.mean, self.std)
        return {"image": pixels, "target": self.labels[index], "index": index}


class FileImages:
    """Images read one by one from a source of (image, label) pairs, each augmented under its own seed."""

    def __init__(
        self,
        source: Any,
        train_transform: Callable[[Image.Image], Tensor] | None,
        eval_transform: Callable[[Image.Image], Tensor],
        channels: int,
        skip_bad: bool = False,
        *,
        label_map: Sequence[int] | None = None,
    ) -> None:
        """`source[i]` is (image, label) and may raise OSError, which `skip_bad` steps over.

        The image is a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C). A source may have `labels`,
        `file_name(index)` and `subset(indices)`.

        `label_map` gives every label of the source another number; a label beyond it is an error.
        """
        self.mode = MODES[channels]
        self.source, self.train_transform, self.eval_transform = source, train_transform, eval_transform
        self.skip_bad, self.label_map = skip_bad, label_map
        # In shared memory, so that worker processes report here which images they could not read.
        self._bad = torch.zeros(max(1, len(source)), dtype=torch.bool).share_memory_() if skip_bad else None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def channels(self) -> int:
        return next(number for number, mode in MODES.items() if mode == self.mode)

    def file_name(self, index: int) -> str | None:
        """As ImageSet.file_name."""
        named = getattr(self.source, "file_name", None)
        return listed_name(self.source, index) if named is None else named(index)

    def subset(self, indices: np.ndarray) -> FileImages:
        """Only the images at `indices`, renumbered from 0."""
        source = self.source.subset([int(i) for i in indices])
        return self._with_source(source, self.label_map)

    def relabelled(self, label_map: Sequence[int]) -> FileImages:
        """The same images, with label i replaced by label_map[i]."""
        own = range(len(label_map)) if self.label_map is None else self.label_map
        return self._with_source(self.source, [label_map[i] for i in own])

    def _with_source(self, source: Any, label_map: Sequence[int] | None) -> FileImages:
        transforms = self.train_transform, self.eval_transform
        return FileImages(source, *transforms, self.channels, self.skip_bad, label_map=label_map)

    @property
    def bad_images(self) -> list[int]:
        """Indices of the images that were skipped so far, by any worker process."""
        return [] if self._bad is None else self._bad.nonzero().flatten().tolist()

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        """As ImageSet.batch; a bad image is replaced by the next readable one in training, left out in evaluation."""
        if epoch is None:
            read = [self._read(int(i), self.eval_transform, None) for i in indices]
        else:
            seeds = epoch_seeds(len(self), *epoch)
            with preserved_generators():
                read = [self._read_or_next(int(i), seeds) for i in indices]
        items = [item for item in read if item is not None]
        return {
            "image": torch.stack([image for image, _, _ in items]) if items else torch.empty(0),
            "target": torch.tensor([label for _, label, _ in items], dtype=torch.long),
            "index": torch.tensor([index for _, _, index in items], dtype=torch.long),
        }

    def _read_or_next(self, index: int, seeds: np.ndarray) -> tuple[Tensor, int, int]:
        for i in range(index, index + len(self)):
            item = self._read(i % len(self), self.train_transform or self.eval_transform, seeds)
            if item is not None:
                return item
        raise OSError(f"none of the {len(self)} images can be read")

    def _read(
        self, index: int, transform: Callable[[Image.Image], Tensor], seeds: np.ndarray | None
    ) -> tuple[Tensor, int, int] | None:
        if seeds is not None:  # before the source is read: it may vary its images too
            seed_generators(int(seeds[index]))
        try:
            image, label = self.source[index]
            image = image_from(image, self.channels, f"image {index}")
        except OSError as error:
            if self._bad is None:
                raise
            if not self._bad[index]:
                _log.warning("skipped: %s", error)
            self._bad[index] = True
            return None
        return transform(image), self._label(label, index), index

    def _label(self, label: Any, index: int) -> int:
        try:
            number = operator.index(label)
        except TypeError as error:
            raise UserError(
                f"the label of image {self.file_name(index) or index} is {label!r}, not an integer"
            ) from error
        if self.label_map is None:
            return number
        if not 0 <= number < len(self.label_map):
            shown, last = self.file_name(index) or index, len(self.label_map) - 1
            raise UserError(f"the label of image {shown} is {number}; the classes of the set are 0 to {last}")
        return self.label_map[number]
