"""What the engine asks of a task and of its data. It knows nothing else about them."""

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
    """Where batches come from. What a step sees depends on the step only: not on workers, ranks or having resumed."""

    train: Callable[..., Iterable[Batch]]
    """`train(start_step=, steps=, rank=, world_size=)`: this rank's slice of the batches of these global steps."""

    evaluate: Callable[..., Iterable[Batch]]
    """`evaluate(rank=, world_size=)`: everything to evaluate on, each item once over all ranks."""

    batch_size: int
    """Items in one step, all ranks together."""

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
    the engine seeds them before every forward from (seed, step, rank, micro-step).
    """

    model_passes: int = 1
    """How often a forward of the task runs the model. Each pass of a MoE layer adds the gradient of its own balance
    loss; the engine weighs them so that their mean counts."""

    items: str = "images"
    """What a batch consists of, for the progress bar's items/s."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` (scalar with a graph, mean over the items) and metrics to average (scalars, detached)."""

    @abstractmethod
    def backbone(self) -> nn.Module:
        """The bare model: what is exported as weights, compiled, and asked for routing statistics."""

    @abstractmethod
    def param_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        """Optimiser groups that hold every trainable parameter once; `lr_scale` in a group scales its learning rate."""

    @abstractmethod
    def evaluate(self, loader: Iterable[Batch], device: torch.device) -> Evaluation:
        """Metrics over everything in the loaders of all ranks; collective. Leaves the mode of the modules as it was."""

    def before_step(self, step: int, steps: int) -> None:
        """Called before update `step` (0-based) of `steps`, for schedules of the task's own."""

    def gradient_metrics(self) -> dict[str, Tensor]:
        """Scalars to report of the gradients (averaged over ranks, without loss scale) where an update is measured."""
        return {}
