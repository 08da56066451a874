"""Optimiser and learning-rate schedule, both timm's, from their configurations."""

from __future__ import annotations

import inspect
from typing import Any

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler

from sparse_mlp.distributed import by_mesh, mesh_of
from sparse_mlp.engine.config import OptimConfig, ScheduleConfig
from sparse_mlp.engine.task import Task
from sparse_mlp.errors import UserError

ON_SPLIT_WEIGHTS = ("adamw", "adam", "sgd", "momentum", "lion", "lars", "nadamw", "radam", "adan", "rmsproptf")
"""Optimisers that give split weights the steps of whole ones."""


def create_optimizer(task: Task, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser over the task's groups. UserError if the groups leave out or repeat a trainable parameter."""
    groups = task.param_groups(config.weight_decay, config.layer_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise UserError(
            f"{type(task).__name__}.param_groups holds {len(grouped)} parameters ({len(set(grouped))} distinct); "
            f"the task has {len(trainable)} to train"
        )
    # one operation of a fused optimiser takes the weights of one mesh
    groups = [{**group, "params": part} for group in groups for part in by_mesh(group["params"])]
    options: dict[str, Any] = {name: getattr(config, name) for name in ("betas", "eps", "momentum")}
    options = {name: value for name, value in options.items() if value is not None}
    kind = timm.optim.get_optimizer_class(config.opt, bind_defaults=False)
    split = any(mesh_of(parameter) is not None for parameter in task.parameters())
    if split and config.opt not in ON_SPLIT_WEIGHTS:
        allowed = ", ".join(ON_SPLIT_WEIGHTS)
        raise UserError(
            f"optim.opt {config.opt} does not take weights that are split over processes; allowed are {allowed}"
        )
    if "fused" in inspect.signature(kind).parameters and not (split and kind is torch.optim.SGD):
        options["fused"] = True  # one pass over the weights instead of ten, also on CPUs
    return timm.optim.create_optimizer_v2(groups, config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)


def create_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, length: float, warmup: float
) -> Scheduler:
    """timm's schedule over `length`, of which the first `warmup` is the warm-up, in updates or any other unit.

    `step_update(position)` sets the learning rate; the position of update n (0-based) is n.
    """
    lowest = config.warmup_lr
    if lowest is None:
        lowest = max(group["lr"] for group in optimizer.param_groups) / 1000
    options: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": lowest, "t_in_epochs": False}
    decay: dict[str, Any] = {"t_initial": length - warmup, "lr_min": config.min_lr, "warmup_prefix": True}
    if config.sched == "cosine":
        return CosineLRScheduler(optimizer, **decay, **options)
    if config.sched in ("linear", "poly"):
        return PolyLRScheduler(optimizer, power=config.power, **decay, **options)
    if config.sched == "multistep":
        # timm's milestone m applies from position m - 1 on.
        decay_t: Any = [share * length + 1 for share in config.milestones]
        return MultiStepLRScheduler(optimizer, decay_t, decay_rate=0.1, warmup_prefix=False, **options)
    return StepLRScheduler(optimizer, decay_t=length + 1, decay_rate=1.0, **options)
