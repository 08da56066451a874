"""Digits: the recipes that `folds.py` chooses from and `seeds.py` runs, and what is measured of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from experiments.runs import finish
from sparse_mlp import recipes
from sparse_mlp.jobs.classify import ClassifyRecipe

# Recipes

AUGMENT: dict[str, dict[str, Any]] = {  # with mixup; the demo shifts by one pixel and turns by up to ten degrees
    "crops": {"rotate": 15.0, "pad": 0, "crop_scale": (0.6, 1.0), "crop_ratio": (0.75, 1.33)},
    "mild crops": {"rotate": 15.0, "pad": 0, "crop_scale": (0.75, 1.0), "crop_ratio": (0.85, 1.18)},
    "strong crops": {"rotate": 20.0, "pad": 0, "crop_scale": (0.5, 1.0), "crop_ratio": (0.67, 1.5)},
    "shifts": {"rotate": 15.0},
}


def arguments(recipe: ClassifyRecipe, **args: object) -> ClassifyRecipe:
    return replace(recipe, model=replace(recipe.model, args=recipe.model.args | args))


def optim(recipe: ClassifyRecipe, **changes: float) -> ClassifyRecipe:
    return replace(recipe, optim=replace(recipe.optim, **changes))


def epochs(recipe: ClassifyRecipe, times: float) -> ClassifyRecipe:
    return replace(recipe, train=replace(recipe.train, epochs=recipe.train.epochs * times))


def batch(recipe: ClassifyRecipe, size: int) -> ClassifyRecipe:
    return replace(recipe, data=replace(recipe.data, batch_size=size))


SHARED: dict[str, Callable[[ClassifyRecipe], ClassifyRecipe]] = {
    "as it is": lambda recipe: recipe,
    "twice as long": partial(epochs, times=2),
    "lr 6e-3": partial(optim, lr=6e-3),
    "weight decay 0.5": partial(optim, weight_decay=0.5),
    "drop path 0.1": partial(arguments, drop_path_rate=0.1),
    "batch 64": partial(batch, size=64),
}
MIXER: dict[str, Callable[[ClassifyRecipe], ClassifyRecipe]] = {  # of as many multiply-adds
    "8 blocks": partial(arguments, num_blocks=8, mlp_ratio=(0.5, 3.33)),
}
ONE_BLOCK = {"sparse_blocks": 1, "mlp_ratio": (0.5, 4.35), "expert_hidden": (128, 256)}
SPARSE: dict[str, Callable[[ClassifyRecipe], ClassifyRecipe]] = {  # likewise
    "noise 0": partial(arguments, noise_std=0.0),
    "noise 1": partial(arguments, noise_std=1.0),
    "K (2, 2), half as wide": partial(arguments, top_k=(2, 2), expert_hidden=(64, 256)),
    "no Re-represent": partial(arguments, rerepresent=False, expert_hidden=(80, 352)),
    "Re-represent of the same size": partial(arguments, rerepresent_scale=(1.0, 1.0), expert_hidden=(64, 296)),
    "experts (4, 4)": partial(arguments, num_experts=(4, 4)),
    "tokens dense": partial(arguments, num_experts=(1, 4)),
    "channels dense": partial(arguments, num_experts=(8, 1), top_k=(1, 1), expert_hidden=(128, 512)),
    "one sparse block": partial(arguments, **ONE_BLOCK),
    "one sparse block, noise 1": partial(arguments, **ONE_BLOCK, noise_std=1.0),
}
CHANGES = {"mixer": SHARED | MIXER, "sparse": SHARED | SPARSE}
CANDIDATES = {  # recipe, augmentation, change
    f"{model}, {augment}, {name}": (f"digits_{model}", augment, change)
    for augment in (*AUGMENT, "plain")
    for model, changes in CHANGES.items()
    for name, change in changes.items()
}


def candidate(name: str, epochs: float, seed: int, threads: int = 1) -> ClassifyRecipe:
    """The demo's recipe for more epochs; unless it is a plain one, varied more, and with averaged weights; changed.

    `epochs` are those of "as it is".
    """
    recipe_name, augment, change = CANDIDATES[name]
    recipe = recipes.get(recipe_name)
    assert isinstance(recipe, ClassifyRecipe)
    train_config = replace(recipe.train, epochs=epochs, seed=seed, threads=threads, eval_every=0, save_every=180)
    if augment != "plain":
        train_config = replace(train_config, ema_decay=0.995, ema_warmup=True)
        varied = replace(recipe.augment, mixup=0.2, mix_probability=0.5, **AUGMENT[augment])
        recipe = replace(recipe, augment=varied)
    return change(replace(recipe, train=train_config))


def stem(name: str) -> str:
    """Of the names of a candidate's run folders."""
    return name.replace(", ", "-").replace(" ", "_")


# Measures


class Outcome(NamedTuple):
    """Of a finished run, on the images it was evaluated on: logits (N, classes) and target (N,)."""

    logits: torch.Tensor
    target: torch.Tensor

    @property
    def top1(self) -> float:
        return (self.logits.argmax(1) == self.target).double().mean().item()

    def loss(self, factor: float = 1.0) -> float:
        return F.cross_entropy(self.logits * factor, self.target).item()


def outcome(recipe: ClassifyRecipe, folder: Path) -> Outcome:
    """Train what is missing of a run; its outcome."""
    run = finish(recipe, folder)
    with np.load(run.path / "predictions.npz") as predictions:
        return Outcome(torch.from_numpy(predictions["logits"]).double(), torch.from_numpy(predictions["target"]))


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracies of runs trained alike and two losses of each: as it is, which label smoothing keeps high by teaching a
    model not to be sure, and with the logits times `factor`, the best for all of these runs, which takes that out."""
    factor = min(np.geomspace(0.5, 8, 100), key=lambda f: np.mean([outcome.loss(f) for outcome in outcomes]))
    return {
        "top1": [outcome.top1 for outcome in outcomes],
        "loss": [outcome.loss() for outcome in outcomes],
        "factor": float(factor),
        "scaled_loss": [outcome.loss(factor) for outcome in outcomes],
    }


def table(found: dict[str, dict[str, Any]], runs: str) -> str:
    """A row for each summary; `runs` says of what its single accuracies are."""
    width = max(map(len, found), default=0)
    rows = [f"{'':{width}} {'top-1':>6} {'spread':>6}  {'loss':>6} {'scaled':>6}   {runs}"]
    for name, values in found.items():
        top1 = values["top1"]
        spread = np.std(top1, ddof=1) if len(top1) > 1 else 0.0
        losses = f"{np.mean(values['loss']):6.4f} {np.mean(values['scaled_loss']):6.4f}"
        each = " ".join(f"{value:.2%}" for value in top1)
        rows.append(f"{name:{width}} {np.mean(top1):6.2%} {spread:6.2%}  {losses}   {each}")
    return "\n".join(rows)
