"""How long a run is: a number of updates, or a training time."""

from __future__ import annotations

from typing import Any

from sparse_mlp.engine.config import ScheduleConfig, TrainConfig

_SHORTENED = 10  # a shortened warm-up is a tenth of the run
_SETTLING_UPDATES = 2  # compilation and allocation happen in the first updates: they say nothing about the pace
_UNIT = 1000.0  # length of the warm-up, and of the decay after it, in the schedule of a run by time


def requested_warmup(schedule: ScheduleConfig, steps_per_epoch: int) -> int:
    """Updates of warm-up that the configuration asks for."""
    if schedule.warmup_epochs is not None:
        return round(schedule.warmup_epochs * steps_per_epoch)
    return schedule.warmup_steps or 0


def count_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Updates of a run whose length is in steps or epochs; at least one."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None, "check_configs accepts exactly one length"
    return max(1, round(train.epochs * steps_per_epoch))


class StepLength:
    """A run of `steps` updates. A warm-up that takes more than half of them is shortened to a tenth of the run."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps: int | None = steps
        self._steps, self._requested = steps, warmup
        self.warmup = warmup if 2 * warmup <= steps else steps // _SHORTENED
        self.schedule_length: float = steps
        self.schedule_warmup: float = self.warmup

    def finished(self, step: int, seconds: float) -> bool:
        """Whether `step` updates, which took `seconds`, are all of the run."""
        return step >= self._steps

    def share(self, step: int, seconds: float) -> float:
        """Share of the run that is over, 0 to 1."""
        return min(1.0, step / self._steps)

    def position(self, step: int, seconds: float) -> float:
        """Where in the schedule, of `schedule_length`, update `step` is."""
        return step

    def expected_steps(self, step: int, seconds: float) -> int:
        """Updates of the whole run."""
        return self._steps

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        """Training time that remains."""
        return (self._steps - step) * seconds_per_step

    def warmup_note(self) -> str | None:
        """One line if the warm-up is not the requested one."""
        if self.warmup == self._requested:
            return None
        return (
            f"a warm-up of {self._requested} updates is more than half of the run's {self._steps}: "
            f"shortened to {self.warmup}, a tenth of the run"
        )

    def state(self) -> dict[str, Any]:
        return {"warmup": self.warmup}

    def load(self, state: dict[str, Any]) -> None:
        """Keep the warm-up that the run began with: a longer run would shorten it to another length."""
        self.warmup = self._requested = state["warmup"]
        self.schedule_warmup = self.warmup


class TimeLength:
    """A run of `budget` seconds of training.

    The warm-up takes its updates, but at most a tenth of the time; the decay runs over the share of the remaining time
    that has elapsed. `steps` is None until the run is over.
    """

    def __init__(self, budget: float, warmup: int) -> None:
        self.steps: int | None = None
        self._budget, self._warmup = budget, warmup
        self._settled: float | None = None  # seconds after the first updates
        self._warmup_end: tuple[int, float] | None = None if warmup else (0, 0.0)  # update and seconds
        self.schedule_warmup = _UNIT if warmup else 0.0
        self.schedule_length = self.schedule_warmup + _UNIT

    def finished(self, step: int, seconds: float) -> bool:
        """Whether the time is over; sets `steps` if it is. A run has at least one update."""
        if step == 0 or seconds < self._budget:
            return False
        self.steps = step
        return True

    def share(self, step: int, seconds: float) -> float:
        """Share of the time that is over, 0 to 1."""
        return min(1.0, seconds / self._budget)

    def position(self, step: int, seconds: float) -> float:
        """Where in the schedule, of `schedule_length`, update `step` is; called with increasing arguments."""
        if self._warmup_end is None:
            progress = self._warmup_progress(step, seconds)
            if progress < 1:
                return _UNIT * progress
            self._warmup_end = (step, seconds)
        _, start = self._warmup_end
        decay = (seconds - start) / max(self._budget - start, 1e-9)
        return self.schedule_warmup + _UNIT * min(decay, 1.0)

    def _warmup_progress(self, step: int, seconds: float) -> float:
        by_updates = step / self._warmup
        if step < _SETTLING_UPDATES:
            return by_updates
        if self._settled is None:
            self._settled = seconds
        remaining = max(self._budget - self._settled, 1e-9)
        return max(by_updates, _SHORTENED * (seconds - self._settled) / remaining)

    def expected_steps(self, step: int, seconds: float) -> int:
        """Updates of the whole run at the pace so far."""
        share = self.share(step, seconds)
        return max(step + 1, round(step / share)) if share > 0 else step + 1

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        """Training time that remains."""
        return max(0.0, self._budget - seconds)

    def warmup_note(self) -> str | None:
        """One line if the warm-up ended before its last update, else None."""
        if self._warmup_end is None or self._warmup_end[0] >= self._warmup:
            return None
        return (
            f"the warm-up of {self._warmup} updates ended after {self._warmup_end[0]}: "
            f"it takes at most a tenth of the training time"
        )

    def state(self) -> dict[str, Any]:
        return {"settled": self._settled, "warmup_end": self._warmup_end}

    def load(self, state: dict[str, Any]) -> None:
        self._settled = state["settled"]
        if state["warmup_end"] is not None:
            step, seconds = state["warmup_end"]
            self._warmup_end = (step, seconds)


def create_length(train: TrainConfig, schedule: ScheduleConfig, steps_per_epoch: int) -> StepLength | TimeLength:
    """The length that a configuration describes."""
    warmup = requested_warmup(schedule, steps_per_epoch)
    if train.minutes is not None:
        return TimeLength(60 * train.minutes, warmup)
    return StepLength(count_steps(train, steps_per_epoch), warmup)
