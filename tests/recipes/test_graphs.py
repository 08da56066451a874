from __future__ import annotations

from pathlib import Path

import pytest

from sparse_mlp.data.graph_files import NAMES
from sparse_mlp.recipes.graphs import node_recipe


@pytest.mark.parametrize("name", NAMES)
def test_every_named_graph_has_a_recipe_with_a_teacher(name: str):
    recipe = node_recipe(name.upper())
    assert (recipe.name, recipe.data.source) == (name, name)
    assert recipe.task.distill > 0 and recipe.schedule.sched == "cosine"


def test_a_folder_has_the_published_setting(tmp_path: Path):
    recipe = node_recipe(str(tmp_path / "mine"))
    assert (recipe.name, recipe.task.distill, recipe.optim.weight_decay) == ("mine", 0.0, 5e-3)
