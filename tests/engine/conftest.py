from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_mlp.engine import (
    Batch,
    Evaluation,
    Loaders,
    OptimConfig,
    RunFolder,
    ScheduleConfig,
    Task,
    TrainConfig,
    Trainer,
)

PROGRAM = Path(__file__).with_name("train_digits.py")


class Line(Task):
    """The smallest task: y = w x + b. It records the arguments of before_step."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)
        self.steps: list[tuple[int, int]] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        error = self.line(batch["x"]) - batch["y"]
        return {"loss": error.square().mean(), "error": error.detach().abs().mean()}

    def backbone(self) -> nn.Module:
        return self.line

    def before_step(self, step: int, steps: int) -> None:
        self.steps.append((step, steps))

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        return [{"params": list(self.line.parameters()), "weight_decay": weight_decay}]

    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        training = self.training
        self.eval()
        with torch.no_grad():
            losses = [self(batch)["loss"].item() for batch in loader]
        self.train(training)
        return Evaluation({"loss": sum(losses) / len(losses), "images": len(losses)})


def line_batch(step: int) -> Batch:
    x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": 2 * x + 1}


def line_batches(*, start_step: int, steps: int, rank: int, world_size: int) -> Iterator[Batch]:
    own = slice(8 * rank // world_size, 8 * (rank + 1) // world_size)
    for step in range(start_step, start_step + steps):
        yield {name: value[own] for name, value in line_batch(step).items()}


@pytest.fixture
def line_loaders() -> Loaders:
    """Batches of 8 points on y = 2x + 1; 5 steps an epoch."""
    return Loaders(
        train=line_batches, evaluate=lambda rank, world_size: [line_batch(-1 - i) for i in range(3)],
        batch_size=8, steps_per_epoch=5,
    )  # fmt: skip


@pytest.fixture
def new_line() -> Callable[[], Task]:
    return Line


@pytest.fixture
def make_trainer(tmp_path: Path, line_loaders: Loaders) -> Callable[..., Trainer]:
    """A Trainer of the line in the folder `name`, opened again if it is there."""

    def make(
        name: str = "run",
        *,
        task: Task | None = None,
        loaders: Loaders | None = None,
        optim: OptimConfig | None = None,
        schedule: ScheduleConfig | None = None,
        **train: Any,
    ) -> Trainer:
        path = tmp_path / name
        return Trainer(
            task or Line(),
            loaders or line_loaders,
            optim=optim or OptimConfig(lr=0.1),
            schedule=schedule or ScheduleConfig(),
            train=TrainConfig(device="cpu", **train),
            run=RunFolder.open(path) if path.exists() else RunFolder.create(path, {}),
        )

    return make


@pytest.fixture
def train_digits(launch: Callable[..., list[int]], tmp_path: Path) -> Callable[..., tuple[RunFolder, int]]:
    """Runs train_digits.py with a specification; the run folder and the exit code, of ranks the worst."""

    def train(name: str, *, ranks: int = 1, errors: list[str] | None = None, **spec: Any) -> tuple[RunFolder, int]:
        spec = {"run": str(tmp_path / name), "model": "mixer_t4_32", **spec}
        codes = launch(PROGRAM, spec, ranks=ranks, errors=errors)
        return RunFolder(tmp_path / name), max(codes, key=abs)

    return train


@pytest.fixture
def checkpoint_content() -> Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]:
    """All tensors of a checkpoint folder, and its numbers without times."""

    def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for file in sorted(path.rglob("*.safetensors")):
            part = file.name if file.parent == path else "state"
            tensors |= {f"{part}/{name}": tensor for name, tensor in load_file(file).items()}
        state = json.loads((path / "state.json").read_text())["state"]
        return tensors, {name: value for name, value in state.items() if name != "clock"}

    return read


@pytest.fixture
def metric_lines() -> Callable[..., list[dict[str, Any]]]:
    """Lines of metrics.jsonl without what depends on the clock; without events unless they are requested."""

    def read(run: RunFolder, *kinds: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
        timed = {"time", "items_per_s", "data_time"}
        wanted = kinds or ("train", "eval", "routing")
        return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] in wanted]

    return read
