"""CIFAR images as zips of lossless WebP strips: 100 images, one below the other, in each file."""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
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


def run_command(convert: Callable[[Path, Path], str], description: str | None, argv: Sequence[str] | None) -> int:
    """`convert(SOURCE, OUT)` from a command line. Returns the exit code: 0, or 2 after a user's mistake, one line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(argv)
    try:
        print(convert(given.source, given.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
