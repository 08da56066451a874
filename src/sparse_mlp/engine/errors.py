"""What can end a training run. Every message is one line, complete in itself."""

from __future__ import annotations

import signal


class TrainingError(RuntimeError):
    """Base of everything the engine raises while it trains; `exit_code` is what a command should end with."""

    exit_code = 2


class CheckpointError(TrainingError):
    """A checkpoint could not be written, or is damaged, or is not one of ours."""


class NonFiniteError(TrainingError):
    """The loss or the weights became NaN or infinite."""


class TrainingStopped(TrainingError):
    """Ctrl-C or SIGTERM: the run was saved and can go on. Exit code 128 + signal: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
