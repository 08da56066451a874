"""What a run says: metrics.jsonl, TensorBoard events, and a progress bar (plain lines where there is no terminal)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from sparse_mlp.distributed import mean
from sparse_mlp.engine.run import RunFolder, naming
from sparse_mlp.errors import UserError

_PLAIN_SECONDS = 5.0  # least time between two plain progress lines
_NOT_SHOWN = {"lr", "grad_norm", "data_time", "images_per_s", "balance"}  # in the file, not on the bar


class Meter:
    """Values per step since the last line of metrics.

    They stay on the device until they are needed, so that a step never waits for them.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._waiting: list[dict[str, Tensor]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Take one step's detached scalars."""
        self._waiting.append(values)

    def flush(self) -> None:
        """Bring what waits to Python numbers, averaged over the ranks; collective.

        What is not finite is left out (the gradient's norm where an fp16 step was skipped), but not a loss.
        """
        if not self._waiting:
            return
        flat = torch.stack([value.double() for values in self._waiting for value in values.values()])
        numbers = iter(mean(flat).tolist())
        for values in self._waiting:
            step = {name: next(numbers) for name in values}
            self.steps.append({name: value for name, value in step.items() if math.isfinite(value) or name == "loss"})
        self._waiting.clear()

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call; of a name that some of them lack, over the others."""
        columns: dict[str, list[float]] = {}
        for values in self.steps:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        self.steps = []
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run; a context manager. `step` counts finished updates."""

    def __init__(self, run: RunFolder, step: int) -> None:
        """Append behind `step`; lines an interrupted run wrote of later steps are cut. ValueError for foreign lines."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._path = run.metrics_path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._said = _cut(self._path, step)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # On a full disk closing fails as well; what is on its way up says it better.
        ignored = (OSError,) if kind else ()
        for opened in (self._file, self._board):
            with contextlib.suppress(*ignored):
                opened.close()

    def has(self, kind: str, step: int) -> bool:
        """Whether the file held a line of this kind at this step when it was opened."""
        return (kind, step) in self._said

    def write(self, kind: str, step: int, epoch: float, seconds: float, values: Mapping[str, Any]) -> None:
        """One line. OSError that names the file if it cannot be written."""
        line = {"kind": kind, "step": step, "epoch": epoch, "time": seconds, **values}
        text = json.dumps(line, allow_nan=False)
        with naming(self._path):
            self._file.write(text + "\n")
            self._file.flush()
        for name, value in _scalars(kind, values):
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Bring everything to the disk, before a checkpoint that relies on it."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        self._board.flush()


def _cut(path: Path, step: int) -> set[tuple[str, int]]:
    """Drop lines of later steps and a last line that was not finished; returns (kind, step) of what stays."""
    if not path.exists():
        return set()
    kept, said = [], set()
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            where = (str(line["kind"]), int(line["step"]))
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise UserError(f"{path} line {number} is not a line of metrics: {text.strip()[:60]!r}") from None
        if where[1] <= step and text.endswith("\n"):
            kept.append(text)
            said.add(where)
    if len(kept) < len(lines):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
    return said


def _scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values for TensorBoard."""
    if kind == "routing":
        layer, load = values["layer"], values["load"]
        entropy = -sum(share * math.log(share) for share in load if share > 0) / math.log(max(len(load), 2))
        yield f"routing_load_entropy/{layer}", entropy
        yield f"routing_max_load/{layer}", max(load)
        yield f"routing_dropped/{layer}", values["dropped"]
        yield f"routing_entropy/{layer}", values["entropy"]
    elif kind in ("train", "eval"):
        prefix = "eval_ema" if values.get("ema") else kind
        for name, value in values.items():
            if isinstance(value, float):
                yield f"{prefix}/{name}", value


class ProgressBar:
    """A live bar on a terminal, else a plain line now and then; on standard error. Silent where `show` is False."""

    def __init__(self, step: int, steps: int, steps_per_epoch: int, *, show: bool, items: str = "images") -> None:
        self._console = Console(stderr=True, quiet=not show, highlight=False)
        self._steps, self._steps_per_epoch, self._items = steps, steps_per_epoch, items
        self._said_at = -math.inf
        self._live: Progress | None = None
        if show and self._console.is_terminal:
            self._live = Progress(
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=self._console,
                expand=True,
                refresh_per_second=2,  # drawing takes milliseconds from the training
            )
            self._bar = self._live.add_task("", total=steps, completed=step)

    def __enter__(self) -> ProgressBar:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self, step: int) -> None:
        if self._live:
            self._live.update(self._bar, completed=step)

    def train(self, step: int, values: Mapping[str, float], seconds_per_step: float) -> None:
        """Show a line of training metrics: loss, what the task measures, speed, and (plain) the time left."""
        shown = [name for name in values if name not in _NOT_SHOWN]
        parts = [f"{name} {values[name]:.3f}" for name in shown]
        parts.append(f"{values['images_per_s']:,.0f} {self._items}/s")
        if self._live:
            self._live.update(self._bar, description="  ".join(parts))
            return
        now = time.monotonic()
        if now - self._said_at >= _PLAIN_SECONDS or step == self._steps:
            self._said_at = now
            left = timedelta(seconds=round((self._steps - step) * seconds_per_step))
            epoch = step / self._steps_per_epoch
            self.say(f"step {step}/{self._steps}  epoch {epoch:.2f}  {'  '.join(parts)}  {left} left")

    def evaluation(self, step: int, metrics: Mapping[str, float], averaged: bool) -> None:
        """A line that stays, for an evaluation."""
        values = "  ".join(
            f"{n} {value:.4g}" if isinstance(value, float) else f"{value:,} {n}" for n, value in metrics.items()
        )
        self.say(f"step {step}/{self._steps}  test{' (averaged weights)' if averaged else ''}  {values}")

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def note(self, what: str) -> None:
        """Say on the bar what is going on besides training."""
        if self._live:
            self._live.update(self._bar, description=what)
