from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mlp import recipes
from sparse_mlp.engine import RunFolder, check_configs
from sparse_mlp.recipes import Recipe
from sparse_mlp.recipes.recipe import parse_arguments


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_complete_and_survives_json(name: str):
    recipe = recipes.get(name)
    assert recipe.name == name
    text = json.dumps(recipes.to_json(recipe), allow_nan=False)
    assert recipes.from_json(json.loads(text)) == recipe
    recipes.check_model_name(recipe.model.name)
    check_configs(recipe.optim, recipe.schedule, recipe.train)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_says_its_command(name: str):
    doc = recipes.RECIPES[name].__doc__ or ""
    # What begins with other weights has a command of its own.
    assert f"train {name}" in doc or re.search(r"sparse-mlp (probe|finetune|transfer) runs/pretrained", doc)


@pytest.mark.parametrize(("sparse", "dense"), [("digits_sparse", "digits_mixer"), ("cifar10_sparse", "cifar10_mixer")])
def test_twins_differ_in_nothing_but_the_model(sparse: str, dense: str):
    changed = recipes.differences(recipes.get(sparse), recipes.get(dense))
    assert changed.keys() <= {"name", "model.name", "model.args"}


def test_supervised_imagenet_recipe_has_the_published_figures():
    """google-research/big_vision, configs/mlp_mixer_i1k.py."""
    recipe = recipes.get("imagenet_mixer_b")
    assert (recipe.train.epochs, recipe.data.batch_size, recipe.schedule.warmup_steps) == (300, 4096, 10_000)
    assert (recipe.optim.lr, recipe.train.clip_grad, recipe.augment.mixup) == (1e-3, 1.0, 0.5)
    assert recipe.optim.lr * recipe.optim.weight_decay == pytest.approx(1e-4)
    assert recipe.model.args["drop_path_rate"] == 0.1 and recipe.task.loss == "bce"


def changed(**values: Any) -> dict[str, Any]:
    """The default recipe as JSON with some dotted fields set."""
    content = recipes.to_json(Recipe())
    for name, value in values.items():
        *path, last = name.split("__")
        target = content
        for part in path:
            target = target[part]
        target[last] = value
    return content


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim__learning": 1}, "unknown field optim.learning"),
        ({"data__batchsize": 1}, "unknown field data.batchsize; nearest: data.batch_size"),
        ({"optim__lr": "fast"}, "optim.lr is 'fast'"),
        ({"optim__lr": True}, "optim.lr is True"),
        ({"train__seed": 1.5}, "train.seed is 1.5"),
        ({"train__compile": 1}, "train.compile is 1"),
        ({"data__on_bad_image": "ignore"}, "data.on_bad_image is 'ignore'"),
        ({"augment__crop_scale": [0.1]}, "augment.crop_scale is"),
        ({"model": "mixer"}, "model should be a JSON object"),
    ],
)
def test_json_that_is_no_recipe_is_one_clear_line(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        recipes.from_json(changed(**values))
    assert "\n" not in str(error.value)


def test_whole_numbers_are_floats_and_lists_tuples():
    recipe = recipes.from_json(changed(optim__lr=1, augment__crop_scale=[0, 1], data__mean=[0, 0.5, 1]))
    assert recipe.optim.lr == 1.0 and type(recipe.optim.lr) is float
    assert recipe.augment.crop_scale == (0.0, 1.0) and recipe.data.mean == (0.0, 0.5, 1.0)


def test_fields_left_out_have_their_defaults():
    assert recipes.from_json({}) == Recipe()


@settings(max_examples=30, deadline=None)
@given(
    lr=st.floats(1e-6, 1),
    size=st.none() | st.integers(1, 512),
    scale=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    args=st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.booleans() | st.none()),
)
def test_any_recipe_survives_json(lr: float, size: int | None, scale: tuple[float, float], args: dict[str, Any]):
    base = Recipe()
    recipe = replace(
        base,
        optim=replace(base.optim, lr=lr),
        data=replace(base.data, image_size=size),
        augment=replace(base.augment, crop_scale=scale),
        model=replace(base.model, args=args),
    )
    assert recipes.from_json(json.loads(json.dumps(recipes.to_json(recipe)))) == recipe


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("digits_sparse").name = "other"  # type: ignore[misc]


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(ValueError, match="nearest: digits_sparse"):
        recipes.get("digits_sprase")


def test_differences_name_the_fields():
    base = recipes.get("digits_sparse")
    other = replace(base, optim=replace(base.optim, lr=0.5), model=replace(base.model, args={"patch_size": 4}))
    assert recipes.differences(base, other) == {
        "model.args": (base.model.args, {"patch_size": 4}),
        "optim.lr": (base.optim.lr, 0.5),
    }


def test_a_run_folder_gives_its_recipe_back(tmp_path: Path):
    recipe = recipes.get("cifar10_sparse")
    RunFolder.create(tmp_path / "run", recipes.to_json(recipe))
    assert recipes.load(tmp_path / "run") == recipe


def test_a_damaged_config_is_named(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run", changed(optim__learning=1))
    with pytest.raises(ValueError, match=r"config.json: unknown field optim.learning"):
        recipes.load(run.path)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["top_k=(1, 2)", "act_layer=gelu"], {"top_k": (1, 2), "act_layer": "gelu"}),
        (["capacity_ratio=None", "x=1e-3", "y='a=b'"], {"capacity_ratio": None, "x": 1e-3, "y": "a=b"}),
        ([], {}),
    ],
)
def test_model_arguments_are_read_as_timm_reads_them(texts: list[str], values: dict[str, Any]):
    assert parse_arguments(texts) == values


@pytest.mark.parametrize("text", ["top_k", "=3", "top-k=3"])
def test_model_arguments_without_a_name_or_value_are_errors(text: str):
    with pytest.raises(ValueError, match="name=value"):
        parse_arguments([text])
