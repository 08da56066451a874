"""Sets of labelled images that serve any batch by index: in memory, or read one by one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_mlp.data.augment import DRAWS, BatchAugment, normalize, resize
from sparse_mlp.data.randomness import epoch_draws, epoch_seeds, preserved_generators, seed_generators

_log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
"""`image` (B, C, H, W) float32, `target` (B,) long or (B, classes) float32 where mixed, `index` (B,) long."""


class ImageSet(Protocol):
    """Labelled images by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        """The images at `indices`: augmented as (seed, epoch) says, or as they are evaluated where it is None."""
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

    def subset(self, indices: np.ndarray) -> ArrayImages:
        """Only the images at `indices`, numbered anew."""
        images, labels = self.images.numpy()[indices], self.labels.numpy()[indices]
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


MODES = {1: "L", 3: "RGB"}
"""Pillow's name for images of so many channels."""


class BadImageError(OSError):
    """An image file that cannot be read; the message names it."""


def read_image(path: Path, channels: int) -> Image.Image:
    """Decode an image file as grey (1) or RGB (3). Raises BadImageError naming the file."""
    try:
        with Image.open(path) as image:
            return image.convert(MODES[channels])
    # Pillow's decoders raise whatever the damage leads to: OSError, SyntaxError, ValueError, struct.error, EOFError...
    except Exception as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).split("\n")[0]
        raise BadImageError(f"cannot read image {path}: {reason}") from error


class FileImages:
    """Images read one by one from a source of (image, label) pairs, each augmented under its own seed."""

    def __init__(
        self,
        source: Any,
        train_transform: Callable[[Image.Image], Tensor] | None,
        eval_transform: Callable[[Image.Image], Tensor],
        channels: int,
        skip_bad: bool = False,
    ) -> None:
        """`source[i]` is (PIL image, label) and may raise OSError, which `skip_bad` steps over."""
        self.mode = MODES[channels]
        self.source, self.train_transform, self.eval_transform = source, train_transform, eval_transform
        self.skip_bad = skip_bad
        # In shared memory, so that worker processes report here which images they could not read.
        self._bad = torch.zeros(len(source), dtype=torch.bool).share_memory_() if skip_bad else None

    def __len__(self) -> int:
        return len(self.source)

    def subset(self, indices: np.ndarray) -> FileImages:
        """Only the images at `indices`, numbered anew; for a source that lists its `samples`."""
        source = copy.copy(self.source)
        source.samples = [self.source.samples[i] for i in indices]
        channels = next(number for number, mode in MODES.items() if mode == self.mode)
        return FileImages(source, self.train_transform, self.eval_transform, channels, self.skip_bad)

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
                read = [self._read_near(int(i), seeds) for i in indices]
        found = [item for item in read if item is not None]
        return {
            "image": torch.stack([image for image, _, _ in found]) if found else torch.empty(0),
            "target": torch.tensor([label for _, label, _ in found], dtype=torch.long),
            "index": torch.tensor([index for _, _, index in found], dtype=torch.long),
        }

    def _read_near(self, index: int, seeds: np.ndarray) -> tuple[Tensor, int, int]:
        for i in range(index, index + len(self)):
            item = self._read(i % len(self), self.train_transform or self.eval_transform, seeds)
            if item is not None:
                return item
        raise OSError(f"none of the {len(self)} images can be read")

    def _read(
        self, index: int, transform: Callable[[Image.Image], Tensor], seeds: np.ndarray | None
    ) -> tuple[Tensor, int, int] | None:
        try:
            image, label = self.source[index]
        except OSError as error:
            if self._bad is None:
                raise
            if not self._bad[index]:
                _log.warning("skipped: %s", error)
            self._bad[index] = True
            return None
        if seeds is not None:
            seed_generators(int(seeds[index]))
        return transform(image if image.mode == self.mode else image.convert(self.mode)), int(label), index
