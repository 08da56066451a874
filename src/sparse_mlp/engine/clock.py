"""Training time, without evaluation and saving, over all processes of a resumed run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interval:
    """Updates between two lines of metrics, their training time in seconds, and the part of it spent on data."""

    steps: int
    seconds: float
    waited: float


class Clock:
    """Seconds of training, as the host measures them. `state` goes into a checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elapsed = 0.0  # seconds before the last start
        self._started: float | None = None
        self._waited = 0.0
        self._interval_step, self._interval_seconds = 0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._elapsed + (time.perf_counter() - self._started if self._started is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the training time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # work in progress belongs to the training
        running = self._started is not None
        self._elapsed, self._started = self.seconds(), None
        try:
            yield
        finally:
            if running:
                self.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def interval(self, step: int) -> Interval:
        """The interval that ends after update `step`; the next one begins."""
        seconds = self.seconds()
        interval = Interval(step - self._interval_step, max(seconds - self._interval_seconds, 1e-9), self._waited)
        self._interval_step, self._interval_seconds, self._waited = step, seconds, 0.0
        return interval

    def state(self) -> dict[str, float]:
        return {
            "seconds": self.seconds(),
            "waited": self._waited,
            "interval_step": self._interval_step,
            "interval": self._interval_seconds,
        }

    def load(self, state: dict[str, float]) -> None:
        self._elapsed, self._waited = state["seconds"], state["waited"]
        self._interval_step, self._interval_seconds = int(state["interval_step"]), state["interval"]
