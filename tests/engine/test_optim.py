from __future__ import annotations

import math

import pytest
import torch
from timm.models.mlp_mixer import MlpMixer

from sparse_mlp.engine import OptimConfig, ScheduleConfig, TrainConfig
from sparse_mlp.engine.length import create_length
from sparse_mlp.engine.optim import create_optimizer, create_schedule
from sparse_mlp.moe import MoeMlp
from sparse_mlp.tasks import Classify


def rates(schedule, steps, steps_per_epoch=10, lr=1.0):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    length = create_length(TrainConfig(steps=steps), schedule, steps_per_epoch)
    rates = create_schedule(optimizer, schedule, length.schedule_length, length.schedule_warmup)
    values = []
    for step in range(steps):
        rates.step_update(step)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_cosine_after_linear_warmup():
    got = rates(ScheduleConfig(warmup_steps=4, warmup_lr=0.2, min_lr=0.1), 14)
    warm = [0.2 + 0.8 * n / 4 for n in range(4)]
    down = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 10)) / 2 for n in range(10)]
    assert got == pytest.approx(warm + down)


def test_linear_constant_and_warmup_in_epochs():
    assert rates(ScheduleConfig(sched="linear"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    got = rates(ScheduleConfig(sched="constant", warmup_epochs=0.2), 40, steps_per_epoch=20)
    assert got == pytest.approx([0.001, 0.25075, 0.5005, 0.75025] + [1.0] * 36)


def test_poly_and_multistep():
    got = rates(ScheduleConfig("poly", power=0.9), 4)
    assert got == pytest.approx([(1 - n / 4) ** 0.9 for n in range(4)])
    # Detection's 1x: 12 epochs, a tenth from epochs 8 and 11 on; the warm-up is part of the first epochs.
    got = rates(ScheduleConfig("multistep", milestones=(8 / 12, 11 / 12), warmup_steps=2, warmup_lr=0.5), 12)
    assert got == pytest.approx([0.5, 0.75, *[1.0] * 6, *[0.1] * 3, 0.01])


def test_the_rate_depends_on_the_step_alone():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = create_schedule(optimizer, ScheduleConfig(), 20, 3)
    schedule.step_update(17)
    late = optimizer.param_groups[0]["lr"]
    schedule.step_update(2)
    schedule.step_update(17)
    assert optimizer.param_groups[0]["lr"] == late


def tiny_task():
    model = MlpMixer(img_size=8, patch_size=4, in_chans=1, num_blocks=2, embed_dim=8, num_classes=3)
    model.blocks[1].mlp_channels = MoeMlp(8, 16, 4)
    return Classify(model)


def test_biases_and_norms_are_not_decayed():
    task = tiny_task()
    optimizer = create_optimizer(task, OptimConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            spared = parameter.ndim <= 1 or names[id(parameter)].endswith("bias")
            assert group["weight_decay"] == (0.0 if spared else 0.3), names[id(parameter)]
    assert any("experts" in name and name.endswith("bias") for name in names.values())  # (E, H): two dimensions


def test_layer_decay_scales_the_rates_of_early_layers():
    task = tiny_task()
    optimizer = create_optimizer(task, OptimConfig(lr=1.0, layer_decay=0.5))
    create_schedule(optimizer, ScheduleConfig(sched="constant"), 10, 0).step_update(0)
    rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    stem, head = rate[id(task.model.stem.proj.weight)], rate[id(task.model.head.weight)]
    assert head == 1.0
    assert (
        stem < rate[id(task.model.blocks[0].mlp_tokens.fc1.weight)] < rate[id(task.model.blocks[1].norm1.weight)] < head
    )
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(task.model.blocks[1].mlp_channels.experts.fc1.bias)] == 0.0


def test_options_reach_the_optimizer():
    optimizer = create_optimizer(tiny_task(), OptimConfig(opt="lamb", lr=0.1, betas=(0.5, 0.6), eps=1e-3))
    assert type(optimizer).__name__ == "Lamb"
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-3}
    fused = create_optimizer(tiny_task(), OptimConfig(opt="sgd", momentum=0.8))
    assert {(group["fused"], group["momentum"]) for group in fused.param_groups} == {(True, 0.8)}


def test_forgotten_and_repeated_parameters():
    task = tiny_task()
    complete = task.param_groups(0.1, None)
    task.param_groups = lambda *_: complete[:1]
    with pytest.raises(ValueError, match=r"Classify.param_groups holds \d+ parameters \(\d+ distinct\); the task has"):
        create_optimizer(task, OptimConfig())
    task.param_groups = lambda *_: complete + complete[:1]
    with pytest.raises(ValueError, match=r"Classify.param_groups"):
        create_optimizer(task, OptimConfig())
