"""The published figures (specs: MoCo v3's appendix and configuration files), at the batch sizes given there."""

from __future__ import annotations

import pytest

from sparse_mlp import recipes
from sparse_mlp.data import AugmentConfig
from sparse_mlp.engine import check_configs


def test_linear_probe_is_moco_v3s():
    recipe = recipes.get("linear_probe")
    assert recipe.task.frozen
    assert (recipe.optim.opt, recipe.optim.momentum, recipe.optim.weight_decay) == ("sgd", 0.9, 0.0)
    assert recipe.optim.lr == 3 * recipe.data.batch_size / 256
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.schedule.sched) == (90, 1024, "cosine")
    crop_and_flip = {"crop_scale", "crop_ratio", "flip"}
    default = AugmentConfig()
    changed = {name for name, value in vars(recipe.augment).items() if value != getattr(default, name)}
    assert changed == crop_and_flip


def test_fine_tuning_is_deits():
    recipe = recipes.get("finetune")
    assert (recipe.train.epochs, recipe.optim.opt, recipe.optim.weight_decay) == (150, "adamw", 0.05)
    assert recipe.optim.lr == pytest.approx(5e-4 * recipe.data.batch_size / 512)
    assert (recipe.task.smoothing, recipe.model.args) == (0.1, {"drop_path_rate": 0.1})
    augment = recipe.augment
    assert (augment.mixup, augment.cutmix, augment.erase) == (0.8, 1.0, 0.25)
    assert augment.auto_augment is not None and "m9" in augment.auto_augment


@pytest.mark.parametrize(("name", "mixup"), [("cifar10", 0.8), ("cifar100", 0.5)])
def test_transfer_is_the_published_one(name: str, mixup: float):
    recipe = recipes.get(f"transfer_{name}")
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.data.name) == (100, 1024, name)
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.schedule.warmup_epochs) == (3e-4, 0.1, 3)
    assert (recipe.augment.mixup, recipe.augment.cutmix, recipe.augment.crop_scale) == (mixup, 1.0, (0.05, 1.0))
    check_configs(recipe.optim, recipe.schedule, recipe.train)
