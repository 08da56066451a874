"""What probe, finetune and transfer share: a recipe that begins with the weights of SOURCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_mlp import recipes
from sparse_mlp.cli.parse import option, parse
from sparse_mlp.cli.train import join_model_arguments
from sparse_mlp.data import DataConfig
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import ModelConfig, Recipe

SOURCES = """SOURCE is a run folder, pre-training or supervised, or a file of weights (.safetensors, .pth, a checkpoint
of MoCo v3's own code); a file needs --model.name and --data.name. What does not fit is an error that lists names."""

AFTERWARDS = """Learning rates follow --data.batch-size in proportion, unless --optim.lr is given. The run is a run like
any other: sparse-mlp train --resume RUN goes on with it."""

_REGULAR = ("drop_rate", "proj_drop_rate", "drop_path_rate")  # of a recipe's model: what no weight depends on
_RATES = ("lr", "warmup_lr", "min_lr")


def recipe_from(
    source: str, recipe: Recipe, options: Sequence[str], kind: Any, *, own_data: bool, prog: str, description: str
) -> Any:
    """The arguments `kind` of a command, whose `recipe` begins with the weights of `source`.

    `own_data`: where a run folder was trained on, unless another set is named. ValueError or FileNotFoundError for a
    source that is none, or that does not say enough.
    """
    default = _begin_with(source, recipe, options, own_data) if source else recipe
    given = parse(kind, options, prog=prog, description=description, default=kind(recipe=default))
    if not source:
        raise UserError(f"which SOURCE? {prog} takes a run folder or a file of weights")
    if given.recipe.model.weights != default.model.weights or given.recipe.model.pretrained:
        raise UserError(f"--model.weights and --model.pretrained do not go with SOURCE {source}, which has its own")
    made = join_model_arguments(given.recipe, default)
    return replace(given, recipe=made if option(options, "optim.lr") else _scale_rates(made, default))


def _begin_with(source: str, recipe: Recipe, options: Sequence[str], own_data: bool) -> Recipe:
    path, name, data = Path(source), option(options, "model.name"), option(options, "data.name")
    regular = {name: value for name, value in recipe.model.args.items() if name in _REGULAR}
    if path.is_dir():
        stored = recipes.load_model_config(path)
        model = replace(stored, args={**stored.args, **regular}, pretrained=False)
        if own_data and data is None:
            recipe = replace(recipe, data=_images_of(path, recipe.data))
    elif path.is_file():
        if name is None:
            raise UserError(f"which model are the weights in {source} of? --model.name NAME")
        if own_data and data is None:
            raise UserError(f"on which images? {source} is a file of weights and does not tell: --data.name SET")
        model = ModelConfig(name, regular)
    else:
        raise FileNotFoundError(f"there is no run folder and no file of weights {source}")
    return replace(recipe, model=replace(model, weights=str(path.resolve())))


def _images_of(run: Path, wanted: DataConfig) -> DataConfig:
    stored = recipes.load_data_config(run)
    return replace(stored, batch_size=wanted.batch_size, eval_batch_size=wanted.eval_batch_size)


def _scale_rates(recipe: Recipe, default: Recipe) -> Recipe:
    """Learning rates that nobody changed, in proportion to the batch size."""
    factor = recipe.data.batch_size / default.data.batch_size

    def scaled(part: Any, before: Any) -> Any:
        rates = {name: getattr(before, name, None) for name in _RATES}
        return replace(part, **{n: rate * factor for n, rate in rates.items() if rate and getattr(part, n) == rate})

    optim, schedule = scaled(recipe.optim, default.optim), scaled(recipe.schedule, default.schedule)
    return replace(recipe, optim=optim, schedule=schedule)
