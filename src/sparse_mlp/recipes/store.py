"""What a run folder remembers of its recipe and of its images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from sparse_mlp.data import DataConfig, InputSpec
from sparse_mlp.engine import RunFolder
from sparse_mlp.engine.run import write_json
from sparse_mlp.errors import UserError
from sparse_mlp.recipes.recipe import ModelConfig, Recipe, decode

T = TypeVar("T")


def load(run_dir: str | Path) -> Recipe:
    """The recipe that a run folder was made with. FileNotFoundError or ValueError, naming the file, if it is none."""
    run = RunFolder.open(run_dir)
    try:
        return decode(Recipe, run.config())
    except ValueError as error:
        raise UserError(f"{run.config_path}: {error}") from error


def load_model_config(run_dir: str | Path) -> ModelConfig:
    """Which model a run folder holds, whatever it was trained on: classes, no classes, or two views."""
    return _section(ModelConfig, run_dir, "model")


def load_data_config(run_dir: str | Path) -> DataConfig:
    """Which images a run folder was trained on."""
    return _section(DataConfig, run_dir, "data")


def _section(kind: type[T], run_dir: str | Path, name: str) -> T:
    run = RunFolder.open(run_dir)
    try:
        return decode(kind, run.config()[name], name)
    except KeyError:
        raise UserError(f"{run.config_path} has no {name}: it is no run on images") from None
    except ValueError as error:
        raise UserError(f"{run.config_path}: {error}") from error


def save_inputs(run_dir: str | Path, spec: InputSpec) -> None:
    """Write what the model of a run is given and what its classes are called, for use without the data set."""
    write_json(_inputs_path(run_dir), dataclasses.asdict(spec))


def load_inputs(run_dir: str | Path) -> InputSpec:
    """The inverse of `save_inputs`. FileNotFoundError or ValueError naming the file."""
    path = _inputs_path(RunFolder.open(run_dir).path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run was not started by `sparse-mlp train`")
    try:
        return decode(InputSpec, json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _inputs_path(run_dir: str | Path) -> Path:
    return Path(run_dir) / "inputs.json"
