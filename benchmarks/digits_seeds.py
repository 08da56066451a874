"""Digits, given longer: Sparse-MLP and the dense Mixer of equal multiply-adds over several seeds, trained alike.

    python benchmarks/digits_seeds.py --json docs/digits_seeds_crops_240.json   # trains what is missing, prints a table
    python benchmarks/digits_seeds.py --epochs 60 --augment plain               # the demo's own recipe instead

Runs lie under runs/digits_seeds and are resumed where they were stopped. The split is fixed (a third for test); a seed
draws the weights, the order, the augmentation and the router's noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparse_mlp import recipes
from sparse_mlp.cli.running import is_finished, train
from sparse_mlp.recipes import Recipe
from sparse_mlp.report import read_run

RECIPES = ("digits_sparse", "digits_mixer")
AUGMENT: dict[str, dict[str, Any]] = {  # with mixup; the demo shifts by one pixel and turns by up to ten degrees
    "crops": {"rotate": 15.0, "pad": 0, "crop_scale": (0.6, 1.0), "crop_ratio": (0.75, 1.33)},
    "strong crops": {"rotate": 20.0, "pad": 0, "crop_scale": (0.5, 1.0), "crop_ratio": (0.67, 1.5)},
    "shifts": {"rotate": 15.0},
}


def longer(recipe: Recipe, epochs: float, seed: int, threads: int, augment: str) -> Recipe:
    """The demo's recipe for more epochs; unless `augment` is "plain", varied more, and with averaged weights."""
    train_config = replace(recipe.train, epochs=epochs, seed=seed, threads=threads, eval_every=0, save_every=180)
    if augment == "plain":
        return replace(recipe, train=train_config)
    return replace(
        recipe,
        train=replace(train_config, ema_decay=0.995, ema_warmup=True),
        augment=replace(recipe.augment, mixup=0.2, mix_probability=0.5, **AUGMENT[augment]),
    )


def finish(recipe: Recipe, folder: Path) -> float:
    """Train what is missing of a run; its accuracy."""
    if not is_finished(folder):
        train(recipe, folder, resume=(folder / "config.json").is_file())
    top1 = read_run(folder).top1
    assert top1 is not None, "a finished run was evaluated"
    return top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--augment",
        choices=(*AUGMENT, "plain"),
        default="crops",
        help="default: crops; plain is the demo's own recipe",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_seeds"))
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    accuracy: dict[str, list[float]] = {name: [] for name in given.recipes}
    for seed in range(given.seeds):
        for name in given.recipes:
            folder = given.runs / f"{name}-{given.epochs:g}-{given.augment.replace(' ', '_')}-seed{seed}"
            recipe = longer(recipes.get(name), given.epochs, seed, given.threads, given.augment)
            accuracy[name].append(finish(recipe, folder))
    print(f"{'top-1, %':15} {'mean':>6} {'std':>5}   seeds 0 to {given.seeds - 1}")
    for name, values in accuracy.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.2%}" for value in values)
        print(f"{name:15} {statistics.mean(values):6.2%} {spread * 100:5.2f}   {each}")
    if given.json:
        result = {"epochs": given.epochs, "augment": given.augment, "threads": given.threads, "top1": accuracy}
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
