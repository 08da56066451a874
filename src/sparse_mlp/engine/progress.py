"""The progress of a run: a bar in a terminal or notebook, else lines at intervals; on standard error."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_LINE_SECONDS = 5.0  # minimum time between two lines where there is no bar
_HIDDEN = {"lr", "grad_norm", "data_time", "items_per_s", "balance"}  # only in metrics.jsonl


class ProgressBar:
    """Shows progress; a context manager. Silent if `show` is False.

    A notebook has a bar if ipywidgets is installed, else lines.
    """

    def __init__(self, *, steps_per_epoch: int, items: str, show: bool) -> None:
        """`items` is what a step consists of, in the plural."""
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        self._steps_per_epoch, self._items = steps_per_epoch, items
        self._step, self._steps, self._share = 0, "", 0.0
        self._last_line = -math.inf
        self._live: Progress | None = None
        if show and _can_redraw(self._console):
            # Descriptions hold names of users' metrics and classes: markup would drop what is in square brackets.
            self._live = Progress(
                TextColumn("{task.fields[steps]}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=self._console,
                expand=True,
                refresh_per_second=2,  # a refresh takes milliseconds from the training
            )
            self._bar = self._live.add_task("", total=1.0, steps="")

    def __enter__(self) -> ProgressBar:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self, step: int, steps: int | None, share: float) -> None:
        """Show that `step` updates of `steps` (None: not known yet), or `share` of the run (0 to 1), are done."""
        self._step, self._share = step, share
        self._steps = f"{step}" if steps is None else f"{step}/{steps}"
        if self._live:
            self._live.update(self._bar, completed=share, steps=self._steps)

    def train(self, values: Mapping[str, float], seconds_left: float) -> None:
        """Show a line of training metrics: the task's own, the throughput and, without a bar, the time left."""
        parts = [f"{name} {value:.3f}" for name, value in values.items() if name not in _HIDDEN]
        parts.append(f"{values['items_per_s']:,.0f} {self._items}/s")
        if self._live:
            self._live.update(self._bar, description="  ".join(parts))
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_SECONDS or self._share >= 1:
            self._last_line = now
            left = timedelta(seconds=round(seconds_left))
            epoch = self._step / self._steps_per_epoch
            self.print(f"step {self._steps}  epoch {epoch:.2f}  {'  '.join(parts)}  {left} left")

    def evaluation(self, metrics: Mapping[str, float], averaged: bool) -> None:
        """Print the metrics of an evaluation, of the averaged weights or not."""
        values = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{value:,} {name}"
            for name, value in metrics.items()
        )
        self.print(f"step {self._steps}  test{' (averaged weights)' if averaged else ''}  {values}")

    def print(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def status(self, activity: str) -> None:
        """Show on the bar what the run does instead of training."""
        if self._live:
            self._live.update(self._bar, description=activity)


def _can_redraw(console: Console) -> bool:
    """Whether a bar can replace what it showed before; rich needs ipywidgets for it in a notebook."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal
