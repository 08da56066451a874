"""Weights into a file, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_mlp.files import replacing

__all__ = ["write_file"]


def write_file(tensors: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. OSError, one line, that names it if it cannot be written; the old one is kept then."""
    with replacing(target) as temporary:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(str(error)) from error
