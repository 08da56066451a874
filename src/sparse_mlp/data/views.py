"""Two views of every image for contrastive pre-training, each a pure function of (seed, epoch, image, view)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from sparse_mlp.data.config import DataConfig
from sparse_mlp.data.images import ArrayImages, Batch, FileImages
from sparse_mlp.data.loader import train_loader
from sparse_mlp.data.randomness import epoch_draws, preserved_generators
from sparse_mlp.data.sets import ImageData
from sparse_mlp.data.view_transforms import VIEW_DRAWS, BatchView, ViewsConfig, view_transform
from sparse_mlp.errors import UserError

__all__ = ["ViewsConfig", "in_two_views", "view_loader"]


def in_two_views(built: ImageData, views: ViewsConfig) -> ImageData:
    """The same sets, the training images in two views. UserError for options that such images would ignore."""
    spec = built.spec
    if spec.channels == 1 and (views.saturation or views.hue or views.grey):
        raise UserError("views.saturation, views.hue and views.grey are for colour images; set them to 0")
    if isinstance(built.train, ArrayImages):
        return replace(built, train=ArrayViews(built.train, views))
    pair = _TwoViews(*(view_transform(views, number, spec.image_size, spec.mean, spec.std) for number in (0, 1)))
    if isinstance(built.train, FileImages):
        return replace(built, train=FileViews(built.train, pair))
    built.train.transform = pair  # type: ignore[attr-defined]
    return built


def view_loader(data: ImageData, config: DataConfig, seed: int, *, steps: int, **where: int) -> Iterable[Batch]:
    """As `train_loader`, with its arguments; batches hold `view1`, `view2` (B, C, H, W), `target` and `index`."""
    batches = train_loader(data, config, seed, steps=steps, **where)
    return _SplitViews(batches) if isinstance(data.train, IterableDataset) else batches


class _SplitViews:
    """Batches of a stream whose transform returns pairs of views."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return map(_split_views, self.batches)


def _split_views(batch: Batch) -> Batch:
    pair = batch.pop("image")
    return {"view1": pair[:, 0], "view2": pair[:, 1], **batch}


class ArrayViews(ArrayImages):
    """Images in memory, of which training sees two views."""

    def __init__(self, images: ArrayImages, views: ViewsConfig) -> None:
        super().__init__(images.images.numpy(), images.labels.numpy(), images.image_size, images.mean, images.std)
        self.views = [BatchView(views, number, images.image_size, images.mean, images.std) for number in (0, 1)]

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        if epoch is None:
            return super().batch(indices)
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        images = self.images[index]
        draws = epoch_draws(len(self), 2 * VIEW_DRAWS, *epoch)[index.numpy()]
        with preserved_generators():
            first, second = (view(images, own) for view, own in zip(self.views, np.split(draws, 2, 1), strict=True))
        return {"view1": first, "view2": second, "target": self.labels[index], "index": index}


class FileViews(FileImages):
    """Images read one by one, of which training sees two views; a file is read once for both."""

    def __init__(self, images: FileImages, pair: Callable[[Image.Image], Tensor]) -> None:
        channels = 1 if images.mode == "L" else 3
        super().__init__(
            images.source, pair, images.eval_transform, channels, images.skip_bad, label_map=images.label_map
        )

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> Batch:
        batch = super().batch(indices, epoch)
        return batch if epoch is None else _split_views(batch)


class _TwoViews:
    """Both views of one image: (2, C, H, W)."""

    def __init__(self, first: Callable[[Image.Image], Tensor], second: Callable[[Image.Image], Tensor]) -> None:
        self.first, self.second = first, second

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack((self.first(image), self.second(image)))
