"""Optimiser and learning-rate schedule, both timm's, from their configurations."""

from __future__ import annotations

import inspect
from typing import Any

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler

from sparse_mlp.engine.config import OptimConfig, ScheduleConfig
from sparse_mlp.engine.task import Task
from sparse_mlp.errors import UserError


def create_optimizer(task: Task, config: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimiser over the task's groups. ValueError if the groups leave out or repeat a trainable parameter."""
    groups = task.param_groups(config.weight_decay, config.layer_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise UserError(
            f"{type(task).__name__}.param_groups holds {len(grouped)} parameters ({len(set(grouped))} distinct); "
            f"the task has {len(trainable)} to train"
        )
    options: dict[str, Any] = {name: getattr(config, name) for name in ("betas", "eps", "momentum")}
    options = {name: value for name, value in options.items() if value is not None}
    kind = timm.optim.get_optimizer_class(config.opt, bind_defaults=False)
    if "fused" in inspect.signature(kind).parameters:
        options["fused"] = True  # one pass over the weights instead of ten, also on CPUs
    return timm.optim.create_optimizer_v2(groups, config.opt, lr=config.lr, weight_decay=config.weight_decay, **options)


def warmup_updates(config: ScheduleConfig, steps: int, steps_per_epoch: int) -> int:
    """Length of the warm-up. ValueError if it leaves nothing of a run of `steps` updates."""
    warmup = config.warmup_steps or 0
    if config.warmup_epochs is not None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise UserError(f"a warm-up of {warmup} updates leaves nothing of the run's {steps}")
    return warmup


def create_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int, steps_per_epoch: int
) -> Scheduler:
    """timm's schedule, counted in updates: `step_update(n)` sets the learning rate of update n (0-based)."""
    warmup = warmup_updates(config, steps, steps_per_epoch)
    lowest = config.warmup_lr
    if lowest is None:
        lowest = max(group["lr"] for group in optimizer.param_groups) / 1000
    options: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": lowest, "t_in_epochs": False}
    rest: dict[str, Any] = {"t_initial": steps - warmup, "lr_min": config.min_lr, "warmup_prefix": True}
    if config.sched == "cosine":
        return CosineLRScheduler(optimizer, **rest, **options)
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, power=1.0, **rest, **options)
    return StepLRScheduler(optimizer, decay_t=steps + 1, decay_rate=1.0, **options)
