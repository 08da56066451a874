"""torch's process-wide settings, for the duration of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from sparse_mlp.engine.config import TrainConfig


@contextlib.contextmanager
def torch_settings(train: TrainConfig) -> Iterator[None]:
    """Set number of threads and deterministic algorithms; restores both."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic cuBLAS
    torch.use_deterministic_algorithms(train.deterministic or deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
