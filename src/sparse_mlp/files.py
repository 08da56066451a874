"""Files that the package writes, whole or not at all, and JSON that it reads; used by every layer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_mlp.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. UserError, which names the file, if that is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write a small file atomically: after a failure the old content is still there."""
    with replacing(path) as temporary, temporary.open("w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file of the same ending beside `path` that takes its place at the end of the block.

    After a failure it is deleted, and an OSError names `path`.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write compressed arrays atomically, as `write_json`."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block: on a full disk the system names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Add `folder` to an error of the system's that names no file: a full disk under a figure or a page."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(f"could not write into {folder}: {error.strerror}") from error
