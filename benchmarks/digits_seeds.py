"""Digits, given longer: Sparse-MLP and the dense Mixer of equal multiply-adds over several seeds, trained alike.

    python benchmarks/digits_seeds.py --json docs/digits_seeds_crops_240.json   # trains what is missing, prints a table
    python benchmarks/digits_seeds.py --epochs 60 --augment plain               # the demo's own recipe instead

Runs lie under runs/digits_seeds and are resumed where they were stopped. The split is fixed (a third for test); a seed
draws the weights, the order, the augmentation and the router's noise. Beside accuracy stand two mean losses (cross
entropy): as it is, which label smoothing keeps high by teaching a model not to be sure, and of logits times one factor
a model, the best for its runs, which takes that out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sparse_mlp import recipes
from sparse_mlp.cli.running import is_finished, train
from sparse_mlp.recipes import Recipe

RECIPES = ("digits_sparse", "digits_mixer")
AUGMENT: dict[str, dict[str, Any]] = {  # with mixup; the demo shifts by one pixel and turns by up to ten degrees
    "crops": {"rotate": 15.0, "pad": 0, "crop_scale": (0.6, 1.0), "crop_ratio": (0.75, 1.33)},
    "mild crops": {"rotate": 15.0, "pad": 0, "crop_scale": (0.75, 1.0), "crop_ratio": (0.85, 1.18)},
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


class Outcome(NamedTuple):
    """Of a finished run, on the images it was evaluated on: logits (N, classes) and target (N,)."""

    logits: torch.Tensor
    target: torch.Tensor

    @property
    def top1(self) -> float:
        return (self.logits.argmax(1) == self.target).double().mean().item()

    def loss(self, factor: float = 1.0) -> float:
        return F.cross_entropy(self.logits * factor, self.target).item()


def finish(recipe: Recipe, folder: Path) -> Outcome:
    """Train what is missing of a run; its outcome."""
    if not is_finished(folder):
        train(recipe, folder, resume=(folder / "config.json").is_file())
    with np.load(folder / "predictions.npz") as predictions:
        return Outcome(torch.from_numpy(predictions["logits"]).double(), torch.from_numpy(predictions["target"]))


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracies and losses of runs trained alike, and their losses with the logits times `factor`."""
    factor = min(np.geomspace(0.5, 8, 100), key=lambda f: np.mean([outcome.loss(f) for outcome in outcomes]))
    return {
        "top1": [outcome.top1 for outcome in outcomes],
        "loss": [outcome.loss() for outcome in outcomes],
        "factor": float(factor),
        "scaled_loss": [outcome.loss(factor) for outcome in outcomes],
    }


def row(name: str, found: dict[str, Any], width: int) -> str:
    top1 = found["top1"]
    spread = np.std(top1, ddof=1) if len(top1) > 1 else 0.0
    losses = f"{np.mean(found['loss']):6.4f} {np.mean(found['scaled_loss']):6.4f}"
    return f"{name:{width}} {np.mean(top1):6.2%} {spread:6.2%}  {losses}   {' '.join(f'{value:.2%}' for value in top1)}"


def head(width: int, runs: str) -> str:
    return f"{'':{width}} {'top-1':>6} {'spread':>6}  {'loss':>6} {'scaled':>6}   top-1 of {runs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: 5")
    parser.add_argument("--first", type=int, default=0, help="the first seed; default: 0")
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
    seeds = range(given.first, given.first + given.seeds)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in given.recipes}
    for seed in seeds:
        for name in given.recipes:
            folder = given.runs / f"{name}-{given.epochs:g}-{given.augment.replace(' ', '_')}-seed{seed}"
            recipe = longer(recipes.get(name), given.epochs, seed, given.threads, given.augment)
            outcomes[name].append(finish(recipe, folder))
    found = {name: summary(of_seeds) for name, of_seeds in outcomes.items()}
    width = max(map(len, found))
    print(head(width, f"seeds {seeds[0]} to {seeds[-1]}"))
    for name, values in found.items():
        print(row(name, values, width))
    if given.json:
        how = {"epochs": given.epochs, "augment": given.augment, "threads": given.threads, "seeds": list(seeds)}
        given.json.write_text(json.dumps(how | {"found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
