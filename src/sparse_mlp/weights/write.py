"""Weights into a file, all of them or none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["write_file"]


def write_file(tensors: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name and rename it: a full disk leaves the old file, or none.

    OSError, one line, that names the file if it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata or {}))
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OSError(f"could not write {target}: {reason}") from error
