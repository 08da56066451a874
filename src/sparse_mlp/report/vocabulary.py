"""The patches of many images that each expert likes most, cut out of the images with what lies around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sparse_mlp.report.predictions import Floats, Ints
from sparse_mlp.report.routing import PatchRouting, mixing_weight, patch_routing
from sparse_mlp.report.samples import Pixels, Samples, picture
from sparse_mlp.report.watch import TOKEN_MIXING, watch

CROP = 48  # pixels of a crop's side
_AROUND = 3  # patches along the side of a crop, the liked one in the middle
_GREY = 128  # what lies beyond the image
_BATCH = 64


@dataclass(frozen=True)
class ImageSource:
    """Images that are read when they are needed.

    read: indices -> those of these images that can be read, their `index` as requested, or None where none can be.
    indices: of those to look at. total: how many there are altogether. labels: names of the images' targets.
    """

    read: Callable[[Sequence[int]], Samples | None]
    indices: Sequence[int]
    total: int
    labels: Sequence[str]

    def batches(self, indices: Sequence[int] | None = None) -> Iterator[Samples]:
        """The images to look at, or those at `indices`, some at a time."""
        wanted = self.indices if indices is None else indices
        for start in range(0, len(wanted), _BATCH):
            samples = self.read(wanted[start : start + _BATCH])
            if samples is not None:
                yield samples


@dataclass(frozen=True)
class Vocabulary:
    """One layer's: for each of E experts n patches, the most liked first.

    image (E, n) index in the source, -1 where there are fewer; target (E, n) its class; patch (E, n) its place in the
    grid; liking (E, n); sheet: the crops, a row of n for each expert.
    """

    image: Ints
    target: Ints
    patch: Ints
    liking: Floats
    sheet: Pixels


@dataclass
class _Likings:
    """What is kept of a layer: for each image and expert the patch liked most, or, of attributions, all shares."""

    grid: tuple[int, int]
    exact: bool
    best: list[Floats]
    patch: list[Ints]
    shares: list[NDArray[np.float16]]

    def add(self, routing: PatchRouting) -> None:
        if routing.exact:
            assert routing.scores is not None and routing.chosen is not None
            sent = (routing.chosen[..., None] == np.arange(routing.num_experts)).any(axis=2)
            self._add(np.where(sent, routing.scores, -np.inf))
        else:
            self.shares.append(routing.shares.astype(np.float16))

    def _add(self, liking: Floats) -> None:
        self.best.append(liking.max(axis=1))
        self.patch.append(liking.argmax(axis=1))

    def finished(self) -> tuple[Floats, Ints]:
        """The best patch's liking and place, both (images, E).

        An attribution depends on the place more than on the image: it is taken relative to the place's mean.
        """
        if self.shares:
            mean = sum(part.sum(axis=0, dtype=np.float64) for part in self.shares) / sum(map(len, self.shares))
            for part in self.shares:
                self._add(part - mean)
            self.shares.clear()
        return np.concatenate(self.best), np.concatenate(self.patch)


def vocabularies(model: nn.Module, source: ImageSource, most: int) -> dict[str, Vocabulary]:
    """The vocabulary of every layer whose items are patches, by its name; of an image an expert has one patch.

    Exact routing: among the patches that went to the expert those of the highest score. Otherwise those whose share
    lies furthest above the mean share of the same place over all images.
    """
    layers: dict[str, _Likings] = {}
    numbers: list[Ints] = []  # (images, 2): index and target
    for samples in source.batches():
        numbers.append(np.stack([samples.index.numpy(), samples.targets.numpy()], axis=1))
        for name, one in watch(model, samples.images)[1].items():
            if name.rpartition(".")[2] == TOKEN_MIXING:
                continue
            routing = patch_routing(model, name, one, samples.images, mixing_weight(model, name))
            if isinstance(routing, PatchRouting):
                layers.setdefault(name, _Likings(routing.grid, routing.exact, [], [], [])).add(routing)
    if not numbers:
        return {}
    index, target = np.concatenate(numbers).T
    chosen = {name: _most_liked(*likings.finished(), index, target, most) for name, likings in layers.items()}
    sheets = _cut_out(source, {name: (layers[name].grid, found[0], found[2]) for name, found in chosen.items()})
    return {name: Vocabulary(*found, sheets[name]) for name, found in chosen.items()}


def _most_liked(liking: Floats, patch: Ints, index: Ints, target: Ints, most: int) -> tuple[Ints, Ints, Ints, Floats]:
    """From (images, E) to images, targets, patches and likings (E, n)."""
    order = np.argsort(-liking, axis=0, kind="stable")[:most].T
    best = np.take_along_axis(liking.T, order, axis=1)
    there = np.isfinite(best)
    patches = np.take_along_axis(patch.T, order, axis=1)
    return np.where(there, index[order], -1), target[order], patches, np.where(there, best, 0.0)


def _cut_out(source: ImageSource, wanted: dict[str, tuple[tuple[int, int], Ints, Ints]]) -> dict[str, Pixels]:
    """The sheets of the layers, from their grids, images (E, n) and patches (E, n)."""
    sheets = {
        name: np.full((image.shape[0] * CROP, image.shape[1] * CROP, 3), _GREY, np.uint8)
        for name, (_, image, _) in wanted.items()
    }
    places: dict[int, list[tuple[str, int, int]]] = {}
    for name, (_, image, _) in wanted.items():
        for expert, rank in zip(*np.nonzero(image >= 0), strict=True):
            places.setdefault(int(image[expert, rank]), []).append((name, int(expert), int(rank)))
    for samples in source.batches(sorted(places)):
        for row, index in enumerate(samples.index.tolist()):
            pixels = picture(samples.images[row], samples.mean, samples.std, side=None)
            for name, expert, rank in places[index]:
                grid, _, patch = wanted[name]
                cell = (slice(expert * CROP, (expert + 1) * CROP), slice(rank * CROP, (rank + 1) * CROP))
                sheets[name][cell] = crop(pixels, grid, int(patch[expert, rank]))
    return sheets


def crop(pixels: Pixels, grid: tuple[int, int], patch: int) -> Pixels:
    """A patch of a picture with its neighbours, CROP pixels large; grey beyond the picture."""
    size = pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]
    middle = [(place + 0.5) * length for place, length in zip(divmod(patch, grid[1]), size, strict=True)]
    half = [max(1, round(_AROUND * length / 2)) for length in size]
    top, left = (round(m - h) for m, h in zip(middle, half, strict=True))
    padded = np.pad(pixels, [(2 * half[0], 2 * half[0]), (2 * half[1], 2 * half[1]), (0, 0)], constant_values=_GREY)
    cut = padded[top + 2 * half[0] : top + 4 * half[0], left + 2 * half[1] : left + 4 * half[1]]
    smooth = Image.Resampling.LANCZOS if max(cut.shape[:2]) > CROP else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(cut).resize((CROP, CROP), smooth))
