"""The folder of a run: what it was asked to do, where it ran, its metrics, checkpoints and report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparse_mlp.engine.checkpoint import last_checkpoint
from sparse_mlp.errors import UserError
from sparse_mlp.moe import compiled

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_PACKAGES = ("sparse-mlp", "torch", "torchvision", "timm", "numpy", "safetensors", "scikit-learn")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. `create` starts one, `open` returns to one."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunFolder:
        """Make the folder with config.json and environment.json. FileExistsError if it holds a run already."""
        run = cls(Path(path))
        if run.config_path.exists():
            raise FileExistsError(
                f"{run.path} holds a run already; go on with --resume {run.path} or name another folder"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.path / "environment.json", environment())
        write_json(run.config_path, config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run. FileNotFoundError if there is none."""
        run = cls(Path(path))
        if not run.config_path.is_file():
            raise FileNotFoundError(f"{run.path} is not a run folder: it has no config.json")
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def results_path(self) -> Path:
        return self.path / "results.json"

    def results(self) -> dict[str, Any] | None:
        """`metrics` of the last evaluation of a run that was trained to its end; None while it was not."""
        return json.loads(self.results_path.read_text()) if self.results_path.is_file() else None

    def has_checkpoint(self) -> bool:
        return last_checkpoint(self.checkpoints) is not None

    def is_begun(self) -> bool:
        """Whether something would be lost if a new run began in the folder: it has taken a step, or has results."""
        return self.config_path.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder. ValueError if one does.

        The system lets go of the lock when the process ends, however it ends.
        """
        if fcntl is None:
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                # By lockf and not flock: data workers must not inherit it, they may outlive a killed process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # which of them depends on the system
                raise UserError(f"{self.path} is being trained by another process") from None
            except OSError:  # a file system without locks
                pass
            yield

    def config(self) -> dict[str, Any]:
        """The resolved configuration. ValueError if the file is damaged."""
        try:
            return json.loads(self.config_path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{self.config_path} is not valid JSON: {error}") from None

    def weights(self, *, ema: bool | None = None) -> Path:
        """Weights file of the newest checkpoint: averaged ones where the run kept them (`ema` None), or as asked.

        FileNotFoundError, naming what is missing.
        """
        folder = last_checkpoint(self.checkpoints)
        if folder is None:
            raise FileNotFoundError(f"{self.path} has no checkpoint yet")
        averaged = folder / "model_ema.safetensors"
        path = averaged if ema or (ema is None and averaged.exists()) else folder / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist" + ("; the run kept no average of its weights" if path == averaged else "")
            )
        return path


def write_json(path: Path, value: Any) -> None:
    """Write a small file in one go: either the old content or the new one is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path), temporary.open("w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from the block says that `path` could not be written: of a full disk the system names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}") from error


def environment() -> dict[str, Any]:
    """Git commit, package versions, hardware, date and command line of this process."""
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "moe_kernels": compiled.state(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        hardware["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **_git_commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": hardware,
        "platform": platform.platform(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git_commit() -> dict[str, Any]:
    """Commit of the checkout this file is tracked in, and whether it was changed since; None where there is none."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside somebody else's checkout is not tracked
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"git_commit": git("rev-parse", "HEAD"), "git_changed": changed}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_changed": None}
