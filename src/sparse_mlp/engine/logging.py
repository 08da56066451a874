"""The metrics of a run: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_mlp.distributed import mean, world_size
from sparse_mlp.engine.run import RunFolder
from sparse_mlp.errors import UserError
from sparse_mlp.files import naming
from sparse_mlp.moe import telemetry


class Meter:
    """Values per step since the last line of metrics.

    They stay on the device until they are needed, so that a step does not synchronise with it.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._pending: list[dict[str, Tensor]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's detached scalars."""
        self._pending.append(values)

    def flush(self) -> None:
        """Convert the pending values to Python numbers, averaged over the ranks; collective.

        Values that are not finite are left out (the gradient's norm in a skipped fp16 step), except for the loss.
        """
        if not self._pending:
            return
        flat = torch.stack([value.double() for values in self._pending for value in values.values()])
        numbers = iter(mean(flat).tolist())
        for values in self._pending:
            step = {name: next(numbers) for name in values}
            self.steps.append({name: value for name, value in step.items() if math.isfinite(value) or name == "loss"})
        self._pending.clear()

    def take(self) -> dict[str, float]:
        """Mean of each name over the steps since the last call that have it."""
        columns: dict[str, list[float]] = {}
        for values in self.steps:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        self.steps = []
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run; a context manager. `step` counts finished updates."""

    def __init__(self, run: RunFolder, step: int, warn: Callable[[str], None]) -> None:
        """Append after `step`; lines that an interrupted run wrote of later steps are removed.

        UserError if the file holds other lines. A failure to write TensorBoard events goes to `warn` as one line, once,
        and ends only these events: metrics.jsonl holds the same numbers.
        """
        self._path, self._warn = run.metrics_path, warn
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._logged = _truncate(self._path, step)
        self._file = self._path.open("a")
        self._folder, self._purge_step = run.tensorboard, step + 1
        self._tensorboard: Any = None

    def __enter__(self) -> MetricsLog:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._thread_hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        with self._tensorboard_errors():
            self._tensorboard = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # On a full disk closing fails as well; the error being raised explains it better.
        with contextlib.suppress(*(OSError,) if kind else ()):
            self._file.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError) if kind else self._tensorboard_errors():
                self._tensorboard.close()
        threading.excepthook = self._thread_hook

    def has(self, kind: str, step: int) -> bool:
        """Whether the file held a line of this kind at this step when it was opened."""
        return (kind, step) in self._logged

    def write(self, kind: str, step: int, epoch: float, seconds: float, values: Mapping[str, Any]) -> None:
        """Write one line. OSError that names the file if it cannot be written."""
        line = {"kind": kind, "step": step, "epoch": epoch, "time": seconds, **values}
        text = json.dumps(line, allow_nan=False)
        with naming(self._path):
            self._file.write(text + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            with self._tensorboard_errors():
                for name, value in _scalars(kind, values):
                    self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Write everything to the disk, before a checkpoint that relies on it."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            with self._tensorboard_errors():
                self._tensorboard.flush()

    @contextlib.contextmanager
    def _tensorboard_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._tensorboard = None
            self._warn(f"no more TensorBoard events: could not write them: {error.strerror or error}")

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread, whose error is raised again by the next call: no traceback of the thread too.
        if not (type(error.thread).__module__.startswith("tensorboard.") and isinstance(error.exc_value, OSError)):
            self._thread_hook(error)


def _truncate(path: Path, step: int) -> set[tuple[str, int]]:
    """Remove lines of later steps and an incomplete last line; returns (kind, step) of the lines that stay."""
    if not path.exists():
        return set()
    kept, logged = [], set()
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            position = (str(line["kind"]), int(line["step"]))
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise UserError(f"{path} line {number} is not a line of metrics: {text.strip()[:60]!r}") from None
        if position[1] <= step and text.endswith("\n"):
            kept.append(text)
            logged.add(position)
    if len(kept) < len(lines):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
    return logged


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


def routing_statistics(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Statistics of the last forward of each MoE layer by its name, averaged over the ranks; collective."""
    return {name: _mean_over_ranks(layer.to_dict()) for name, layer in telemetry.collect(model).items()}


def _mean_over_ranks(statistics: dict[str, Any]) -> dict[str, Any]:
    """Numbers and lists of numbers, averaged over the ranks; collective."""
    if world_size() == 1:
        return statistics
    flat = [number for value in statistics.values() for number in (value if isinstance(value, list) else [value])]
    numbers = iter(mean(torch.tensor(flat, dtype=torch.float64)).tolist())
    return {
        name: [next(numbers) for _ in value] if isinstance(value, list) else next(numbers)
        for name, value in statistics.items()
    }
