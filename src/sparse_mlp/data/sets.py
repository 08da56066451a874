"""The image sets by name: `DataConfig` in, a training set, a test set and what a model must know of them out."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from torch.utils.data import IterableDataset

from sparse_mlp.data.augment import BatchAugment, train_transform
from sparse_mlp.data.cifar import Split, read_cifar10, read_cifar100, read_cifar100_fifth
from sparse_mlp.data.config import AugmentConfig, DataConfig, check_configs
from sparse_mlp.data.folder import FolderSource, read_folder
from sparse_mlp.data.images import MODES, ArrayImages, FileImages
from sparse_mlp.data.mix import BatchMixer, batch_mixer
from sparse_mlp.data.spec import InputSpec
from sparse_mlp.errors import UserError

TIMM_PREFIXES = {
    "torch/": "torchvision",
    "hfds/": "datasets",
    "hfids/": "datasets",
    "tfds/": "tensorflow_datasets",
    "wds/": "webdataset",
}
"""How timm's names begin, and the package that each kind needs."""


@dataclass(frozen=True)
class ImageData:
    """A training and a test set, and what the model, the task and the report need to know of them."""

    train: ArrayImages | FileImages | IterableDataset
    test: ArrayImages | FileImages | IterableDataset
    spec: InputSpec
    mixer: BatchMixer | None
    """Mixes every training batch, where mixup or cutmix is on."""

    @property
    def classes(self) -> list[str]:
        """Names, in the order of the labels."""
        return list(self.spec.classes)

    def bad_images(self) -> list[str]:
        """Files that could not be read so far and were skipped."""
        found = []
        for images in (self.train, self.test):
            if isinstance(images, FileImages) and isinstance(images.source, FolderSource):
                found += [images.source.samples[index][0] for index in images.bad_images]
        return found


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
    folder: str


_ARRAY_SETS = {
    "digits": _ArraySet(read_digits, (0.305,), (0.376,), "digits"),
    "cifar10": _ArraySet(read_cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "cifar10"),
    "cifar100": _ArraySet(read_cifar100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar100"),
    "cifar100_fifth": _ArraySet(read_cifar100_fifth, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar100"),
}
SETS = (*_ARRAY_SETS, "folder")
"""Names of the sets of our own; timm's have a prefix."""


def default_root(name: str) -> Path:
    """Where a set is looked for when `DataConfig.root` does not say: $SPARSE_MLP_DATA, else data/, by name."""
    folder = _ARRAY_SETS[name].folder if name in _ARRAY_SETS else name.replace("/", "_")
    return Path(os.environ.get("SPARSE_MLP_DATA") or "data") / folder


def build_datasets(data: DataConfig, augment: AugmentConfig) -> ImageData:
    """Open the set that `data` names, to be augmented as `augment` says.

    Raises ValueError or FileNotFoundError in one line: an unknown name, files that are not there, options that the set
    does not know, or another number of classes than `data.num_classes`.
    """
    check_configs(data, augment)
    _check_used(data)
    root = Path(data.root) if data.root else default_root(data.name)
    if data.name in _ARRAY_SETS:
        built = _build_arrays(data, augment, root)
    elif data.name == "folder":
        if data.root is None:
            raise UserError("a folder set needs --data.root FOLDER")
        train, test, classes = read_folder(root, data.channels or 3, data.test_share)
        built = _build_files(data, augment, train, test, classes)
    elif data.name.lower().startswith(tuple(TIMM_PREFIXES)):
        built = _build_timm(data, augment, root)
    else:
        near = difflib.get_close_matches(data.name, SETS, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"unknown data set {data.name!r}{hint} (known: {', '.join(SETS)}, and timm's {' '.join(TIMM_PREFIXES)})"
        )
    if data.num_classes is not None and data.num_classes != len(built.spec.classes):
        raise UserError(
            f"data.num_classes is {data.num_classes}, but {data.name} has {len(built.spec.classes)} classes"
        )
    if data.label_share is None:
        return built
    return replace(built, train=_labelled_share(built.train, data, built.classes))


def _labelled_share(train: Any, data: DataConfig, classes: Sequence[str]) -> ArrayImages | FileImages:
    """A class-balanced part of a training set. ValueError for a share out of range or one that empties a class."""
    assert data.label_share is not None
    if not 0 < data.label_share <= 1:
        raise UserError(f"data.label_share {data.label_share} is not in (0, 1]")
    labels = train.labels.numpy() if isinstance(train, ArrayImages) else np.array([n for _, n in train.source.samples])
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


def _check_used(data: DataConfig) -> None:
    """ValueError for an option that the named set would ignore."""
    kind = data.name.lower().split("/")[0] + "/" if "/" in data.name else data.name
    timm_kinds = tuple(TIMM_PREFIXES)
    if data.label_seed and data.label_share is None:
        raise UserError(f"data.label_seed {data.label_seed} would be ignored: data.label_share is not set")
    users = {
        "on_bad_image": ("folder", "torch/"),
        "test_share": ("folder",),
        "label_share": SETS,
        "repeats": (*SETS, "torch/", "hfds/"),
        "download": ("cifar10", "cifar100", *timm_kinds),
        "train_split": timm_kinds,
        "test_split": timm_kinds,
        "num_samples": ("hfids/", "tfds/", "wds/"),
        "crop_pct": ("folder", *timm_kinds),
    }
    for option, kinds in users.items():
        value = getattr(data, option)
        if value != getattr(DataConfig(), option) and kind not in kinds and kind in (*SETS, *timm_kinds):
            raise UserError(f"data.{option} {value!r} would be ignored by {data.name}; it is for {', '.join(kinds)}")


def _build_arrays(data: DataConfig, augment: AugmentConfig, root: Path) -> ImageData:
    known = _ARRAY_SETS[data.name]
    channels = len(known.mean)
    if data.channels not in (None, channels):
        raise UserError(f"data.channels is {data.channels}, but the images of {data.name} have {channels}")
    (train, train_labels), (test, test_labels), classes = known.read(root, data.download)
    size = data.image_size or train.shape[-1]
    mean, std = _normalization(data, known.mean, known.std)
    varied = BatchAugment(augment, size, mean, std)
    return ImageData(
        train=ArrayImages(train, train_labels, size, mean, std, varied),
        test=ArrayImages(test, test_labels, size, mean, std),
        spec=InputSpec(tuple(classes), channels, size, mean, std, crop_pct=1.0),
        mixer=batch_mixer(augment, len(classes)),
    )


def _build_files(data: DataConfig, augment: AugmentConfig, train: Any, test: Any, classes: Sequence[str]) -> ImageData:
    """Sets read one by one; a stream is given its transform, any other source is wrapped in FileImages."""
    size = data.image_size or 224
    usual: Any = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if data.channels == 1:
        usual = [(float(np.mean(values)),) for values in usual]
    mean, std = _normalization(data, *usual)
    training = train_transform(augment, size, mean, std)
    spec = InputSpec(tuple(classes), len(mean), size, mean, std, data.crop_pct or 0.875)
    evaluation = spec.transform
    if isinstance(train, IterableDataset):
        train.transform, test.transform = training, evaluation  # type: ignore[attr-defined]
    else:
        train = FileImages(train, training, evaluation, len(mean), data.on_bad_image == "skip")
        test = FileImages(test, None, evaluation, len(mean), data.on_bad_image == "skip")
    return ImageData(train, test, spec, batch_mixer(augment, len(classes)))


def _normalization(
    data: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The configured mean and standard deviation, else those given."""
    for option, value in (("mean", data.mean), ("std", data.std)):
        if value is not None and len(value) != len(mean):
            raise UserError(f"data.{option} {value} must have one number for each of the {len(mean)} channels")
    return data.mean or mean, data.std or std


def _build_timm(data: DataConfig, augment: AugmentConfig, root: Path) -> ImageData:
    splits = []
    prefix = data.name.lower().split("/")[0] + "/"
    torchvision, streamed = prefix == "torch/", prefix not in ("torch/", "hfds/")
    if importlib.util.find_spec(TIMM_PREFIXES[prefix]) is None:
        package = TIMM_PREFIXES[prefix]
        raise UserError(f"data.name {data.name!r} needs the package {package}: pip install {package}")
    for split, training in ((data.train_split, True), (data.test_split, False)):
        try:
            splits.append(
                create_dataset(
                    data.name,
                    root=str(root) if data.root or torchvision else None,
                    split=split,
                    is_training=training,
                    download=data.download,
                    batch_size=data.batch_size if training else data.eval_batch_size,
                    num_samples=data.num_samples if training and streamed else None,
                    input_img_mode=MODES[data.channels or 3],
                )
            )
        except (ImportError, AssertionError, RuntimeError, TypeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"timm cannot open {data.name!r}, split {split!r}: {reason}") from error
    train, test = splits
    return _build_files(data, augment, train, test, _class_names(train, data))


def _class_names(dataset: Any, data: DataConfig) -> list[str]:
    """Class names as far as the set tells them, else their numbers."""
    reader = getattr(dataset, "reader", None)
    names = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    if not names and hasattr(getattr(reader, "dataset", None), "features"):
        names = getattr(reader.dataset.features.get(getattr(reader, "label_key", "label")), "names", None)  # type: ignore[union-attr]
    if names:
        return [name[0] if isinstance(name, tuple) else str(name) for name in names]  # ImageNet: tuples of synonyms
    if data.num_classes is None:
        raise UserError(f"{data.name} does not tell its classes; give --data.num-classes")
    return [str(number) for number in range(data.num_classes)]
