"""Checkpoints written while training goes on: a step waits for a copy of its state, not for the disk."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sparse_mlp.distributed import world_size
from sparse_mlp.engine.checkpoint import save_checkpoint


class Saver:
    """Writes one checkpoint at a time in a thread. Every method but `close` is collective, in the same order."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        # of its own: the thread's messages must not get between those of the training
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._thread: threading.Thread | None = None
        self._result: Path | BaseException | None = None

    def start(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Mapping[str, str]],
        state: Mapping[str, Any],
    ) -> None:
        """Copy the state and begin to write it; see `save_checkpoint`. The one before must have been waited for."""
        assert self._thread is None, "a checkpoint is being written"
        # training goes on with both
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        state = copy.deepcopy(state)

        def write() -> None:
            try:
                self._result = save_checkpoint(self.folder, step, copied, weights, state, self.keep, self._group)
            except BaseException as error:  # raised by `wait`
                self._result = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def wait(self) -> Path | None:
        """Folder of the checkpoint that was being written, None if there was none. CheckpointError if it failed."""
        self.close()
        result, self._result = self._result, None
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Wait for the thread, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
