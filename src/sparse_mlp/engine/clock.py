"""How long training took, without evaluation, saving and what happened before a resumption."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Lap:
    """Updates between two lines of metrics, the seconds they took, and how many of these went into waiting for data."""

    steps: int
    seconds: float
    waited: float


class Clock:
    """Seconds of training. A checkpoint holds its `state`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0  # seconds up to the last start
        self._started: float | None = None
        self._waited = 0.0
        self._lap_step, self._lap_seconds = 0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the block does not count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # work under way is training
        running = self._started is not None
        self._before, self._started = self.seconds(), None
        try:
            yield
        finally:
            if running:
                self.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the block counts as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def lap(self, step: int) -> Lap:
        """The lap that ends after update `step`; the next one begins."""
        seconds = self.seconds()
        lap = Lap(step - self._lap_step, max(seconds - self._lap_seconds, 1e-9), self._waited)
        self._lap_step, self._lap_seconds, self._waited = step, seconds, 0.0
        return lap

    def state(self) -> dict[str, float]:
        return {"seconds": self.seconds(), "waited": self._waited, "lap_step": self._lap_step, "lap": self._lap_seconds}

    def load(self, state: dict[str, float]) -> None:
        self._before, self._waited = state["seconds"], state["waited"]
        self._lap_step, self._lap_seconds = int(state["lap_step"]), state["lap"]
