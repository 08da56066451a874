"""Complete configurations by name: each a function that returns a `Recipe` and says in its docstring what to expect."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from sparse_mlp.errors import UserError
from sparse_mlp.recipes import as_mlp, cifar, cycle_mlp, digits, finetune, headline, hire_mlp, imagenet, transfer
from sparse_mlp.recipes.build import Job, build, build_model, check_model_name, load_model, load_weights
from sparse_mlp.recipes.recipe import ModelConfig, Recipe, differences, from_json, to_json
from sparse_mlp.recipes.store import load, load_data_config, load_inputs, load_model_config, save_inputs

RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        digits.digits_sparse,
        digits.digits_mixer,
        cifar.cifar10_sparse,
        cifar.cifar10_mixer,
        cifar.cifar100_sparse,
        cifar.cifar100_mixer,
        imagenet.imagenet_sparse_s,
        imagenet.imagenet_sparse_b,
        imagenet.imagenet_sparse_l,
        imagenet.imagenet_mixer_s,
        imagenet.imagenet_mixer_b,
        as_mlp.cifar10_as_mlp,
        as_mlp.imagenet_as_mlp_tiny,
        as_mlp.imagenet_as_mlp_small,
        as_mlp.imagenet_as_mlp_base,
        cycle_mlp.cifar10_cycle_mlp,
        cycle_mlp.imagenet_cycle_mlp_b1,
        cycle_mlp.imagenet_cycle_mlp_b2,
        cycle_mlp.imagenet_cycle_mlp_b3,
        cycle_mlp.imagenet_cycle_mlp_b4,
        cycle_mlp.imagenet_cycle_mlp_b5,
        hire_mlp.cifar10_hire_mlp,
        hire_mlp.imagenet_hire_mlp_tiny,
        hire_mlp.imagenet_hire_mlp_small,
        hire_mlp.imagenet_hire_mlp_base,
        hire_mlp.imagenet_hire_mlp_large,
        headline.headline_sparse,
        headline.headline_mixer,
        finetune.linear_probe,
        finetune.finetune_deit,
        transfer.transfer_cifar10,
        transfer.transfer_cifar100,
        transfer.transfer_cifar100_fifth,
    )
}


def get(name: str) -> Recipe:
    """The recipe of that name. ValueError with the nearest names if there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        raise UserError(
            f"unknown recipe {name!r}; " + (f"nearest: {', '.join(near)}" if near else f"known: {', '.join(RECIPES)}")
        )
    return RECIPES[name]()


__all__ = [
    "RECIPES",
    "Job",
    "ModelConfig",
    "Recipe",
    "build",
    "build_model",
    "check_model_name",
    "differences",
    "from_json",
    "get",
    "load",
    "load_data_config",
    "load_inputs",
    "load_model",
    "load_model_config",
    "load_weights",
    "save_inputs",
    "to_json",
]
