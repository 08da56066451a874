"""CIFAR-10 and CIFAR-100 from the official python files.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

Split = tuple[np.ndarray, np.ndarray]
"""Images (N, 3, 32, 32) uint8 and labels (N,)."""


def read_cifar(dataset: type[CIFAR10], root: Path, download: bool) -> tuple[Split, Split, list[str]]:
    """Train split, test split and class names from the official python layout in `root`, checked against its md5.

    Raises FileNotFoundError, naming what is expected where, if the files are missing or damaged and cannot be fetched.
    """
    try:
        train, test = (dataset(str(root), train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        wanted = f"{root / dataset.base_folder}/ with {dataset.train_list[0][0]} ... {dataset.test_list[0][0]}"
        advice = (
            f"the download failed ({_first_line(error)})"
            if download
            else "--data.download on the command line fetches it"
        )
        raise FileNotFoundError(
            f"{dataset.__name__} is not in {root}: expected {wanted} (official md5); {advice}"
        ) from error
    splits = [(np.ascontiguousarray(d.data.transpose(0, 3, 1, 2)), np.asarray(d.targets)) for d in (train, test)]
    return splits[0], splits[1], list(train.classes)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
