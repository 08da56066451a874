"""Does upcycling pay? Small models on CIFAR-10: trained on as they are, with experts, or with experts from the start.

python -m experiments.upcycling run --out runs/upcycling       # trains what is missing, goes on with what was stopped
python -m experiments.upcycling report --out runs/upcycling    # results/cifar10.json and .md, seam.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.runs import finish, is_finished, with_source
from experiments.upcycling.arms import planned_runs
from experiments.upcycling.tables import write_results
from sparse_mlp.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a user's mistake, in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.upcycling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--out", type=Path, default=Path("runs/upcycling"), help="default: runs/upcycling")
    parser.add_argument("--cifar10", metavar="DIR", help="default: $SPARSE_MLP_DATA/cifar10")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="default: beside this program")
    given = parser.parse_args(argv)
    try:
        if given.action == "run":
            train_missing(given.out, given.cifar10)
        else:
            for path in write_results(given.out, given.to):
                print(path)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train_missing(out: Path, cifar10: str | None) -> None:
    """Every run that is not finished, in order; one that was stopped goes on to the bit."""
    for planned in planned_runs():
        folder = out / planned.name
        if is_finished(folder):
            print(f"{planned.name}: finished before", flush=True)
            continue
        recipe = replace(planned.recipe, data=replace(planned.recipe.data, root=cifar10))
        run = finish(with_source(recipe, planned, out), folder)
        print(f"{planned.name}: top-1 {run.metrics['top1']:.2%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
