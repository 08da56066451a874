"""Exceptions that end a training run. Every message is one complete line."""

from __future__ import annotations

import signal


class TrainingError(RuntimeError):
    """Base of the engine's exceptions during training; `exit_code` is the exit status of a command."""

    exit_code = 2


class CheckpointError(TrainingError):
    """A checkpoint could not be written, is damaged, or belongs to another model."""


class NonFiniteError(TrainingError):
    """The loss or the weights became NaN or infinite."""


class TrainingStopped(TrainingError):
    """Ctrl-C or SIGTERM: the run was saved and can be resumed. Exit status 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
