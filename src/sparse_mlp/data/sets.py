"""The image sets by name: from a `DataConfig` to a training set, a test set and the inputs of a model."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100

from sparse_mlp.data.augment import BatchAugment, train_transform
from sparse_mlp.data.cifar import Split, read_cifar
from sparse_mlp.data.classes import match_classes
from sparse_mlp.data.config import AugmentConfig, DataConfig, check_configs
from sparse_mlp.data.decode import BadImageError, display_name
from sparse_mlp.data.folder import FolderSource, read_folder
from sparse_mlp.data.images import ArrayImages, FileImages
from sparse_mlp.data.mix import BatchMixer, batch_mixer
from sparse_mlp.data.spec import InputSpec
from sparse_mlp.data.timm_sets import TIMM_PREFIXES, open_timm
from sparse_mlp.data.trust import check_trusted
from sparse_mlp.errors import UserError


@dataclass(frozen=True)
class ImageData:
    """A training and a test set, and what the model, the task and the report need to know of them."""

    train: ArrayImages | FileImages | IterableDataset
    test: ArrayImages | FileImages | IterableDataset
    spec: InputSpec
    mixer: BatchMixer | None
    """Mixes every training batch, where mixup or cutmix is on."""

    notes: list[str] = field(default_factory=list)
    """What was left out or is missing, a line each, for the caller to print."""

    split: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of the training and of the test images, relative to the folder, for a folder that was divided here.

    Stored with a run and passed to `build_datasets` again, it keeps training images out of the test set. Empty for sets
    that have a split of their own."""

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the labels."""
        return list(self.spec.classes)

    def bad_images(self) -> list[str]:
        """Files that could not be read so far and were skipped."""
        files = []
        for images in (self.train, self.test):
            if isinstance(images, FileImages):
                files += [_path(images, index) for index in images.bad_images]
        return files


def _path(images: FileImages, index: int) -> str:
    if isinstance(images.source, FolderSource):
        return display_name(images.source.samples[index][0])
    return images.file_name(index) or f"image {index}"


def read_digits(root: Path, download: bool) -> tuple[Split, Split, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey: 1,198 to train and a fixed stratified third (599) to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = train_test_split(np.arange(len(images)), test_size=1 / 3, stratify=digits.target, random_state=0)
    return (images[train], digits.target[train]), (images[test], digits.target[test]), [str(n) for n in range(10)]


@dataclass(frozen=True)
class _ArraySet:
    read: Callable[[Path, bool], tuple[Split, Split, list[str]]]
    mean: tuple[float, ...]
    """Of the training images, in 0..1."""
    std: tuple[float, ...]


_ARRAY_SETS = {
    "digits": _ArraySet(read_digits, (0.305,), (0.376,)),
    "cifar10": _ArraySet(partial(read_cifar, CIFAR10), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _ArraySet(partial(read_cifar, CIFAR100), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SETS = (*_ARRAY_SETS, "folder")
"""Names of the sets of our own; timm's have a prefix."""


def default_root(name: str) -> Path:
    """Where a set is looked for when `DataConfig.root` does not say: $SPARSE_MLP_DATA, else data/, by name."""
    return Path(os.environ.get("SPARSE_MLP_DATA") or "data") / name.replace("/", "_")


def build_datasets(
    data: DataConfig,
    augment: AugmentConfig,
    *,
    split: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
    trusted: bool = False,
) -> ImageData:
    """Open the set that `data` names, to be augmented as `augment` says.

    `split` is the `ImageData.split` of when the run began: images added to the folder since are not used. `classes` are
    those of a trained model: the set's classes are matched with them by name. `trusted` says that the user named this
    set: only then is anything fetched, or opened that can execute code.

    Raises UserError or FileNotFoundError in one line: an unknown name, files that are not there, options that the set
    does not know, or classes that differ.
    """
    check_configs(data, augment)
    _check_used(data)
    if not trusted:
        check_trusted(data)
        data = replace(data, download=False)
    root = Path(data.root) if data.root else default_root(data.name)
    if split and data.name != "folder":
        raise UserError(f"a stored split is for a folder of images; {data.name} has its own")
    if data.name in _ARRAY_SETS:
        built = _build_arrays(data, augment, root)
    elif data.name == "folder":
        if not data.root:
            raise UserError("a folder set needs --data.root FOLDER")
        folder = read_folder(root, data.channels or 3, data.test_share, split)
        built = build_files(data, augment, folder.train, folder.test, folder.classes)
        built = replace(built, notes=folder.notes, split=folder.split)
    elif data.name.lower().startswith(tuple(TIMM_PREFIXES)):
        built = build_files(data, augment, *open_timm(data, root))
    else:
        near = difflib.get_close_matches(data.name, SETS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"unknown data set {data.name!r}{hint} (known: {', '.join(SETS)}, and timm's {' '.join(TIMM_PREFIXES)})"
        )
    return finish_data(built, data, augment, classes)


def finish_data(built: ImageData, data: DataConfig, augment: AugmentConfig, classes: Sequence[str] | None) -> ImageData:
    """What applies to any set: the number of classes, the share of the labels, the classes of a trained model."""
    if data.num_classes is not None and data.num_classes != len(built.spec.classes):
        raise UserError(
            f"data.num_classes is {data.num_classes}, but {data.name} has {len(built.spec.classes)} classes"
        )
    if data.label_share is not None:
        built = replace(built, train=_labelled_share(built.train, data, built.classes))
    return built if classes is None or list(classes) == built.classes else _with_classes(built, augment, classes)


def _with_classes(built: ImageData, augment: AugmentConfig, classes: Sequence[str]) -> ImageData:
    """The same sets with labels that count among `classes`."""
    label_map = match_classes(classes, built.classes)
    if isinstance(built.train, IterableDataset) or isinstance(built.test, IterableDataset):
        raise UserError("the classes of a stream have to be those of the trained model, in the same order")
    return replace(
        built,
        train=built.train.relabelled(label_map),
        test=built.test.relabelled(label_map),
        spec=replace(built.spec, classes=tuple(classes)),
        mixer=batch_mixer(augment, len(classes)),
    )


def _labelled_share(train: Any, data: DataConfig, classes: Sequence[str]) -> ArrayImages | FileImages:
    """A class-balanced part of a training set. UserError for a share out of range or one that empties a class."""
    assert data.label_share is not None
    if not 0 < data.label_share <= 1:
        raise UserError(f"data.label_share {data.label_share} is not in (0, 1]")
    labels = train.labels.numpy() if isinstance(train, ArrayImages) else np.array(train.source.labels)
    generator = np.random.default_rng(data.label_seed)
    chosen = []
    for number, name in enumerate(classes):
        own = np.flatnonzero(labels == number)
        count = round(data.label_share * len(own))
        if count == 0:
            raise UserError(
                f"data.label_share {data.label_share} leaves class {name} without an image: it has {len(own)}"
            )
        chosen.append(generator.permutation(own)[:count])
    return train.subset(np.sort(np.concatenate(chosen)))


_TIMM = tuple(TIMM_PREFIXES)
_USERS = {
    "root": (*(name for name in SETS if name != "digits"), *_TIMM),
    "on_bad_image": ("folder", "torch/", "hfds/"),
    "test_share": ("folder",),
    "label_share": SETS,
    "repeats": (*SETS, "torch/", "hfds/"),
    "download": ("cifar10", "cifar100", "torch/", "hfids/", "tfds/"),
    "train_split": _TIMM,
    "test_split": _TIMM,
    "num_samples": ("hfids/", "tfds/", "wds/"),
    "crop_pct": ("folder", *_TIMM),
}
"""Options that are not for every set, and which sets use them."""


def ignored_options(name: str) -> list[str]:
    """Options of DataConfig that the named set would ignore; none of a set that is not known."""
    kind = name.lower().split("/")[0] + "/" if "/" in name else name
    return [option for option, kinds in _USERS.items() if kind not in kinds and kind in (*SETS, *_TIMM)]


def _check_used(data: DataConfig) -> None:
    """UserError for an option that the named set would ignore."""
    for option in ignored_options(data.name):
        value = getattr(data, option)
        if value != getattr(DataConfig(), option):
            kinds = ", ".join(_USERS[option])
            raise UserError(f"data.{option} {value!r} would be ignored by {data.name}; it is for {kinds}")


def _build_arrays(data: DataConfig, augment: AugmentConfig, root: Path) -> ImageData:
    known = _ARRAY_SETS[data.name]
    channels = len(known.mean)
    if data.channels not in (None, channels):
        raise UserError(f"data.channels is {data.channels}, but the images of {data.name} have {channels}")
    (train, train_labels), (test, test_labels), classes = _read_arrays(data, known, root)
    size = data.image_size or train.shape[-1]
    mean, std = _normalization(data, known.mean, known.std)
    augmentation = BatchAugment(augment, size, mean, std)
    return ImageData(
        train=ArrayImages(train, train_labels, size, mean, std, augmentation),
        test=ArrayImages(test, test_labels, size, mean, std),
        spec=InputSpec(tuple(classes), channels, size, mean, std, crop_pct=1.0),
        mixer=batch_mixer(augment, len(classes)),
    )


def _read_arrays(data: DataConfig, known: _ArraySet, root: Path) -> tuple[Split, Split, list[str]]:
    """Images and labels of the same number, with valid labels. UserError, FileNotFoundError or BadImageError."""
    try:
        train, test, classes = known.read(root, data.download)
    except (UserError, FileNotFoundError):
        raise
    # Readers raise whatever the damage leads to: BadZipFile, zlib.error, UnpicklingError, KeyError, ValueError...
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadImageError(f"the files of {data.name} in {display_name(root)} are damaged: {reason}") from error
    for part, (images, labels) in (("training", train), ("test", test)):
        if labels.shape != (len(images),):
            raise BadImageError(
                f"{display_name(root)} has {len(images):,} {part} images of {data.name} and {labels.size:,} labels"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0 or labels.max() >= len(classes):
            raise BadImageError(
                f"{display_name(root)} has {part} labels of {data.name} that are not integers in 0..{len(classes) - 1}"
            )
    return train, test, classes


def build_files(data: DataConfig, augment: AugmentConfig, train: Any, test: Any, classes: Sequence[str]) -> ImageData:
    """Sets read one by one; a stream is given its transform, any other source is wrapped in FileImages."""
    size = data.image_size or 224
    defaults: Any = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if data.channels == 1:
        defaults = [(float(np.mean(values)),) for values in defaults]
    mean, std = _normalization(data, *defaults)
    training = train_transform(augment, size, mean, std)
    spec = InputSpec(tuple(classes), len(mean), size, mean, std, data.crop_pct or 0.875)
    evaluation = spec.transform
    if isinstance(train, IterableDataset):
        train.transform, test.transform = training, evaluation  # type: ignore[attr-defined]
    else:
        settings: Any = {"skip_bad": data.on_bad_image == "skip", "label_map": range(len(classes))}
        train = FileImages(train, training, evaluation, len(mean), **settings)
        test = FileImages(test, None, evaluation, len(mean), **settings)
    return ImageData(train, test, spec, batch_mixer(augment, len(classes)))


def _normalization(
    data: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The configured mean and standard deviation, else those given."""
    for option, value in (("mean", data.mean), ("std", data.std)):
        if value is not None and len(value) != len(mean):
            raise UserError(f"data.{option} {value} must have one number for each of the {len(mean)} channels")
    return data.mean or mean, data.std or std
