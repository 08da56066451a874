"""The interface of a task and its data to the engine, which knows nothing else about them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = dict[str, Any]  # tensors or lists, each with one entry an item in its first dimension


@dataclass(frozen=True)
class Loaders:
    """Sources of batches. The batch of a step is a function of the step: not of workers, ranks or resumption."""

    train: Callable[..., Iterable[Batch]]
    """`train(start_step=, steps=, rank=, world_size=)`: this rank's slice of the batches of these global steps.

    It must be lazy: a run with train.minutes does not know its length, requests 2^40 steps and reads the first ones."""

    evaluate: Callable[..., Iterable[Batch]]
    """`evaluate(rank=, world_size=)`: this rank's batches of the evaluation set, each item on exactly one rank."""

    batch_size: int
    """Items in one step, over all ranks."""

    steps_per_epoch: int

    replicated: bool = False
    """Every rank is given the whole batch, and a batch of any size is allowed."""


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation, the same on every rank except for the predictions."""

    metrics: dict[str, float]
    """Names and numbers for the "eval" line of the metrics."""

    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays with one row an item; empty on ranks other than 0."""


class Task(nn.Module):
    """A module that turns a batch into a loss.

    Everything that has to be in a checkpoint is a parameter or a buffer. Randomness comes from torch's generators only:
    the engine seeds them before every forward from (seed, step, micro-step), on all ranks alike;
    drop path, dropout and routers then draw by item (see `distributed.draws`).
    """

    model_passes: int = 1
    """Forward passes of the model in one forward of the task. Each pass of a MoE layer adds the gradient of its own
    balance loss; the engine scales them so that their mean counts."""

    items: str = "items"
    """What the items of a batch are, in the plural (images, nodes), for the progress bar and the report."""

    schedules_over_run: bool = False
    """Whether `before_step` depends on `steps`. Such a run cannot be made longer when it is resumed."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` (scalar with a graph, mean over the items) and metrics to average (scalars, detached)."""

    @abstractmethod
    def backbone(self) -> nn.Module:
        """The bare model, which is exported, compiled, and read for routing statistics."""

    @abstractmethod
    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        """Optimiser groups that hold every trainable parameter once; `lr_scale` in a group scales its learning rate."""

    @abstractmethod
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """Metrics over the loaders of all ranks; collective. Restores the modules' training mode."""

    def before_step(self, step: int, steps: int) -> None:
        """Called before update `step` (0-based) of `steps`, for the task's own schedules.

        In a run with train.minutes `steps` is an estimate at the pace so far: step / steps is the share of the time.
        """

    def gradient_metrics(self) -> dict[str, Tensor]:
        """Scalars to log of the gradients (averaged over ranks, loss scale removed), for updates that are logged."""
        return {}


def name_of(backbone: nn.Module, task: Task) -> str:
    """The dotted name of a task's backbone."""
    return next(name for name, module in task.named_modules() if module is backbone)


def called_module(task: Task) -> nn.Module:
    """The part of a task that holds its backbone, with what an evaluation needs besides, such as a detector's heads."""
    return task.get_submodule(name_of(task.backbone(), task).partition(".")[0])
