"""Read a run folder: configuration, environment, metrics, predictions. Invalid files raise a one-line UserError."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sparse_mlp.engine import RunFolder
from sparse_mlp.errors import UserError
from sparse_mlp.files import read_json
from sparse_mlp.report.predictions import Floats, Predictions, read_predictions

# Entries of a line of metrics that are not measured scalars.
_MEASURED = ("train", "eval", "routing")
_NOT_SCALARS = {"kind", "step", "epoch", "time", "layer", "load", "importance", "split", "what", "ema"}

SCORES = {"top1": "Top-1", "miou": "Mean IoU", "box_map": "Box mAP"}
"""What runs of one kind are compared by, shares of 1, and how a page calls it."""

_CLASSIFIERS = ("classify", "knn", "nodes")  # kinds of run whose predictions are always classes

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: stored, but no parameters


@dataclass(frozen=True)
class Series:
    """Metrics over training: `step` and `time` (s) of each line, and every logged number, NaN where a line has none."""

    step: Floats
    time: Floats
    values: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.step)

    def get(self, key: str) -> Floats:
        return self.values.get(key, np.full(len(self.step), np.nan))


@dataclass(frozen=True)
class Routing:
    """What one MoE layer reported over T lines: `load` and `importance` (T, E), the others (T,)."""

    step: Floats
    time: Floats
    load: Floats
    importance: Floats
    dropped: Floats
    entropy: Floats

    @property
    def num_experts(self) -> int:
        return self.load.shape[1]

    def final_load(self) -> Floats:
        """Return the load (E,) averaged over the last tenth of the lines, at least one."""
        return self.load[-max(1, len(self.load) // 10) :].mean(axis=0)

    def final_importance(self) -> Floats:
        """Return the importance (E,) averaged over the last tenth of the lines, at least one."""
        return self.importance[-max(1, len(self.importance) // 10) :].mean(axis=0)


@dataclass(frozen=True)
class RunData:
    """Everything that reports read from a run folder; `sparse_mlp.jobs.Run` is the run itself."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    train: Series
    evals: Series
    routing: dict[str, Routing]
    events: list[dict[str, Any]]
    predictions: Predictions | None
    classes: list[str] | None
    parameters: int | None
    has_experts: bool
    """Whether the model has layers with experts; `routing` holds those that were measured in training."""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def model_name(self) -> str:
        model = self.config.get("model")
        return str(model.get("name", "model")) if isinstance(model, dict) else str(model or "model")

    @property
    def kind(self) -> str:
        """The kind of run that its configuration names."""
        return str(self.config.get("kind") or "")

    @property
    def pretraining(self) -> bool:
        """Whether the run learned from views, without labels; its predictions are then those of the kNN."""
        return _is_pretraining(self.config)

    @property
    def items(self) -> str:
        """What a batch holds."""
        return "nodes" if self.kind == "nodes" or "nodes" in self.evals.values else "images"

    @property
    def last_step(self) -> int:
        steps = [series.step[-1] for series in (self.train, self.evals) if len(series)]
        steps += [event["step"] for event in self.events]
        return int(max(steps, default=0))

    @property
    def seconds(self) -> float:
        """Seconds of training so far; 0 where nothing was logged, see `timed`."""
        times = [series.time[-1] for series in (self.train, self.evals) if len(series)]
        return float(max(times, default=0.0))

    @property
    def timed(self) -> bool:
        """Whether the time of training was logged."""
        return bool(len(self.train) or len(self.evals))

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy in 0..1: of the final predictions, else of the last evaluation, else None."""
        if self.predictions is not None and len(self.predictions.target):
            return float(self.predictions.correct.mean())
        accuracy = self.evals.get("knn_top1" if self.pretraining else "top1")
        return float(accuracy[-1]) if len(accuracy) and np.isfinite(accuracy[-1]) else None

    def score(self, name: str) -> float | None:
        """One of SCORES as the run ended; None where its kind has another."""
        if name == "top1":
            return self.top1
        values = self.evals.get(name)
        return float(values[-1]) if len(values) and np.isfinite(values[-1]) else None

    @property
    def items_per_s(self) -> float | None:
        """Median training throughput."""
        rate = self.train.get("items_per_s")
        return float(np.nanmedian(rate)) if np.isfinite(rate).any() else None


def read_run(run_dir: Path | str) -> RunData:
    """Read the run folder `run_dir`.

    A last line of metrics.jsonl that an interruption cut short is left out and noted; anything else that does not parse
    is a UserError naming file and line. FileNotFoundError if the folder or its config.json is missing.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise FileNotFoundError(f"run folder {path} does not exist")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no config.json")
    notes: list[str] = []
    lines = _read_metrics(path / "metrics.jsonl", notes)
    by_kind: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "routing": [], "event": []}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    config, environment = read_json(path / "config.json"), path / "environment.json"
    return RunData(
        path=path,
        config=config,
        environment=read_json(environment) if environment.is_file() else {},
        train=_series(by_kind["train"]),
        evals=_series(_final_weights_only(by_kind["eval"])),
        routing=_routing(by_kind["routing"], path / "metrics.jsonl"),
        events=by_kind["event"],
        predictions=_read_predictions(path / "predictions.npz", notes, config),
        classes=_read_classes(path / "inputs.json"),
        parameters=_count_parameters(path),
        has_experts=bool(by_kind["routing"]),
        notes=notes,
    )


def _read_classes(path: Path) -> list[str] | None:
    """Return the names of the classes, where the run folder has them."""
    names = read_json(path).get("classes") if path.is_file() else None
    return [str(name) for name in names] if isinstance(names, list) else None


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no metrics.jsonl yet: nothing was logged.")
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was stopped in the middle
                notes.append("The last line of metrics.jsonl was cut short by an interruption and is left out.")
                continue
            raise UserError(f"{path} line {number} is not JSON") from error
        problem = _problem(entry)
        if problem:
            raise UserError(f"{path} line {number} {problem}")
        parsed.append(entry)
    return parsed


def _problem(entry: Any) -> str | None:
    """Return what is wrong with a line of metrics, if anything."""
    if not isinstance(entry, dict) or "kind" not in entry or not isinstance(entry.get("step"), int | float):
        return "is not a metrics line: it needs 'kind' and 'step'"
    scalars = [key for key in entry if key not in _NOT_SCALARS] if entry["kind"] in _MEASURED else []
    for key in ["time", *scalars]:
        if isinstance(entry.get(key), str) or (key == "time" and not isinstance(entry.get(key), int | float | None)):
            return f"does not fit: {key} is {entry[key]!r:.40}, not a number"
    for key in ("load", "importance") if entry["kind"] == "routing" else ():
        shares = entry.get(key)
        if (
            not isinstance(shares, list)
            or not shares
            or not all(isinstance(share, int | float | None) for share in shares)
        ):
            return f"does not fit: {key} should be a list with a number for each expert"
    return None


def _numbers(lines: Iterable[dict[str, Any]], key: str) -> Floats:
    values = (line.get(key) for line in lines)
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)


def _series(lines: list[dict[str, Any]]) -> Series:
    logged = [(key, value) for line in lines for key, value in line.items() if key not in _NOT_SCALARS]
    keys = dict.fromkeys(key for key, value in logged if isinstance(value, int | float))
    return Series(_numbers(lines, "step"), _times(lines), {key: _numbers(lines, key) for key in keys})


def _times(lines: list[dict[str, Any]]) -> Floats:
    """Return the seconds of training, made non-decreasing (a resumed run may repeat a moment)."""
    return np.maximum.accumulate(np.nan_to_num(_numbers(lines, "time"))) if lines else np.zeros(0)


def _final_weights_only(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the evaluations of the weights that are delivered: of the averaged ones, else of the raw ones."""
    averaged = [line for line in lines if line.get("ema")]
    return averaged or lines


def _routing(lines: list[dict[str, Any]], path: Path) -> dict[str, Routing]:
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        # Shares that sum to nothing are those of a layer that never ran in training: a frozen backbone.
        if all(share is not None for share in line["load"]) and sum(line["load"]) > 0:
            by_layer.setdefault(str(line.get("layer")), []).append(line)
    layers = {}
    for name, entries in by_layer.items():
        sizes = {len(entry[key]) for entry in entries for key in ("load", "importance")}
        if len(sizes) != 1:
            raise UserError(f"{path}: layer {name} changes its number of experts: {sorted(sizes)}")
        layers[name] = Routing(
            step=_numbers(entries, "step"),
            time=_times(entries),
            load=np.array([entry["load"] for entry in entries], dtype=np.float64),
            importance=np.array([entry["importance"] for entry in entries], dtype=np.float64),
            dropped=_numbers(entries, "dropped"),
            entropy=_numbers(entries, "entropy"),
        )
    return layers


def _is_pretraining(config: dict[str, Any]) -> bool:
    return config.get("kind") == "pretrain" or "views" in config


def _read_predictions(path: Path, notes: list[str], config: dict[str, Any]) -> Predictions | None:
    if not path.is_file():
        notes.append("There is no final evaluation yet (predictions.npz), so nothing is shown per class.")
        return None
    found = read_predictions(path, classes=config.get("kind", "classify") in _CLASSIFIERS)
    if found is None:
        return None
    labelled = found.labelled()
    if len(labelled.target) < len(found.target):
        without = len(found.target) - len(labelled.target)
        notes.append(f"{without:,} of {len(found.target):,} predictions are of items without a label and not counted.")
    return labelled


def _count_parameters(path: Path) -> int | None:
    """Return the number of weights, from the header of the final or else the newest weights file; None without one."""
    file = path / "model.safetensors"
    if not file.is_file():
        try:
            file = RunFolder(path).weights()
        except FileNotFoundError:
            return None
    try:
        with safe_open(file, framework="numpy") as weights:
            names = [name for name in weights.keys() if not name.endswith(_BUFFERS)]  # noqa: SIM118 - not a dict
            return sum(int(np.prod(weights.get_slice(name).get_shape())) for name in names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a safetensors file: {' '.join(str(error).split())}") from error
