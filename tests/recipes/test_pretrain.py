from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sparse_mlp import recipes
from sparse_mlp.engine import RunFolder, check_configs
from sparse_mlp.recipes.pretrain import (
    PRETRAIN_RECIPES,
    PretrainRecipe,
    get_pretraining,
    is_pretraining,
    load_pretraining,
    resolve,
)
from sparse_mlp.recipes.recipe import decode


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_every_recipe_is_complete_and_survives_json(name):
    recipe = get_pretraining(name)
    assert recipe.name == name and f"pretrain {name}" in (PRETRAIN_RECIPES[name].__doc__ or "")
    assert decode(PretrainRecipe, json.loads(json.dumps(recipes.to_json(recipe)))) == recipe
    recipes.check_model_name(recipe.model.name)
    check_configs(recipe.optim, recipe.schedule, recipe.train)


def test_imagenet_figures_are_the_published_ones():
    """arXiv 2104.02057, section 5; facebookresearch/moco-v3, CONFIG.md."""
    recipe = resolve(get_pretraining("imagenet_moco_sparse_b"))
    assert recipe.optim.lr == pytest.approx(2.4e-3)  # 1.5e-4 x 4096 / 256
    assert (recipe.data.batch_size, recipe.train.epochs, recipe.optim.weight_decay) == (4096, 300, 0.1)
    assert (recipe.schedule.warmup_epochs, recipe.schedule.sched, recipe.schedule.min_lr) == (40, "cosine", 0.0)
    task, views = recipe.task, recipe.views
    assert (task.temperature, task.momentum, task.hidden_dim, task.out_dim) == (0.2, 0.99, 4096, 256)
    assert (task.projector_layers, task.predictor_layers) == (3, 2)
    assert (views.crop_scale, views.jitter, views.grey) == ((0.08, 1.0), 0.8, 0.2)
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (views.blur, views.solarize) == ((1.0, 0.1), (0.0, 0.2))


def test_twins_differ_in_nothing_but_the_model():
    changed = recipes.differences(get_pretraining("cifar10_moco_sparse"), get_pretraining("cifar10_moco_mixer"))  # type: ignore[arg-type]
    assert changed.keys() <= {"name", "model.name", "model.args"}


def test_the_learning_rate_follows_the_batch_once():
    recipe = PretrainRecipe()
    recipe = resolve(replace(recipe, data=replace(recipe.data, batch_size=512)))
    assert recipe.optim.lr == pytest.approx(3e-4) and recipe.lr_base_size is None
    assert resolve(recipe) == recipe
    with pytest.raises(ValueError, match="lr_base_size 0 is below 1"):
        resolve(replace(PretrainRecipe(), lr_base_size=0))


def test_a_run_folder_gives_its_recipe_back(tmp_path):
    recipe = resolve(get_pretraining("digits_moco_sparse"))
    RunFolder.create(tmp_path / "views", recipes.to_json(recipe))  # type: ignore[arg-type]
    RunFolder.create(tmp_path / "classes", recipes.to_json(recipes.get("digits_sparse")))
    assert load_pretraining(tmp_path / "views") == recipe and is_pretraining(tmp_path / "views")
    assert not is_pretraining(tmp_path / "classes")
    with pytest.raises(ValueError, match=r"config\.json: not a pre-training run"):
        load_pretraining(tmp_path / "classes")


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(ValueError, match="nearest: digits_moco_sparse"):
        get_pretraining("digits_moco_sprase")
