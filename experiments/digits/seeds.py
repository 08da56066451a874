"""Digits, given longer: Sparse-MLP and the dense Mixer of equal multiply-adds over several seeds, on the test images.

    python -m experiments.digits.seeds NAME [NAME ...]         # trains what is missing, prints accuracies and losses
    python -m experiments.digits.seeds --epochs 60 "sparse, plain, as it is"          # the demo's own recipe

The names are those of `folds.py --list`. Runs are resumed where they were stopped. The split is fixed (a third for
test); a seed draws the weights, the order, the augmentation and the router's noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from experiments.digits.candidates import CANDIDATES, Outcome, candidate, outcome, stem, summary, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=CANDIDATES)
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: 5")
    parser.add_argument("--first", type=int, default=0, help="the first of them; default: 0")
    parser.add_argument("--epochs", type=float, default=240)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_seeds"))
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seeds = range(given.first, given.first + given.seeds)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in given.names}
    for seed in seeds:
        for name in given.names:
            folder = given.runs / f"{stem(name)}-{given.epochs:g}-seed{seed}"
            outcomes[name].append(outcome(candidate(name, given.epochs, seed, given.threads), folder))
    found = {name: summary(of_seeds) for name, of_seeds in outcomes.items()}
    print(table(found, f"top-1 of seeds {seeds[0]} to {seeds[-1]}"))
    if given.json:
        how = {"epochs": given.epochs, "threads": given.threads, "seeds": list(seeds)}
        given.json.write_text(json.dumps(how | {"found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
