"""Run folders made up for the tests, in the layout that the engine and the command write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import save_file
from torch import nn

from sparse_mlp.report import ImageSource, Samples, write_classification_report

MakeRun = Callable[..., Path]


def metric_lines(
    steps: int, every: int, layers: dict[str, int], evals: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Lines of a run whose loss falls; routing loads sum to 1."""
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        where = {"step": step, "epoch": step / 10, "time": 0.05 * step}
        loss = 2.3 * math.exp(-2 * step / steps) + 0.02 * float(rng.random())
        lines.append(
            {"kind": "train", **where, "loss": loss, "accuracy": 1 - loss / 2.4, "balance": 0.1, "lr": 1e-3}
            | {"grad_norm": 0.5, "items_per_s": 1000.0 + step, "data_time": 0.1}
        )
        for layer, experts in layers.items():
            load, importance = rng.dirichlet([20.0] * experts), rng.dirichlet([40.0] * experts)
            lines.append(
                {"kind": "routing", **where, "layer": layer, "load": load.tolist(), "importance": importance.tolist()}
                | {"dropped": 0.0, "entropy": 0.9, "balance_loss": 0.01}
            )
        if evals and step % (steps // evals) == 0:
            top1 = 1 - loss / 2.5
            lines.append(
                {"kind": "eval", **where, "split": "test", "loss": loss, "top1": top1, "top5": 1.0, "images": 100}
                | {"ema": False}
            )
    lines.append({"kind": "event", "step": steps, "epoch": steps / 10, "time": 0.05 * steps, "what": "finished"})
    return lines


def write_run(
    folder: Path,
    *,
    classes: Sequence[str] | int = 10,
    images: int = 200,
    layers: dict[str, int] | None = None,
    steps: int = 100,
    every: int = 10,
    evals: int = 5,
    logits: np.ndarray | None = None,
    target: np.ndarray | None = None,
    predictions: bool = True,
    weights: bool = True,
    metrics: str | None = None,
    config: dict[str, Any] | None = None,
    files: Sequence[str] | None = None,
) -> Path:
    rng = np.random.default_rng(0)
    names = [str(c) for c in range(classes)] if isinstance(classes, int) else list(classes)
    folder.mkdir(parents=True)
    whole = {"name": "digits_sparse", "model": {"name": "sparse_mlp_t4_32", "args": {"patch_size": 2}}}
    whole |= {"data": {"name": "digits", "batch_size": 64}, "train": {"epochs": 10, "seed": 0}}
    (folder / "config.json").write_text(json.dumps(whole | (config or {})))
    (folder / "inputs.json").write_text(json.dumps({"classes": names}))
    environment = {"date": "2026-01-02T03:04:05+00:00", "command": ["/some/bin/sparse-mlp", "train", "a b"]}
    environment |= {"git_commit": "0123456789abcdef", "git_changed": True, "versions": {"torch": "2.11"}}
    environment["hardware"] = {"cpu": "A CPU", "cores": 2, "threads": 2, "memory_gib": 7.8, "gpus": []}
    (folder / "environment.json").write_text(json.dumps(environment))
    if metrics is None:
        layers = {"blocks.4.mlp_tokens": 8, "blocks.4.mlp_channels": 4} if layers is None else layers
        lines = metric_lines(steps, every, layers, evals, rng)
        metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(metrics)
    if predictions:
        target = rng.integers(len(names), size=images) if target is None else target
        if logits is None:
            logits = rng.normal(size=(images, len(names))).astype(np.float32)
            logits[np.arange(images), target] += 3.0
        named = {} if files is None else {"files": np.array(files)}
        np.savez(folder / "predictions.npz", index=np.arange(len(target)), target=target, logits=logits, **named)
    if weights:
        save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}, folder / "model.safetensors")
    return folder


def random_samples(run: Path, number: int = 200, channels: int = 1, size: int = 8) -> Samples:
    with np.load(run / "predictions.npz") as archive:
        targets = torch.from_numpy(archive["target"][:number]).long()
    images = torch.randn(len(targets), channels, size, size, generator=torch.Generator().manual_seed(0))
    return Samples(images, targets, torch.arange(len(targets)), (0.5,) * channels, (0.25,) * channels)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run folder and return its path; every part can be left out or given."""

    def make(name: str = "run", **parts: Any) -> Path:
        return write_run(tmp_path / name, **parts)

    return make


@pytest.fixture
def make_samples() -> Callable[..., Samples]:
    """Random images of 8 pixels for the run's first `number` test images, with the targets of its predictions."""
    return random_samples


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("sparse_mlp_t4_32", num_classes=10, in_chans=1, img_size=8, patch_size=2)


@pytest.fixture
def model() -> nn.Module:
    """A Sparse-MLP for the images of `make_samples`."""
    return small_model()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything, its report written; not to be changed."""
    run = write_run(tmp_path_factory.mktemp("whole") / "run")
    samples = random_samples(run)
    write_classification_report(run, small_model(), samples, source_of(samples), macs=16_000_000)
    return run


def source_of(samples: Samples) -> ImageSource:
    """All of them, of classes called "class 0", "class 1", ..."""

    def read(indices: Sequence[int]) -> Samples:
        rows = list(indices)
        return Samples(samples.images[rows], samples.targets[rows], samples.index[rows], samples.mean, samples.std)

    names = [f"class {c}" for c in range(int(samples.targets.max()) + 1)]
    return ImageSource(read, range(len(samples.index)), len(samples.index), names)
