"""Any folder of images, one subfolder a class."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from sparse_mlp.data.images import read_image
from sparse_mlp.errors import UserError

_TEST_NAMES = ("val", "valid", "validation", "test")


class FolderSource:
    """(PIL image, label) pairs of some image files; an unreadable one raises BadImageError with its name."""

    def __init__(self, samples: list[tuple[str, int]], channels: int) -> None:
        self.samples, self.channels = samples, channels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(Path(path), self.channels), label


def read_folder(root: Path, channels: int, test_share: float | None) -> tuple[FolderSource, FolderSource, list[str]]:
    """Training images, test images and class names of a folder.

    `root` holds train/ and val/ (or valid/, validation/, test/) with one subfolder a class in each; or the class
    folders themselves, of which `test_share` of each class becomes the test set, chosen by the files' names. Raises
    FileNotFoundError or ValueError for a folder that is missing, empty, or whose splits disagree about the classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root {root} is not a folder; it should hold train/ and val/, or one folder a class"
        )
    if (root / "train").is_dir():
        if test_share is not None:
            raise UserError(f"data.test_share {test_share} would be ignored: {root} has a train/ folder")
        tests = [root / name for name in _TEST_NAMES if (root / name).is_dir()]
        if not tests:
            raise FileNotFoundError(
                f"{root} has train/ but none of {', '.join(f'{n}/' for n in _TEST_NAMES)} to test on"
            )
        train, classes = _list_images(root / "train")
        test, test_classes = _list_images(tests[0])
        if classes != test_classes:
            lacking = [f"{n!r} is not in {tests[0].name}/" for n in classes if n not in test_classes]
            lacking += [f"{n!r} is not in train/" for n in test_classes if n not in classes]
            raise UserError(f"the class folders of {root} differ: {'; '.join(lacking[:5])}")
    else:
        images, classes = _list_images(root)
        train, test = _split(images, root, len(classes), 0.2 if test_share is None else test_share)
    return FolderSource(train, channels), FolderSource(test, channels), classes


def _list_images(root: Path) -> tuple[list[tuple[str, int]], list[str]]:
    try:
        found = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} has no class folders; images belong into one subfolder a class") from error
    if not found.samples:
        raise FileNotFoundError(f"there are no images in the class folders of {root}")
    filled = {label for _, label in found.samples}
    empty = [name for label, name in enumerate(found.classes) if label not in filled]
    if empty:
        raise FileNotFoundError(f"class folder {root / empty[0]} has no images ({len(empty)} such in all)")
    return found.samples, found.classes


def _split(
    samples: list[tuple[str, int]], root: Path, classes: int, test_share: float
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Give the share of each class whose names hash lowest to the test set: an added image moves few others."""
    if not 0 < test_share < 1:
        raise UserError(f"data.test_share {test_share} must lie between 0 and 1")
    per_class: list[list[str]] = [[] for _ in range(classes)]
    for path, label in samples:
        per_class[label].append(path)
    chosen = set()
    for paths in per_class:
        if len(paths) < 2:
            raise UserError(f"a class needs two images to be split into train and test; {paths[0]} is alone")
        names = {path: Path(path).relative_to(root).as_posix().encode() for path in paths}
        ranked = sorted(paths, key=lambda path: hashlib.blake2b(names[path]).digest())
        chosen.update(ranked[: min(max(1, round(test_share * len(paths))), len(paths) - 1)])
    return [s for s in samples if s[0] not in chosen], [s for s in samples if s[0] in chosen]
