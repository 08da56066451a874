"""How training runs: frozen dataclasses, every field a command-line option."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args, get_type_hints

import timm.optim

from sparse_mlp.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser. Weight decay leaves out biases, norms and what the model's no_weight_decay() names."""

    opt: str = "adamw"
    """Any optimiser of timm: adamw, lamb, sgd, ... (timm.optim.list_optimizers())."""

    lr: float = 1e-3
    """Highest learning rate, reached after warm-up."""

    weight_decay: float = 0.05
    """Decoupled weight decay (for sgd: L2)."""

    betas: tuple[float, float] | None = None
    """Decay of the two moments. Left out: the optimiser's own, for adamw (0.9, 0.999)."""

    eps: float | None = None
    """Term in the denominator. Left out: the optimiser's own."""

    momentum: float | None = None
    """Momentum of sgd and similar optimisers. Left out: 0.9."""

    layer_decay: float | None = None
    """Factor on the learning rate per layer, from the head down to the stem, for fine-tuning; 0.65 to 0.9 are usual."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run: a linear warm-up, then the schedule down to min_lr at the end.

    The schedule is over the updates; with train.minutes it is over the share of the time that has elapsed. A warm-up of
    more than half of the updates is shortened to a tenth of them. With train.minutes it ends after a tenth of the time
    at the latest. The run prints one line if it shortens the warm-up.
    """

    sched: Literal["cosine", "linear", "poly", "multistep", "constant"] = "cosine"
    """Shape after the warm-up: cosine; linear; poly (a power of the share that is left); multistep (constant between
    milestones). Only a finished run with a constant one can be resumed with a greater length."""

    power: float = 1.0
    """Exponent of poly; 1 is linear."""

    milestones: tuple[float, ...] = ()
    """For multistep: shares of the run, rising, at each of which the learning rate becomes a tenth. 0.667 0.917 are the
    epochs 8 and 11 of 12 of detection's 1x schedule."""

    warmup_steps: int | None = None
    """Updates of warm-up. Left out: none, unless warmup_epochs is given."""

    warmup_epochs: float | None = None
    """The same in epochs."""

    warmup_lr: float | None = None
    """Learning rate at the first update of the warm-up. Left out: a thousandth of optim.lr."""

    min_lr: float = 0.0
    """Learning rate at the end of the schedule (not for constant and multistep)."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision, saving. Exactly one of epochs, steps and minutes is given.

    A run is resumed with the length it began with. With a constant schedule it may be resumed with a greater length in
    the same unit: the run, finished or not, goes on exactly as if it had been planned so. Cosine and linear schedules
    are spread over the planned length and end at schedule.min_lr, so that their runs cannot be made longer.
    """

    epochs: float | None = None
    """Passes over the training set."""

    steps: int | None = None
    """Updates of the weights."""

    minutes: float | None = None
    """Training time, evaluation and saving not counted. The run ends with the first update that ends after this time;
    an interrupted run is resumed for the remaining time. The number of updates, recorded at the end, depends on the
    machine and its load, and so does the learning rate of each: such a run cannot be repeated to the bit."""

    seed: int = 0
    """Of everything random: order of the data, augmentation, mixing, drop path, router noise."""

    amp: Literal["bf16", "fp16"] | None = None
    """Mixed precision in training; fp16 with loss scaling. Evaluation is in float32."""

    grad_accum: int = 1
    """Micro-batches that the batch of a step is split into, to save memory."""

    clip_grad: float | None = None
    """Maximum norm of all gradients together (lamb also clips at 1 by itself)."""

    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, 0.999 to 0.9999, which is also evaluated and saved."""

    ema_warmup: bool = False
    """Increase the decay to ema_decay over the first updates, for short runs."""

    compile: bool = False
    """torch.compile the model: slower to start, faster to run, above all on GPUs."""

    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    channels_last: bool = False
    """Memory format for convolutions."""

    deterministic: bool = False
    """Use only deterministic algorithms of torch. On a CPU runs repeat to the bit without it; on a GPU they may not."""

    log_every: int = 10
    """Updates between two lines of metrics."""

    eval_every: int | None = None
    """Updates between two evaluations. Left out: once an epoch. 0: only at the end."""

    save_every: int | None = None
    """Updates between two checkpoints. Left out: once an epoch. 0: only at the end (and when stopped)."""

    keep: int = 2
    """Checkpoints to keep, the newest ones."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ... Under torchrun each process takes its own GPU."""

    threads: int | None = None
    """CPU threads of torch in each process, at most four for each core. Left out: torch's own choice."""


FREE_ON_RESUME = ("compile", "log_every", "eval_every", "save_every", "keep", "device", "threads", "deterministic")
"""Fields of TrainConfig that may change when a run is resumed, as they do not determine the weights. The length may
grow with a constant schedule: see `check_longer`."""


LENGTHS = ("epochs", "steps", "minutes")
"""Fields of TrainConfig of which exactly one says how long a run is; `check_longer` says when it may grow."""


def check_configs(optim: OptimConfig, schedule: ScheduleConfig, train: TrainConfig) -> None:
    """UserError, one line, for values that are not allowed or would be ignored."""
    _check_optim(optim)
    _check_schedule(schedule, optim)
    _check_train(train)


def _check_optim(optim: OptimConfig) -> None:
    known = [str(name) for name in timm.optim.list_optimizers()]
    if optim.opt not in known:
        near = difflib.get_close_matches(optim.opt, known, n=3)
        raise UserError(f"unknown optimiser {optim.opt!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    info = timm.optim.get_optimizer_info(optim.opt)
    for name, has in (("betas", info.has_betas), ("eps", info.has_eps), ("momentum", info.has_momentum)):
        if getattr(optim, name) is not None and not has:
            raise UserError(f"optim.{name} {getattr(optim, name)} would be ignored: {optim.opt} has none")
    _positive("optim.lr", optim.lr)
    _at_least("optim.weight_decay", optim.weight_decay, 0)
    if optim.layer_decay is not None and not 0 < optim.layer_decay <= 1:
        raise UserError(f"optim.layer_decay {optim.layer_decay} is not in (0, 1]")


def _check_schedule(schedule: ScheduleConfig, optim: OptimConfig) -> None:
    if schedule.sched not in (allowed := get_args(get_type_hints(ScheduleConfig)["sched"])):
        raise UserError(f"unknown schedule {schedule.sched!r}; allowed are {', '.join(allowed)}")
    if schedule.power != 1 and schedule.sched != "poly":
        raise UserError(f"schedule.power {schedule.power} would be ignored: the schedule is {schedule.sched}")
    _positive("schedule.power", schedule.power)
    if bool(schedule.milestones) != (schedule.sched == "multistep"):
        given = f"{schedule.milestones} would be ignored" if schedule.milestones else "are missing"
        raise UserError(f"schedule.milestones {given}: the schedule is {schedule.sched}")
    edges = (0.0, *schedule.milestones, 1.0)
    if not all(before < after for before, after in pairwise(edges)):
        raise UserError(f"schedule.milestones {schedule.milestones} are not rising shares between 0 and 1")
    if schedule.warmup_steps is not None and schedule.warmup_epochs is not None:
        raise UserError(
            f"schedule.warmup_steps {schedule.warmup_steps} and schedule.warmup_epochs {schedule.warmup_epochs} "
            "exclude each other"
        )
    _at_least("schedule.warmup_steps", schedule.warmup_steps, 0)
    _at_least("schedule.warmup_epochs", schedule.warmup_epochs, 0)
    if schedule.sched in ("constant", "multistep") and schedule.min_lr:
        raise UserError(f"schedule.min_lr {schedule.min_lr} would be ignored: the schedule is {schedule.sched}")
    if schedule.warmup_lr is not None and not (schedule.warmup_steps or schedule.warmup_epochs):
        raise UserError(f"schedule.warmup_lr {schedule.warmup_lr} would be ignored: there is no warm-up")
    for name in ("warmup_lr", "min_lr"):
        value = getattr(schedule, name)
        _at_least(f"schedule.{name}", value, 0)
        if value is not None and value > optim.lr:
            raise UserError(f"schedule.{name} {value} is above optim.lr {optim.lr}")


def _check_train(train: TrainConfig) -> None:
    given = {name: getattr(train, name) for name in LENGTHS}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        listed = " and ".join(f"train.{name} {value}" for name, value in given.items()) or "none"
        raise UserError(f"exactly one of train.epochs, train.steps and train.minutes says how long; given: {listed}")
    for name, value in given.items():
        _positive(f"train.{name}", value)
    for name in ("grad_accum", "log_every", "keep", "threads"):
        _at_least(f"train.{name}", getattr(train, name), 1)
    for name in ("seed", "eval_every", "save_every"):
        _at_least(f"train.{name}", getattr(train, name), 0)
    cores = os.cpu_count() or 1
    if train.threads is not None and train.threads > 4 * cores:
        raise UserError(f"train.threads {train.threads} is more than four for each of this machine's {cores} cores")
    if train.seed >= 2**63:
        raise UserError(f"train.seed {train.seed} is not below 2^63")
    if train.amp not in (None, "bf16", "fp16"):
        raise UserError(f"unknown train.amp {train.amp!r}; allowed are bf16, fp16 and None")
    if train.clip_grad is not None:
        _positive("train.clip_grad", train.clip_grad)
    if train.ema_decay is not None and not 0 < train.ema_decay < 1:
        raise UserError(f"train.ema_decay {train.ema_decay} is not between 0 and 1")
    if train.ema_warmup and train.ema_decay is None:
        raise UserError("train.ema_warmup would be ignored: train.ema_decay is not set")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} {value} is not positive" + (" and finite" if value > 0 else ""))


def _at_least(name: str, value: float | None, minimum: float) -> None:
    if value is not None and not minimum <= value < math.inf:
        raise UserError(f"{name} {value} is " + (f"below {minimum}" if value < minimum else "not a finite number"))
