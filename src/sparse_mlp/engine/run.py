"""The folder of a run: configuration, environment, metrics, checkpoints and report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparse_mlp.engine.checkpoint import clean, last_checkpoint
from sparse_mlp.errors import UserError
from sparse_mlp.files import read_json, write_json
from sparse_mlp.moe import kernels

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_PACKAGES = ("sparse-mlp", "torch", "torchvision", "timm", "numpy", "safetensors", "scikit-learn")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. `create` starts a run, `open` finds an existing one without writing anything."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any]) -> RunFolder:
        """Create the folder with config.json and environment.json. FileExistsError if it holds a run already.

        A run without a checkpoint and without a line of metrics after a step is overwritten.
        """
        run = cls(Path(path))
        if run.config_path.exists():
            if run.is_begun():
                raise FileExistsError(
                    f"{run.path} holds a run already; go on with --resume {run.path} or name another folder"
                )
            with run.locked():
                run.metrics_path.unlink(missing_ok=True)
                shutil.rmtree(run.tensorboard, ignore_errors=True)
                clean(run.checkpoints)
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

    def has_steps(self) -> bool:
        """Whether there is a checkpoint or a line of metrics after a step; a file of unknown lines counts as one."""
        if last_checkpoint(self.checkpoints) is not None:
            return True
        if not self.metrics_path.exists():
            return False
        try:
            return any(json.loads(line)["step"] > 0 for line in self.metrics_path.read_text().splitlines())
        except (ValueError, KeyError, TypeError):
            return True

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
        """`metrics` of the last evaluation of a run that was trained to its end; None while it was not.

        UserError if the file is damaged.
        """
        if not self.results_path.is_file():
            return None
        results = read_json(self.results_path)
        if not isinstance(results.get("metrics"), dict):
            raise UserError(f"{self.results_path} is damaged: it has no metrics")
        return results

    def has_checkpoint(self) -> bool:
        return last_checkpoint(self.checkpoints) is not None

    def is_begun(self) -> bool:
        """Whether something would be lost if a new run began in the folder: it has taken a step, or has results."""
        return self.has_steps() or self.results_path.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder. UserError if one does.

        The system releases the lock when the process ends, also if it is killed.
        """
        if fcntl is None:
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                # lockf, not flock: forked data workers, which may outlive a killed process, must not inherit the lock.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # either, depending on the system
                raise UserError(f"{self.path} is being trained by another process") from None
            except OSError:  # a file system without locks
                pass
            yield

    def config(self) -> dict[str, Any]:
        """The resolved configuration. UserError if the file is damaged."""
        return read_json(self.config_path)

    def weights(self, *, ema: bool | None = None) -> Path:
        """Weights file of the newest checkpoint; with `ema` None the averaged weights if the run kept them.

        FileNotFoundError that names what is missing.
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


def environment() -> dict[str, Any]:
    """Git commit, package versions, hardware, date and command line of this process."""
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "moe_kernels": kernels.state(),
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
        git("ls-files", "--error-unmatch", here.name)  # installed into another project's checkout it is not tracked
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"git_commit": git("rev-parse", "HEAD"), "git_changed": changed}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_changed": None}
