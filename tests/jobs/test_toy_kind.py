"""A kind of run from outside the package: the seam that every other kind stands on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparse_mlp
from sparse_mlp import recipes
from sparse_mlp.cli.main import main
from sparse_mlp.engine import Evaluation, Loaders, OptimConfig, RunFolder, ScheduleConfig, Task, TrainConfig
from sparse_mlp.jobs import Context, Job, PredictOptions, Recipe, Row, kinds, load_weights, register, summarize


# --8<-- [start:kind]
@dataclass(frozen=True)
class LineRecipe(Recipe):
    kind: ClassVar[str] = "line"
    name: str = "line"
    slope: float = 3.0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig("sgd", lr=0.1, weight_decay=0.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("constant"))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=20, log_every=5, eval_every=5, save_every=5))


class LineTask(Task):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.model(batch["x"]) - batch["y"]).square().mean()}

    def backbone(self) -> nn.Module:
        return self.model

    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters())}]

    def evaluate(self, loader: Iterable[dict[str, Tensor]], device: torch.device) -> Evaluation:
        losses = [self(batch)["loss"].item() for batch in loader]
        return Evaluation({"loss": sum(losses) / len(losses)}, {"slope": self.model.weight.detach().numpy()})


class LineJob(Job[LineRecipe]):
    recipe_type = LineRecipe

    def __init__(self, recipe: LineRecipe, context: Context | None = None) -> None:
        super().__init__(recipe, context)
        torch.manual_seed(recipe.train.seed)
        self.task = LineTask()
        self.loaders = Loaders(self.batches, lambda **_: self.batches(0, 1), batch_size=8, steps_per_epoch=10)

    def batches(self, start_step: int, steps: int, **_: int) -> Iterable[dict[str, Tensor]]:
        for step in range(start_step, start_step + steps):
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
            yield {"x": x, "y": self.recipe.slope * x}

    @classmethod
    def predict(cls, run: RunFolder, files: Sequence[str], options: PredictOptions) -> list[Row]:
        model = nn.Linear(1, 1)
        load_weights(model, options.checkpoint or run.path)
        return [{"x": float(x), "y": model(torch.tensor([float(x)])).item()} for x in files]


# --8<-- [end:kind]
@pytest.fixture(scope="module", autouse=True)
def known() -> Iterable[None]:
    register(LineJob)
    yield
    del kinds._KINDS["line"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sparse_mlp.Run:
    return sparse_mlp.train(LineRecipe(), tmp_path_factory.mktemp("toy") / "run", show=False)


def test_it_trains_and_is_measured(run: sparse_mlp.Run) -> None:
    assert run.metrics["loss"] < 0.1 and run.recipe == LineRecipe()
    assert json.loads((run.path / "config.json").read_text())["kind"] == "line"
    assert (run.path / "model.safetensors").is_file() and (run.path / "predictions.npz").is_file()


def test_the_verbs_serve_it(run: sparse_mlp.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run.path)]) == 0
    assert f"{run.metrics['loss']:.4f}" in capsys.readouterr().out
    assert main(["predict", str(run.path), "2", "--out", str(tmp_path / "y.json")]) == 0
    assert json.loads((tmp_path / "y.json").read_text())[0]["y"] == pytest.approx(6, abs=0.5)
    assert main(["report", str(run.path)]) == 0 and (run.path / "report.html").stat().st_size > 1000
    assert main(["export", str(run.path), str(tmp_path / "x.safetensors")]) == 2


def test_a_comparison_shows_what_it_costs(run: sparse_mlp.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters of its weights file, and what the kind itself can say."""
    row = summarize(run)
    assert (row.steps, row.parameters, row.macs, row.scores) == (20, 2, None, {})
    monkeypatch.setattr(LineJob, "cost", classmethod(lambda cls, run: (2, 1)))
    assert summarize(run).macs == 1


def test_it_is_resumed_to_the_bit(run: sparse_mlp.Run, tmp_path: Path) -> None:
    short = sparse_mlp.train(
        LineRecipe(train=TrainConfig(steps=20, save_every=5, log_every=5)), tmp_path / "run", show=False
    )
    for checkpoint in sorted((short.path / "checkpoints").iterdir())[1:]:
        checkpoint.rename(tmp_path / checkpoint.name)
    again = sparse_mlp.resume(short.path, show=False)
    assert (again.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()


def test_a_finished_run_goes_on_with_a_larger_length(run: sparse_mlp.Run, tmp_path: Path) -> None:
    long = sparse_mlp.train(LineRecipe(train=TrainConfig(steps=30, log_every=5)), tmp_path / "long", show=False)
    short = sparse_mlp.train(LineRecipe(train=TrainConfig(steps=20, log_every=5)), tmp_path / "short", show=False)
    grown = sparse_mlp.resume(short.path, {"train": {"steps": 30}}, show=False)
    assert grown.recipe.train.steps == 30
    assert (grown.path / "model.safetensors").read_bytes() == (long.path / "model.safetensors").read_bytes()


def test_a_schedule_that_has_ended_is_not_made_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = LineRecipe(schedule=ScheduleConfig("cosine"), train=TrainConfig(steps=4, log_every=2))
    run = sparse_mlp.train(recipe, tmp_path / "run", show=False)
    assert main(["train", "--resume", str(run.path), "--train.steps", "8"]) == 2
    assert "only a constant schedule can go on" in capsys.readouterr().err
    assert sparse_mlp.resume(run.path, show=False).recipe == recipe, "the refused length has left nothing behind"


def test_its_options_are_those_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.RECIPES, "line", lambda: LineRecipe())
    assert main(["train", "line", "--slope", "2", "--out", str(tmp_path / "run")]) == 0
    assert sparse_mlp.Run(tmp_path / "run").recipe.slope == 2
