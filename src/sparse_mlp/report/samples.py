"""Test images for the report: which ones are shown, and their conversion to pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparse_mlp.errors import UserError
from sparse_mlp.report.analysis import Pair, confusion_matrix, mistakes_of, worst_pairs
from sparse_mlp.report.predictions import Predictions
from sparse_mlp.report.run import read_run

Pixels = NDArray[np.uint8]

MAX_EXAMPLES = 10  # images on which routing is drawn
MAX_PAIRS = 6  # pairs of confused classes with sample images
IMAGES_PER_PAIR = 3
SMALL = 64  # pixels of an image's side up to which it is shown pixel by pixel
_SIDE = 160  # pixels of a picture on the page, at most


@dataclass(frozen=True)
class Samples:
    """Test images as the model takes them.

    images: (N, C, H, W) float, normalised. targets: (N,) classes. index: (N,) places in the test set, as in
    predictions.npz. mean, std: what the normalisation took off and divided by, per channel.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not len(self.images) == len(self.targets) == len(self.index):
            shapes = ", ".join(str(tuple(t.shape)) for t in (self.images, self.targets, self.index))
            raise UserError(f"samples need images (N, C, H, W), targets (N,) and index (N,); got {shapes}")
        if not len(self.mean) == len(self.std) == self.images.shape[1]:
            raise UserError(
                f"samples of {self.images.shape[1]} channels need as many means and stds; "
                f"got {len(self.mean)} and {len(self.std)}"
            )

    def where(self) -> dict[int, int]:
        """Return the row of each index."""
        return {int(i): row for row, i in enumerate(self.index.tolist())}


def wanted_images(run_dir: Path | str, seed: int = 0) -> list[int]:
    """Return the indices of the test images that `write_classification_report` would show, at most a few dozen.

    One image per class (of up to ten classes), drawn by `seed`, then the surest of the most frequent mistakes. Empty
    while the run has no predictions, and for a streamed test set, whose images have no index.
    """
    predictions = read_run(run_dir).predictions
    if predictions is None:
        return []
    examples = example_rows(predictions.target, seed)
    mistakes = [row for _, rows in mistake_rows(predictions) for row in rows]
    indices = (int(predictions.index[row]) for row in [*examples, *mistakes])
    return [index for index in dict.fromkeys(indices) if index >= 0]


def example_rows(targets: NDArray[np.int64], seed: int) -> list[int]:
    """Return one row per class, for up to ten classes; which ones is fixed by `seed`."""
    draw = np.random.default_rng(seed)
    present = np.unique(targets)
    if len(present) > MAX_EXAMPLES:
        present = np.sort(draw.choice(present, MAX_EXAMPLES, replace=False))
    return [int(draw.choice(np.flatnonzero(targets == c))) for c in present]


def mistake_rows(predictions: Predictions) -> list[tuple[Pair, list[int]]]:
    """Return the most frequent mistakes, each with rows of the images it was made on most surely."""
    pairs = worst_pairs(confusion_matrix(predictions), MAX_PAIRS)
    return [(pair, mistakes_of(predictions, pair, IMAGES_PER_PAIR).tolist()) for pair in pairs]


def picture(image: Tensor, mean: Sequence[float], std: Sequence[float], side: int | None = _SIDE) -> Pixels:
    """Undo the normalisation of one image (C, H, W): returns (h, w, 3) pixels about `side` long; None: as it is.

    Small images grow by whole pixels, large ones shrink smoothly. Anything but three channels becomes grey.
    """
    array = image.detach().float().cpu().numpy()
    array = array * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    if len(array) != 3:
        array = array.mean(axis=0, keepdims=True).repeat(3, axis=0)
    pixels = np.round(255 * np.clip(array, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    longest = max(pixels.shape[:2])
    if side is None:
        return pixels
    if longest <= side:
        factor = side // longest
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    size = tuple(max(1, round(length * side / longest)) for length in (pixels.shape[1], pixels.shape[0]))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def data_uri(pixels: Pixels, *, photo: bool = False) -> str:
    """Return the pixels (h, w, 3) inside a `data:` address: as a PNG, a `photo` as a WebP a tenth of the size."""
    buffer, kind = io.BytesIO(), "webp" if photo else "png"
    options = {"quality": 80} if photo else {"optimize": True}
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
