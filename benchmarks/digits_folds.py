"""Digits: choose a recipe without the test images, by five-fold cross-validation on the 1,198 training images.

    python benchmarks/digits_folds.py --list                             # the candidates
    python benchmarks/digits_folds.py [NAME ...]                         # trains what is missing, prints the table
    python benchmarks/digits_folds.py --finished --json docs/digits_folds.json   # of what is trained already

Every candidate is trained on four fifths and evaluated on the fifth left out, as `digits_seeds.py` trains on all, with
its measures. Runs lie under runs/digits_folds and are resumed where they were stopped.

CHOICE are the candidates of a choice that was settled before its last runs: as many of each model, all five folds, the
highest mean accuracy wins. (All others were looked at before, for Sparse-MLP alone or nearly so.)
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

from digits_seeds import AUGMENT, Outcome, finish, head, longer, row, summary
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


def batch(recipe: Recipe, size: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, batch_size=size))


SHARED: dict[str, Callable[[Recipe], Recipe]] = {
    "as it is": lambda recipe: recipe,
    "twice as long": partial(epochs, times=2),
    "lr 6e-3": partial(optim, lr=6e-3),
    "weight decay 0.5": partial(optim, weight_decay=0.5),
    "drop path 0.1": partial(arguments, drop_path_rate=0.1),
    "batch 64": partial(batch, size=64),
}
ONE_BLOCK = {"sparse_blocks": 1, "mlp_ratio": (0.5, 4.35), "expert_hidden": (128, 256)}
MIXER: dict[str, Callable[[Recipe], Recipe]] = {  # of as many multiply-adds
    "8 blocks": partial(arguments, num_blocks=8, mlp_ratio=(0.5, 3.33)),
}
SPARSE: dict[str, Callable[[Recipe], Recipe]] = {  # likewise
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
    for augment in AUGMENT
    for model, changes in CHANGES.items()
    for name, change in changes.items()
}
CHOICE = [
    f"{model}, {candidate}"
    for model, own in (("mixer", "crops, 8 blocks"), ("sparse", "crops, one sparse block"))
    for candidate in ("shifts, as it is", "crops, as it is", "mild crops, as it is", "crops, batch 64", own)
]


def read_fold(fold: int, root: Path, download: bool) -> tuple[sets.Split, sets.Split, list[str]]:
    """The training images of the digits only: four fifths to train, the fold to test."""
    (images, labels), _, classes = sets.read_digits(root, download)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    kept, left_out = list(folds.split(np.zeros(len(labels)), labels))[fold]
    return (images[kept], labels[kept]), (images[left_out], labels[left_out]), classes


def run(name: str, fold: int, epochs: float, folder: Path) -> Outcome:
    recipe, augment, change = CANDIDATES[name]
    digits = replace(sets._ARRAY_SETS["digits"], read=partial(read_fold, fold))
    with mock.patch.dict(sets._ARRAY_SETS, digits=digits):
        return finish(change(longer(recipes.get(recipe), epochs, fold, 1, augment)), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=CHOICE, help="candidates; default: those of the choice")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--finished", action="store_true", help="train nothing, show every candidate that has a fold")
    parser.add_argument("--epochs", type=float, default=120)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_folds"))
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    if given.list:
        print("\n".join(CANDIDATES))
        return
    torch.set_num_threads(1)
    found = {}
    width = max(map(len, CANDIDATES))
    for name in CANDIDATES if given.finished else given.names:
        stem = name.replace(", ", "-").replace(" ", "_")
        folders = {fold: given.runs / f"{stem}-fold{fold}" for fold in range(FOLDS)}
        folds = [fold for fold, folder in folders.items() if is_finished(folder) or not given.finished]
        if folds:
            outcomes = [run(name, fold, given.epochs, folders[fold]) for fold in folds]
            found[name] = {"folds": folds} | summary(outcomes)
    print(head(width, "the folds there are, 0 first"))
    for name, values in found.items():
        print(row(name, values, width))
    if given.json:
        given.json.write_text(json.dumps({"epochs": given.epochs, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
