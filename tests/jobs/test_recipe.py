from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mlp import recipes
from sparse_mlp.engine import RunFolder
from sparse_mlp.jobs import Run, differences, from_json, to_json
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.recipe import parse_arguments


def changed(**values: Any) -> dict[str, Any]:
    """The default recipe as JSON with some dotted fields set."""
    content = to_json(ClassifyRecipe())
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
        ({"augment__crop_scale": [0.1]}, "augment.crop_scale"),
        ({"model": "mixer"}, "model should be a JSON object"),
    ],
)
def test_json_that_is_no_recipe_is_one_clear_line(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        from_json(ClassifyRecipe, changed(**values))
    assert "\n" not in str(error.value)


def test_whole_numbers_are_floats_and_lists_tuples():
    recipe = from_json(ClassifyRecipe, changed(optim__lr=1, augment__crop_scale=[0, 1], data__mean=[0, 0.5, 1]))
    assert recipe.optim.lr == 1.0 and type(recipe.optim.lr) is float
    assert recipe.augment.crop_scale == (0.0, 1.0) and recipe.data.mean == (0.0, 0.5, 1.0)


def test_fields_left_out_have_their_defaults():
    assert from_json(ClassifyRecipe, {}) == ClassifyRecipe()


@settings(max_examples=30, deadline=None)
@given(
    lr=st.floats(1e-6, 1),
    size=st.none() | st.integers(1, 512),
    scale=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    args=st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.booleans() | st.none()),
)
def test_any_recipe_survives_json(lr: float, size: int | None, scale: tuple[float, float], args: dict[str, Any]):
    base = ClassifyRecipe()
    recipe = replace(
        base,
        optim=replace(base.optim, lr=lr),
        data=replace(base.data, image_size=size),
        augment=replace(base.augment, crop_scale=scale),
        model=replace(base.model, args=args),
    )
    assert from_json(ClassifyRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe


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


def test_differences_name_the_fields():
    base = recipes.get("digits_sparse")
    other = replace(base, optim=replace(base.optim, lr=0.5), model=replace(base.model, args={"patch_size": 4}))
    assert differences(base, other) == {
        "model.args": (base.model.args, {"patch_size": 4}),
        "optim.lr": (base.optim.lr, 0.5),
    }


def test_a_run_folder_gives_its_recipe_back(tmp_path: Path):
    recipe = recipes.get("cifar10_sparse")
    RunFolder.create(tmp_path / "run", to_json(recipe))
    assert Run(tmp_path / "run").recipe == recipe


def test_a_damaged_config_is_named(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run", changed(optim__learning=1))
    with pytest.raises(ValueError, match=r"config.json: unknown field optim.learning"):
        Run(run.path).recipe  # noqa: B018
