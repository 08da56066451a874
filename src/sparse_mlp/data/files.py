"""Find image files, and count the files that are skipped."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from torchvision.datasets import VisionDataset

from sparse_mlp.data.decode import display_name, image_endings

_log = logging.getLogger(__name__)

HIDDEN, _IRREGULAR = "hidden (leading dot)", "not regular files"


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system or a tool: .ipynb_checkpoints, ._photo.jpg, __MACOSX..."""
    return name.startswith(".") or name == "__MACOSX"


def walk_images(root: Path, recursive: bool = True) -> tuple[list[Path], Counter[str]]:
    """Image files of a folder and its subfolders in a fixed order, and how many entries were left out for which reason.

    Links to folders are followed, each folder once. Files are looked at, never opened.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if is_hidden(entry.name):
                    left_out[HIDDEN] += 1
                elif entry.is_dir():
                    if recursive:
                        folders.append(path)
                elif reason := _unread(path):
                    left_out[reason] += 1
                else:
                    files.append(path)
    return sorted(files, key=lambda path: (path.parent.parts, path.name)), left_out


def _unread(path: Path) -> str | None:
    """Why a file that is no folder is left out, or None."""
    if not path.is_file():
        return _IRREGULAR
    ending = path.suffix.lower()
    if ending in image_endings():
        return None
    return f"ending in {display_name(ending)}" if ending else "without an ending"


def describe_left_out(where: Path | str, left_out: Counter[str]) -> str:
    """One line of text, for example: left out of photos: 3 ending in .txt, 1 hidden (leading dot)."""
    parts = [f"{count} {reason}" for reason, count in left_out.most_common(6)]
    rest = sum(left_out.values()) - sum(count for _, count in left_out.most_common(6))
    parts += [f"{rest} others"] if rest else []
    return f"left out of {display_name(where)}: {', '.join(parts)}"


def find_images(paths: Sequence[str | Path], recursive: bool = True) -> list[Path]:
    """The image files that files, folders and patterns such as 'photos/*.jpg' stand for, each once, in that order.

    Folders are searched with their subfolders unless `recursive` is False. Names that begin with a dot, endings that
    are not read, pipes and devices are left out, which a warning counts; a file that is named itself is taken whatever
    its name. Raises FileNotFoundError naming what holds no image.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        files, left_out = [path], Counter[str]()
        if path.is_dir():
            files, left_out = walk_images(path, recursive)
        elif not path.is_file():
            files, left_out = _match(str(given), recursive)
        if not files:
            if path.exists() and not path.is_dir():
                raise FileNotFoundError(f"{display_name(given)} is not a regular file")
            reason = f" ({describe_left_out(given, left_out)})" if left_out else ""
            raise FileNotFoundError(f"there are no images in {display_name(given)}{reason}")
        if left_out:
            _log.warning("%s", describe_left_out(given, left_out))
        found |= dict.fromkeys(files)
    return list(found)


def _match(pattern: str, recursive: bool) -> tuple[list[Path], Counter[str]]:
    """What a pattern stands for; the folders among it are searched."""
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for name in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        path = Path(name)
        if path.is_dir():
            if "**" in pattern:  # which has the files below it too
                continue
            more, reasons = walk_images(path, recursive)
            files += more
            left_out += reasons
        elif reason := _unread(path):
            left_out[reason] += 1
        else:
            files.append(path)
    return files, left_out


def listed_name(dataset: Any, index: int) -> str | None:
    """The file of an item of torchvision's ImageFolder and its kin, or of a Subset of one; None for other datasets."""
    if isinstance(dataset, Subset):
        return listed_name(dataset.dataset, dataset.indices[index])
    samples = getattr(dataset, "samples", None)
    if not isinstance(dataset, VisionDataset) or not samples:
        return None
    path, root = Path(samples[index][0]), Path(dataset.root)
    return display_name((path.relative_to(root) if path.is_relative_to(root) else path).as_posix())
