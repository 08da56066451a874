from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io

import pytest
import tyro

from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig, check_configs

GOOD = (OptimConfig(), ScheduleConfig(), TrainConfig(epochs=1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (TrainConfig(), "exactly one of train.epochs, train.steps and train.minutes says how long; given: none"),
        (TrainConfig(epochs=1, minutes=2), "exactly one .*; given: train.epochs 1 and train.minutes 2"),
        (TrainConfig(steps=0), "train.steps 0 is not positive"),
        (TrainConfig(minutes=float("nan")), "train.minutes nan is not positive"),
        (TrainConfig(steps=1, ema_warmup=True), "train.ema_warmup would be ignored: train.ema_decay is not set"),
        (TrainConfig(steps=1, ema_decay=1.0), "train.ema_decay 1.0 is not between 0 and 1"),
        (TrainConfig(steps=1, grad_accum=0), "train.grad_accum 0 is below 1"),
        (TrainConfig(steps=1, clip_grad=0.0), "train.clip_grad 0.0 is not positive"),
        (TrainConfig(steps=1, log_every=0), "train.log_every 0 is below 1"),
        (TrainConfig(steps=1, keep=0), "train.keep 0 is below 1"),
        (TrainConfig(steps=1, seed=-1), "train.seed -1 is below 0"),
        (TrainConfig(steps=1, amp="fp8"), "unknown train.amp 'fp8'; allowed are bf16, fp16 and None"),
        (
            TrainConfig(steps=1, threads=100_000_000),
            r"train.threads 100000000 is more than four for each of this machine's \d+ cores",
        ),
        (OptimConfig(opt="adamv"), "unknown optimiser 'adamv'; nearest: .*adam"),
        (OptimConfig(opt="sgd", betas=(0.9, 0.9)), r"optim.betas \(0.9, 0.9\) would be ignored: sgd has none"),
        (OptimConfig(momentum=0.9), "optim.momentum 0.9 would be ignored: adamw has none"),
        (OptimConfig(lr=0.0), "optim.lr 0.0 is not positive"),
        (OptimConfig(weight_decay=-1.0), "optim.weight_decay -1.0 is below 0"),
        (OptimConfig(layer_decay=1.5), r"optim.layer_decay 1.5 is not in \(0, 1\]"),
        (ScheduleConfig(sched="cosin"), "unknown schedule 'cosin'; allowed are cosine, linear, poly, multistep"),
        (ScheduleConfig(power=0.9), "schedule.power 0.9 would be ignored: the schedule is cosine"),
        (ScheduleConfig(milestones=(0.5,)), r"schedule.milestones \(0.5,\) would be ignored: the schedule is cosine"),
        (ScheduleConfig("multistep"), "schedule.milestones are missing: the schedule is multistep"),
        (
            ScheduleConfig("multistep", milestones=(0.9, 0.5)),
            r"schedule.milestones \(0.9, 0.5\) are not rising shares between 0 and 1",
        ),
        (
            ScheduleConfig("multistep", milestones=(8.0, 11.0)),
            r"schedule.milestones \(8.0, 11.0\) are not rising shares between 0 and 1",
        ),
        (
            ScheduleConfig(warmup_steps=1, warmup_epochs=1),
            "schedule.warmup_steps 1 and schedule.warmup_epochs 1 exclude",
        ),
        (ScheduleConfig(warmup_lr=1e-6), "schedule.warmup_lr 1e-06 would be ignored: there is no warm-up"),
        (
            ScheduleConfig(sched="constant", min_lr=1e-6),
            "schedule.min_lr 1e-06 would be ignored: the sch",
        ),
        (ScheduleConfig(min_lr=1.0), "schedule.min_lr 1.0 is above optim.lr 0.001"),
    ],
)
def test_mistakes_are_one_line(changed, message):
    configs = [changed if type(changed) is type(good) else good for good in GOOD]
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check_configs(*configs)
    assert "\n" not in str(caught.value)


def test_defaults_pass():
    check_configs(*GOOD)


@pytest.mark.parametrize("config", GOOD)
def test_fields_are_frozen_and_each_is_explained(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        tyro.cli(type(config), args=["--help"])
    for field in dataclasses.fields(config):
        option = "--" + field.name.replace("_", "-")
        assert option in text.getvalue()
    source = inspect.getsource(type(config))
    assert source.count('"""') == 2 * (1 + len(dataclasses.fields(config))), "a field has no docstring"
