"""Ctrl-C and SIGTERM as a request to stop, which all ranks carry out after the same step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from sparse_mlp.distributed import AsyncMax, world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Handles the signals inside a `with` block. A second Ctrl-C ends the process immediately."""

    def __init__(self) -> None:
        self.received = 0
        self._maximum = AsyncMax()
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there Python handles signals
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None:
            self._maximum.wait()

    def agreed(self) -> int:
        """Number of the signal that all ranks stop for, or 0; collective, called once a step."""
        return self._maximum.reduce(self.received)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data worker: the signal went to the whole process group
            return
        if self.received and number == signal.SIGINT and world_size() == 1:  # torchrun repeats signals to its ranks
            raise KeyboardInterrupt
        self.received = self.received or number
