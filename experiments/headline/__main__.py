"""The headline experiment on CIFAR-10: Sparse-MLP against dense Mixers of equal multiply-adds and of equal parameters.

python -m experiments.headline run                         # trains what is missing, goes on with what was stopped
python -m experiments.headline run supervised --seeds 1    # one part, one seed
python -m experiments.headline report                      # tables and figures from the finished runs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.headline.arms import PARTS, HeadlineRecipe, headline_runs
from experiments.headline.study import Arm, arm_results, study_figure, study_table
from experiments.runs import NamedRun, finish, is_finished, with_source
from sparse_mlp.errors import UserError
from sparse_mlp.jobs import Run, summarize
from sparse_mlp.report import read_run

HEADINGS = {
    "supervised": "CIFAR-10, supervised from scratch",
    "linear": "CIFAR-10, MoCo v3, then a linear probe",
    "knn": "CIFAR-10, MoCo v3, then the 20 nearest neighbours",
    "finetune": "CIFAR-10, MoCo v3, then fine-tuned",
    "transfer": "A class-balanced fifth of CIFAR-100, MoCo v3 on CIFAR-10, then fine-tuned",
    "ablations": "CIFAR-10, one change to the sparse model at a time",
}
FIGURES = {
    "supervised": ("top1", "top-1 accuracy on the test images, %"),
    "pretrain": ("knn_top1", "kNN accuracy on the test images, %"),
}

# Forward passes an image costs in a step, the backward pass two: two views of the online encoder with a backward pass
# and two of the momentum encoder without; a frozen backbone one; the kNN has no steps.
PASSES = {"pretrain": 2 * (3 + 1), "linear": 1.0, "knn": 0.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after a user's mistake, in one line."""
    given = _parser().parse_args(argv)
    try:
        if given.action == "run":
            train_missing(given)
        else:
            write_results(given.out, given.to)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.headline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="train what is missing; a run that was stopped goes on to the bit")
    run.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    run.add_argument("--seeds", type=int, default=3, help="of each model; the ablations have one. Default: 3")
    run.add_argument("--cifar10", metavar="DIR", help="default: $SPARSE_MLP_DATA/cifar10, fetched if missing")
    run.add_argument("--cifar100-fifth", metavar="DIR", help="image folder that experiments/data writes; for transfer")
    report = actions.add_parser("report", help="write results.json, results.md and the figures")
    report.add_argument("--to", type=Path, default=Path(__file__).parent, help="default: beside this program")
    for action in (run, report):
        action.add_argument("--out", type=Path, default=Path("runs/headline"), help="default: runs/headline")
    return parser


def train_missing(given: argparse.Namespace) -> None:
    """Every run of the named parts that is not finished, in order."""
    for planned in headline_runs(tuple(given.parts) or PARTS, given.seeds):
        folder = given.out / planned.name
        if is_finished(folder):
            print(f"{folder}: finished before", flush=True)
            continue
        recipe = _with_inputs(planned, given)
        begun = (folder / "config.json").is_file()
        print(f"{folder}: {'going on' if begun else 'training'}", flush=True)
        finish(recipe, folder)


def _with_inputs(planned: NamedRun[HeadlineRecipe], given: argparse.Namespace) -> HeadlineRecipe:
    """The run's recipe with its images and the weights it begins with."""
    recipe = planned.recipe
    root = {"cifar10": given.cifar10, "folder": given.cifar100_fifth}.get(recipe.data.name)
    if root is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=root))
    return with_source(recipe, planned, given.out)


def write_results(out: Path, target: Path) -> None:
    """results.json, results.md and the figures of the finished runs. FileNotFoundError if there are none."""
    studies = {part: _arms(part, out) for part in HEADINGS | FIGURES}
    studies = {part: found for part, found in studies.items() if any(arm.runs for arm in found[0])}
    if not studies:
        raise FileNotFoundError(f"there is no finished run of the headline experiment in {out}")
    target.mkdir(parents=True, exist_ok=True)
    written = [target / "results.json", target / "results.md"]
    results: dict[str, Any] = {
        part: {arm.name: arm_results(arm) for arm in arms if arm.runs} for part, (arms, _) in studies.items()
    }
    written[0].write_text(json.dumps(results, indent=1) + "\n")
    sections = [f"## {HEADINGS[part]}\n\n{study_table(*studies[part])}" for part in HEADINGS if part in studies]
    written[1].write_text("<!-- Written by `python -m experiments.headline report` -->\n\n" + "\n".join(sections))
    for part, (metric, label) in FIGURES.items():
        if part in studies:
            written.append(target / f"{part}.png")
            study_figure(studies[part][0], metric, label).savefig(written[-1], dpi=160)
    for path in written:
        print(path)


def _arms(part: str, out: Path) -> tuple[list[Arm], int]:
    """The models of a part with their finished runs, and how many runs each was to have."""
    planned = list(headline_runs((part,)))
    arms = []
    for name in dict.fromkeys(entry.arm for entry in planned):
        mine = [entry for entry in planned if entry.arm == name and is_finished(out / entry.name)]
        arms.append(_arm(name, part, mine, out) if mine else Arm(name, 0, 0, []))
    return arms, len({entry.seed for entry in planned})


def _arm(name: str, part: str, finished: Sequence[NamedRun], out: Path) -> Arm:
    runs = [Run(out / entry.name) for entry in finished]
    # A kNN leaves no weights of its own.
    costs = summarize(Run(out / finished[0].source) if part == "knn" and finished[0].source else runs[0])
    assert costs.macs is not None and costs.parameters is not None
    before = 0.0
    if finished[0].source is not None:
        before = Arm(name, costs.macs, 0, [read_run(out / finished[0].source)], passes=PASSES["pretrain"]).spent
    metric = "knn_top1" if part == "pretrain" else "top1"
    return Arm(
        name,
        costs.macs,
        costs.parameters,
        [read_run(run.path) for run in runs],
        [run.metrics[metric] for run in runs],
        passes=PASSES.get(part, 3.0),
        before=before,
    )


if __name__ == "__main__":
    sys.exit(main())
