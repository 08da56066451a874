"""From lossless WebP strips of a class-balanced fifth of CIFAR-100 to a folder of PNG files, train/CLASS and val/CLASS.

    python -m experiments.data.cifar100_fifth SOURCE OUT    # then --data.name folder --data.root OUT

SOURCE holds train.zip (10,000 images), test.zip (2,000), labels_train.npy, labels_test.npy and classes.txt. What is
measured on it is not comparable with figures for all of CIFAR-100, whose official files have other checksums.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.data.strips import read_strips, run_command
from sparse_mlp.errors import UserError


def write_fifth(source: Path, out: Path) -> int:
    """Write the images into `out`; returns how many. UserError if images and labels do not fit."""
    classes = (source / "classes.txt").read_text().split()
    written = 0
    for split, folder in (("train", "train"), ("test", "val")):
        images = read_strips([source / f"{split}.zip"]).transpose(0, 2, 3, 1)
        labels = np.load(source / f"labels_{split}.npy")
        if len(images) != len(labels) or labels.max() >= len(classes):
            raise UserError(f"{source} has {len(images)} {split} images and {len(labels)} labels, up to {labels.max()}")
        for name in classes:
            (out / folder / name).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(out / folder / classes[label] / f"{number:05d}.png", compress_level=1)
        written += len(images)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda source, out: f"{write_fifth(source, out):,} images in {out}", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
