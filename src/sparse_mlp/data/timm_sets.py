"""Sets that timm opens by name: torchvision's, Hugging Face's, tensorflow_datasets', WebDataset shards."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset

from sparse_mlp.data.config import DataConfig
from sparse_mlp.data.decode import MODES, BadImageError, convert_image, decode_image
from sparse_mlp.data.trust import check_info, check_shards, is_remote
from sparse_mlp.errors import UserError

_log = logging.getLogger(__name__)

TIMM_PREFIXES = {
    "torch/": "torchvision",
    "hfds/": "datasets",
    "hfids/": "datasets",
    "tfds/": "tensorflow_datasets",
    "wds/": "webdataset",
}
"""How timm's names begin, and the package that each kind needs."""


class ReaderSource:
    """(PIL image, label) pairs of one of timm's readers by index, decoded as the files of a folder are."""

    def __init__(self, reader: Any, channels: int) -> None:
        self.reader, self.channels = reader, channels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.reader[index][:2]
        with file:
            return decode_image(file, self.channels, self.file_name(index) or f"{index}"), label

    def file_name(self, index: int) -> str | None:
        return self.reader.filename(index)


class StreamSource(IterableImageDataset):
    """timm's stream with images converted as those of a folder are; a bad one is skipped with a warning, as by timm."""

    def __init__(self, reader: Any, channels: int) -> None:
        super().__init__("", reader=reader)
        self.channels = channels

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for image, target in self.reader:
            try:
                image = convert_image(image, self.channels)
            except BadImageError as error:
                _log.warning("skipped: %s", error)
                continue
            yield image if self.transform is None else self.transform(image), target


def open_timm(data: DataConfig, root: Path) -> tuple[Any, Any, list[str]]:
    """Training set, test set and class names. UserError or FileNotFoundError, one line, for what cannot be opened."""
    prefix = data.name.lower().split("/")[0] + "/"
    if data.name.lower() in ("torch/folder", "torch/image_folder"):
        raise UserError(f"{data.name} is read as data.name folder, with --data.root")
    if importlib.util.find_spec(TIMM_PREFIXES[prefix]) is None:
        package = TIMM_PREFIXES[prefix]
        raise UserError(f"data.name {data.name!r} needs the package {package}: pip install {package}")
    local_shards = prefix == "wds/" and not is_remote(data.root or str(root))
    if local_shards:
        check_info(data.root or str(root))
    train, test = (_open_split(data, root, prefix, training) for training in (True, False))
    if local_shards:
        for part in (train, test):
            check_shards(data.root or str(root), part.reader)
    return train, test, _class_names(train, data)


def _open_split(data: DataConfig, root: Path, prefix: str, training: bool) -> Any:
    split, channels = (data.train_split if training else data.test_split), data.channels or 3
    streamed = prefix not in ("torch/", "hfds/")
    try:
        opened = create_dataset(
            data.name,
            root=data.root or (str(root) if prefix in ("torch/", "wds/") else None),
            split=split,
            is_training=training,
            download=data.download,
            batch_size=data.batch_size if training else data.eval_batch_size,
            num_samples=data.num_samples if training and streamed else None,
            # tensorflow_datasets decodes by itself; elsewhere no mode: the conversion is ours
            input_img_mode=MODES[channels] if prefix == "tfds/" else "",
        )
    except KeyError as error:
        raise UserError(f"timm cannot open {data.name!r}, split {split!r}: its description lacks {error}") from error
    # timm and the packages behind it raise whatever their files lead to.
    except (ImportError, AssertionError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"timm cannot open {data.name!r}, split {split!r}: {reason}") from error
    if isinstance(opened, IterableImageDataset):
        return StreamSource(opened.reader, channels)
    return ReaderSource(opened.reader, channels) if isinstance(opened, ImageDataset) else opened


def _class_names(dataset: Any, data: DataConfig) -> list[str]:
    """Class names as far as the set has them, else their numbers."""
    reader = getattr(dataset, "reader", None)
    names = getattr(dataset, "classes", None) or getattr(reader, "class_to_idx", None)
    if not names and hasattr(getattr(reader, "dataset", None), "features"):
        names = getattr(reader.dataset.features.get(getattr(reader, "label_key", "label")), "names", None)  # type: ignore[union-attr]
    if names:
        return [name[0] if isinstance(name, tuple) else str(name) for name in names]  # ImageNet: tuples of synonyms
    if data.num_classes is None:
        raise UserError(f"{data.name} does not tell its classes; give --data.num-classes")
    return [str(number) for number in range(data.num_classes)]
