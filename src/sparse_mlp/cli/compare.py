"""`sparse-mlp compare`: several recipes, one table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from sparse_mlp import distributed, recipes
from sparse_mlp.cli.parse import parse, split_names
from sparse_mlp.cli.running import check_resume, choose_folder, is_finished, train
from sparse_mlp.cli.showing import console, count_macs, count_parameters, table
from sparse_mlp.cli.train import join_model_arguments
from sparse_mlp.engine import check_configs
from sparse_mlp.errors import UserError
from sparse_mlp.recipes import Recipe
from sparse_mlp.report import read_run, write_comparison

_DESCRIPTION = """Train several recipes one after the other and set their results side by side.

    sparse-mlp compare RECIPE RECIPE ... [--out DIR] [--any.field VALUE ...]

Each run goes into DIR/RECIPE. Called again, the command goes on where it was; finished runs are not trained again.

Fields given here change every recipe alike; the defaults shown below are those of the first."""


@dataclass(frozen=True)
class CompareArguments:
    out: Path = Path("runs/compare")
    """Folder of the comparison, with one run folder a recipe in it."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)


def run(arguments: list[str]) -> int:
    names, options = split_names(arguments)
    if not 2 <= len(names) <= 6 and "--help" not in options and "-h" not in options:
        raise UserError(f"compare takes two to six recipes, not {len(names)}; known: {', '.join(recipes.RECIPES)}")
    if len(set(names)) != len(names):
        raise UserError(f"a recipe is named twice: {' '.join(names)}")
    asked: dict[Path, Recipe] = {}
    for name in names or ["digits_sparse"]:
        default = recipes.get(name)
        start = CompareArguments(recipe=default)
        given = parse(CompareArguments, options, prog="compare", description=_DESCRIPTION, default=start)
        recipe = join_model_arguments(given.recipe, default)
        if recipe.name != default.name:
            raise UserError(f"--name {recipe.name} would be ignored: each run is called by its recipe; see --out")
        asked[given.out / name] = replace(recipe, name=name)
    for folder, recipe in asked.items():  # before anything is trained
        if (folder / "config.json").is_file():
            check_resume(folder, recipes.load(folder), recipe)
        else:
            choose_folder(recipe.name, folder, resume=False)
            check_configs(recipe.optim, recipe.schedule, recipe.train)
            recipes.build(recipe)
    progress = console(stderr=True, quiet=not distributed.is_main())
    for folder, recipe in asked.items():
        if is_finished(folder):
            progress.print(f"{folder}: finished before", markup=False, soft_wrap=True)
            continue
        progress.print(f"{folder}: training {recipe.model.name}", markup=False, soft_wrap=True)
        train(recipe, folder, resume=(folder / "config.json").is_file())
    if distributed.is_main():
        _show(list(asked), given.out)
    return 0


def _show(folders: list[Path], out: Path) -> None:
    """The table, and the page and figure with the curves of all runs."""
    shown = table("run", "top-1", "parameters", "mult-adds", "images/s", "busiest expert", numbers=5)
    macs = []
    for folder in folders:
        spec = recipes.load_inputs(folder)
        model = recipes.load_model(recipes.load(folder).model, spec, folder)
        macs.append(count_macs(model, spec.channels, spec.image_size)[""])
        measured = read_run(folder)
        loads = [routing.final_load() for routing in measured.routing.values()]
        busiest = max((float(load.max()) * len(load) for load in loads), default=None)
        shown.add_row(
            folder.name,
            "-" if measured.top1 is None else f"{measured.top1:.2%}",
            f"{count_parameters(model) / 1e6:.2f} M",
            f"{macs[-1] / 1e6:.1f} M",
            "-" if measured.items_per_s is None else f"{measured.items_per_s:,.0f}",
            "dense" if busiest is None else f"{busiest:.2f} x its share",
        )
    page = write_comparison(folders, out, macs)
    console().print(shown)
    console().print(f"comparison: {page}", markup=False, soft_wrap=True)
