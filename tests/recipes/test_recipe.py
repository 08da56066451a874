from __future__ import annotations

import dataclasses
import json

import pytest

from sparse_mlp import recipes
from sparse_mlp.engine import check_configs
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig, check_model_name, differences, from_json, job_type, to_json


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_complete_and_survives_json(name: str):
    recipe = recipes.get(name)
    assert recipe.name == name
    text = json.dumps(to_json(recipe), allow_nan=False)
    assert from_json(job_type(recipe.kind).recipe_type, json.loads(text)) == recipe
    if isinstance(getattr(recipe, "model", None), ModelConfig) and recipe.model.name:  # else that of the weights
        check_model_name(recipe.model.name)
    if hasattr(recipe, "train"):
        check_configs(recipe.optim, recipe.schedule, recipe.train)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_says_its_command(name: str):
    doc = recipes.RECIPES[name].__doc__ or ""
    assert f"train {name}" in doc


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [
        ("digits_sparse", "digits_mixer"),
        ("cifar10_sparse", "cifar10_mixer"),
        ("cifar10_moco_sparse", "cifar10_moco_mixer"),
    ],
)
def test_twins_differ_in_nothing_but_the_model(sparse: str, dense: str):
    changed = differences(recipes.get(sparse), recipes.get(dense))
    assert changed.keys() <= {"name", "model.name", "model.args"}


def test_supervised_imagenet_recipe_has_the_published_figures():
    """google-research/big_vision, configs/mlp_mixer_i1k.py."""
    recipe = recipes.get("imagenet_mixer_b")
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.schedule.warmup_steps) == (300, 4096, 10_000)
    assert (recipe.optim.lr, recipe.train.clip_grad, recipe.augment.mixup) == (1e-3, 1.0, 0.5)
    assert recipe.optim.lr * recipe.optim.weight_decay == pytest.approx(1e-4)
    assert recipe.model.args["drop_path_rate"] == 0.1 and recipe.task.loss == "bce"


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("digits_sparse").name = "other"  # type: ignore[misc]


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(ValueError, match="nearest: digits_sparse"):
        recipes.get("digits_sprase")


def test_a_model_offers_the_nearest_too():
    with pytest.raises(UserError, match="nearest: cycle_mlp_b1"):
        recipes.get("cycle_mlp_b11")


def test_changed_fields_are_followed_by_what_depends_on_them():
    recipe = recipes.recipe("cifar10_sparse", train={"epochs": 2}, data={"batch_size": 64}, name="mine")
    assert (recipe.train.epochs, recipe.train.minutes, recipe.name) == (2, None, "mine")
    assert recipe.optim.lr == recipes.get("cifar10_sparse").optim.lr / 2
    assert recipes.recipe("cifar10_sparse", data={"batch_size": 64}, optim={"lr": 1.0}).optim.lr == 1.0


def test_model_arguments_join_those_of_the_recipe_until_the_model_is_another():
    args = recipes.get("digits_sparse").model.args
    assert recipes.recipe("digits_sparse", model={"args": {"top_k": 2}}).model.args == {**args, "top_k": 2}
    assert recipes.recipe("digits_sparse", model={"name": "resnet10t"}).model.args == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "unknown field trian; nearest: train"),
        ({"train": {"epoch": 1}}, "unknown field train.epoch; nearest: train.epochs"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'"),
        ({"train": 3}, "train should be a JSON object"),
        ({"kind": "nodes"}, "kind 'nodes' would be ignored: digits_sparse is of the kind 'classify'"),
    ],
)
def test_wrong_changes_are_one_line(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        recipes.recipe("digits_sparse", **changes)
