"""Any folder of images, one subfolder a class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sparse_mlp.data.decode import display_name, read_image
from sparse_mlp.data.files import HIDDEN, describe_left_out, is_hidden, walk_images
from sparse_mlp.errors import UserError

_TEST_NAMES = ("val", "valid", "validation", "test")
_Samples = list[tuple[str, int]]


class FolderSource:
    """(PIL image, label) pairs of some image files; an unreadable one raises BadImageError with its name."""

    def __init__(self, samples: _Samples, channels: int, root: Path) -> None:
        self.samples, self.channels, self.root = samples, channels, root

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(Path(path), self.channels), label

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self.samples]

    def file_name(self, index: int) -> str:
        """Relative to the folder of the set, fit to be shown and stored."""
        return _relative(self.samples[index][0], self.root)

    def subset(self, indices: Sequence[int]) -> FolderSource:
        return FolderSource([self.samples[i] for i in indices], self.channels, self.root)


@dataclass(frozen=True)
class FolderSets:
    """What a folder holds."""

    train: FolderSource
    test: FolderSource
    classes: list[str]
    split: dict[str, list[str]] = field(default_factory=dict)
    """Names of the images of `train` and `test`, where they were divided here rather than by subfolders."""
    notes: list[str] = field(default_factory=list)
    """What was left out, a line each."""


def read_folder(
    root: Path, channels: int, test_share: float | None, split: Mapping[str, Sequence[str]] | None = None
) -> FolderSets:
    """Training images, test images and class names of a folder.

    `root` holds train/ and val/ (or valid/, validation/, test/) with one subfolder a class in each; or the class
    folders themselves, of which `test_share` of each class becomes the test set, chosen by the files' names, or exactly
    the images that a stored `split` names. Raises FileNotFoundError or UserError for a folder that is missing, empty,
    or whose splits disagree about the classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root {display_name(root)} is not a folder; it should hold train/ and val/, or one folder a class"
        )
    if (root / "train").is_dir():
        if split:
            raise UserError(
                f"{display_name(root)} has a train/ folder now, and the run was trained on a split of its own"
            )
        return _read_presplit(root, channels, test_share)
    notes: list[str] = []
    if split:
        classes, files = _list_files(root, notes)
        train, test, classes = _apply_split(root, files, split, notes)
    else:
        images, classes = _list_samples(root, notes)
        train, test = _split_classes(images, root, len(classes), 0.2 if test_share is None else test_share)
    names = {"train": [_relative(path, root) for path, _ in train], "test": [_relative(path, root) for path, _ in test]}
    return FolderSets(FolderSource(train, channels, root), FolderSource(test, channels, root), classes, names, notes)


def _read_presplit(root: Path, channels: int, test_share: float | None) -> FolderSets:
    """A folder with train/ and a test folder."""
    if test_share is not None:
        raise UserError(f"data.test_share {test_share} would be ignored: {display_name(root)} has a train/ folder")
    tests = [root / name for name in _TEST_NAMES if (root / name).is_dir()]
    if not tests:
        wanted = ", ".join(f"{name}/" for name in _TEST_NAMES)
        raise FileNotFoundError(f"{display_name(root)} has train/ but none of {wanted} to test on")
    notes: list[str] = []
    train, classes = _list_samples(root / "train", notes)
    test, test_classes = _list_samples(tests[0], notes)
    if classes != test_classes:
        lacking = [f"{n!r} is not in {tests[0].name}/" for n in classes if n not in test_classes]
        lacking += [f"{n!r} is not in train/" for n in test_classes if n not in classes]
        raise UserError(f"the class folders of {display_name(root)} differ: {'; '.join(lacking[:5])}")
    used = {"train", tests[0].name}
    others = sorted(display_name(p.name) for p in root.iterdir() if p.name not in used and not is_hidden(p.name))
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"not used beside train/ and {tests[0].name}/: {', '.join(others[:5])}{more}")
    return FolderSets(FolderSource(train, channels, root), FolderSource(test, channels, root), classes, notes=notes)


def _list_samples(root: Path, notes: list[str]) -> tuple[_Samples, list[str]]:
    """Every image with the number of its class, and the classes; an empty class is an error."""
    classes, files = _list_files(root, notes)
    if not any(files.values()):
        raise FileNotFoundError(f"there are no images in the class folders of {display_name(root)}{_because(notes)}")
    empty = [name for name in classes if not files[name]]
    if empty:
        shown = display_name(root / empty[0])
        raise FileNotFoundError(f"class folder {shown} has no images ({len(empty)} such in all){_because(notes)}")
    return [(str(path), number) for number, name in enumerate(classes) for path in files[name]], classes


def _because(notes: list[str]) -> str:
    return f"; {notes[-1]}" if notes else ""


def _list_files(root: Path, notes: list[str]) -> tuple[list[str], dict[str, list[Path]]]:
    """Class names in their order and the image files of each; what was left out becomes a note."""
    left_out: Counter[str] = Counter()
    files: dict[str, list[Path]] = {}
    for entry in sorted(root.iterdir()):
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif entry.is_dir():
            files[display_name(entry.name)], reasons = walk_images(entry)
            left_out += reasons
        else:
            left_out["in no class folder"] += 1
    if not files:
        raise FileNotFoundError(f"{display_name(root)} has no class folders; images belong into one subfolder a class")
    if left_out:
        notes.append(describe_left_out(root, left_out))
    return sort_classes(files), files


def sort_classes(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Class names as numbers where all are numbers (0, 1, 2, 10), else as text."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _relative(path: str, root: Path) -> str:
    return display_name(Path(path).relative_to(root).as_posix())


def _apply_split(
    root: Path, files: dict[str, list[Path]], split: Mapping[str, Sequence[str]], notes: list[str]
) -> tuple[_Samples, _Samples, list[str]]:
    """The images that a stored split names, in its order.

    A training image that is gone keeps its place, so that the order of the others stays and reading it fails by name; a
    test image that is gone is left out.
    """
    present = {_relative(str(path), root): str(path) for paths in files.values() for path in paths}
    named = [*split.get("train", ()), *split.get("test", ())]
    classes = sort_classes({name.split("/")[0]: None for name in named})
    labels = {name: number for number, name in enumerate(classes)}
    both = [
        [(present.get(name, str(root / name)), labels[name.split("/")[0]]) for name in split.get(part, ())]
        for part in ("train", "test")
    ]
    for part, images in zip(("train", "test"), both, strict=True):
        gone = [name for name in split.get(part, ()) if name not in present]
        if gone:
            total = len(images)
            notes.append(f"{len(gone)} of the {total} {part} images of the stored split are gone: {gone[0]}, ...")
    new = present.keys() - set(named)
    if new:
        notes.append(f"{len(new)} images are not in the stored split and count as neither training nor test images")
    test = [sample for name, sample in zip(split.get("test", ()), both[1], strict=True) if name in present]
    if not test:
        raise FileNotFoundError(
            f"none of the {len(both[1])} test images of the stored split is in {display_name(root)}"
        )
    return both[0], test, classes


def _split_classes(samples: _Samples, root: Path, classes: int, test_share: float) -> tuple[_Samples, _Samples]:
    """Put the share of each class with the lowest name hashes into the test set: an added image moves few others."""
    if not 0 < test_share <= 1:
        raise UserError(f"data.test_share {test_share} must be above 0 and at most 1 (all images are tested on)")
    if test_share == 1:
        return [], samples
    per_class: list[list[str]] = [[] for _ in range(classes)]
    for path, label in samples:
        per_class[label].append(path)
    chosen = set()
    for paths in per_class:
        if len(paths) < 2:
            shown = display_name(paths[0])
            raise UserError(f"a class needs two images to be split into train and test; {shown} is the only one")
        ranked = sorted(
            paths, key=lambda path: hashlib.blake2b(os.fsencode(Path(path).relative_to(root).as_posix())).digest()
        )
        chosen.update(ranked[: min(max(1, round(test_share * len(paths))), len(paths) - 1)])
    return [s for s in samples if s[0] not in chosen], [s for s in samples if s[0] in chosen]
