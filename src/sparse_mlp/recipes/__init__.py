"""Complete configurations by name: each a function that returns a recipe and says in its docstring what to expect.

A function with an argument gets the recipe with the user's changes, and fits the other fields to the weights and the
images that it names. The name of any timm model is a recipe too; see `own_images`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import timm
from torch.utils.data import Dataset

from sparse_mlp.data import DataConfig
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import ModelConfig, Recipe, check_model_name, override
from sparse_mlp.jobs.classify import ClassifyRecipe
from sparse_mlp.jobs.images import OWN_DATASETS
from sparse_mlp.models import registered_names
from sparse_mlp.recipes import (
    as_mlp,
    cifar,
    coco,
    cycle_mlp,
    digits,
    graphs,
    hire_mlp,
    imagenet,
    moco,
    own_images,
    own_masks,
    pretrained,
    segmentation,
)

RECIPES: dict[str, Callable[..., Recipe]] = {
    function.__name__: function
    for function in (
        digits.digits_sparse,
        digits.digits_mixer,
        digits.digits_moco_sparse,
        cifar.cifar10_sparse,
        cifar.cifar10_mixer,
        cifar.cifar100_sparse,
        cifar.cifar100_mixer,
        as_mlp.cifar10_as_mlp,
        cycle_mlp.cifar10_cycle_mlp,
        hire_mlp.cifar10_hire_mlp,
        moco.cifar10_moco_sparse,
        moco.cifar10_moco_mixer,
        pretrained.linear_probe,
        pretrained.knn,
        pretrained.finetune,
        pretrained.semi_supervised,
        pretrained.transfer_cifar10,
        pretrained.transfer_cifar100,
        graphs.cora,
        graphs.citeseer,
        graphs.pubmed,
        graphs.photo,
        graphs.computers,
        graphs.cs,
        graphs.physics,
        graphs.graph,
        segmentation.camvid,
        own_masks.segment,
        imagenet.imagenet_sparse_s,
        imagenet.imagenet_sparse_b,
        imagenet.imagenet_sparse_l,
        imagenet.imagenet_mixer_s,
        imagenet.imagenet_mixer_b,
        as_mlp.imagenet_as_mlp_tiny,
        as_mlp.imagenet_as_mlp_small,
        as_mlp.imagenet_as_mlp_base,
        cycle_mlp.imagenet_cycle_mlp_b1,
        cycle_mlp.imagenet_cycle_mlp_b2,
        cycle_mlp.imagenet_cycle_mlp_b3,
        cycle_mlp.imagenet_cycle_mlp_b4,
        cycle_mlp.imagenet_cycle_mlp_b5,
        hire_mlp.imagenet_hire_mlp_tiny,
        hire_mlp.imagenet_hire_mlp_small,
        hire_mlp.imagenet_hire_mlp_base,
        hire_mlp.imagenet_hire_mlp_large,
        moco.imagenet_moco_sparse_s,
        moco.imagenet_moco_sparse_b,
        moco.imagenet_moco_sparse_l,
        moco.imagenet_moco_mixer_s,
        moco.imagenet_moco_mixer_b,
        moco.imagenet_moco_mixer_l,
        coco.coco_small_mask_rcnn,
        coco.coco_small_retinanet,
        coco.coco_cycle_mlp_b1_retinanet,
        coco.coco_as_mlp_tiny_mask_rcnn,
        coco.coco_as_mlp_tiny_mask_rcnn_3x,
        coco.coco_as_mlp_small_mask_rcnn,
        coco.coco_as_mlp_small_mask_rcnn_3x,
        coco.coco_as_mlp_tiny_cascade,
        coco.coco_as_mlp_tiny_cascade_3x,
        coco.coco_as_mlp_small_cascade,
        coco.coco_as_mlp_small_cascade_3x,
        coco.coco_as_mlp_base_cascade,
        coco.coco_as_mlp_base_cascade_3x,
        coco.coco_hire_mlp_tiny_mask_rcnn,
        segmentation.ade20k_as_mlp_tiny_upernet,
        segmentation.ade20k_as_mlp_small_upernet,
        segmentation.ade20k_as_mlp_base_upernet,
        segmentation.ade20k_cycle_mlp_b1_fpn,
        segmentation.ade20k_cycle_mlp_b2_fpn,
        segmentation.ade20k_hire_mlp_small_fpn,
        segmentation.ade20k_hire_mlp_small_upernet,
    )
}


def get(name: str, given: Any = None, datasets: tuple[Dataset, Dataset] | None = None) -> Recipe:
    """The recipe of that name, fitted to what was `given` (the recipe with the user's changes) where it fits itself.

    UserError with the nearest names if there is neither a recipe nor a model of that name.
    """
    if not isinstance(name, str):
        raise UserError(f"a recipe is called by its name, a str, not by {name!r}")
    if name in RECIPES:
        function = RECIPES[name]
        values = {"given": given, "datasets": datasets} if given is not None else {}
        return function(**{key: values[key] for key in inspect.signature(function).parameters if key in values})
    if timm.is_model(name):
        check_model_name(name)
        default = ClassifyRecipe(name=name, model=ModelConfig(name), data=DataConfig(pretrained.NOT_GIVEN))
        return own_images.fit_to_images(default, given, datasets) if given is not None else default
    near = difflib.get_close_matches(name, [*RECIPES, *registered_names()], n=3, cutoff=0.4)
    near = near or difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    known = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(RECIPES)}, and the models of timm"
    raise UserError(f"unknown recipe {name!r}; {known}")


def resolve(name: str, change: Callable[[Recipe], Recipe], datasets: tuple[Dataset, Dataset] | None = None) -> Recipe:
    """The recipe of that name with a user's changes; the other fields may depend on these changes.

    `change` applies the changes to a recipe. It is called twice: to learn what the user gave, and for the result.
    """
    recipe = change(get(name, change(get(name)), datasets))
    if name not in RECIPES:
        own_images.describe(recipe)  # type: ignore[arg-type]
    return recipe


def recipe(name: str, /, *, datasets: tuple[Dataset, Dataset] | None = None, **changes: Any) -> Recipe:
    """A recipe by name with other values in some fields: `recipe("cifar10_sparse", train=dict(epochs=2))`.

    What depends on the changed fields follows: one length replaces the other, learning rates follow the batch size. The
    settings of a model, and of recipes that begin with weights, fit the images: those that `data` names, or `datasets`,
    a training and a test set of your own, which are then given to `train` too.
    UserError with the nearest names for an unknown recipe or field, or a wrong value.
    """
    if datasets is not None:
        data = changes.get("data", {})
        changes["data"] = {**(asdict(data) if isinstance(data, DataConfig) else data), "name": OWN_DATASETS}
    return resolve(name, lambda default: override(default, changes), datasets)


__all__ = ["RECIPES", "get", "recipe", "resolve"]
