"""Ctrl-C and SIGTERM as a request that is answered between two steps, by all ranks after the same one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from sparse_mlp.distributed import Vote, world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Catches the signals for the time of a `with` block. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received = 0
        self._vote = Vote()
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._vote.close()

    def agreed(self) -> int:
        """The signal number all ranks stop for, or 0; collective, once a step."""
        return self._vote.cast(self.received)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked data worker, which got a signal meant for the whole process group
            return
        if self.received and number == signal.SIGINT and world_size() == 1:  # torchrun repeats signals to its ranks
            raise KeyboardInterrupt
        self.received = self.received or number
