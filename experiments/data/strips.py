"""CIFAR images as zips of lossless WebP strips: 100 images, one below the other, in each file."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sparse_mlp.errors import UserError

STRIP = 100
"""Images in one strip."""


def read_strips(archives: Sequence[Path]) -> np.ndarray:
    """All images of some zips, in order, as (N, 3, 32, 32) uint8. UserError naming one that is damaged."""

    def decode(content: bytes) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        return pixels.reshape(STRIP, 32, 32, 3).transpose(0, 3, 1, 2)

    strips: list[np.ndarray] = []
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as file, ThreadPoolExecutor(2) as pool:
                strips += pool.map(decode, [file.read(name) for name in sorted(file.namelist())])
        except (zipfile.BadZipFile, zlib.error, UnidentifiedImageError, ValueError) as error:
            raise UserError(f"{archive} is damaged: {error}") from error
    return np.concatenate(strips)
