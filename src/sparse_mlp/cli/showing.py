"""What several commands print or write about runs and models."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from sparse_mlp import recipes
from sparse_mlp.data import ImageData
from sparse_mlp.engine import RunFolder, last_checkpoint
from sparse_mlp.recipes import Recipe
from sparse_mlp.report import Samples, wanted_images, write_report


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where a command prints; wider than rich's 80 columns where no terminal says its width."""
    made = Console(stderr=stderr, quiet=quiet, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 160
    return made


def table(*columns: str, numbers: int = 0) -> Table:
    """A table whose first column is never cut and whose columns from the second on hold `numbers` numbers."""
    made = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    made.columns[0].overflow = "fold"
    for column in made.columns[1 : 1 + numbers]:
        column.justify = "right"
        column.no_wrap = True
    return made


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, channels: int, image_size: int) -> dict[str, int]:
    """Multiply-adds of the matrix products for one image, in evaluation, by module name ("" is the whole model)."""
    training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, channels, image_size, image_size))
    model.train(training)
    root = type(model).__name__
    counts = {name: sum(operations.values()) // 2 for name, operations in counter.get_flop_counts().items()}
    macs = {name.removeprefix(root).removeprefix("."): count for name, count in counts.items() if name != "Global"}
    return macs | {"": counts["Global"]}


def write_run_report(folder: Path, recipe: Recipe, data: ImageData) -> Path:
    """The report of a run; routing is drawn where it has weights and its test set is no stream."""
    if last_checkpoint(RunFolder.open(folder).checkpoints) is None:
        return write_report(folder)
    model = recipes.load_model(recipe.model, data.spec, folder)
    macs = count_macs(model, data.spec.channels, data.spec.image_size)[""]
    return write_report(folder, model, _samples(folder, data), macs=macs)


def _samples(folder: Path, data: ImageData) -> Samples | None:
    wanted = wanted_images(folder)
    if isinstance(data.test, IterableDataset) or not wanted:
        return None
    batch = data.test.batch(wanted)
    return Samples(batch["image"], batch["target"], batch["index"], data.spec.mean, data.spec.std)
