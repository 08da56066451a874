"""Digits: choose a recipe without the test images, by five-fold cross-validation on the 1,198 training images.

    python -m experiments.digits.folds --list        # the candidates
    python -m experiments.digits.folds [NAME ...]    # trains what is missing, prints the table
    python -m experiments.digits.folds --finished --json experiments/digits/results/folds.json   # of what is trained

Every candidate is trained on four fifths and evaluated on the fifth left out, as `seeds.py` trains on all; the seed is
the fold. Runs are resumed where they were stopped.

CHOICE are the candidates of a choice that was settled when shifts and crops had been run, and two folds of one sparse
block, before the rest: as many of each model, all five folds, the highest accuracy wins, at a tie the lower scaled
loss. (All others were looked at before, for Sparse-MLP alone or nearly so.)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from experiments.digits.candidates import CANDIDATES, Outcome, candidate, outcome, stem, summary, table
from experiments.runs import is_finished
from sparse_mlp.data import sets

FOLDS = 5
CHOICE = [
    f"{model}, {rest}"
    for model, own in (("mixer", "crops, 8 blocks"), ("sparse", "crops, one sparse block"))
    for rest in ("shifts, as it is", "crops, as it is", "mild crops, as it is", "crops, batch 64", own)
]


def read_fold(fold: int, root: Path, download: bool) -> tuple[sets.Split, sets.Split, list[str]]:
    """The training images of the digits only: four fifths to train, the fold to test."""
    (images, labels), _, classes = sets.read_digits(root, download)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    kept, left_out = list(folds.split(np.zeros(len(labels)), labels))[fold]
    return (images[kept], labels[kept]), (images[left_out], labels[left_out]), classes


def run(name: str, fold: int, epochs: float, folder: Path) -> Outcome:
    digits = replace(sets._ARRAY_SETS["digits"], read=partial(read_fold, fold))
    with mock.patch.dict(sets._ARRAY_SETS, digits=digits):
        return outcome(candidate(name, epochs, seed=fold), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=CHOICE, help="candidates; default: those of the choice")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--finished", action="store_true", help="train nothing, show every candidate that has a fold")
    parser.add_argument("--epochs", type=float, default=120)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_folds"))
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    if unknown := set(given.names) - set(CANDIDATES):
        parser.error(f"no candidates: {', '.join(sorted(unknown))}; --list has them")
    if given.list:
        print("\n".join(CANDIDATES))
        return
    torch.set_num_threads(1)
    found = {}
    for name in CANDIDATES if given.finished else given.names:
        folders = {fold: given.runs / f"{stem(name)}-fold{fold}" for fold in range(FOLDS)}
        folds = [fold for fold, folder in folders.items() if is_finished(folder) or not given.finished]
        if folds:
            outcomes = [run(name, fold, given.epochs, folders[fold]) for fold in folds]
            found[name] = {"folds": folds} | summary(outcomes)
    print(table(found, "top-1 of the folds there are"))
    if given.json:
        given.json.write_text(json.dumps({"epochs": given.epochs, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
