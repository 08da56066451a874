"""Images with a class for every pixel: the layouts of ADE20K, CamVid, Cityscapes and of a user's own folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from sparse_mlp.data.decode import BadImageError, decode_image, display_name, exif_turn, image_endings
from sparse_mlp.data.randomness import epoch_seeds, preserved_generators, seed_generators
from sparse_mlp.data.segmentation_config import SegmentationConfig, check_segmentation
from sparse_mlp.data.sets import default_root
from sparse_mlp.data.tree import Tree
from sparse_mlp.errors import UserError

__all__ = ["IGNORE", "MaskedImages", "SegmentationData", "open_segmentation", "to_tensor"]

_log = logging.getLogger(__name__)

IGNORE = 255
"""Target of pixels that count for nothing."""

_INVALID = 254  # of the table of mask values: no class
_CROP_TRIES = 10
_IMAGES, _MASKS = ("images", "image", "img"), ("masks", "mask", "annotations", "labels")
_CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by name in their trees."""

    image: tuple[Tree, str]
    mask: tuple[Tree, str]

    @property
    def name(self) -> str:
        """What reports and predictions call the image."""
        return display_name(self.image[1])


@dataclass(frozen=True)
class Layout:
    """Where a set keeps its parts, and what the values of its masks mean."""

    splits: tuple[str, str]
    table: np.ndarray
    """(256,) from mask value to class, IGNORE or _INVALID."""
    classes: tuple[str, ...]


@dataclass(frozen=True)
class SegmentationData:
    """A training and a test set, and the names of the classes."""

    train: MaskedImages
    test: MaskedImages
    classes: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    mixer: None = None

    def bad_images(self) -> list[str]:
        """Names of the images that were skipped because they cannot be used, so far."""
        return list(dict.fromkeys([*self.train.bad_images, *self.test.bad_images]))


class MaskedImages:
    """Images with masks, read one by one, each augmented under its own seed."""

    def __init__(self, pairs: Sequence[Pair], config: SegmentationConfig, table: np.ndarray, classes: int) -> None:
        self.pairs, self.config, self.table, self.classes = list(pairs), config, table, classes
        self.distort = v2.RandomPhotometricDistort(p=config.photometric) if config.photometric else None
        # In shared memory, so that worker processes report here what they could not read.
        self._bad = torch.zeros(max(1, len(self.pairs)), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def bad_images(self) -> list[str]:
        """Names of the images that were skipped so far, by any worker process."""
        return [self.pairs[i].name for i in self._bad.nonzero().flatten().tolist()]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """An image (RGB, upright) and the classes of its pixels (H, W) uint8, IGNORE where there is none.

        BadImageError naming the file if one of them cannot be read, or if they do not fit each other.
        """
        pair = self.pairs[index]
        return read_pair(pair, self.table, self.classes)

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: tuple[int, int] | None = None) -> dict[str, Any]:
        """`image`: in training (B, 3, S, S), else a list of (3, h, w); `target`: the classes (B, S, S), else a list of
        (H, W) at the masks' own sizes; `index` (B,)."""
        seeds = None if epoch is None else epoch_seeds(len(self), *epoch)
        with preserved_generators():
            read = [self._read_or_next(int(i), seeds) for i in indices]
        items = [item for item in read if item is not None]
        images, targets, index = [list(part) for part in zip(*items, strict=True)] if items else ([], [], [])
        stack = seeds is not None
        return {
            "image": torch.stack(images) if stack else images,
            "target": torch.stack(targets) if stack else targets,
            "index": torch.tensor(index, dtype=torch.long),
        }

    def _read_or_next(self, index: int, seeds: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """In training a bad image is replaced by the next readable one, in evaluation it is left out."""
        for i in range(index, index + len(self)):
            i %= len(self)
            try:
                image, mask = self.read(i)
            except OSError as error:
                if self.config.on_bad_image == "error":
                    raise
                if not self._bad[i]:
                    _log.warning("skipped: %s", error)
                self._bad[i] = True
                if seeds is None:
                    return None
                continue
            if seeds is None:
                return to_tensor(resize_short_side(image, self.config.short_side)), torch.from_numpy(mask), i
            seed_generators(int(seeds[i]))
            return (*self.augment(image, mask), i)
        raise OSError(f"none of the {len(self)} images can be read")

    def augment(self, image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """A random scale and crop, flip and colours; what lies outside the image is black and ignored."""
        size, config = self.config.image_size, self.config
        scale = torch.empty(()).uniform_(*config.scale).item()
        if config.short_side is not None:
            scale *= config.short_side / min(image.size)
        width, height = (max(1, round(scale * side)) for side in image.size)
        crop = (min(size, width), min(size, height))
        labels = Image.fromarray(mask)
        for _ in range(_CROP_TRIES):
            left = int(torch.randint(width - crop[0] + 1, ()))
            top = int(torch.randint(height - crop[1] + 1, ()))
            # Only the part of the image that is kept is resized.
            box = (left / scale, top / scale, (left + crop[0]) / scale, (top + crop[1]) / scale)
            box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
            part = np.asarray(labels.resize(crop, Image.Resampling.NEAREST, box=box))
            counts = np.bincount(part[part != IGNORE], minlength=1)
            if counts.max() <= config.max_class_share * counts.sum():
                break
        pixels = functional.pil_to_tensor(image.resize(crop, Image.Resampling.BILINEAR, box=box))
        target = torch.from_numpy(part.copy())
        if torch.rand(()) < config.flip:
            pixels, target = pixels.flip(-1), target.flip(-1)
        if self.distort is not None:
            pixels = self.distort(pixels)
        padding = [0, 0, size - crop[0], size - crop[1]]
        return normalized(functional.pad(pixels, padding)), functional.pad(target[None], padding, fill=IGNORE)[0].long()


def read_pair(pair: Pair, table: np.ndarray, classes: int) -> tuple[Image.Image, np.ndarray]:
    """See `MaskedImages.read`. A mask belongs to the upright image; one that has the size of the image as it is stored,
    and not of the upright one, is turned as the image is."""
    tree, name = pair.image
    with tree.open(name) as file:
        turn = exif_turn(file)
        image = decode_image(file, 3, tree.display(name))
    values = _read_mask(*pair.mask)
    if turn is not None and values.shape[::-1] != image.size:
        values = np.asarray(Image.fromarray(values).transpose(turn))
    shown = pair.mask[0].display(pair.mask[1])
    if values.shape[::-1] != image.size:
        sizes = "is {} x {}, its image {} x {}".format(*values.shape[::-1], *image.size)
        raise BadImageError(f"mask {shown} {sizes}")
    target = table[values]
    if (target == _INVALID).any():
        wrong = int(values[target == _INVALID].max())
        raise BadImageError(f"mask {shown} has the value {wrong}: it stands for none of the {classes} classes")
    return image, target


def _read_mask(tree: Tree, name: str) -> np.ndarray:
    """(H, W) uint8, the indices of a palette and the values of a grey image as they are."""
    shown = tree.display(name)
    with tree.open(name) as file:
        try:
            with Image.open(file, formats=("PNG", "TIFF", "BMP", "WEBP", "GIF")) as image:
                image.load()
                values = np.asarray(image)
        # Pillow's decoders raise whatever the damage leads to.
        except Exception as error:
            raise BadImageError(f"cannot read mask {shown}: {error}") from error
    if values.ndim != 2:
        raise BadImageError(f"mask {shown} has colours ({image.mode}): its pixels should be class numbers")
    if values.max(initial=0) > 255:
        raise BadImageError(f"mask {shown} has the value {values.max()}: class numbers end at 255")
    return values.astype(np.uint8)


def resize_short_side(image: Image.Image, short_side: int | None) -> Image.Image:
    """Resize so that the shorter side has this many pixels; None leaves the image as it is."""
    if short_side is None or short_side == min(image.size):
        return image
    scale = short_side / min(image.size)
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BILINEAR)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W) -> float32 by ImageNet's mean and deviation."""
    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    return functional.normalize(scaled, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as a model takes it."""
    return normalized(functional.pil_to_tensor(image))


def open_segmentation(config: SegmentationConfig) -> SegmentationData:
    """The set that a configuration names. UserError or OSError, one line, for what does not exist or fit."""
    check_segmentation(config)
    root = Path(config.root) if config.root is not None else default_root(config.name)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {display_name(root)}: name the set's with --data.root")
    layout = _LAYOUTS[config.name](root, config)
    notes: list[str] = []
    find = _FINDERS.get(config.name, _find_pairs)
    train, test = (config.train_split or layout.splits[0], config.test_split or layout.splits[1])
    parts = {split: find(root, split, notes) for split in (train, test)}
    divided = not any(parts.values()) and config.train_split is None and config.test_split is None
    if config.test_share is not None and not divided:
        raise UserError(f"data.test_share {config.test_share} would be ignored: {display_name(root)} has splits")
    if divided:
        parts = dict(zip((train, test), _divide(find(root, None, notes), root, config), strict=True))
    for split, pairs in parts.items():
        if not pairs:
            raise FileNotFoundError(f"{display_name(root)} has no images with masks for the split {split!r}")
    pairs = parts[train][: config.num_images]
    if config.num_images is not None and len(pairs) < config.num_images:
        raise UserError(f"data.num_images {config.num_images} is more than the {len(pairs)} training images")
    options = config, layout.table, len(layout.classes)
    sets = MaskedImages(pairs, *options), MaskedImages(parts[test], *options)
    return SegmentationData(*sets, layout.classes, notes)


def _divide(pairs: Sequence[Pair], root: Path, config: SegmentationConfig) -> tuple[list[Pair], list[Pair]]:
    """Training and test images of a folder without splits, by their names alone."""
    share = 0.2 if config.test_share is None else config.test_share
    tested = [_share_of(pair.name) < share for pair in pairs]
    parts = [[pair for pair, test in zip(pairs, tested, strict=True) if test is wanted] for wanted in (False, True)]
    if pairs and not all(parts):
        raise UserError(f"data.test_share {share} leaves no images of {display_name(root)} on one side")
    return parts[0], parts[1]


def _share_of(name: str) -> float:
    """A number in [0, 1) from a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) / 2**32


def _find_pairs(root: Path, split: str | None, notes: list[str]) -> list[Pair]:
    """Images and masks of one split: images/SPLIT + masks/SPLIT, SPLIT/images + SPLIT/masks, or SPLIT.zip."""
    places: list[tuple[Path, str, str]] = []
    if split is None:
        places = [(root, image, mask) for image in _IMAGES for mask in _MASKS]
    else:
        own = root / split if (root / split).is_dir() else root / f"{split}.zip"
        places = [(own, image, mask) for image in _IMAGES for mask in _MASKS]
        places += [(root, f"{image}/{split}", f"{mask}/{split}") for image in _IMAGES for mask in _MASKS]
    trees = {path: Tree(path) for path, _, _ in places if path.exists()}
    for path, images, masks in places:
        if path in trees and (pairs := _pairs_in(trees[path], images, masks, notes)):
            return pairs
    return []


def _pairs_in(tree: Tree, images: str, masks: str, notes: list[str]) -> list[Pair]:
    """Images and masks of the same name but for the ending."""
    by_stem = {_stem(name, masks): name for name in tree.names if name.startswith(f"{masks}/") and _is_image(name)}
    names = [name for name in tree.names if name.startswith(f"{images}/") and _is_image(name)]
    if not names or not by_stem:
        return []
    pairs = [Pair((tree, name), (tree, by_stem[stem])) for name in names if (stem := _stem(name, images)) in by_stem]
    lonely = [name for name in names if _stem(name, images) not in by_stem]
    if lonely:
        notes.append(f"{len(lonely)} images of {display_name(tree.path)} have no mask: {', '.join(lonely[:3])}")
    unused = by_stem.keys() - {_stem(name, images) for name in names}
    if unused:
        notes.append(f"{len(unused)} masks of {display_name(tree.path)} have no image: {', '.join(sorted(unused)[:3])}")
    return pairs


def _stem(name: str, folder: str) -> str:
    return name[len(folder) + 1 :].rsplit(".", 1)[0]


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in image_endings()


def _find_cityscapes(root: Path, split: str | None, notes: list[str]) -> list[Pair]:
    """leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png."""
    tree = Tree(root)
    prefix, ending = f"leftImg8bit/{split}/", "_leftImg8bit.png"
    pairs = []
    for name in tree.names:
        if name.startswith(prefix) and name.endswith(ending):
            mask = f"gtFine/{split}/{name[len(prefix) : -len(ending)]}_gtFine_labelIds.png"
            pairs.append(Pair((tree, name), (tree, mask)))
    return pairs


def _table(values: Mapping[int, int]) -> np.ndarray:
    table = np.full(256, _INVALID, dtype=np.uint8)
    for value, target in values.items():
        table[value] = target
    return table


def _folder(root: Path, config: SegmentationConfig) -> Layout:
    path = root / "classes.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{display_name(root)} has no classes.txt: names of the classes, a line each, the first for mask value 0"
        )
    classes = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not 2 <= len(classes) < _INVALID:
        raise UserError(f"{display_name(path)} names {len(classes)} classes: 2 to {_INVALID - 1} are possible")
    ignore = IGNORE if config.ignore is None else config.ignore
    return Layout(("train", "val"), _table({**{i: i for i in range(len(classes))}, ignore: IGNORE}), classes)


def _camvid(root: Path, config: SegmentationConfig) -> Layout:
    return Layout(("train", "test"), _table({**{i: i for i in range(11)}, 11: IGNORE}), _CAMVID)


def _ade20k(root: Path, config: SegmentationConfig) -> Layout:
    """SceneParsing's 150 classes: 0 is what has none, class c is c + 1 in the masks; objectInfo150.txt names them."""
    info, names = root / "objectInfo150.txt", [f"class {i + 1}" for i in range(150)]
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()[1:151]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    return Layout(("training", "validation"), _table({0: IGNORE, **{i + 1: i for i in range(150)}}), tuple(names))


def _cityscapes(root: Path, config: SegmentationConfig) -> Layout:
    values, names = {}, {}
    for entry in Cityscapes.classes:
        counted = 0 <= entry.train_id < IGNORE
        if entry.id >= 0:
            values[entry.id] = entry.train_id if counted else IGNORE
        if counted:
            names[entry.train_id] = entry.name
    return Layout(("train", "val"), _table(values), tuple(names[i] for i in range(len(names))))


_LAYOUTS: dict[str, Callable[[Path, SegmentationConfig], Layout]] = {
    "folder": _folder,
    "camvid": _camvid,
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
}
_FINDERS = {"cityscapes": _find_cityscapes}
