"""Digits: choose a recipe without the test images, by five-fold cross-validation on the 1,198 training images.

    python benchmarks/digits_folds.py --list                             # the candidates
    python benchmarks/digits_folds.py [NAME ...]                         # trains what is missing, prints the table
    python benchmarks/digits_folds.py --finished --json docs/digits_folds.json   # of what is trained already

Every candidate is trained on four fifths and evaluated on the fifth left out, as `digits_seeds.py` trains on all. Runs
lie under runs/digits_folds and are resumed where they were stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from digits_seeds import AUGMENT, finish, longer
from sparse_mlp import recipes
from sparse_mlp.cli.running import is_finished
from sparse_mlp.data import sets
from sparse_mlp.recipes import Recipe

FOLDS = 5


def arguments(recipe: Recipe, **args: object) -> Recipe:
    return replace(recipe, model=replace(recipe.model, args=recipe.model.args | args))


def optim(recipe: Recipe, **changes: float) -> Recipe:
    return replace(recipe, optim=replace(recipe.optim, **changes))


def epochs(recipe: Recipe, times: float) -> Recipe:
    return replace(recipe, train=replace(recipe.train, epochs=recipe.train.epochs * times))


SHARED: dict[str, Callable[[Recipe], Recipe]] = {
    "as it is": lambda recipe: recipe,
    "twice as long": partial(epochs, times=2),
    "lr 6e-3": partial(optim, lr=6e-3),
    "weight decay 0.5": partial(optim, weight_decay=0.5),
    "drop path 0.1": partial(arguments, drop_path_rate=0.1),
}
ONE_BLOCK = {"sparse_blocks": 1, "mlp_ratio": (0.5, 4.35), "expert_hidden": (128, 256)}
SPARSE: dict[str, Callable[[Recipe], Recipe]] = {  # of as many multiply-adds
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
CHANGES = {"mixer": SHARED, "sparse": SHARED | SPARSE}
CANDIDATES = {  # recipe, augmentation, change
    f"{model}, {augment}, {name}": (f"digits_{model}", augment, change)
    for augment in AUGMENT
    for model, changes in CHANGES.items()
    for name, change in changes.items()
}


def read_fold(fold: int, root: Path, download: bool) -> tuple[sets.Split, sets.Split, list[str]]:
    """The training images of the digits only: four fifths to train, the fold to test."""
    (images, labels), _, classes = sets.read_digits(root, download)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    kept, left_out = list(folds.split(np.zeros(len(labels)), labels))[fold]
    return (images[kept], labels[kept]), (images[left_out], labels[left_out]), classes


def run(name: str, fold: int, epochs: float, folder: Path) -> float:
    recipe, augment, change = CANDIDATES[name]
    digits = replace(sets._ARRAY_SETS["digits"], read=partial(read_fold, fold))
    with mock.patch.dict(sets._ARRAY_SETS, digits=digits):
        return finish(change(longer(recipes.get(recipe), epochs, fold, 1, augment)), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="candidates; default: all")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--finished", action="store_true", help="train nothing")
    parser.add_argument("--epochs", type=float, default=120)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_folds"))
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    if given.list:
        print("\n".join(CANDIDATES))
        return
    torch.set_num_threads(1)
    result: dict[str, dict[int, float]] = {}
    for name in given.names or CANDIDATES:
        for fold in range(FOLDS):
            stem = name.replace(", ", "-").replace(" ", "_")
            folder = given.runs / f"{stem}-fold{fold}"
            if is_finished(folder) or not given.finished:
                result.setdefault(name, {})[fold] = run(name, fold, given.epochs, folder)
    print(f"{'top-1, %':42} {'mean':>6}   folds 0 to {FOLDS - 1}")
    for name, found in result.items():
        each = " ".join(f"{found[fold]:.2%}" if fold in found else "   -  " for fold in range(FOLDS))
        print(f"{name:42} {np.mean(list(found.values())):6.2%}   {each}")
    if given.json:
        given.json.write_text(json.dumps({"epochs": given.epochs, "top1": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
